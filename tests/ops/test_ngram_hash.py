"""ngram_hash: what the generic kit cannot know. Numbers are those of contracts section 12."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import transom

B, S, N, H, PAD = 2, 9, 4, 3, 7
INT64_MAX = 2**63 - 1


def numbers(n: int = N, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    sizes = 1009 + 2 * rng.permutation(60)[: (n - 1) * H].reshape(n - 1, H)
    return dict(
        multipliers=torch.from_numpy(2 * rng.integers(0, 2**62, n) + 1),
        moduli=torch.from_numpy(sizes),
    )


def tokens(seed: int = 0, s: int = S, top: int = 5000) -> Tensor:
    return torch.randint(0, top, (B, s), generator=torch.Generator().manual_seed(seed))


def oracle(padded: np.ndarray, multipliers: Tensor, moduli: Tensor) -> np.ndarray:
    """The demo's way: whole shifted arrays in NumPy's wrapping int64; `padded` has n-1 ids before
    the chunk."""
    n, s = len(multipliers), padded.shape[1] - len(multipliers) + 1
    with np.errstate(over="ignore"):
        terms = [
            padded[:, n - 1 - g : n - 1 - g + s].astype(np.int64) * multipliers.numpy()[g]
            for g in range(n)
        ]
    out, mix = [], terms[0]
    for g in range(1, n):
        mix = np.bitwise_xor(mix, terms[g])
        out += [np.mod(mix, int(m)) for m in moduli[g - 1]]
    return np.stack(out, -1)


def with_start(ids: Tensor, n: int = N) -> np.ndarray:
    return np.concatenate([np.full((len(ids), n - 1), PAD), ids.numpy()], 1)


def test_matches_the_demo_bit_for_bit():
    ids, call = tokens(), numbers()
    rows = transom.ngram_hash(ids, **call, pad=PAD)
    assert rows.dtype == torch.int32
    np.testing.assert_array_equal(rows.numpy(), oracle(with_start(ids), **call))


@pytest.mark.parametrize("s", [0, 1, 2])
def test_edge_51_no_tokens_and_fewer_tokens_than_n(s):
    ids, call = tokens(s=s), numbers()
    rows = transom.ngram_hash(ids, **call, pad=PAD)
    assert rows.shape == (B, s, (N - 1) * H)
    np.testing.assert_array_equal(rows.numpy(), oracle(with_start(ids), **call))


@pytest.mark.parametrize("columns", range(N))
def test_edge_51_before_a_short_lookback_is_the_start(columns):
    ids, call = tokens(), numbers()
    whole = transom.ngram_hash(ids, **call, pad=PAD)
    cut = dict(**call, pad=PAD, lookback=ids[:, :columns])
    assert torch.equal(transom.ngram_hash(ids[:, columns:], **cut), whole[:, columns:])
    assert transom.explain("ngram_hash", ids[:, columns:], **cut).chosen == "composite"
    compiled = torch.compile(transom.ngram_hash, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids[:, columns:], **cut), whole[:, columns:])


def test_edge_51_a_lookback_longer_than_n_minus_1_is_refused():
    text = "ngram_hash: lookback has 4 columns; expected at most n-1 = 3; pass the newest"
    with pytest.raises(ValueError, match=f"^{text}$"):
        transom.ngram_hash(tokens(), **numbers(), pad=PAD, lookback=tokens(s=4))


def test_edge_51_a_short_history_is_filled_with_negative_ids():
    ids, call = tokens(), numbers()
    whole = transom.ngram_hash(ids, **call, pad=PAD)
    history = torch.cat([torch.full((B, 2), -1), ids[:, :1]], 1)
    rows = transom.ngram_hash(ids[:, 1:], **call, pad=PAD, lookback=history)
    assert torch.equal(rows, whole[:, 1:])


@pytest.mark.parametrize("cut", range(1, S))
def test_edge_60_chunks_with_lookback_equal_the_whole(cut):
    ids, call = tokens(), numbers()
    whole = transom.ngram_hash(ids, **call, pad=PAD)
    start = torch.cat([torch.full((B, N - 1), -1), ids[:, :cut]], 1)
    rows = transom.ngram_hash(ids[:, cut:], **call, pad=PAD, lookback=start[:, 1 - N :])
    assert torch.equal(rows, whole[:, cut:])


def test_edge_60_token_by_token_decode_equals_the_whole():
    ids, call = tokens(), numbers()
    whole = transom.ngram_hash(ids, **call, pad=PAD)
    seen = torch.cat([torch.full((B, N - 1), -1), ids], 1)
    for s in range(S):
        step = transom.ngram_hash(
            ids[:, s : s + 1], **call, pad=PAD, lookback=seen[:, s : s + N - 1]
        )
        assert torch.equal(step[:, 0], whole[:, s])


def test_edge_52_left_padding_hashes_like_the_start_of_a_sequence():
    ids, call = tokens(), numbers()
    alone = transom.ngram_hash(ids, **call, pad=PAD)
    for filler, blocked in ((PAD, None), (-100, None), (3, torch.arange(S + 2).expand(B, -1) < 2)):
        padded = torch.cat([torch.full((B, 2), filler), ids], 1)
        rows = transom.ngram_hash(padded, **call, pad=PAD, blocked=blocked)
        assert torch.equal(rows[:, 2:], alone)


def test_edge_53_negative_ids_never_give_a_negative_row():
    ids, call = tokens(), numbers()
    ids[:, ::3] = -torch.randint(1, 10**6, ids[:, ::3].shape)
    rows = transom.ngram_hash(ids, **call, pad=PAD)
    assert int(rows.min()) >= 0
    assert torch.equal(rows, transom.ngram_hash(ids.clamp_min(0), **call, pad=PAD, blocked=ids < 0))


def test_edge_57_products_wrap_and_the_modulo_floors():
    ids = torch.tensor([[2**31 - 1, 2**62, INT64_MAX, 5, INT64_MAX]])
    multipliers = torch.tensor([INT64_MAX, INT64_MAX - 2, 3])
    moduli = torch.tensor([[1009, 2**31 - 1], [10007, 2]])
    rows = transom.ngram_hash(ids, multipliers, moduli, pad=PAD)
    stream = [PAD, PAD] + ids[0].tolist()
    for s in range(ids.shape[1]):
        mix = 0
        for g in range(3):
            mix ^= stream[s + 2 - g] * int(multipliers[g]) % 2**64
            signed = mix - 2**64 if mix >= 2**63 else mix
            for h in range(2 if g else 0):
                assert int(rows[0, s, (g - 1) * 2 + h]) == signed % int(moduli[g - 1, h])
    assert int(rows.min()) >= 0


def test_edge_58_the_columns_of_shorter_n_grams_do_not_depend_on_n():
    ids, call = tokens(), numbers()
    long = transom.ngram_hash(ids, **call, pad=PAD)
    short = transom.ngram_hash(ids, call["multipliers"][:2], call["moduli"][:1], pad=PAD)
    assert torch.equal(long[..., :H], short)


def test_edge_59_blocked_positions_stop_every_n_gram():
    ids, call = tokens(), numbers()
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[:, 3:5] = True
    rows = transom.ngram_hash(ids, **call, pad=PAD, blocked=blocked)
    for b in range(B):
        for s in range(S):
            window, dead = [], False
            for g in range(N):
                dead = dead or s < g or bool(blocked[b, s - g])
                window.insert(0, PAD if dead else int(ids[b, s - g]))
            want = oracle(np.array([window]), **call)[0, 0]
            np.testing.assert_array_equal(rows[b, s].numpy(), want)


def test_edge_59_behind_a_block_a_sequence_starts_anew():
    ids, call = tokens(), numbers()
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[:, 4] = True
    rows = transom.ngram_hash(ids, **call, pad=PAD, blocked=blocked)
    assert torch.equal(rows[:, 5:], transom.ngram_hash(ids[:, 5:], **call, pad=PAD))


def test_edge_60_a_negative_lookback_id_carries_a_block():
    ids, call = tokens(), numbers()
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[:, 3] = True
    whole = transom.ngram_hash(ids, **call, pad=PAD, blocked=blocked)
    kept = torch.where(blocked, -1, ids)[:, 5 - N : 4]
    rows = transom.ngram_hash(ids[:, 4:], **call, pad=PAD, lookback=kept, blocked=blocked[:, 4:])
    assert torch.equal(rows, whole[:, 4:])


def test_offsets_are_added_to_each_column():
    ids, call = tokens(), numbers()
    ends = call["moduli"].flatten().cumsum(0)
    offsets = ends - call["moduli"].flatten()
    rows = transom.ngram_hash(ids, **call, pad=PAD)
    shifted = transom.ngram_hash(ids, **call, offsets=offsets, pad=PAD)
    assert torch.equal(shifted, (rows + offsets).int())
    assert bool((shifted >= offsets).all() and (shifted < ends).all())


def test_index_dtypes_give_the_same_rows():
    ids, call = tokens(), numbers()
    rows = transom.ngram_hash(ids, **call, pad=PAD)
    narrow = transom.ngram_hash(ids.int(), call["multipliers"], call["moduli"].int(), pad=PAD)
    assert torch.equal(rows, narrow)


@pytest.mark.parametrize("mib", ["0.0001", "0.001"])
def test_blocks_of_any_size_give_the_same_rows(monkeypatch, mib):
    ids, call = tokens(), numbers()
    blocked = torch.rand(B, S, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = transom.ngram_hash(ids, **call, pad=PAD, blocked=blocked)
    monkeypatch.setenv("TRANSOM_WORKSPACE_MB", mib)
    assert torch.equal(whole, transom.ngram_hash(ids, **call, pad=PAD, blocked=blocked))


def test_vmap_folds_into_the_batch():
    ids, call = tokens(), numbers()
    stacked = torch.stack([ids, tokens(1), tokens(2)])
    rows = torch.vmap(lambda t: transom.ngram_hash(t, **call, pad=PAD))(stacked)
    assert torch.equal(rows[1], transom.ngram_hash(stacked[1], **call, pad=PAD))


def test_the_composite_ran():
    with transom.record() as calls:
        transom.ngram_hash(tokens(), **numbers(), pad=PAD)
    assert [(c.op, c.impl) for c in calls] == [("ngram_hash", "composite")]


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(moduli=torch.zeros(N - 1, H).long()), "moduli has 0; every entry must be > 0"),
        (dict(offsets=torch.full(((N - 1) * H,), -5)), "offsets has -5; every entry must be >= 0"),
        (
            dict(offsets=torch.full(((N - 1) * H,), 2**31)),
            "row numbers are int32; use hashed_embedding",
        ),
        (dict(pad=-1), "pad is -1; must be a token id in 0..2147483647"),
        (dict(moduli=torch.ones(N, H).long()), "moduli has 4 where"),
    ],
)
def test_bad_input_is_refused_in_one_line(change, text):
    with pytest.raises(ValueError, match="^ngram_hash: .*") as error:
        transom.ngram_hash(tokens(), **{**numbers(), "pad": PAD, **change})
    assert text in str(error.value) and "\n" not in str(error.value)


def test_multipliers_must_be_int64():
    call = numbers()
    call["multipliers"] = call["multipliers"].int()
    with pytest.raises(TypeError, match="ngram_hash: multipliers is int32; expected int64"):
        transom.ngram_hash(tokens(), **call, pad=PAD)
