"""The numba backend's numbers: bfloat16 and float16 as codes, exp."""

from __future__ import annotations

import functools
import importlib

import numpy as np
import pytest
import torch

import transom

REASON = transom.backends()["numba"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@functools.cache
def codecs():
    import numba

    numbers = importlib.import_module("transom.backends.numba._numbers")
    wide, narrow, exp = numbers.wide, numbers.narrow, numbers.exp

    @numba.njit
    def widen(codes, out):
        for i in range(codes.size):
            out[i] = wide(codes[i])

    @numba.njit
    def round_to(x, out):
        for i in range(x.size):
            out[i] = narrow(x[i], out)

    @numba.njit
    def exponentials(x, out):
        for i in range(x.size):
            out[i] = exp(x[i])

    return widen, round_to, exponentials


def same_numbers(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtype, code", [(torch.bfloat16, np.uint16), (torch.float16, np.int16)])
def test_all_numbers_of_16_bits_are_read_exactly(dtype, code):
    codes = np.arange(2**16, dtype=np.uint16).view(code)
    out = np.empty(codes.size, np.float32)
    codecs()[0](codes, out)
    want = torch.from_numpy(codes.view(np.int16)).view(dtype).float()
    assert same_numbers(torch.from_numpy(out), want)
    assert np.array_equal(np.signbit(out), codes.view(np.int16) < 0)


@pytest.mark.parametrize("dtype, code", [(torch.bfloat16, np.uint16), (torch.float16, np.int16)])
def test_rounding_is_that_of_torch(dtype, code):
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float().numpy()
    with np.errstate(all="ignore"):
        halves = ((exact[:-1].astype(np.float64) + exact[1:]) / 2).astype(np.float32)  # ties
    small = np.ldexp(np.random.default_rng(2).standard_normal(50_000), -15).astype(np.float32)
    x = np.concatenate([bits.view(np.float32), exact, halves, small])
    out = np.empty(x.size, code)
    codecs()[1](x, out)
    got = torch.from_numpy(out.view(np.int16)).view(dtype)
    assert same_numbers(got.float(), torch.from_numpy(x).to(dtype).float())


def test_exp_is_within_two_units_in_the_last_place():
    x = np.linspace(-103.9, 88.7, 400_001, dtype=np.float32)
    edge = np.array([-np.inf, -200, 0.0, -0.0, 89.5, np.inf, np.nan], np.float32)
    out, at_edge = np.empty_like(x), np.empty_like(edge)
    codecs()[2](x, out)
    codecs()[2](edge, at_edge)
    want = np.exp(x.astype(np.float64))
    unit = np.spacing(want.astype(np.float32)).astype(np.float64)
    assert (np.abs(out - want) / unit).max() <= 2
    assert np.array_equal(at_edge, [0, 0, 1, 1, np.inf, np.inf, np.nan], equal_nan=True)
