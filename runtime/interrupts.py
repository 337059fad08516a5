"""Ctrl-C while an operator writes one of its arguments: held back until all of it is written.

A kernel in C is one step to Python anyway. An implementation in Python goes through an argument
piece by piece, and an exception between two of them would leave it neither as it was nor as it
should be.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


def uninterrupted(function: Callable[..., Any], *values: Any) -> Any:
    """function(*values); a SIGINT meanwhile reaches Python's handler of it when that is done."""
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only, so that others cannot be interrupted.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        return function(*values)
    seen: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame)))
    try:
        return function(*values)
    finally:
        signal.signal(signal.SIGINT, before)
        if seen:
            before(*seen[0])
