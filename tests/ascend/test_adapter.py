"""The adapter to the vendor's operators: its calls bind to their schemas, its numbers agree."""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import transom
from transom.backends import ascend
from transom.backends.ascend import _schemas
from transom.conformance import agree, cases
from transom.tolerance import as_tuple

CHIP = "ascend950pr_9589"

# (operator, its backend module, dims, dtype): within the vendor's limits
CALLS = [
    ("grouped_gemm", "moe.grouped_gemm", dict(M=24, K=40, N=48, E=4), "bfloat16"),
    ("grouped_gemm", "moe.grouped_gemm", dict(M=7, K=40, N=48, E=1), "float32"),
    ("grouped_gemm_backward_x", "moe.grouped_gemm", dict(M=24, K=40, N=48, E=4), "float16"),
    ("moe_experts", "moe.moe_experts", dict(T=6, D=40, I=20, E=4, K=2), "float32"),
    ("route", "moe.route", dict(T=6, E=16, k=4, score="softmax"), "float32"),
    ("route", "moe.route", dict(T=6, E=16, k=4, score="softmax", renormalize=False), "bfloat16"),
    (
        "route",
        "moe.route",
        dict(T=6, E=16, k=4, score="sigmoid", groups=4, top_groups=2, scale=2.5),
        "float32",
    ),
    (
        "lightning_indexer",
        "attention.lightning_indexer",
        dict(B=2, S=3, N=48, H=64, D=128, top_k=20),
        "bfloat16",
    ),
    (
        "sparse_attention",
        "attention.sparse_attention",
        dict(B=2, S=5, H=4, D=576, N=20, L=6, v_dim=512, scale=576**-0.5),
        "bfloat16",
    ),
    ("sinkhorn", "mhc.sinkhorn", dict(T=(3,), R=4, iterations=20, eps=1e-6), "float32"),
    (
        "mhc_pre",
        "mhc.mhc_pre",
        dict(T=(2, 3), R=4, D=64, iterations=20, eps=1e-6, rms_eps=1e-6, post_scale=2.0),
        "bfloat16",
    ),
    ("mhc_post", "mhc.mhc_post", dict(T=(3,), R=4, D=64), "float16"),
]
LEFT_OUT = {
    "sparse_attention": {"visible", "local_kv", "sink", "local_valid"},
    "moe_experts": {"gate_up_bias", "down_bias"},
    "route": {"preset", "mask"},
}


def ids_of(value):
    return value if isinstance(value, str) and "." not in value else None


def implementation(op, module):
    """The adapter's Impl, registered though no device is here."""
    for twin in transom.ops().values():  # a module may hold several operators
        kept = twin.impls.get("ascend")
        if twin.path == op.path and kept is not None and kept.unavailable:
            del twin.impls["ascend"]
    importlib.import_module(f"transom.backends.ascend.{module}")
    return op.impls["ascend"]


def within_limits(name, dims, dtype):
    """The call; an indexer's weights in the dtype of q, as the vendor wants them."""
    op = transom.ops()[name]
    case = cases.build(op, dims, getattr(torch, dtype), seed=3, absent=LEFT_OUT.get(name, set()))
    if name == "lightning_indexer":
        q, k, weights, *rest = case.values
        case = replace(case, values=(q, k, weights.to(q.dtype), *rest))
    return case


def reasons(impl, case):
    facts = transom.dispatch.facts_of(case.op, case.values)
    return [
        why
        for r in impl.requires
        if (why := r(replace(facts, device="npu", arch=CHIP))) is not None
    ]


@pytest.mark.parametrize("name, module, dims, dtype", CALLS, ids=ids_of)
def test_numbers_agree_when_references_play_the_vendor(vendor, name, module, dims, dtype):
    op = transom.ops()[name]
    impl = implementation(op, module)
    case = within_limits(name, dims, dtype)
    assert reasons(impl, case) == []
    given = agree.as_given(case)
    got = as_tuple(op.invoke(impl.function, *case.values))
    assert agree.with_reference(case, given, got) is None


def test_every_schema_is_called(vendor):
    vendor.CALLED.clear()
    for name, module, dims, dtype in CALLS:
        case = within_limits(name, dims, dtype)
        case.op.invoke(implementation(case.op, module).function, *case.values)
    assert vendor.CALLED == set(_schemas.SCHEMAS)


def test_a_misspelt_argument_is_refused(vendor):
    x, w = torch.randn(4, 8), torch.randn(2, 8, 3)
    with pytest.raises(RuntimeError, match="grp_list"):
        torch.ops.npu.npu_grouped_matmul([x], [w], split_item=3, grp_list=torch.tensor([2, 4]))


def test_rows_of_no_expert_are_zero_even_of_nan(vendor):
    op = transom.ops()["grouped_gemm"]
    forward = implementation(op, "moe.grouped_gemm").function
    x = torch.randn(6, 4)
    x[4:] = torch.nan
    y = forward(x, torch.randn(2, 3, 4), torch.tensor([1, 4]))
    assert not y[:4].isnan().any() and (y[4:] == 0).all()


def test_empty_slots_of_nan_weights_add_nothing(vendor):
    op = transom.ops()["moe_experts"]
    forward = implementation(op, "moe.moe_experts").function
    ids = torch.tensor([[0, -1], [-1, -1]])
    weights = torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan]])
    y = forward(torch.randn(2, 4), ids, weights, torch.randn(2, 6, 4), torch.randn(2, 4, 3))
    assert y.isfinite().all() and (y[1] == 0).all()


def test_a_query_without_entries_gives_zero(vendor):
    op = transom.ops()["sparse_attention"]
    forward = implementation(op, "attention.sparse_attention").function
    q, kv = torch.randn(1, 2, 1, 576).half(), torch.randn(1, 4, 576).half()
    indices = torch.tensor([[[0, 3], [-1, -1]]])
    o, lse = forward(q, kv, indices, scale=0.05, v_dim=512)
    assert (o[0, 1] == 0).all() and lse[0, 1, 0] == -np.inf and (o[0, 0] != 0).any()


@pytest.mark.parametrize(
    "name, module, dims, dtype, said",
    [
        (
            "sinkhorn",
            "mhc.sinkhorn",
            dict(T=(3,), R=5, iterations=3, eps=1e-6),
            "float32",
            "R is 5; supported: 4, 6, 8",
        ),
        (
            "route",
            "moe.route",
            dict(T=6, E=16, k=4, score="sqrtsoftplus"),
            "float32",
            "score is sqrtsoftplus; supported: softmax, sigmoid",
        ),
        (
            "route",
            "moe.route",
            dict(T=6, E=16, k=4, score="sigmoid", renormalize=False),
            "float32",
            "renormalize is False; supported with sigmoid: True",
        ),
        (
            "moe_experts",
            "moe.moe_experts",
            dict(T=6, D=40, I=20, E=4, K=2),
            "bfloat16",
            "x is bfloat16; supported: float32",
        ),
        (
            "sparse_attention",
            "attention.sparse_attention",
            dict(B=1, S=1, H=4, D=576, N=20, L=6, v_dim=512, scale=0.1),
            "bfloat16",
            "N = 20 rows would be copied and 6 read; supported: N at most S*L",
        ),
    ],
    ids=ids_of,
)
def test_what_the_vendor_does_not_take_is_refused_with_a_sentence(name, module, dims, dtype, said):
    op = transom.ops()[name]
    impl = implementation(op, module)
    case = cases.build(op, dims, getattr(torch, dtype), absent=LEFT_OUT.get(name, set()))
    assert said in reasons(impl, case)


def test_the_910_has_no_hyper_connections():
    op = transom.ops()["sinkhorn"]
    impl = implementation(op, "mhc.sinkhorn")
    case = cases.build(op, dict(T=(3,), R=4, iterations=3, eps=1e-6))
    facts = transom.dispatch.facts_of(op, case.values)
    said = [r(replace(facts, device="npu", arch="ascend910b3")) for r in impl.requires]
    assert "architecture is 'ascend910b3'; supported: ascend950" in said


def test_without_torch_npu_the_backend_says_so():
    assert ascend.DEVICES == ("npu",)
    assert ascend.probe() == (
        "torch_npu is not installed; expected torch_npu >= 2.14; pip install torch-npu"
    )


def test_schemas_are_read_from_the_bytes_of_a_library():
    contract = importlib.import_module("transom.conformance.ascend.contract")
    text = {**_schemas.SCHEMAS}
    whole = b"\x00".join((n + s).encode() for n, s in text.items()) + b"\x00"
    assert contract.differences(b"\x7fELF\x00" + whole, "2.14.0") == []
    text["npu_swiglu"] = "(Tensor input, int dim=-1, bool fast=False) -> Tensor"
    del text["npu_mhc_pre"]
    other = b"\x00".join((n + s).encode() for n, s in text.items()) + b"\x00"
    assert contract.differences(other, "2.15.0") == [
        "npu_swiglu: torch_npu 2.15.0 says (Tensor input, int dim=-1, bool fast=False) -> Tensor; "
        "adapter expects (Tensor input, int dim=-1) -> Tensor",
        "npu_mhc_pre: torch_npu 2.15.0 has no such operator",
    ]
