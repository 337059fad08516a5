"""Every code of the small formats and every tie between two, through the Triton kernels. Run by
test_interpreted.py, in a process where TRITON_INTERPRET is set."""

from __future__ import annotations

import pytest
import torch

import transom

HOSTILE = [torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 2.0**-149, 3.4e38, -3.4e38, 1e-10]


def table(values: list[float]) -> torch.Tensor:
    """Magnitudes, the middles between neighbours, and a float beside each, of both signs."""
    x = torch.tensor(values)
    x = torch.cat((x, (x[1:] + x[:-1]) / 2))
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    x = torch.cat((x, x.nextafter(up), x.nextafter(down)))
    return torch.cat((x, -x))


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [m * 2.0**-9 for m in range(8)] + [
    (8 + m) * 2.0**e for e in range(-9, 6) for m in range(8) if (e, m) != (5, 7)
]


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point():
        same = torch.equal(a.isnan(), b.isnan())
        return same and torch.equal(*(x.nan_to_num(nan=0.0).view(torch.int32) for x in (a, b)))
    return torch.equal(a, b)


def agree(op: str, *args: torch.Tensor, **kwargs: int) -> tuple[torch.Tensor, ...]:
    """The kernels' outputs, which are the composite's to the bit."""
    out = {}
    for impl in ("triton", "composite"):
        with transom.use(**{op: impl}):
            got = transom.ops()[op].call(*args, **kwargs)
        out[impl] = got if isinstance(got, tuple) else (got,)
    assert all(equal_bits(a, b) for a, b in zip(out["triton"], out["composite"], strict=True))
    return out["triton"]


def matrix(values: torch.Tensor, columns: int, largest: float) -> torch.Tensor:
    """The values in rows, `largest` at the end of each, so that every block has scale 1."""
    rows = torch.zeros(-(-len(values) // (columns - 1)), columns)
    padded = torch.nn.functional.pad(values, (0, rows.shape[0] * (columns - 1) - len(values)))
    rows[:, :-1], rows[:, -1] = padded.view(rows.shape[0], -1), largest
    return rows


def test_every_e4m3_code_and_tie():
    rows = matrix(table(E4M3).clamp(-448, 448), 64, 448.0)
    values, scales = agree("quantize_fp8_e8m0", rows, rows=1, columns=64)
    assert (scales == 127).all()
    assert len(values.unique()) == 254  # all but the two NaN
    agree("quantize_fp8", rows, rows=3, columns=48)


def test_every_e2m1_code_and_tie():
    rows = matrix(table(E2M1).clamp(-6, 6), 32, 6.0)
    values, scales = agree("quantize_mxfp4", rows)
    assert (scales == 127).all()
    assert len({*(values & 15).flatten().tolist(), *(values >> 4).flatten().tolist()}) == 16


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_hostile_weights_in_odd_blocks(dtype):
    x = torch.randn(2, 5, 70, generator=torch.Generator().manual_seed(0)) * 1e-3
    x.view(-1)[::37][: len(HOSTILE)] = torch.tensor(HOSTILE)
    x[:, -1] = 0
    x = x.to(dtype)
    for weight in (x, x.mT.contiguous().mT):
        agree("dequantize_int8", *agree("quantize_int8", weight, group=31), group=31)
        agree("dequantize_int4", *agree("quantize_int4", weight, group=31), group=31)
        agree("dequantize_mxfp4", *agree("quantize_mxfp4", weight))
        block = dict(rows=2, columns=9)
        agree("dequantize_fp8", *agree("quantize_fp8", weight, **block), **block)
        agree("dequantize_fp8", *agree("quantize_fp8_e8m0", weight, **block), **block)


@pytest.mark.parametrize("row_bytes", (584, 288))
def test_cache_rows_of_hostile_keys(row_bytes):
    kv = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(1))
    kv.view(-1)[::77][: len(HOSTILE)] = torch.tensor(HOSTILE)
    kv[0, 0, 500:] = torch.tensor([torch.inf, -torch.inf, 3.4e38, -0.0, 1.00390625, 1.01171875] * 2)
    (rows,) = agree("pack_cache_rows", kv.mT.contiguous().mT, row_bytes=row_bytes)
    agree("unpack_cache_rows", rows)
