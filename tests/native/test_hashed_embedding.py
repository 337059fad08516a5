"""Native lookups: every format and layout of a table, addresses beyond 32 bits, threads, shards."""

from __future__ import annotations

import pytest
import torch

import transom
from transom import QuantizedWeight

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def run(op, *args, impl="native", **kwargs):
    with transom.use(impl), transom.record() as calls:
        out = getattr(transom, op)(*args, **kwargs)
    assert {c.impl for c in calls} == {impl}
    return out


def lookup(rows, B=2, S=70, n=3, h=3, seed=0):
    """Tokens and the arguments of a hash into `rows` rows."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.linspace(0, rows, (n - 1) * h + 1).long()
    return torch.randint(-1, 10**5, (B, S), generator=g), dict(
        multipliers=torch.randint(1, 2**62, (n,), generator=g),
        moduli=ends.diff().view(n - 1, h),
        offsets=ends[:-1],
        pad=2,
    )


def quantised(format, rows, d, group, seed=0):
    """Codes and scales at random: quantize() makes none in blocks of several rows but fp8's."""
    g = torch.Generator().manual_seed(seed)
    if format == "mxfp4" or group is None:
        return transom.quantize(torch.randn(rows, d, generator=g), format, group=group)
    high, wide = group
    grid = (-(-rows // high) if high else 1, -(-d // wide) if wide else 1)
    low, top, dtype = (-127, 128, torch.int8) if format == "int8" else (0, 127, torch.uint8)
    codes = torch.randint(low, top, (rows, d // 2 if format == "int4" else d), generator=g)
    zeros = torch.randint(0, 16, grid, generator=g).byte() if format == "int4" else None
    scales = torch.rand(grid, generator=g)
    return QuantizedWeight(format, codes.to(dtype), scales, zeros, group=group)


def both(tokens, table, **hashed):
    """A lookup side by side and added up, natively; compared with the composite's."""
    y = run("hashed_embedding", tokens, table, **hashed)
    assert torch.equal(y, run("hashed_embedding", tokens, table, impl="composite", **hashed))
    added = run("hashed_embedding_pooled", tokens, table, **hashed)
    want = run("hashed_embedding_pooled", tokens, table, impl="composite", **hashed)
    if isinstance(table, QuantizedWeight):  # a scale's product may be fused with the sum
        torch.testing.assert_close(added, want, rtol=2e-6, atol=2e-6 * float(want.abs().max()))
    else:
        assert torch.equal(added, want)
    return y


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1, 3, 8, 31, 32, 33, 100, 256])
def test_plain_rows_of_any_width_and_layout(dtype, d):
    tokens, hashed = lookup(331)
    table = torch.randn(331, d, dtype=dtype)
    y = both(tokens, table, **hashed)
    for other in (
        table.mT.contiguous().mT,
        torch.randn(331, 2 * d + 1).to(dtype)[:, 1::2].copy_(table),
        torch.randn(662, d).to(dtype)[::2].copy_(table),
    ):
        assert torch.equal(both(tokens, other, **hashed), y)


@pytest.mark.parametrize(
    "format, group",
    [
        ("fp8", (1, 32)),
        ("fp8", (1, 0)),
        ("fp8", (128, 128)),
        ("fp8", (3, 5)),
        ("fp8", (0, 0)),
        ("int8", (1, 0)),
        ("int8", (1, 64)),
        ("int8", (7, 3)),
        ("int8", (0, 10)),
        ("int4", (1, 32)),
        ("int4", (1, 128)),
        ("int4", (4, 7)),
        ("int4", (1, 0)),
        ("mxfp4", None),
    ],
)
@pytest.mark.parametrize("d", [2, 32, 36, 80, 256])
def test_quantised_rows_of_any_group(format, group, d):
    if format == "mxfp4" and d % 32:
        pytest.skip("mxfp4 has groups of 32")
    tokens, hashed = lookup(97)
    both(tokens, quantised(format, 97, d, group), **hashed)


def test_every_code_of_fp8_and_mxfp4_is_decoded():
    tokens, hashed = lookup(64)
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    one = QuantizedWeight("fp8", codes, torch.full((64, 8), 127, dtype=torch.uint8), group=(1, 32))
    y = run("hashed_embedding", tokens, one, **hashed)
    want = run("hashed_embedding", tokens, one, impl="composite", **hashed)
    assert torch.equal(y.isnan(), want.isnan()) and y.isnan().any()
    assert torch.equal(y.nan_to_num(), want.nan_to_num())
    both(
        tokens,
        QuantizedWeight("mxfp4", codes, torch.full((64, 16), 1, dtype=torch.uint8)),
        **hashed,
    )


@pytest.mark.parametrize("byte", [0, 1, 126, 254, 255])
def test_the_least_and_the_largest_scales(byte):
    tokens, hashed = lookup(64)
    codes = torch.randint(0, 127, (64, 32), dtype=torch.uint8)
    for format, wide in (("fp8", 32), ("mxfp4", 64)):
        scales = torch.full((64, wide // 32), byte, dtype=torch.uint8)
        table = QuantizedWeight(format, codes, scales, group=(1, 32))
        y = run("hashed_embedding", tokens, table, **hashed)
        want = run("hashed_embedding", tokens, table, impl="composite", **hashed)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.nan_to_num(), want.nan_to_num())


def test_edge_67_a_row_and_its_scales_in_one_piece_of_264_bytes():
    """V4.1's storage: 256 codes and 8 scale bytes, two views of one array."""
    tokens, hashed = lookup(150)
    made = quantised("fp8", 150, 256, (1, 32))
    scales = torch.randint(120, 131, (150, 8), dtype=torch.uint8)
    stored = torch.cat([made.values, scales], 1)
    apart = QuantizedWeight("fp8", made.values, scales, group=(1, 32))
    together = QuantizedWeight("fp8", stored[:, :256], stored[:, 256:], group=(1, 32))
    assert torch.equal(both(tokens, together, **hashed), both(tokens, apart, **hashed))


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, "fp8", "int4"], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_out_of_any_dtype_and_strides(table, dtype):
    tokens, hashed = lookup(97)
    d, columns = 40, hashed["moduli"].numel()
    weight = (
        quantised(table, 97, d, None) if isinstance(table, str) else torch.randn(97, d).to(table)
    )
    y = run("hashed_embedding", tokens, weight, **hashed).to(dtype)
    B, S, width = *tokens.shape, columns * d
    for out in (
        torch.empty(B, S, width, dtype=dtype),
        torch.empty(S, B, width + 3, dtype=dtype)[:, :, 3:].mT.mT.transpose(0, 1),
        torch.empty(B, S, 2 * width, dtype=dtype)[..., ::2],
    ):
        out.fill_(float("nan"))
        assert run("hashed_embedding", tokens, weight, **hashed, out=out) is out
        assert torch.equal(out, y)


@pytest.mark.parametrize(
    "d, dtype", [(32, torch.float32), (33, torch.float32), (132, torch.bfloat16)]
)
def test_outputs_that_are_written_past_the_caches_hold_the_same(d, dtype):
    tokens, hashed = lookup(500, B=1, S=12_000, h=8)
    table = torch.randn(500, d).to(dtype)
    out = torch.zeros(1, 12_000, 16 * d, dtype=dtype)  # memory that the system has provided
    run("hashed_embedding", tokens, table, **hashed, out=out)
    assert torch.equal(out, run("hashed_embedding", tokens, table, impl="composite", **hashed))


def test_a_row_whose_address_passes_32_bits():
    V, step, d = 2**20 + 3, 2**13, 8
    try:
        storage = torch.empty(V * step, dtype=torch.bfloat16)  # 16 GiB, of which rows are touched
    except RuntimeError:
        pytest.skip("the system promises no 16 GiB of address space")
    table = storage.as_strided((V, d), (step, 1))
    tokens, hashed = lookup(V, B=1, S=4, h=2)
    rows = run("ngram_hash", tokens, **{k: hashed[k] for k in hashed}).long()
    assert int(rows.max()) * step * 2 > 2**33
    marks = torch.randn(rows.numel(), d).bfloat16()
    table[rows.flatten()] = marks
    want = table[rows.flatten()].view(1, 4, -1)
    assert torch.equal(run("hashed_embedding", tokens, table, **hashed), want)


def test_more_rows_than_32_bits_count():
    V = 2**40
    table = torch.arange(64.0).expand(V, 64)
    tokens, hashed = lookup(V, B=1, S=5, h=2)
    y = run("hashed_embedding", tokens, table, **hashed)
    assert torch.equal(y, torch.arange(64.0).repeat(1, 5, 4))
    part = run("hashed_embedding", tokens, table[: 2**39], **hashed, shard=(2**39, 2**39))
    rows = run("hashed_embedding", tokens, table, impl="composite", **hashed, shard=(0, V))
    assert torch.equal(rows, y) and 0 < int((part != 0).sum()) < int((y != 0).sum())


@pytest.mark.parametrize("op", ["hashed_embedding", "hashed_embedding_pooled"])
def test_shards_add_up_and_read_no_row_of_another(op):
    tokens, hashed = lookup(97)
    table = torch.randint(-9, 9, (97, 24)).float()
    whole, parts = run(op, tokens, table, **hashed), []
    for a, b in ((0, 20), (20, 20), (20, 41), (41, 97)):
        held = torch.full((99, 24), float("nan"))
        held[: b - a] = table[a:b]
        parts.append(run(op, tokens, held[: b - a], **hashed, shard=(a, b - a)))
    assert torch.equal(sum(parts), whole)


@pytest.mark.parametrize("op", ["hashed_embedding", "hashed_embedding_pooled"])
@pytest.mark.parametrize("B, S", [(1, 1), (64, 1), (1, 129), (3, 500), (700, 3)])
def test_the_same_bits_at_any_number_of_threads_alone_and_in_a_batch(op, B, S):
    tokens, hashed = lookup(4001, B=B, S=S, h=8)
    table = torch.randn(4001, 72).bfloat16()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(op, tokens, table, **hashed))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(run(op, tokens[-1:], table, **hashed), found[0][-1:])


def test_what_it_cannot_read_is_declined_with_a_sentence():
    tokens, hashed = lookup(50)
    for op in ("hashed_embedding", "hashed_embedding_pooled"):
        (wide,) = transom.explain(op, tokens, torch.randn(50, 4).double(), **hashed).rejected[
            "native"
        ]
        assert wide == "table is float64; supported: float32, bfloat16, float16, quantised"
        turned = QuantizedWeight(
            "int8", torch.zeros(4, 50, dtype=torch.int8).mT, torch.ones(50, 1), group=(1, 0)
        )
        (strided,) = transom.explain(op, tokens, turned, **hashed).rejected["native"]
        assert strided.startswith("table has values with a last dim of stride 50; supported: 1")
