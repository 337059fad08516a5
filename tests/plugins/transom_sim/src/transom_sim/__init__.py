"""A simulated accelerator: the torch device "sim", and transom's operators on it.

library   the C library: the table's services, and what else it exports
memory    tensors over the device's memory; copying, pickling, saving them
aten      torch's own operators: data, metadata, and the counted way round by the CPU
streams   Stream, Event, the current stream
device    what becomes torch.sim
"""

from __future__ import annotations

from typing import Any

_mounted = False


def mount() -> None:
    """Make "sim" a device of torch. `import torch` calls this (entry point torch.backends)."""
    global _mounted
    if _mounted:
        return
    import torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    taken = torch._C._get_privateuse1_backend_name()
    if taken != "privateuseone":
        raise RuntimeError(f"transom_sim: PrivateUse1 is {taken!r} in this process; only one fits")
    from . import aten, device, memory

    _setup_privateuseone_for_python_backend("sim", backend_module=device)
    aten.register()
    memory.register()
    _mounted = True


def register(transom: Any) -> None:
    """Add the library's implementations. transom calls this at the first call on a "sim" tensor
    (entry point transom.plugins)."""
    from . import library

    mount()
    library.plugin()
