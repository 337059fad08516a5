"""The largest plain arguments that operators take.

A call on small tensors then ends within a second, whatever its arguments, and nothing that is
computed from them leaves 64 bits. Models stay far below: 20 iterations, a top_k of 2048, blocks of
128 tokens.
"""

from __future__ import annotations

ITERATIONS = 1000
"""Of Sinkhorn; the gradient keeps what each of them gave."""
TOP_K = 1 << 20
"""Keys that a query selects; all of them are written, -1 where there are fewer."""
BLOCK = 1 << 20
"""Tokens of a block, and elements of a group or a side of a block that share a scale."""
DILATION = 1 << 16
"""Rows between two taps of a convolution, whose state has as many."""
WINDOW = 1 << 20
"""Tokens of a window, also of one that is longer than the sequence."""
ROWS = 1 << 44
"""Rows of a gradient; row numbers have 64 bits, but a kernel sorts those of a shard."""


def above(most: int, **arguments: int) -> str | None:
    """The sentence against the first argument above `most`, or None."""
    for name, value in arguments.items():
        if value > most:
            return f"{name} is {value}; must be at most {most}"
    return None
