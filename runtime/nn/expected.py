"""Checks of what modules are called with, in their own words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expect(module: str, name: str, value: Tensor | None, shape: str, /, **sizes: int) -> None:
    """Raise unless `value` is a tensor of this shape (or None: nothing to check).

    shape  names of dims with spaces between, "..." first for any leading ones; a dim whose size is
           among `sizes` must have it

    TypeError for what is no tensor, ValueError for another shape.
    """
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{module}: {name} is a {type(value).__name__}; expected a torch.Tensor")
    dims = shape.split()
    lead = dims[0] == "..."
    named = dims[1:] if lead else dims
    seen = value.shape
    if (len(seen) >= len(named) if lead else len(seen) == len(named)) and all(
        sizes.get(dim, size) == size
        for dim, size in zip(named, seen[len(seen) - len(named) :], strict=True)
    ):
        return
    text = ", ".join(f"{dim} = {sizes[dim]}" if dim in sizes else dim for dim in dims)
    raise ValueError(f"{module}: {name} has shape {list(seen)}; expected [{text}]")


def expect_bool(module: str, name: str, value: Tensor | None) -> None:
    """TypeError unless `value` is a tensor of bool, or None."""
    if value is not None and value.dtype != torch.bool:
        kind = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{module}: {name} is {kind}; expected bool")


def expect_for_each(
    module: str, name: str, value: Tensor | None, lead: Sequence[int], *tail: int
) -> None:
    """Raise unless `value` [*lead, *tail] has an entry for each token of x [*lead, hidden]; the
    tokens may also stand in one dim."""
    if value is None:
        return
    expect(module, name, value, "...")
    tokens = 1
    for size in lead:
        tokens *= size
    if list(value.shape) not in ([*lead, *tail], [tokens, *tail]):
        raise ValueError(
            f"{module}: {name} has shape {list(value.shape)}; x has the tokens {list(lead)}: "
            f"expected {[*lead, *tail]}"
        )
