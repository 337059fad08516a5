"""Arguments that contradict each other, have no memory or no measure: refused before a kernel runs.

Every operator is asked, with every argument of the kind.
"""

from __future__ import annotations

import time

import pytest
import torch

import transom
from transom.conformance.cases import build
from transom.kernels import _bounds as bounds
from transom.plugins import load
from transom.weights import QuantizedWeight, weight_args

OPS = dict(sorted(transom.ops().items()))
WEIGHTS = [(op.name, p.name) for op in OPS.values() for p in op.parameters if p.role == "weight"]
TENSORS = [(op.name, p.name) for op in OPS.values() for p in op.parameters if p.role != "value"]


def example(op, **arguments):
    """{argument: value} of the operator's first example, which is small."""
    case = build(op, op.examples[0])
    return {p.name: v for p, v in zip(op.parameters, case.values, strict=True)} | arguments


def flat(op, arguments):
    """The arguments of the torch operator."""
    values = []
    for p in op.parameters:
        value = arguments[p.name]
        if p.role != "weight":
            values.append(value)
        elif value is None:
            values += [None, None, None, ""]
        else:
            values += weight_args(value)
    return values


def call_torch_op(op, arguments):
    """torch.ops.transom.<op>(...)"""
    return getattr(torch.ops.transom, op.name)(*flat(op, arguments))


# Parts of a quantised weight -------------------------------------------------------------------

SPEC = r"expected <format>:<rows>x<columns> with a format of int8, int4, fp8, mxfp4"
MISFITS = {
    "scales of another shape": (
        lambda q: {"scales": torch.rand((1,) * q.scales.ndim)},
        r"scales have shape .*; int8 weight \[.*\] in groups of 1x32 needs \[",
    ),
    "scales of another dtype": (
        lambda q: {"scales": q.scales.double()},
        r"scales are float64; int8 expects float32",
    ),
    "values of another dtype": (
        lambda q: {"values": q.values.to(torch.uint8)},
        r"values are uint8; int8 expects int8",
    ),
    "zero points": (
        lambda q: {"zeros": torch.zeros(q.scales.shape, dtype=torch.uint8)},
        r"zeros are given; int8 has none",
    ),
    "another format's spec": (
        lambda q: {"spec": "int4:1x32"},
        r"zeros are missing; int4 has a zero point for each group",
    ),
    "a larger group": (lambda q: {"spec": "int8:1x64"}, r"scales have shape"),
    "a group of mxfp4": (
        lambda q: {"spec": "mxfp4:1x64"},
        r"spec is 'mxfp4:1x64'; mxfp4 has one scale for each 1x32",
    ),
    "no group": (lambda q: {"spec": "int8"}, r"spec is 'int8'; " + SPEC),
    "a negative group": (lambda q: {"spec": "int8:1x-32"}, r"spec is 'int8:1x-32'; " + SPEC),
    "a group beyond 64 bits": (lambda q: {"spec": "int8:1x" + "9" * 30}, SPEC),
    "a long spec": (lambda q: {"spec": "x" * 5000}, r"spec is 'x{60}'; " + SPEC),
    "an unknown format": (lambda q: {"spec": "int9:1x32"}, r"spec is 'int9:1x32'; " + SPEC),
}


def quantised(op, name):
    """The example with an int8 weight in groups of 32 as argument `name`."""
    dims = {"K": 64, "D": 64, "d": 64, "N": 64, "I": 64}
    dims = {symbol: size for symbol, size in dims.items() if symbol in op.examples[0]}
    arguments = build(op, {**op.examples[0], **dims}).values
    arguments = {p.name: v for p, v in zip(op.parameters, arguments, strict=True)}
    plain = arguments[name]
    if isinstance(plain, QuantizedWeight):
        plain = plain.dequantize()
    return {**arguments, name: transom.quantize(plain.float(), "int8", group=32)}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("op, name", WEIGHTS)
def test_parts_of_a_weight_that_do_not_fit_are_refused_by_the_torch_operator(op, name, misfit):
    op = OPS[op]
    arguments = quantised(op, name)
    change, text = MISFITS[misfit]
    weight = arguments[name]
    stored = dict(zip(("values", "scales", "zeros", "spec"), weight_args(weight), strict=True))
    at = sum(4 if p.role == "weight" else 1 for p in op.parameters[: op.position[name]])
    values = flat(op, arguments)
    values[at : at + 4] = (stored | change(weight)).values()
    with pytest.raises((ValueError, TypeError), match=rf"^{op.name}: {name}'s .*{text}"):
        getattr(torch.ops.transom, op.name)(*values)
    call_torch_op(op, arguments)  # the same weight, as it is


@pytest.mark.parametrize("op, name", WEIGHTS)
def test_a_weight_whose_scales_were_exchanged_is_refused(op, name):
    """After a call with the weight as it was made, whose plan must not serve this one."""
    op = OPS[op]
    arguments = quantised(op, name)
    op.call(**arguments)
    arguments[name].scales = torch.rand((1,) * arguments[name].scales.ndim)
    with pytest.raises(ValueError, match=rf"^{op.name}: {name}'s scales have shape"):
        op.call(**arguments)


@pytest.mark.parametrize(
    "scales, spec, text",
    [
        (None, "int8:1x32", "has the spec 'int8:1x32' and no scales; expected both or neither"),
        (torch.ones(1, 1, 1), "", "has scales or zeros and no spec; expected both or neither"),
    ],
)
def test_a_weight_has_scales_and_a_spec_or_neither(scales, spec, text):
    x, weight, ends = torch.ones(2, 32), torch.ones(1, 3, 32), torch.tensor([2])
    with pytest.raises(ValueError, match=f"^grouped_gemm: weight {text}"):
        torch.ops.transom.grouped_gemm(x, weight, scales, None, spec, ends)


# Memory ----------------------------------------------------------------------------------------


def without_memory(tensor):
    """A copy of it, whose storage is then resized to 0 (as FSDP does to parameters)."""
    copy = tensor.detach().clone()
    copy.untyped_storage().resize_(0)
    return copy


@pytest.mark.parametrize("op, name", TENSORS)
def test_a_tensor_whose_storage_was_freed_is_refused(op, name):
    """By every road: past torch's dispatcher, through it, and by the composite."""
    op = OPS[op]
    arguments = example(op)
    value = arguments[name]
    if value is None:
        pytest.skip("not in the example")
    plain = value.dequantize() if isinstance(value, QuantizedWeight) else value
    arguments[name] = without_memory(plain)
    text = rf"^{op.name}: {name} has {plain.numel()} elements and no memory; expected a storage"
    with pytest.raises(ValueError, match=text):
        op.call(**arguments)
    with pytest.raises(ValueError, match=text):
        call_torch_op(op, arguments)
    with transom.use("composite"), pytest.raises(ValueError, match=text):
        op.call(**arguments)


@pytest.mark.parametrize("part", ["values", "scales"])
@pytest.mark.parametrize("op, name", WEIGHTS)
def test_a_part_of_a_weight_whose_storage_was_freed_is_refused(op, name, part):
    op = OPS[op]
    arguments = quantised(op, name)
    setattr(arguments[name], part, without_memory(getattr(arguments[name], part)))
    with pytest.raises(ValueError, match=rf"^{op.name}: {name} has .* and no memory"):
        op.call(**arguments)


@pytest.mark.parametrize("op, name", TENSORS)
def test_a_zero_tensor_of_forward_differentiation_counts_as_zeros(op, name):
    op = OPS[op]
    arguments = example(op)
    value = arguments[name]
    if value is None or name in op.mutates or isinstance(value, QuantizedWeight):
        pytest.skip("not a plain tensor of the example that is only read")

    def outcome(tensor):
        try:
            result = op.call(**{**arguments, name: tensor})
        except ValueError as error:  # moduli of 0
            return str(error)
        return result if isinstance(result, tuple) else (result,)

    seen = outcome(torch._efficientzerotensor(value.shape, dtype=value.dtype))
    expected = outcome(torch.zeros_like(value))
    if isinstance(expected, str):
        assert seen == expected
    else:  # torch writes the zeros with strides of 0, which may be for another implementation
        torch.testing.assert_close(seen, expected, equal_nan=True)


# Sizes and numbers -----------------------------------------------------------------------------

MOST = {
    "iterations": bounds.ITERATIONS,
    "top_k": bounds.TOP_K,
    "block_size": bounds.BLOCK,
    "dilation": bounds.DILATION,
    "window": bounds.WINDOW,
    "group": bounds.BLOCK,
    "columns": bounds.BLOCK,
}
OTHERS = {
    # Bounded by shapes: k by E, groups by E, pending by m, v_dim by D; a row count that is no
    # size of anything; bytes of a row, which are one of two; an id.
    *("k", "groups", "top_groups", "pending", "v_dim", "row_bytes", "pad"),
    # `rows` is a side of a block in quant, a table's in engram, where an output has as many.
    "rows",
}
NUMBERS = [(op.name, p.name) for op in OPS.values() for p in op.parameters if p.type == "int"]


def test_every_integer_argument_has_a_stated_bound():
    assert {name for _, name in NUMBERS} == {*MOST, *OTHERS}


@pytest.mark.parametrize("number", [2**31, 2**53, 2**62, 2**63 - 1, -(2**31), -(2**63)])
@pytest.mark.parametrize("op, name", NUMBERS)
def test_an_integer_beyond_its_bound_is_refused(op, name, number):
    op = OPS[op]
    if name == "pad" and number >= 0 or name == "rows" and 0 <= number <= bounds.ROWS:
        pytest.skip("an id; the rows of a large table")
    with pytest.raises(ValueError, match=f"^{op.name}: ") as refused:
        op.call(**{**example(op), name: number})
    assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)


def at_its_bound(op, name):
    """The example with `name` at its bound, and what else follows from it: the rows of a
    convolution's state, the scales of groups."""
    arguments = {**example(op), name: MOST[name]}
    if op.name.startswith("dequantize"):
        rest = {k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)}
        parts = OPS[op.name[2:]].call(torch.randn(2, 9, 64), **rest)
        parts = zip(("values", "scales", "zeros"), parts, strict=False)
        return {**arguments, **{k: v for k, v in parts if k in arguments}}
    if name == "dilation":
        rows = (arguments["weight"].shape[1] - 1) * MOST[name]
        for state in {"state", "dnew_state"} & arguments.keys():
            given = arguments[state]
            arguments[state] = given.new_zeros(given.shape[0], rows, given.shape[2])
    return arguments


@pytest.mark.parametrize(
    "impl", ["native", "composite", pytest.param("numba", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("op, name", [each for each in NUMBERS if each[1] in MOST])
def test_a_small_call_at_the_bound_of_an_integer_ends_within_a_second(op, name, impl):
    op = OPS[op]
    load(op, "cpu")
    if impl not in op.impls:
        pytest.skip(f"{op.name} has no {impl}")
    with transom.use(impl):
        op.call(**example(op))  # what is compiled at the first call is compiled
        arguments = at_its_bound(op, name)
        start = time.process_time()
        op.call(**arguments)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("shape", [(2**40, 4, 0), (0, 4, 2**60)])
def test_a_tensor_without_elements_has_sizes_that_can_be_counted(shape):
    x = torch.empty(1, 4, 1).as_strided(shape, (0, 0, 0))
    text = rf"^engram_gate: x has shape \[.*\] without elements; sizes may be at most {2**24}$"
    value, weight = x[:, 0], x.as_strided((4, shape[2]), (0, 0))
    with pytest.raises(ValueError, match=text):
        transom.engram_gate(x, x, value, weight, eps=1e-6)


def test_a_tensor_of_more_elements_than_can_be_counted_is_refused():
    x = torch.zeros(1, 1).expand(2**30, 2**30)
    weight, ends = torch.zeros(1, 1, 1).expand(1, 1, 2**30), torch.tensor([2**30])
    text = r"^grouped_gemm: x has shape \[1073741824, 1073741824\]; supported: 2\^48 elements$"
    with pytest.raises(ValueError, match=text):
        transom.grouped_gemm(x, weight, ends)


def test_a_call_without_results_ends_at_once_however_long_its_inputs_are():
    x, value, weight = (torch.empty(s) for s in ((2**24, 4, 0), (2**24, 0), (4, 0)))
    start = time.process_time()
    y = transom.engram_gate(x, x, value, weight, eps=1e-6)
    assert y.shape == x.shape and time.process_time() - start < 0.5
