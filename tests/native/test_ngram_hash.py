"""Native ngram_hash: moduli at the edges of its formulas, every layout of its arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import transom
from transom.kernels.engram.hashed_embedding import hashed_embedding
from transom.kernels.engram.ngram_hash import hash_reference

REASON = transom.backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

LEAST, MOST = -(2**63), 2**63 - 1
VECTORED = [2**13, 2**13 + 1, 2**20 + 7, 2262403, 2**24, 2**30 + 3, 2**31 - 1, 2**31 - 19]
OTHERS = [1, 2, 3, 5, 64, 2**13 - 1]
WIDE = [2**31, 2**31 + 1, 2**32 - 1, 2**32 + 15, 2**53 - 1, 2**62 - 57, 2**62, MOST - 24, MOST]


def run(op, *args, **kwargs):
    with transom.use("native"), transom.record() as calls:
        out = op(*args, **kwargs)
    assert [(c.op, c.impl) for c in calls] == [(op.name, "native")]
    return out


def mixes(moduli, seed):
    """One-token n-grams whose mix is any number at all: with pad 0 it is the product."""
    g = np.random.default_rng(seed)
    m = np.resize(np.array(moduli, dtype=object), 400)
    around = m * g.integers(1, 2**20, len(m)) + g.integers(-1, 2, len(m))
    picked = [
        *(int(v) for v in around),
        *(-int(v) for v in around),
        LEAST,
        LEAST + 1,
        MOST,
        MOST - 1,
        0,
        1,
        -1,
        2**53,
        2**53 + 1,
        -(2**53) - 1,
    ]
    return np.array([v for v in picked if LEAST <= v <= MOST] + list(g.integers(LEAST, MOST, 3000)))


@pytest.mark.parametrize(
    "moduli", [VECTORED, OTHERS, [*VECTORED, 7]], ids=["vector", "small", "both"]
)
def test_every_mix_has_the_floor_modulo(moduli):
    """A token of 1 times a multiplier is the mix; each multiplier is a call of its own."""
    size = torch.tensor([moduli])
    ones = torch.ones(1, 1, dtype=torch.int64)
    implementation = transom.ngram_hash
    for mix in mixes(moduli, 0)[::9]:
        factors = torch.tensor([int(mix), 0])
        rows = run(implementation, ones, factors, size, pad=0)
        assert rows[0, 0].tolist() == [int(mix) % m for m in moduli], mix


@pytest.mark.parametrize("moduli", [VECTORED, OTHERS, WIDE], ids=["vector", "small", "wide"])
@pytest.mark.parametrize("seed", range(3))
def test_row_numbers_beyond_32_bits_and_any_modulus(moduli, seed):
    """Through hashed_embedding, whose rows are 64 bits: a shard of one row says which was read."""
    g = np.random.default_rng(seed)
    h, n = len(moduli), 3
    size = torch.tensor(np.stack([moduli, moduli[::-1]]))
    factors = torch.tensor(g.integers(LEAST, MOST, n))
    tokens = torch.tensor(g.integers(0, MOST, (1, 6)))
    want = hash_reference(tokens.numpy(), factors.numpy(), size.numpy(), None, 5, None, None)
    table, zero = torch.ones(1, 1), torch.zeros((n - 1) * h, dtype=torch.int64)
    for s, c in [(0, 0), (1, h - 1), (3, h), (5, 2 * h - 1)]:
        y = run(
            hashed_embedding,
            tokens,
            table,
            multipliers=factors,
            moduli=size,
            offsets=zero,
            pad=5,
            shard=(int(want[0, s, c]), 1),
        )
        assert torch.equal(y[0] != 0, torch.from_numpy(want[0] == want[0, s, c]))


@pytest.mark.parametrize("h", [1, 3, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_any_number_of_columns_and_places(rng, h, n):
    B, S = 3, 37
    tokens = torch.tensor(rng.integers(-1, 10**6, (B, S)))
    size = torch.tensor(rng.integers(2**13, 2**24, (n - 1, h)))
    size[-1, 0] = 11  # one column that takes the other formula
    starts = torch.tensor(rng.integers(0, 2**30, (n - 1) * h))
    factors = torch.tensor(rng.integers(LEAST, MOST, n))
    lookback = torch.tensor(rng.integers(-1, 9, (B, n - 1)))
    blocked = torch.tensor(rng.random((B, S)) < 0.2)
    given = dict(offsets=starts, pad=3, lookback=lookback, blocked=blocked)
    want = hash_reference(
        *(t.numpy() for t in (tokens, factors, size, starts)), 3, lookback.numpy(), blocked.numpy()
    )
    rows = run(transom.ngram_hash, tokens, factors, size, **given)
    assert np.array_equal(rows.numpy(), want)
    apart = {
        k: t[:, None].repeat(1, 2, 1)[:, 1].mT.contiguous().mT
        if k in ("lookback", "blocked")
        else t
        for k, t in given.items()
    }
    assert torch.equal(
        run(transom.ngram_hash, tokens.mT.contiguous().mT, factors, size, **apart), rows
    )


def test_the_same_rows_at_any_number_of_threads(rng):
    tokens = torch.tensor(rng.integers(0, 10**5, (5, 3001)))
    size, factors = torch.tensor([[2262403] * 8, [646403] * 8]), torch.tensor([3, 5, 7])
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run(transom.ngram_hash, tokens, factors, size, pad=2))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
