"""A hash as one would write it in numba: all n-gram sizes and heads in one pass over the tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cases import Case
from ..measure import Candidate

Values = Mapping[str, Any]


def probe() -> str | None:
    """numba must load."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """The hash alone."""
    if case.op != "ngram_hash":
        return []
    return [Candidate("numba fused hash", "numba", lambda _: _hash, "one parallel loop, compiled")]


@functools.cache
def _kernel() -> Any:
    import numba

    @numba.njit(parallel=True)
    def kernel(tokens, multipliers, moduli, offsets, pad, out):  # type: ignore[no-untyped-def]
        n, heads = multipliers.shape[0], moduli.shape[1]
        for s in numba.prange(tokens.shape[0]):
            mix = tokens[s] * multipliers[0]
            for g in range(1, n):
                token = tokens[s - g] if s >= g else pad
                mix ^= token * multipliers[g]
                for j in range(heads):
                    column = (g - 1) * heads + j
                    out[s, column] = mix % moduli[g - 1, j] + offsets[column]

    return kernel


def _hash(v: Values) -> Tensor:
    import numba

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    out = torch.empty(*v["tokens"].shape, v["moduli"].numel(), dtype=torch.int32)
    arrays = [v[n].numpy() for n in ("multipliers", "moduli", "offsets")]
    _kernel()(v["tokens"][0].numpy(), *arrays, v["pad"], out[0].numpy())
    return out
