"""A plugin's services: memory, copies and streams of its device."""

from __future__ import annotations

from typing import Any

from ..errors import PluginError
from . import library

TO_DEVICE, FROM_DEVICE, WITHIN_DEVICE = 1, 2, 3
"""Directions of a copy."""


class Services:
    """The services of a library as functions, for the Python that mounts a device on torch.

    Addresses and streams are numbers; stream 0 means: done on return. A service that the library
    lacks, or that fails, raises PluginError (MemoryError if the device's memory is exhausted).
    """

    def __init__(self, vendor: str, pointer: Any) -> None:
        self._vendor, self._table = vendor, pointer

    def has(self, service: str) -> bool:
        """True if the library offers it."""
        return bool(getattr(self._table, service))

    def allocate(self, bytes: int, device: int = 0) -> int:
        """The address of `bytes` > 0 of the device's memory, 64-byte aligned."""
        status = library.interface().new("transom_status *")
        address = int(self._number(self._get("allocate")(device, bytes, status)))
        if not address:
            text = library.message(status) or f"no {bytes} bytes on device {device}"
            raise MemoryError(f"plugin {self._vendor}: {text}")
        return address

    def release(self, address: int, device: int = 0) -> None:
        """Give back what allocate() answered."""
        self._run("release", device, self._pointer(address))

    def copy(
        self, to: int, source: int, bytes: int, direction: int, *, stream: int = 0, device: int = 0
    ) -> None:
        """Enqueue a copy; `direction` is TO_DEVICE, FROM_DEVICE or WITHIN_DEVICE."""
        ends = self._pointer(to), self._pointer(source)
        self._run("copy", device, *ends, bytes, direction, self._pointer(stream))

    def synchronize(self, stream: int = 0, device: int = 0) -> None:
        """Wait for what is enqueued on `stream`; 0: on every stream of the device."""
        self._run("synchronize", device, self._pointer(stream))

    def stream(self, device: int = 0) -> int:
        """The stream that this thread's work goes to."""
        return self._number(self._get("stream")(device))

    def _run(self, service: str, *args: Any) -> None:
        status = library.interface().new("transom_status *")
        code = self._get(service)(*args, status)
        if code:
            text = library.message(status) or "gives no reason"
            error = MemoryError if (status.code or code) == 3 else PluginError
            raise error(f"plugin {self._vendor}: {service} failed with code {code}: {text}")

    def _get(self, service: str) -> Any:
        function = getattr(self._table, service)
        if not function:
            raise PluginError(f"plugin {self._vendor}: has no service {service}")
        return function

    @staticmethod
    def _pointer(address: int) -> Any:
        return library.interface().cast("void *", address)

    @staticmethod
    def _number(pointer: Any) -> int:
        return int(library.interface().cast("uintptr_t", pointer))
