"""The numbers that address an Engram table: its primes, multipliers and offsets.

They appear nowhere in a checkpoint: a config gives them, together with the number of ids that the
tokenizer's compression leaves (see token_map.py). So they are built here, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INT64_MAX = 2**63 - 1
LAYER_STRIDE = 10007
"""How far the seeds of two neighbouring layers lie apart (the demo's number)."""


@dataclass(frozen=True)
class EngramHash:
    """What addresses one layer's table: int64 tensors for `hashed_embedding`, its row count, and
    how many ids the multipliers were drawn for (None: not known)."""

    multipliers: Tensor
    moduli: Tensor
    offsets: Tensor
    rows: int
    ids: int | None = None


def engram_hashes(
    layers: Sequence[int],
    *,
    table_sizes: Sequence[int],
    heads: int,
    compressed_vocab: int,
    seed: int,
) -> dict[int, EngramHash]:
    """The hash of every Engram layer, rebuilt from a config.

    layers            layer numbers *in the order of the config*: a prime is never used twice, so
                      the order decides them
    table_sizes       least rows of a column, one entry for each n-gram size 2, 3, ...
    heads             columns for each n-gram size
    compressed_vocab  number of ids after compression; it bounds the multipliers so that valid ids
                      never wrap
    seed              of the multipliers, as in the config

    Columns have prime sizes: for every layer and n-gram size the next primes from the table size on
    that no column has yet; a table has exactly as many rows as they add up to.
    *Source:* Engram, arXiv 2601.07372, and its demo code.
    """
    if not table_sizes or min(table_sizes) < 1 or heads < 1 or compressed_vocab < 1:
        raise ValueError(
            f"engram_hashes: table_sizes is {list(table_sizes)}, heads is {heads},"
            f" compressed_vocab is {compressed_vocab}; expected at least one size, and all >= 1"
        )
    seen: set[int] = set()
    out = {}
    for layer in layers:
        moduli = []
        for size in table_sizes:
            candidate = size
            found: list[int] = []
            while len(found) < heads:
                if candidate not in seen and _is_prime(candidate):
                    seen.add(candidate)
                    found.append(candidate)
                candidate += 1
            moduli.append(found)
        half = max(1, INT64_MAX // compressed_vocab // 2)
        rng = np.random.default_rng(seed + LAYER_STRIDE * layer)
        draws = rng.integers(0, half, size=len(table_sizes) + 1, dtype=np.int64)
        sizes = torch.tensor(moduli, dtype=torch.int64)
        ends = sizes.flatten().cumsum(0)
        out[layer] = EngramHash(
            torch.from_numpy(2 * draws + 1),
            sizes,
            ends - sizes.flatten(),
            int(ends[-1]),
            compressed_vocab,
        )
    return out


def _is_prime(n: int) -> bool:
    """Miller-Rabin with bases that leave no composite below 3.3e24 undetected."""
    small = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in small):
        return n in small
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in small:
        power = pow(base, odd, n)
        if power in (1, n - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % n
            if power == n - 1:
                break
        else:
            return False
    return True
