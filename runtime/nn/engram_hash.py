"""The numbers of an Engram table: which ids count as one, which primes and multipliers address it.

They appear nowhere in a checkpoint: a config and a tokenizer give them, and a wrong tokenizer
rehashes everything in silence. So they are built here, on the CPU, and compared by checksum.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INT64_MAX = 2**63 - 1
LAYER_STRIDE = 10007
"""How far the seeds of two neighbouring layers lie apart (the demo's number)."""
REPLACEMENT = "\ufffd"
"""What a tokenizer decodes to where a token is no whole character."""


@dataclass(frozen=True)
class EngramHash:
    """What addresses one layer's table: int64 tensors for `hashed_embedding`, and its row count."""

    multipliers: Tensor
    moduli: Tensor
    offsets: Tensor
    rows: int


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
            torch.from_numpy(2 * draws + 1), sizes, ends - sizes.flatten(), int(ends[-1])
        )
    return out


def token_map_checksum(token_map: Tensor) -> int:
    """CRC-32 of a token compression table as little-endian int32: it tells tokenizers apart."""
    return zlib.crc32(token_map.detach().cpu().numpy().astype("<i4").tobytes())


def build_token_map(decoded: Sequence[str], pieces: Sequence[str]) -> Tensor:
    """int32 [vocab], raw id -> compressed id: ids alike but for case, accents, space become one.

    decoded  the text that each id decodes to by itself
    pieces   the token of each id as the vocabulary spells it; stands in where the text is no whole
             character

    A text is brought to NFKC, then NFD without combining marks, lower case, runs of space, tab and
    line ends made one space, and trimmed (a text that is one space keeps it); if nothing is left it
    stays as it was. Compressed ids count up in the order of first appearance.
    *Source:* Engram, arXiv 2601.07372, section 3 and its demo code.
    """
    if len(decoded) != len(pieces):
        raise ValueError(
            f"build_token_map: decoded has {len(decoded)} texts, pieces has {len(pieces)};"
            " expected one of each for each id"
        )
    numbers: dict[str, int] = {}
    keys = (
        piece if REPLACEMENT in text else _folded(text) or text
        for text, piece in zip(decoded, pieces, strict=True)
    )
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int32)


def _folded(text: str) -> str:
    marks = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    bare = "".join(c for c in marks if unicodedata.category(c) != "Mn").lower()
    single = re.sub(r"[ \t\r\n]+", " ", bare)
    return single if single == " " else single.strip()


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
