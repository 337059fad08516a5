"""SparseAttention in its four forms against float64 oracles, and its caches against themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import transom
from transom.nn.attention import (
    IndexShape,
    LatentShape,
    SharedAttention,
    SharedShape,
    SparseAttention,
    attention_target,
)
from transom.nn.attention_cache import AttentionCache
from transom.nn.rotary import Rotary, Yarn

HIDDEN = 24
SHARED = SharedShape(
    hidden=HIDDEN, heads=4, head_dim=16, q_rank=12, out_groups=2, out_rank=8, window=7, eps=1e-6
)
LATENT = LatentShape(
    hidden=HIDDEN, heads=3, q_rank=12, kv_rank=16, nope=8, rope=4, value=6, eps=1e-6
)
ROTARY = Rotary(8, 160_000.0, "interleaved", "last", Yarn(16.0, 64, 32.0, 1.0))
TAIL = Rotary(4, 10_000.0, "interleaved", "last")
HALVES = Rotary(4, 10_000.0, "half", "first")
INDEX = IndexShape(heads=8, dim=8, top_k=3)
FORMS = ["window", "hca", "csa", "dsa"]


def layer(form: str, *, index: IndexShape = INDEX, dtype: torch.dtype = torch.float32):
    """A layer of every form whose parameters are random and none of them zero."""
    made = {
        "window": lambda: SparseAttention.window(SHARED, ROTARY),
        "hca": lambda: SparseAttention.hca(SHARED, ROTARY, ratio=8),
        "csa": lambda: SparseAttention.csa(SHARED, ROTARY, ratio=4, index=index),
        "dsa": lambda: SparseAttention.dsa(LATENT, TAIL, index=index, index_rotary=HALVES),
    }[form]()
    generator = torch.Generator().manual_seed(len(form))
    with torch.no_grad():
        for name, p in made.named_parameters():
            scale = 0.5 if p.dim() == 1 else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + ("norm.weight" in name))
    return made.to(dtype)


def tokens(count: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count + 1000 * batch)
    return torch.randn(batch, count, HIDDEN, generator=generator).to(dtype)


def feed(made: SparseAttention, x: Tensor, chunks: list[int]) -> tuple[Tensor, AttentionCache]:
    cache, outputs = None, []
    for part in x.split(chunks, 1):
        output, cache, _ = made(part, cache)
        outputs.append(output)
    return torch.cat(outputs, 1), cache


def close(a: Tensor, b: Tensor, bound: float = 2e-5) -> bool:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= bound * float(b.abs().max())


def same_cache(a: AttentionCache, b: AttentionCache) -> bool:
    pairs = [(a.local, b.local), (a.entries, b.entries), (a.keys, b.keys)]
    for s, t in ((a.state, b.state), (a.index_state, b.index_state)):
        assert (s is None) == (t is None)
        if s is not None and t is not None:
            assert s.position == t.position
            pairs += [(s.kv, t.kv), (s.gate.nan_to_num(neginf=-9), t.gate.nan_to_num(neginf=-9))]
    ok = [x is None if y is None else torch.allclose(x, y, atol=2e-5) for x, y in pairs]
    return a.position == b.position and all(ok)


# Oracles, in float64 and one query at a time ------------------------------------------------------


def turned(x: Tensor, position: int, rotary: Rotary, sign: int = 1) -> Tensor:
    """x [..., D] at one position, by multiplication of complex numbers."""
    x = x.double().clone()
    channels = torch.arange(x.shape[-1])
    channels = channels[: rotary.dim] if rotary.span == "first" else channels[-rotary.dim :]
    if rotary.pairing == "interleaved":
        a, b = channels[0::2], channels[1::2]
    else:
        a, b = channels[: rotary.dim // 2], channels[rotary.dim // 2 :]
    angle = sign * position * rotary.frequencies()
    z = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones_like(angle), angle)
    x[..., a], x[..., b] = z.real, z.imag
    return x


def normed(x: Tensor, weight: Tensor | float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def entries_of(compressor, x: Tensor, rotary: Rotary) -> Tensor:
    """The compressor's entries of one sequence x [S, hidden]: [S // m, D]."""
    m, overlap = compressor.ratio, compressor.overlap
    kv, gate = x @ compressor.wkv.weight.T, x @ compressor.wgate.weight.T
    gate = gate + compressor.position_bias[torch.arange(len(x)) % m]
    d, out = kv.shape[1] // (1 + overlap), []
    for i in range(len(x) // m):
        v, g = kv[i * m : (i + 1) * m, -d:], gate[i * m : (i + 1) * m, -d:]
        if overlap and i:
            v = torch.cat([v, kv[(i - 1) * m : i * m, :d]])
            g = torch.cat([g, gate[(i - 1) * m : i * m, :d]])
        entry = normed((g.softmax(0) * v).sum(0), compressor.norm.weight)
        out.append(turned(entry, i * m, rotary))
    return torch.stack(out) if out else x.new_zeros(0, d)


def chosen(indexer, x: Tensor, qr: Tensor, keys: Tensor, t: int, rotary: Rotary) -> Tensor:
    """The keys that the token at t selects."""
    q = turned((qr[t] @ indexer.wq.weight.T).view(indexer.shape.heads, -1), t, rotary)
    score = (x[t] @ indexer.wproj.weight.T) @ (q @ keys.T).relu()
    return score.sort(descending=True, stable=True).indices[: indexer.shape.top_k]


def shared_oracle(made: SharedAttention, x: Tensor) -> Tensor:
    """A V4 layer over one whole sequence x [S, hidden]."""
    made, x = made.double(), x.double()
    shape, rotary, out = made.shape, made.rotary, []
    qr = normed(x @ made.wq_a.weight.T, made.q_norm.weight)
    kv = normed(x @ made.wkv.weight.T, made.kv_norm.weight)
    kv = torch.stack([turned(row, t, rotary) for t, row in enumerate(kv)])
    entries = entries_of(made.compressor, x, rotary) if made.compressor else kv[:0]
    keys = entries_of(made.index_keys, x, rotary) if made.index_keys else None
    for t in range(len(x)):
        q = normed((qr[t] @ made.wq_b.weight.T).view(shape.heads, -1), 1.0)
        q = turned(q, t, rotary)
        seen = (t + 1) // made.ratio if made.ratio else 0
        picked = entries[:seen]
        if keys is not None and seen:
            picked = entries[chosen(made.indexer, x, qr, keys[:seen], t, rotary)]
        rows = torch.cat([picked, kv[max(0, t - shape.window + 1) : t + 1]])
        logits = q @ rows.T * shape.head_dim**-0.5
        p = torch.cat([logits, made.sink[:, None]], 1).softmax(1)[:, :-1]
        o = turned(p @ rows, t, rotary, sign=-1).view(shape.out_groups, -1)
        weight = made.wo_a.weight.view(shape.out_groups, shape.out_rank, -1)
        out.append((weight @ o[..., None]).flatten() @ made.wo_b.weight.T)
    return torch.stack(out)


def latent_oracle(made, x: Tensor, *, dense: bool) -> Tensor:
    """A V3.2 layer over one sequence, keys and values of every head written out."""
    made, x = made.double(), x.double()
    shape, out = made.shape, []
    qr = normed(x @ made.wq_a.weight.T, made.q_norm.weight)
    latent = x @ made.wkv_a.weight.T
    tail = torch.stack(
        [turned(row[shape.kv_rank :], t, made.rotary) for t, row in enumerate(latent)]
    )
    kv = normed(latent[:, : shape.kv_rank], made.kv_norm.weight) @ made.wkv_b.weight.T
    kv = kv.view(len(x), shape.heads, -1)
    norm = made.index_keys.norm
    keys = torch.nn.functional.layer_norm(
        x @ made.index_keys.wk.weight.T, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    keys = torch.stack([turned(row, t, made.index_rotary) for t, row in enumerate(keys)])
    for t in range(len(x)):
        q = (qr[t] @ made.wq_b.weight.T).view(shape.heads, -1)
        rope = turned(q[:, shape.nope :], t, made.rotary)
        at = torch.arange(t + 1)
        if not dense:
            at = chosen(made.indexer, x, qr, keys[: t + 1], t, made.index_rotary)
        k, v = kv[at][..., : shape.nope], kv[at][..., shape.nope :]
        logits = torch.einsum("hn,lhn->hl", q[:, : shape.nope], k) + rope @ tail[at].T
        p = (logits * (shape.nope + shape.rope) ** -0.5).softmax(1)
        out.append(torch.einsum("hl,lhv->hv", p, v).flatten() @ made.wo.weight.T)
    return torch.stack(out)


def oracle(form: str, x: Tensor, made: SparseAttention) -> Tensor:
    with torch.no_grad():
        if form == "dsa":
            return torch.stack([latent_oracle(made, row, dense=False) for row in x])
        return torch.stack([shared_oracle(made, row) for row in x])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 3, 4, 8, 29])
def test_layers_against_float64(form: str, length: int) -> None:
    x = tokens(length)
    with torch.no_grad():
        got = layer(form)(x).output
    assert got.dtype == torch.float32
    assert close(got, oracle(form, x, layer(form)))


@pytest.mark.parametrize("form", ["window", "hca"])
def test_bfloat16_layers(form: str) -> None:
    # forms without a selection: a near tie may rightly select otherwise in bfloat16
    x = tokens(19, dtype=torch.bfloat16)
    with torch.no_grad():
        got = layer(form, dtype=torch.bfloat16)(x).output
    assert got.dtype == torch.bfloat16
    assert close(got, oracle(form, x, layer(form, dtype=torch.bfloat16)), 2e-2)


@pytest.mark.parametrize(
    ("form", "ops"),
    [
        ("window", {"sparse_attention"}),
        ("hca", {"sparse_attention", "compress_kv"}),
        ("csa", {"sparse_attention", "compress_kv", "lightning_indexer"}),
        ("dsa", {"sparse_attention", "lightning_indexer"}),
    ],
)
def test_layers_run_through_the_registry(form: str, ops: set[str]) -> None:
    with torch.no_grad(), transom.record() as calls:
        layer(form)(tokens(9))
    assert {c.op for c in calls} == ops


# Caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_edge_20_and_21_and_42_decode_after_prefill_equals_prefill(form: str) -> None:
    # 18 tokens: past the window of 7, two HCA blocks of 8, four CSA blocks of 4
    made, x = layer(form), tokens(18)
    whole, at_end = feed(made, x, [18])
    for length in range(1, 18):
        got, cache = feed(made, x, [length] + [1] * (18 - length))
        assert close(got, whole), length
        assert same_cache(cache, at_end), length


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [[5, 6, 7], [1, 3, 14], [8, 0, 8, 2], [4, 4, 4, 4, 2]])
@torch.no_grad()
def test_chunked_prefill_equals_the_whole(form: str, chunks: list[int]) -> None:
    made, x = layer(form), tokens(18)
    whole, at_end = feed(made, x, [18])
    got, cache = feed(made, x, chunks)
    assert close(got, whole)
    assert same_cache(cache, at_end)


@torch.no_grad()
def test_edge_20_hca_of_128_around_its_first_entry_and_a_window_of_128() -> None:
    shape = SharedShape(HIDDEN, 2, 8, 12, 1, 8, 128, 1e-6)
    made = SparseAttention.hca(shape, Rotary(4, 160_000.0, "interleaved", "last"), ratio=128)
    x = tokens(131, batch=1)
    whole, at_end = feed(made, x, [131])
    assert at_end.entries.shape[1] == 1
    for length in (126, 127, 128, 129):
        got, cache = feed(made, x, [length] + [1] * (131 - length))
        assert close(got, whole), length
        assert same_cache(cache, at_end), length
    assert close(whole[0], shared_oracle(made, x[0]))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_edge_40_beam_reorder(form: str) -> None:
    made, x = layer(form), tokens(15, batch=3)
    order = torch.tensor([2, 0, 0, 1])
    _, cache, _ = made(x[:, :10])
    got, _, _ = made(x[order, 10:], cache.reorder(order))
    assert close(got, made(x[order]).output[:, 10:])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_edge_40_and_41_an_older_cache_in_mid_block_is_taken_up_again(form: str) -> None:
    made, x = layer(form), tokens(17)
    _, cache, _ = made(x[:, :7])
    made(tokens(9), cache)  # rejected tokens, across boundaries of blocks
    assert cache.position == 7
    got, _, _ = made(x[:, 7:], cache)
    assert close(got, made(x).output[:, 7:])


@torch.no_grad()
def test_edge_50_caches_of_every_form_count_their_bytes() -> None:
    sizes = {form: layer(form)(tokens(13)).cache.nbytes // 4 // 2 for form in FORMS}
    window = 6 * 16
    assert sizes == {
        "window": window,
        "hca": window + 1 * 16 + 2 * 8 * 16,  # an entry; the state's values and gates
        "csa": window + 3 * (16 + 8) + 2 * 8 * (2 * 16 + 2 * 8),
        "dsa": 13 * (16 + 4) + 13 * 8,
    }


@torch.no_grad()
def test_a_window_cache_does_not_keep_the_prompt_alive() -> None:
    local = layer("window")(tokens(40)).cache.local
    assert local.untyped_storage().nbytes() == local.nbytes


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_right_padding_changes_nothing_before_it(form: str) -> None:
    made, x = layer(form), tokens(16)
    padded = torch.cat([x[:, :11], torch.full((2, 5, HIDDEN), 3.0)], 1)
    assert close(made(padded).output[:, :11], made(x[:, :11]).output)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_no_tokens_give_no_output_and_the_same_cache(form: str) -> None:
    made = layer(form)
    _, cache, _ = made(tokens(9))
    output, after, _ = made(tokens(9)[:, :0], cache)
    assert output.shape == (2, 0, HIDDEN)
    assert same_cache(after, cache)


# Equivalences (contract 14.2) ---------------------------------------------------------------------


@torch.no_grad()
def test_edge_48_csa_with_all_entries_selected_equals_all_entries() -> None:
    csa = layer("csa", index=IndexShape(8, 8, top_k=8))
    dense = SharedAttention(SHARED, ROTARY, ratio=4, overlap=True)
    dense.load_state_dict(csa.state_dict(), strict=False)
    x = tokens(35)
    assert close(csa(x).output, dense(x).output)
    assert not close(layer("csa")(x).output, dense(x).output, 1e-2)


@pytest.mark.parametrize("form", ["hca", "csa"])
@torch.no_grad()
def test_a_layer_with_less_than_a_block_sees_the_window_only(form: str) -> None:
    made, window = layer(form), layer("window")
    window.load_state_dict(made.state_dict(), strict=False)
    x = tokens(made.ratio)
    got, want = made(x).output, window(x).output
    assert torch.equal(got[:, :-1], want[:, :-1])
    # 8.2: at t = m - 1 the block just completed is visible in the same step
    assert not close(got[:, -1], want[:, -1], 1e-3)


@torch.no_grad()
def test_without_sink_and_entries_it_is_plain_window_attention() -> None:
    made, x = layer("window"), tokens(20, batch=1)
    made.sink.fill_(-math.inf)
    angles = made.rotary.angles(0, 20, device=x.device)
    q = made.wq_b(made.q_norm(made.wq_a(x))).unflatten(-1, (4, 16))
    q = made.rotary.turn(normed(q, 1.0), angles)
    kv = made.rotary.turn(made.kv_norm(made.wkv(x)), angles)[:, None].expand(1, 4, -1, -1)
    i = torch.arange(20)
    mask = (i[:, None] >= i) & (i[:, None] - i < 7)
    o = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), kv, kv, attn_mask=mask
    ).transpose(1, 2)
    assert close(made(x).output, made._project(made.rotary.turn(o, angles, inverse=True)))


@torch.no_grad()
def test_edge_44_the_window_includes_the_token_itself() -> None:
    shape = SharedShape(HIDDEN, 4, 16, 12, 2, 8, window=1, eps=1e-6)
    made, x = SparseAttention.window(shape, ROTARY), tokens(6)
    made.sink.fill_(-math.inf)
    kv = made.kv_norm(made.wkv(x))[:, :, None].expand(-1, -1, 4, -1)
    assert close(made(x).output, made._project(kv))  # turned there and back
    got, cache = feed(made, x, [1] * 6)
    assert close(got, made(x).output)
    assert cache.local.shape[1] == 0


@torch.no_grad()
def test_edge_48_dsa_up_to_top_k_tokens_equals_dense_latent_attention() -> None:
    x = tokens(9)
    got = layer("dsa", index=IndexShape(8, 8, top_k=9))(x).output
    made = layer("dsa")
    want = torch.stack([latent_oracle(made, row, dense=True) for row in x])
    assert close(got, want)
    assert not close(layer("dsa")(x).output, want, 1e-2)


@torch.no_grad()
def test_edge_36_only_distances_matter_far_beyond_the_window() -> None:
    # 70,000 tokens in: the inverse turn and exact angles make the output that of position 0
    made, x = layer("window"), tokens(20)
    far = made(x, AttentionCache(70_000)).output
    assert close(far, made(x).output, 5e-5)


@torch.no_grad()
def test_edge_36_and_37_a_wrong_angle_shows_in_the_output() -> None:
    x, right = tokens(30), layer("hca")
    want = right(x).output
    for wrong in (
        Rotary(8, 10_000.0, "interleaved", "last", ROTARY.yarn),
        Rotary(8, 160_000.0, "half", "last", ROTARY.yarn),
        Rotary(8, 160_000.0, "interleaved", "first", ROTARY.yarn),
        Rotary(8, 160_000.0, "interleaved", "last"),
    ):
        other = SparseAttention.hca(SHARED, wrong, ratio=8)
        other.load_state_dict(right.state_dict())
        assert not close(other(x).output, want, 1e-3), wrong


@pytest.mark.parametrize("form", FORMS)
def test_autocast_keeps_the_compressor_in_float32(form: str) -> None:
    made, x = layer(form), tokens(13)
    want, exact, _ = made(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, cache, loss = made(x, with_index_loss=form in ("csa", "dsa"))
    assert got.dtype == torch.bfloat16
    (got.float().sum() + (0 if loss is None else loss.sum())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    if form in ("window", "hca"):  # elsewhere a near tie may select otherwise
        assert close(got, want, 3e-2)
    if exact.state is not None:
        assert close(cache.state.kv, exact.state.kv, 1e-6)
        assert close(cache.entries, exact.entries, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_layers_compile_without_a_graph_break(form: str) -> None:
    made, x = layer(form), tokens(13)

    def two_chunks(x: Tensor) -> Tensor:
        first, cache, _ = made(x[:, :6])
        return torch.cat([first, made(x[:, 6:], cache).output], 1)

    with torch.no_grad():
        got = torch.compile(two_chunks, fullgraph=True, backend="eager")(x)
        assert close(got, two_chunks(x))


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_parameter(form: str) -> None:
    made, x = layer(form), tokens(18).requires_grad_()
    with_index = form in ("csa", "dsa")
    output, _, loss = made(x, with_index_loss=with_index)
    (output.square().sum() + (loss.sum() if loss is not None else 0)).backward()
    for name, p in made.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.ne(0).any(), name
    assert x.grad.ne(0).all()


@pytest.mark.parametrize("form", ["csa", "dsa"])
def test_the_index_loss_reaches_the_indexer_and_nothing_else(form: str) -> None:
    made, x = layer(form), tokens(18).requires_grad_()
    _, _, loss = made(x, with_index_loss=True)
    assert loss.shape == (2, 18)
    assert (loss >= -1e-6).all()
    loss.sum().backward()
    reached = {n.split(".")[0] for n, p in made.named_parameters() if p.grad is not None}
    assert reached == {"indexer", "index_keys"}
    assert x.grad is None


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_chunks_are_those_of_the_whole(form: str) -> None:
    made = layer(form, dtype=torch.float64)
    x = tokens(14, dtype=torch.float64)
    wanted = [p for n, p in made.named_parameters() if not n.startswith("index")]
    whole, _ = feed(made, x, [14])
    parts, _ = feed(made, x, [3, 6, 1, 4])
    dy = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1)).double()
    want = torch.autograd.grad(whole, wanted, dy)
    for g, w in zip(torch.autograd.grad(parts, wanted, dy), want, strict=True):
        assert close(g, w, 1e-6)


def test_the_index_target_is_the_attention_over_the_listed_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(s, generator=generator) for s in [(1, 3, 2, 8), (1, 6, 8)])
    local, sink = torch.randn(1, 3, 8, generator=generator), torch.tensor([0.3, -1.0])
    indices = torch.tensor([[[0, 2, -1], [1, 3, 5], [-1, -1, -1]]])
    _, lse = transom.sparse_attention(
        q, kv, indices, local_kv=local, window=2, sink=sink, scale=0.4, return_lse=True
    )
    target = attention_target(q, kv, indices, lse, scale=0.4, sink=sink)
    for s, at in enumerate(([0, 2], [1, 3, 5], [])):
        rows = torch.cat([kv[0, at], local[0, max(0, s - 1) : s + 1]])
        logits = torch.cat([q[0, s] @ rows.T * 0.4, sink[:, None]], 1)
        p = logits.softmax(1)[:, : len(at)].sum(0)
        assert torch.allclose(target[0, s, : len(at)], p / p.sum(), atol=1e-6)
        assert target[0, s, len(at) :].eq(0).all()


# Bad input ----------------------------------------------------------------------------------------


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match=r"SparseAttention: heads is 4; must divide by out_groups"):
        SparseAttention.window(SharedShape(HIDDEN, 4, 16, 12, 3, 8, 7, 1e-6), ROTARY)
    with pytest.raises(ValueError, match=r"SparseAttention: window is 0; must be at least 1"):
        SparseAttention.window(SharedShape(HIDDEN, 4, 16, 12, 2, 8, 0, 1e-6), ROTARY)
    with pytest.raises(ValueError, match=r"SparseAttention: ratio is 0 with an index; must be at"):
        SparseAttention.csa(SHARED, ROTARY, ratio=0, index=INDEX)
    with pytest.raises(ValueError, match=r"rotary turns the first 4 channels; must be the last"):
        SparseAttention.dsa(LATENT, HALVES, index=INDEX, index_rotary=HALVES)
    with pytest.raises(ValueError, match=r"with_index_loss is True; the layer has no indexer"):
        layer("hca")(tokens(3), with_index_loss=True)
    with pytest.raises(ValueError, match=r"rotary: dim is 5; must be even and at least 2"):
        Rotary(5, 10_000.0, "half", "last")
    with pytest.raises(ValueError, match=r"rotary: pairing is 'neox'; must be interleaved or half"):
        Rotary(4, 10_000.0, "neox", "last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rotary: span is 'middle'; must be first or last"):
        Rotary(4, 10_000.0, "half", "middle")  # type: ignore[arg-type]
