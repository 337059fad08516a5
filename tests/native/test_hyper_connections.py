"""Native hyper-connections: strides, the borders of tiles and spans, threads, against float64."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.registry import OPS

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

EPS = dict(eps=1e-6, rms_eps=1e-6)
NUMBERS = {
    "sinkhorn_backward": dict(iterations=5, eps=1e-6),
    "mhc_pre_backward": dict(iterations=5, post_scale=2.0, **EPS),
    "mhc_head": EPS,
    "mhc_head_backward": EPS,
    "mhc_post": {},
    "mhc_post_backward": {},
}
SIZES = [(1, 1), (2, 9), (3, 341), (4, 512), (5, 257), (16, 70), (4, 0)]


def inputs(op, T, R, D, dtype):
    g = torch.Generator().manual_seed(3)

    def normal(*shape, to=dtype):
        return torch.randn(*shape, generator=g).to(to)

    wide = torch.float32
    N = R if "head" in op else (2 + R) * R
    weights = [normal(N, R * D, to=wide) / max(1, R * D) ** 0.5]
    weights += [1 + normal(1 if "head" in op else 3, to=wide) / 4, normal(N, to=wide)]
    return {
        "sinkhorn_backward": lambda: [normal(T, R, R, to=wide), 4 * normal(T, R, R)],
        "mhc_pre_backward": lambda: [
            normal(T, D),
            normal(T, R, to=wide),
            normal(T, R, R, to=wide),
            normal(T, R, D),
            *weights,
        ],
        "mhc_head": lambda: [normal(T, R, D), *weights],
        "mhc_head_backward": lambda: [normal(T, D), normal(T, R, D), *weights],
        "mhc_post": lambda: [
            normal(T, D),
            normal(T, R, D),
            normal(T, R, to=wide),
            normal(T, R, R, to=wide),
        ],
        "mhc_post_backward": lambda: [
            normal(T, R, D),
            normal(T, D),
            normal(T, R, D),
            normal(T, R, to=wide),
            normal(T, R, R, to=wide),
        ],
    }[op]()


def run(op, args, impl="native"):
    with transom.use(impl), transom.record() as calls:
        out = OPS[op](*args, **NUMBERS[op])
    assert [c.impl for c in calls if c.op == op] == [impl]
    return out if isinstance(out, tuple) else (out,)


def close(got, want):
    for a, b in zip(got, want, strict=True):
        a, b = a.double(), b.double()
        size = b.abs().amax() if b.numel() else 0.0
        limit = 2e-5 * (1e-3 + size) + torch.finfo(got[0].dtype).eps * b.abs()
        assert ((a - b).abs() <= limit).all()


def apart(x):
    """The same numbers with gaps between rows and tokens, NaN in them."""
    shape = (2 * x.shape[0], *(n + 3 for n in x.shape[1:]))
    out = torch.full(shape, torch.nan, dtype=x.dtype)[(slice(None, None, 2), slice(1, -2))]
    for i in range(2, x.ndim):
        out = out.narrow(i, 2, x.shape[i])
    return out.copy_(x)


def scattered(x):
    """The same numbers with the last dim of stride 2."""
    return torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)[..., ::2].copy_(x)


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("R, D", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes_off_the_tiles_in_any_strides(dtype, R, D, op):
    args = inputs(op, 37, R, D, dtype)
    got = run(op, args)
    close(got, run(op, args, "reference"))
    tokens = {"mhc_head": 1, "mhc_head_backward": 2, "mhc_pre_backward": 4}.get(op, len(args))
    for move in (apart, scattered):
        moved = [move(a) if i < tokens else a for i, a in enumerate(args)]
        assert all(torch.equal(a, b) for a, b in zip(run(op, moved), got, strict=True))


@pytest.mark.parametrize("op", [op for op in NUMBERS if "pre" in op or "head" in op])
@pytest.mark.parametrize("T", [0, 1, 7, 64, 65, 255, 256, 257, 600])
def test_numbers_of_tokens_at_the_borders_of_blocks_and_spans(op, T):
    args = inputs(op, T, 4, 40, torch.float32)
    close(run(op, args), run(op, args, "reference"))


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("T", [3, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_any_number_of_threads(op, T, dtype):
    args = inputs(op, T, 4, 1100, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(op, args)
        for n in (2, 5):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(op, args), one, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", NUMBERS)
@pytest.mark.parametrize("R", [3, 4])
def test_a_token_has_the_same_bits_alone_and_among_others(op, R):
    args = inputs(op, 70, R, 300, torch.bfloat16)
    tokens = {"mhc_head": 1, "mhc_head_backward": 2, "mhc_pre_backward": 4}.get(op, len(args))
    # The gradients of parameters are sums over the tokens.
    outputs = 1 if "pre" in op or "head" in op else None
    together = run(op, args)[:outputs]
    for t in (0, 33, 69):
        one = [a[t : t + 1] if i < tokens else a for i, a in enumerate(args)]
        alone = run(op, one)[:outputs]
        assert all(torch.equal(a[0], b[t]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_larger_than_the_caches_keep_has_the_same_bits(dtype):
    # 40 MB of streams, of which each token is also mixed alone, through the caches.
    args = inputs("mhc_post", 1300 if dtype == torch.bfloat16 else 650, 4, 4096, dtype)
    kept = run("mhc_post", args)  # its memory is what the next call gets, if the allocator keeps it
    del kept
    (whole,) = run("mhc_post", args)
    for t in (0, 17, 649):
        (one,) = run("mhc_post", [a[t : t + 1] for a in args])
        assert torch.equal(one[0], whole[t])


def test_extreme_logits_have_gradients_through_twenty_steps():
    logits = torch.tensor([[[0.0, -60, 30, 4], [12, 0, -9, 1], [5, 5, 5, 5], [-40, 40, 0, 0]]])
    grad = torch.arange(16.0).view(1, 4, 4) / 16
    out = []
    for impl in ("native", "reference"):
        with transom.use(impl):
            out.append(OPS["sinkhorn_backward"](grad, logits, iterations=20, eps=1e-6))
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("op", NUMBERS)
def test_what_it_cannot_hold_is_declined_with_a_sentence(op):
    name = "logits" if op.startswith("sinkhorn") else "x"
    plan = transom.explain(op, *inputs(op, 1, 17, 3, torch.float32), **NUMBERS[op])
    assert plan.rejected["native"] == ("R = 17; supported: at most 16",)
    wide = [a.double() for a in inputs(op, 1, 2, 3, torch.float32)]
    plan = transom.explain(op, *wide, **NUMBERS[op])
    assert plan.rejected["native"] == (f"{name} is float64; supported: float32, bfloat16, float16",)
