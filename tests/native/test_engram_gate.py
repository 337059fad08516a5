"""Native engram_gate and its gradient: masks, extremes, layouts, threads."""

from __future__ import annotations

import pytest
import torch

import transom
from transom.kernels.engram.engram_gate import engram_gate_backward

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def run(op, *args, impl="native", **kwargs):
    with transom.use(impl), transom.record() as calls:
        out = op(*args, **{"eps": 1e-20, **kwargs})
    assert [(c.op, c.impl) for c in calls] == [(op.name, impl)]
    return out


def call(T=19, R=4, D=200, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, key, dy = (torch.randn(T, R, D, generator=g).to(dtype) for _ in range(3))
    return dy, x, key, torch.randn(T, D, generator=g).to(dtype), torch.randn(R, D, generator=g)


def near(got, want, dtype):
    """Both are rounded: where a result lies between two numbers they may take either one. The
    gradient's slope grows with 1 / sqrt(|dot|), and with it what is left of float32."""
    scale = float(want.abs().max()) if want.numel() else 0.0
    limit = 1.01 * torch.finfo(dtype).eps * want.double().abs() + 1e-4 * scale
    assert ((got.double() - want.double()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [1, 7, 8, 31, 33, 2560])
@pytest.mark.parametrize("residual", [True, False])
def test_widths_around_the_vectors(dtype, D, residual):
    dy, *args = call(T=5, D=D, dtype=dtype)
    options = dict(residual=residual, eps=1.0 if D == 1 else 1e-20)
    want = run(transom.engram_gate, *args, impl="reference", **options)
    near(run(transom.engram_gate, *args, **options), want, dtype)
    got = run(engram_gate_backward, dy, *args, **options)
    expected = run(engram_gate_backward, dy, *args, impl="reference", **options)
    for a, b in zip(got, expected, strict=True):
        near(a, b, a.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("residual", [True, False])
def test_edge_65_what_stands_in_a_masked_row_is_not_read(dtype, residual):
    dy, x, key, value, weight = call(dtype=dtype)
    mask = torch.arange(19) % 3 != 1
    whole = run(transom.engram_gate, x, key, value, weight, mask=mask, residual=residual)
    back = run(engram_gate_backward, dy, x, key, value, weight, mask=mask, residual=residual)
    for row in (key, value):
        row[~mask] = float("nan")
    bits = x[~mask].clone()
    y = run(transom.engram_gate, x, key, value, weight, mask=mask, residual=residual)
    assert torch.equal(y, whole)
    assert torch.equal(y[~mask], bits if residual else torch.zeros_like(bits))
    x[~mask] = float("nan")
    again = run(engram_gate_backward, dy, x, key, value, weight, mask=mask, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(back, again, strict=True))
    assert torch.equal(again[0][~mask], dy[~mask] if residual else torch.zeros_like(bits))
    assert not again[1][~mask].any() and not again[2][~mask].any()


def test_a_masked_row_keeps_the_payload_of_its_nans():
    _, x, key, value, weight = call(dtype=torch.bfloat16)
    x.view(torch.int16)[3] = 0x7FA5
    y = run(transom.engram_gate, x, key, value, weight, mask=torch.arange(19) != 3)
    assert torch.equal(y.view(torch.int16)[3], x.view(torch.int16)[3])


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15, 3e17])
def test_the_gate_of_huge_and_tiny_rows_is_that_of_their_directions(size):
    _, x, key, value, weight = call()
    options = dict(residual=False, eps=0.0)
    got = run(transom.engram_gate, x * size, key * size, value, 1e3 * weight, **options)
    want = run(transom.engram_gate, x, key, value, 1e3 * weight, impl="reference", **options)
    near(got, want, torch.float32)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_rows_whose_squares_leave_float32_are_the_composites(size):
    _, x, key, value, weight = call()
    got = run(transom.engram_gate, x * size, key, value, weight, residual=False)
    want = run(transom.engram_gate, x * size, key, value, weight, impl="composite", residual=False)
    torch.testing.assert_close(got, want, equal_nan=True)


def test_edge_61_a_dot_of_zero_of_either_sign_counts_as_positive():
    _, x, key, value, weight = call(T=4)
    for zero in (0.0, -0.0):
        y = run(transom.engram_gate, x, key * zero, value, weight, residual=False)
        want = torch.sigmoid(torch.tensor(1e-3)) * value[:, None].expand_as(y)
        torch.testing.assert_close(y, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_layout_gives_the_same_bits(dtype):
    dy, x, key, value, weight = call(dtype=dtype)
    mask = torch.arange(19) % 4 != 0
    whole = run(transom.engram_gate, x, key, value, weight, mask=mask)
    back = run(engram_gate_backward, dy, x, key, value, weight, mask=mask)

    def spread(t):
        return torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2].copy_(t)

    def turned(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    for change in (spread, turned):
        d, *args = (change(t) for t in (dy, x, key, value, weight))
        given = torch.stack([mask, ~mask], 1)[:, 0]
        assert torch.equal(run(transom.engram_gate, *args, mask=given), whole)
        again = run(engram_gate_backward, d, *args, mask=given)
        assert all(torch.equal(a, b) for a, b in zip(back, again, strict=True))
    folded = [t.unflatten(0, (1, 19)) for t in (x, key, value)]
    assert torch.equal(run(transom.engram_gate, *folded, weight, mask=mask[None])[0], whole)
    half = weight.to(dtype)
    assert torch.equal(
        run(transom.engram_gate, x, key, value, half),
        run(transom.engram_gate, x, key, value, half.float()),
    )


@pytest.mark.parametrize("T", [1, 8, 9, 700])
def test_the_same_bits_at_any_number_of_threads(T):
    dy, *args = call(T=T, D=136, dtype=torch.bfloat16)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((run(transom.engram_gate, *args), *run(engram_gate_backward, dy, *args)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = run(transom.engram_gate, *(t[-1:] for t in args[:3]), args[3])
    assert torch.equal(alone[0], found[0][0][-1])


def test_outputs_that_are_written_past_the_caches_hold_the_same():
    _, *args = call(T=260, D=4096)
    y = run(transom.engram_gate, *args)
    near(y, run(transom.engram_gate, *args, impl="composite"), torch.float32)
    part = run(transom.engram_gate, *(t[:9] for t in args[:3]), args[3])
    assert torch.equal(part, y[:9])


def test_float64_is_declined_with_a_sentence():
    args = [t.double() for t in call(T=2, D=8)[1:]]
    (shown,) = transom.explain("engram_gate", *args, eps=0.0).rejected["native"]
    assert shown == "x is float64; supported: float32, bfloat16, float16"
