"""Streams, events and the current stream, as torch.cuda has them."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from typing import Any

from . import library

STREAMS = 8
_turn = itertools.cycle(range(1, STREAMS))
_lock = threading.Lock()


class Stream:
    """One of the device's streams; a new one is the next of seven, in turns. Work that is enqueued
    runs when somebody waits for it."""

    def __init__(self, device: Any = None, priority: int = 0, *, number: int | None = None) -> None:
        with _lock:
            self.number = next(_turn) if number is None else number

    @property
    def sim_stream(self) -> int:
        """The native handle."""
        return int(library.exports().sim_stream(self.number))

    def synchronize(self) -> None:
        """Wait for all that is enqueued."""
        library.exports().sim_wait(self.number, 2**64 - 1)

    def query(self) -> bool:
        """True if all that is enqueued is done."""
        now = library.exports().sim_record(self.number)
        return bool(library.exports().sim_reached(self.number, now))

    def record_event(self, event: Event | None = None) -> Event:
        """An event at this point of the stream."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """What is enqueued from now on runs after the event."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """What is enqueued from now on runs after all that is enqueued on `stream`."""
        self.wait_event(stream.record_event())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __repr__(self) -> str:
        return f"<torch.sim.Stream {self.number}>"


class Event:
    """A point of a stream: how many commands it had when the event was recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        if enable_timing:
            raise NotImplementedError("events of 'sim' do not time; use torch.sim.clock()")
        self._stream, self._number = 0, 0

    def record(self, stream: Stream | None = None) -> None:
        """Take the point that the stream has reached."""
        self._stream = (stream or current_stream()).number
        self._number = library.exports().sim_record(self._stream)

    def query(self) -> bool:
        """True if the stream has passed it."""
        return bool(library.exports().sim_reached(self._stream, self._number))

    def synchronize(self) -> None:
        """Wait until the stream has passed it."""
        library.exports().sim_wait(self._stream, self._number)

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait for it."""
        number = (stream or current_stream()).number
        if not library.exports().sim_stream_waits(number, self._stream, self._number):
            raise MemoryError("sim: no memory for an event")


def current_stream(device: Any = None) -> Stream:
    """The stream that this thread's work goes to."""
    return Stream(number=library.exports().sim_current())


def default_stream(device: Any = None) -> Stream:
    """Stream 0, which every thread begins with."""
    return Stream(number=0)


def set_stream(stream: Stream) -> None:
    """Let this thread's work go to `stream`."""
    library.exports().sim_set_current(stream.number)


@contextlib.contextmanager
def stream(stream: Stream | None) -> Iterator[None]:
    """Let this thread's work go to `stream` within the block."""
    before = current_stream()
    if stream is not None:
        set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)
