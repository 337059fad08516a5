"""How native kernels round to 16 bits: every neighbourhood where the result changes."""

from __future__ import annotations

import pytest
import torch

import transom

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def rounded(numbers, dtype, D):
    """The float32 numbers as a native kernel writes them into rows of D elements: a weight of post
    times f = 1."""
    f = torch.ones(len(numbers), D, dtype=dtype)
    x = torch.zeros(len(numbers), 1, D, dtype=dtype)
    with transom.use("native"):
        return transom.mhc_post(f, x, numbers[:, None], torch.zeros(len(numbers), 1, 1))[:, 0]


def bits(x):
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("D", [1, 17])  # of one element; of vectors and one element
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_number_of_16_bits_and_each_middle_between_two_with_its_neighbours(dtype, D):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    # What rounds to infinity begins half a step above the largest number.
    middles = (every[1:].double() + every[:-1].double()) / 2
    last = every[-1].double() + (every[-1].double() - every[-2].double()) / 2
    middles = torch.cat([middles, last[None], -last[None]]).float()
    places = bits(torch.cat([every, middles]))[:, None] + torch.arange(-1, 2, dtype=torch.int32)
    numbers = places.flatten().view(torch.float32)
    numbers = torch.cat([numbers[numbers.isfinite()], torch.tensor([torch.inf, -torch.inf])])
    want = numbers.to(dtype)[:, None].expand(-1, D)
    assert torch.equal(rounded(numbers, dtype, D), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_stays_nan_whatever_its_payload(dtype):
    payloads = torch.tensor([1, 0x1000, 0x1FFF, 0x2000, 0x8000, 0x3FFFFF, 0x400000, 0x7FFFFF])
    numbers = (payloads | 0x7F800000).int()
    numbers = torch.cat([numbers, numbers | -(2**31)]).view(torch.float32)
    assert rounded(numbers, dtype, 17).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_equal_numbers_have_equal_bits_wherever_they_stand_in_a_row(dtype):
    g = torch.Generator().manual_seed(1)
    numbers = torch.randn(1000, generator=g) * 2.0 ** torch.randint(-30, 30, (1000,), generator=g)
    row = bits(rounded(numbers, dtype, 53))
    assert (row == row[:, :1]).all()
