"""pack_cache_rows, unpack_cache_rows and attention over such rows: what the kit cannot know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom

BYTES = [584, 288]


def normal(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g)


def blocks_of(row_bytes: int) -> tuple[int, int]:
    """How many leading elements have scales, and how many share one."""
    return (448, 64) if row_bytes == 584 else (512, 16)


@pytest.mark.parametrize("row_bytes, error", [(584, 1 / 16), (288, 1 / 5)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_a_value_comes_back_within_half_a_step_of_its_block(row_bytes, error, size) -> None:
    x = normal(2, 3, 512) * size
    y = transom.unpack_cache_rows(transom.pack_cache_rows(x, row_bytes=row_bytes))
    scaled, block = blocks_of(row_bytes)
    largest = x[..., :scaled].unflatten(-1, (-1, block)).abs().amax(-1, keepdim=True)
    off = (y - x)[..., :scaled].unflatten(-1, (-1, block)).abs()
    # A subnormal step of the scale itself at small sizes: E4M3 scales end at 2^-9.
    assert (off <= error * largest + (2.0**-9 * 6 if row_bytes == 288 else 0)).all()
    assert torch.equal(y[..., scaled:], x[..., scaled:].bfloat16().float())


@pytest.mark.parametrize("row_bytes", BYTES)
def test_what_was_unpacked_packs_to_the_same_values(row_bytes) -> None:
    y = transom.unpack_cache_rows(transom.pack_cache_rows(normal(1, 40, 512), row_bytes=row_bytes))
    again = transom.unpack_cache_rows(transom.pack_cache_rows(y, row_bytes=row_bytes))
    near = (again - y).abs() <= (0 if row_bytes == 584 else 0.15 * y.abs().amax())
    assert near.all()


def test_the_layout_of_a_v4_row() -> None:
    x = torch.zeros(1, 1, 512)
    x[..., 0], x[..., 70], x[..., 448] = 448.0, -1.0, -1.0
    row = transom.pack_cache_rows(x, row_bytes=584)[0, 0].tolist()
    assert row[0] == 0x7E and row[576] == 127  # 448 = 1.75 * 2^8 under a scale of 1
    assert row[70] == 0xF8 and row[577] == 127 - 8  # -1 = -256 * 2^-8
    assert row[448:450] == [0x80, 0xBF] and row[583] == 0  # bfloat16 -1, little-endian
    assert row[578:583] == [105] * 5  # 1e-4 / 448 is above 2^-23


def test_the_layout_of_a_v41_row() -> None:
    x = torch.zeros(1, 1, 512)
    x[..., 0], x[..., 1], x[..., 17] = 6.0, -3.0, 0.75
    row = transom.pack_cache_rows(x, row_bytes=288)[0, 0].tolist()
    assert row[0] == 0x7 | 0xD << 4 and row[256] == 0x38
    assert row[8] == 7 << 4 and row[257] == 0x20  # 0.75 = 6 * 2^-3


@pytest.mark.parametrize("row_bytes", BYTES)
def test_zero_vectors_and_signs_of_zero(row_bytes) -> None:
    y = transom.unpack_cache_rows(
        transom.pack_cache_rows(torch.zeros(1, 2, 512), row_bytes=row_bytes)
    )
    assert torch.equal(y, torch.zeros(1, 2, 512))


@pytest.mark.parametrize("row_bytes", BYTES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_with_nan_or_infinity_is_nan_and_the_others_are_not(row_bytes, bad) -> None:
    x = normal(1, 1, 512)
    x[..., 130] = bad
    y = transom.unpack_cache_rows(transom.pack_cache_rows(x, row_bytes=row_bytes))[0, 0]
    _, block = blocks_of(row_bytes)
    start = 130 // block * block
    assert y[start : start + block].isnan().all()
    assert y[:start].isfinite().all() and y[start + block :].isfinite().all()


def test_scale_bytes_0_and_255_and_padding_of_any_kind() -> None:
    rows = transom.pack_cache_rows(torch.ones(1, 1, 512), row_bytes=584)
    rows[..., 576], rows[..., 577], rows[..., 583] = 0, 255, 255
    y = transom.unpack_cache_rows(rows)[0, 0]
    assert (y[:64] == 256 * 2.0**-127).all() and y[64:128].isnan().all() and (y[128:] == 1).all()


@pytest.mark.parametrize("row_bytes", BYTES)
@pytest.mark.parametrize("impl", ["composite", "native"])
def test_attention_over_rows_is_attention_over_what_they_hold(row_bytes, impl) -> None:
    if impl == "native" and transom.backends()["native"] is not None:
        pytest.skip(str(transom.backends()["native"]))
    rows = transom.pack_cache_rows(normal(2, 300, 512), row_bytes=row_bytes)
    named = torch.randint(-1, 302, (2, 4, 200), generator=torch.Generator().manual_seed(1))
    call = dict(q=normal(2, 4, 5, 512), local_kv=normal(2, 9, 512, seed=1), window=7)
    rows[:, 7], rows[:, 8, 576 if row_bytes == 584 else 256] = 255, 255
    named[(named == 7) | (named == 8)] = -1
    for spread in (rows, torch.stack([rows, rows], -1)[..., 0]):
        for indices in (named, None):
            bound = None if indices is not None else torch.full((2, 4), 7)
            with transom.use(impl):
                got = transom.sparse_attention(
                    kv=spread, indices=indices, visible=bound, **call, return_lse=True
                )
                want = transom.sparse_attention(
                    kv=transom.unpack_cache_rows.impls["composite"].function(rows),
                    indices=indices,
                    visible=bound,
                    **call,
                    return_lse=True,
                )
            assert got[0].isfinite().all()
            if impl == "native":
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
            torch.testing.assert_close(got, want)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"^pack_cache_rows: kv has D = 511; must be 512"):
        transom.pack_cache_rows(torch.zeros(1, 1, 511), row_bytes=584)
    with pytest.raises(ValueError, match=r"^pack_cache_rows: rows have 583 bytes; must be 584 or"):
        transom.pack_cache_rows(torch.zeros(1, 1, 512), row_bytes=583)
    rows = torch.zeros(1, 1, 583, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^unpack_cache_rows: rows have 583 bytes; must be 584"):
        transom.unpack_cache_rows(rows)
    with pytest.raises(ValueError, match=r"^sparse_attention_rows: rows have 583 bytes; must be"):
        transom.sparse_attention(torch.zeros(1, 1, 2, 512), rows)
