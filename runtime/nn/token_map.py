"""Token compression of an Engram: which raw ids of a tokenizer count as one.

A table is addressed by compressed ids, so a map that differs by one token from the one that the
table was trained with reads other rows for every n-gram, in silence. The folding of texts is
therefore done by the library that the published map was made with, and a map is compared by its
checksum and by the number of its ids.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes to where a token is no whole character."""
SENTINEL = "\ue000"
"""Stands for a text that is one space while others are trimmed."""


def token_map_checksum(token_map: Tensor) -> int:
    """CRC-32 of a token compression table as little-endian int32: it tells tokenizers apart."""
    return zlib.crc32(token_map.detach().cpu().numpy().astype("<i4").tobytes())


def build_token_map(decoded: Sequence[str], pieces: Sequence[str]) -> Tensor:
    """int32 [vocab], raw id -> compressed id: ids alike but for case, accents, space become one.

    decoded  the text that each id decodes to by itself
    pieces   the token of each id as the vocabulary spells it; stands in where the text is no whole
             character (holds U+FFFD)

    A text goes through these steps of the tokenizers library, in order: NFKC, NFD, StripAccents,
    Lowercase, runs of space, tab and line ends made one space, Strip; a text that is one space by
    then is kept (U+E000 stands for it meanwhile, so that this character reads as a space). If
    nothing is left, the text stays as it was. Compressed ids count up in the order of first
    appearance. Raises ImportError without the tokenizers library.

    *Source:* Engram, arXiv 2601.07372, section 3 and its demo code.
    """
    if len(decoded) != len(pieces):
        raise ValueError(
            f"build_token_map: decoded has {len(decoded)} texts, pieces has {len(pieces)};"
            " expected one of each for each id"
        )
    folded = _folding()
    numbers: dict[str, int] = {}
    keys = (
        piece if REPLACEMENT in text else folded(text) or text
        for text, piece in zip(decoded, pieces, strict=True)
    )
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int32)


def _folding() -> Callable[[str], str]:
    """A text -> what is left of it: two texts of the same rest have one compressed id."""
    try:
        from tokenizers import Regex, normalizers
    except ImportError as error:
        raise ImportError(
            "build_token_map: the tokenizers library is not installed, and no other folds every"
            " text as it does; pip install 'transom[transformers]'"
        ) from error
    # Python's unicodedata is no stand-in: another version of Unicode, another set of combining
    # marks, and a lower case that looks at a letter's neighbours.
    steps = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(SENTINEL, " "),
        ]
    )
    fold: Callable[[str], str] = steps.normalize_str
    return fold
