"""What kernels ask for as workspace, told from shapes alone: it does not grow with the tokens, the
context or the table."""

from __future__ import annotations

import math

import pytest
import torch

import transom
from transom import config
from transom.abi import plugin
from transom.abi.frame import Frame
from transom.abi.library import interface
from transom.conformance.calls import describe
from transom.weights.layout import contiguous

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZES = {"T", "S", "Sq", "N", "M", "V", "rows"}
"""Dims of tokens, context and tables; N of a weight is a width."""


def row_of_a_table(d):
    """The n-grams sorted by row, as long as their sums have one order."""
    return 8 * d["B"] * d["S"] * (d["n"] - 1) * d["h"]


def sums_of_keys(d):
    """The gradients of entries and local keys in float32, until they are rounded."""
    return 4 * d["B"] * (d["N"] + d.get("M", 0)) * d["D"]


def sums_of_indexer_keys(d):
    """The same of one batch."""
    return 4 * d["N"] * d["D"]


def order_of_slots(d):
    """The slots by expert, int32."""
    return 4 * math.prod(d["T"] if isinstance(d["T"], tuple) else (d["T"],)) * d["K"]


GROWING = {
    "hashed_embedding_backward": row_of_a_table,
    "hashed_embedding_backward_rows": row_of_a_table,
    "lightning_indexer_kl_backward": sums_of_indexer_keys,
    "moe_experts_backward_experts": order_of_slots,
    "sparse_attention_backward": sums_of_keys,
}
"""Gradients that keep something for each row: how many bytes."""


def entries():
    if REASON is not None:
        return []
    from transom.backends.native import library

    return sorted(library().entries, key=lambda entry: entry.op)


def enlarged(family, example, factor):
    sizes = SIZES - {"N"} if family == "moe" else SIZES
    return {
        name: size
        if name not in sizes
        else tuple(factor * n for n in size)
        if isinstance(size, tuple)
        else factor * size
        for name, size in example.items()
    }


def asked(entry, dims, dtype=torch.bfloat16):
    """Bytes that a call of these dims asks for; no tensor is made."""
    op, ffi = transom.ops()[entry.op], interface()
    if entry.pointer.workspace == ffi.NULL:
        return 0
    facts = describe(op, {}, dtype, example=dims).facts("cpu", "")
    values = [
        facts.arguments[p.name] if p.role == "value" else plugin._assumed(op, p.name, facts)
        for p in op.parameters
    ]
    made = () if op.mutates else op.outputs({**facts.arguments, **facts.dims}, facts.dtypes)
    outputs = [contiguous(shape, kind) for shape, kind in made]
    frame = Frame(op, values, outputs, ("cpu", 0), False)
    frame.call.workspace_limit = config.workspace_bytes()
    return int(entry.pointer.workspace(frame.call))


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.op)
def test_workspace_does_not_grow_with_tokens_context_and_tables(entry):
    op, found = transom.ops()[entry.op], 0
    for example in op.examples:
        large, larger = (enlarged(op.family, example, 1 << bits) for bits in (12, 15))
        try:
            before, after = asked(entry, large), asked(entry, larger)
        except ValueError:  # dims that must be equal, or a list for each of so many blocks
            continue
        found += 1
        if entry.op in GROWING:
            after -= GROWING[entry.op](larger)
        assert after <= max(before, config.workspace_bytes())
    assert found
