"""transom.nn Engram: hashes, compression, both forms, caches. Numbers are those of contracts
section 12."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import transom
from transom.nn.engram import Engram, EngramCache, engram_hashes, token_map_checksum

B, S, R, D, VOCAB, KINDS, PAD, COLUMN, HEADS = 2, 14, 3, 8, 50, 37, 2, 4, 2


def make(form: str, dtype: torch.dtype = torch.float64, **change) -> Engram:
    torch.manual_seed(0)
    sizes = [100, 100] if form == "demo" else [100, 100, 100]
    hashed = engram_hashes([1], table_sizes=sizes, heads=HEADS, compressed_vocab=KINDS, seed=0)[1]
    layer = Engram(
        D,
        R,
        hashed=hashed,
        column=COLUMN,
        vocab=VOCAB,
        token_map=token_map(),
        pad=PAD,
        form=form,
        dtype=dtype,
        **{"gate_eps": 1e-20, **change},
    )
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def token_map() -> Tensor:
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))
    return (order % KINDS).int()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (B, S), generator=torch.Generator().manual_seed(seed))


def streams(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, S, R, D, generator=g, dtype=torch.float64).to(dtype)


def norm(v: Tensor, weight: Tensor, eps: float) -> Tensor:
    return v / (v.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def oracle(layer: Engram, x: Tensor, ids: Tensor) -> Tensor:
    """Contracts 3.1 in plain torch, with norm weights apart, one token at a time for the hash."""
    assert layer.token_map is not None
    n = layer.ngram
    pad = int(layer.token_map[PAD])
    stream = torch.cat([torch.full((B, n - 1), pad), layer.token_map[ids].long()], 1)
    columns = []
    for g in range(1, n):
        mix = 0
        for i in range(g + 1):
            mix = mix ^ (stream[:, n - 1 - i : n - 1 - i + S] * layer.multipliers[i])
        columns += [mix % m for m in layer.moduli[g - 1]]
    rows = torch.stack(columns, -1) + layer.offsets
    e = layer.table[rows].flatten(2)
    if layer.form == "demo":
        keys, value = [k(e) for k in layer.keys], layer.value(e)
    else:
        *keys, value = (e @ layer.wkv.T).split(D, -1)
    v = []
    for j in range(R):
        a = norm(x[:, :, j], layer.x_norm[j], layer.gate_eps)
        b = norm(keys[j], layer.key_norm[j], layer.gate_eps)
        dot = (a * b).sum(-1) / D**0.5
        s = dot.abs().clamp_min(1e-6).sqrt() * dot.sign()
        v.append(torch.sigmoid(s)[..., None] * value)
    y = torch.stack(v, 2)
    if layer.form == "v4.1":
        return x + y
    normed = norm(y, layer.conv_norm, layer.conv_eps).flatten(2)
    padded = torch.nn.functional.pad(normed.transpose(1, 2), (9, 0))
    z = torch.nn.functional.conv1d(padded, layer.conv[:, None], dilation=3, groups=R * D)
    return x + y + torch.nn.functional.silu(z).transpose(1, 2).view_as(y)


@pytest.mark.parametrize("form", ["demo", "v4.1"])
def test_is_the_formula_of_its_form(form):
    layer, x, ids = make(form), streams(), tokens()
    torch.testing.assert_close(layer(x, ids), oracle(layer, x, ids))


@pytest.mark.parametrize("form", ["demo", "v4.1"])
def test_gradients_are_those_of_the_formula(form):
    layer, ids = make(form), tokens()
    x = streams().requires_grad_()
    wanted = [x, *layer.parameters()]
    dy = streams(5)
    got = torch.autograd.grad(layer(x, ids), wanted, dy)
    want = torch.autograd.grad(oracle(layer, x, ids), wanted, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["demo", "v4.1"])
@pytest.mark.parametrize("chunks", [[1] * S, [5, 9], [1, 2, 3, 8], [13, 1]])
def test_edge_60_chunks_and_decode_equal_the_whole(form, chunks):
    layer, x, ids = make(form), streams(), tokens()
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[0, 4:6] = True
    whole = layer(x, ids, blocked=blocked)
    cache, at, parts = EngramCache(), 0, []
    for size in chunks:
        part = slice(at, at + size)
        parts.append(layer(x[:, part], ids[:, part], blocked=blocked[:, part], cache=cache))
        at += size
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_edge_60_rejected_tokens_are_rolled_back_by_an_older_cache():
    layer, x, ids = make("demo"), streams(), tokens()
    whole = layer(x, ids)
    cache = EngramCache()
    layer(x[:, :6], ids[:, :6], cache=cache)
    kept = cache.copy()
    layer(streams(9)[:, :3], tokens(9)[:, :3], cache=cache)
    torch.testing.assert_close(layer(x[:, 6:], ids[:, 6:], cache=kept), whole[:, 6:])


def test_beams_are_reordered():
    layer, x, ids = make("demo"), streams(), tokens()
    cache, order = EngramCache(), torch.tensor([1, 0])
    layer(x[:, :8], ids[:, :8], cache=cache)
    cache.reorder(order)
    want = layer(x[order], ids[order])[:, 8:]
    torch.testing.assert_close(layer(x[order][:, 8:], ids[order][:, 8:], cache=cache), want)


@pytest.mark.parametrize("form", ["demo", "v4.1"])
def test_edge_65_blocked_positions_return_x_bit_for_bit(form):
    layer, x, ids = make(form), streams(), tokens()
    blocked = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) < 0.4
    y = layer(x, ids, blocked=blocked)
    assert torch.equal(y[blocked], x[blocked]) and not torch.equal(y[~blocked], x[~blocked])


def test_edge_59_no_n_gram_reads_across_a_block():
    layer, x, ids = make("v4.1"), streams(), tokens()
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[:, 5] = True
    torch.testing.assert_close(layer(x, ids, blocked=blocked)[:, 6:], layer(x[:, 6:], ids[:, 6:]))


@pytest.mark.parametrize("form", ["demo", "v4.1"])
def test_edge_52_left_padding_that_is_blocked_equals_no_padding(form):
    layer, x, ids = make(form), streams(), tokens()
    padded = torch.cat([torch.full((B, 3), PAD), ids], 1)
    blocked = (torch.arange(S + 3) < 3).expand(B, -1)
    y = layer(torch.cat([streams(4)[:, :3], x], 1), padded, blocked=blocked)
    torch.testing.assert_close(y[:, 3:], layer(x, ids))


@pytest.mark.parametrize("bad", [-1, -VOCAB, VOCAB, 10**6])
def test_edge_53_and_54_ids_outside_the_vocabulary_count_as_blocked(bad):
    layer, ids = make("demo"), tokens()
    ids[:, 5] = bad
    compressed = layer.compress(ids)
    assert bool((compressed[:, 5] == -1).all())
    assert torch.equal(compressed[:, :5], token_map()[ids[:, :5]])
    assert bool(layer(streams(), ids).isfinite().all())


def test_edge_56_columns_are_distinct_primes_and_rows_are_their_sum():
    hashes = engram_hashes(
        [1, 15], table_sizes=[646400] * 2, heads=8, compressed_vocab=99092, seed=0
    )
    primes = torch.cat([h.moduli.flatten() for h in hashes.values()])
    assert primes.unique().numel() == 32 and int(primes.min()) >= 646400
    for h in hashes.values():
        assert int(h.offsets[-1] + h.moduli.flatten()[-1]) == h.rows == int(h.moduli.sum())
        assert bool((h.multipliers % 2 == 1).all())
        assert int(h.multipliers.max()) < 2**63 // 99092 + 1


def test_edge_56_v4_1_s_tables_have_the_published_rows():
    """Contracts 3.3: 384,006,168 and 384,016,682 rows."""
    hashes = engram_hashes(
        [1, 14], table_sizes=[16_000_000] * 3, heads=8, compressed_vocab=99092, seed=0
    )
    assert [h.rows for h in hashes.values()] == [384_006_168, 384_016_682]


def test_the_order_of_layers_decides_the_primes():
    numbers = dict(table_sizes=[100], heads=2, compressed_vocab=10, seed=0)
    assert engram_hashes([1, 2], **numbers)[1].moduli.tolist() == [[101, 103]]
    assert engram_hashes([2, 1], **numbers)[1].moduli.tolist() == [[107, 109]]


def test_edge_57_valid_ids_never_wrap():
    h = engram_hashes([3], table_sizes=[100] * 3, heads=1, compressed_vocab=99092, seed=7)[3]
    assert int(h.multipliers.max()) * 99091 < 2**63


def test_edge_62_a_new_demo_block_adds_the_gated_value_alone():
    layer, x, ids = make("demo"), streams(), tokens()
    with torch.no_grad():
        layer.conv.zero_()
    cache = EngramCache()
    y = layer(x, ids, cache=cache)
    assert cache.conv is not None and cache.conv.shape == (B, 9, R * D)
    layer.conv_norm.data *= 5
    assert torch.equal(layer(x, ids), y)


def test_edge_63_a_token_map_of_another_tokenizer_is_refused():
    other = token_map()
    other[7] += 1
    good, bad = token_map_checksum(token_map()), token_map_checksum(other)
    make("demo", checksum=good)
    with pytest.raises(ValueError, match=f"token_map has checksum {good}; expected {bad}; use the"):
        make("demo", checksum=bad)
    state = make("demo").state_dict()
    state["token_map"] = other
    with pytest.raises(ValueError, match=f"token_map has checksum {bad}; expected {good}"):
        make("demo").load_state_dict(state)


def test_edge_63_a_token_map_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"Engram: token_map has shape \[50\]; expected \[49\]"):
        h = engram_hashes([1], table_sizes=[100], heads=1, compressed_vocab=37, seed=0)[1]
        Engram(
            D,
            R,
            hashed=h,
            column=4,
            vocab=49,
            token_map=token_map(),
            pad=0,
            form="demo",
            gate_eps=0.0,
        )


def test_edge_63_a_token_map_of_another_count_of_ids_is_refused():
    h = engram_hashes([1], table_sizes=[100], heads=1, compressed_vocab=KINDS + 1, seed=0)[1]
    call = dict(hashed=h, column=4, vocab=VOCAB, pad=0, form="v4.1", gate_eps=1e-20)
    with pytest.raises(ValueError, match="token_map has 37 compressed ids; the hashes were drawn"):
        Engram(D, R, token_map=token_map(), **call)
    with pytest.raises(ValueError, match="drawn for 38 ids, and without a token_map 50 raw ids"):
        Engram(D, R, token_map=None, **call)


def test_without_a_token_map_raw_ids_are_hashed():
    h = engram_hashes([1], table_sizes=[100], heads=1, compressed_vocab=VOCAB, seed=0)[1]
    layer = Engram(
        D, R, hashed=h, column=4, vocab=VOCAB, token_map=None, pad=0, form="v4.1", gate_eps=1e-20
    )
    ids = tokens()
    assert torch.equal(layer.compress(ids), ids)


@pytest.mark.parametrize("form", ["demo", "v4.1"])
def test_bfloat16_lies_near_float64(form):
    wide = make(form)
    narrow = make(form).bfloat16()
    wide.load_state_dict(
        {
            k: v.to(torch.float64) if v.is_floating_point() else v
            for k, v in narrow.state_dict().items()
        }
    )
    x, ids = streams(dtype=torch.bfloat16), tokens()
    with torch.no_grad():
        got, want = narrow(x, ids), wide(x.double(), ids)
    assert got.dtype == torch.bfloat16
    assert float((got.double() - want).abs().max() / want.abs().max()) <= 2e-2


def test_quantised_weights_lie_near_the_plain_ones():
    layer = make_wide()
    x, ids = torch.randn(B, S, R, 32), tokens()
    want = layer(x, ids).detach()
    quantised = make_wide(
        table=transom.quantize(layer.table.detach(), "fp8", group=(1, 32)),
        wkv=transom.quantize(layer.wkv.detach(), "fp8", group=(32, 32)),
    )
    quantised.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if k.endswith("norm")}, strict=False
    )
    with torch.no_grad(), transom.record() as calls:
        got = quantised(x, ids)
    assert {"grouped_gemm", "engram_gate"} <= {c.op for c in calls}
    assert float((got - want).norm() / (want - x).norm()) < 0.1


def make_wide(**change) -> Engram:
    torch.manual_seed(0)
    h = engram_hashes([1], table_sizes=[60, 60, 60], heads=2, compressed_vocab=KINDS, seed=0)[1]
    return Engram(
        32,
        R,
        hashed=h,
        column=32,
        vocab=VOCAB,
        token_map=token_map(),
        pad=PAD,
        form="v4.1",
        gate_eps=1e-20,
        **change,
    )


def test_sparse_and_dense_table_gradients_agree():
    x, ids = streams(), tokens()
    dense, sparse = make("demo"), make("demo", sparse_gradient=True)
    dense(x, ids).sum().backward()
    sparse(x, ids).sum().backward()
    assert sparse.table.grad.is_sparse
    torch.testing.assert_close(sparse.table.grad.to_dense(), dense.table.grad)


def test_compiles_without_a_graph_break():
    layer, x, ids = make("demo"), streams(), tokens()
    compiled = torch.compile(lambda a, b: layer(a, b), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ids), layer(x, ids))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(form="v4"), "Engram: form is 'v4'; expected one of demo, v4.1"),
        (dict(pad=VOCAB), r"Engram: pad is 50; must be a raw id in 0..49"),
        (dict(table=torch.zeros(3, 4)), r"Engram: table has shape \[3, 4\]; expected \["),
        (
            dict(wkv=torch.zeros(3, 4)),
            "Engram: wkv is given; the demo form has separate projections",
        ),
    ],
)
def test_bad_numbers_are_refused(change, text):
    h = engram_hashes([1], table_sizes=[100, 100], heads=1, compressed_vocab=VOCAB, seed=0)[1]
    call = dict(hashed=h, column=4, vocab=VOCAB, token_map=None, pad=0, form="demo", gate_eps=1e-20)
    with pytest.raises(ValueError, match=text):
        Engram(D, R, **{**call, **change})
