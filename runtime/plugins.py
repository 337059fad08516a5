"""Backends in this tree and plugins of vendors: found, probed and loaded when a call first needs
them.

A backend is a folder of transom.backends with `probe() -> str | None` (None: usable here; else the
sentence why not) and DEVICES, the device types it can serve. Its implementation of `moe/route` is
imported from `moe/route.py` below it. A plugin is an entry point of the group `transom.plugins`: a
callable that takes the package `transom` and registers implementations with public names only. What
fails to load becomes a reason, never an import error.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import config

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .dispatch import Facts
    from .op import Impl, Op

GROUP = "transom.plugins"


@dataclass(frozen=True)
class Backend:
    """A backend of this tree: what devices it serves, why it can't be used here (None: it can)."""

    name: str
    devices: tuple[str, ...]
    unavailable: str | None


@dataclass
class Plugin:
    """An installed plugin: where it comes from, and the error that loading it gave (None: loaded or
    not yet tried)."""

    name: str
    distribution: str
    devices: tuple[str, ...]
    """The device types that it names as its entry point's extras; empty: loaded at the first call
    of all."""
    entry: EntryPoint
    loaded: bool = False
    error: str | None = None
    trace: str | None = None


_loading: str | None = None
_lock = threading.RLock()


@functools.cache
def backends() -> dict[str, Backend]:
    """The backends of this tree, each probed once a process."""
    package = importlib.import_module("transom.backends")  # the attribute is the function
    out = {}
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if not found.ispkg:
            continue
        try:
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            out[found.name] = Backend(found.name, tuple(module.DEVICES), module.probe())
        except ImportError as error:
            out[found.name] = Backend(found.name, (), f"failed to import: {error}")
    return out


@functools.cache
def plugins() -> dict[str, Plugin]:
    """The installed plugins that TRANSOM_PLUGINS lets through, sorted; not loaded by this."""
    from importlib.metadata import entry_points  # 15 ms: not at `import transom`

    wanted = config.PLUGINS.get()
    if wanted == "none":
        return {}
    chosen = None if wanted == "all" else {n.strip() for n in wanted.split(",")}
    out = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        if chosen is None or entry.name in chosen:
            distribution = (
                f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown distribution"
            )
            out[entry.name] = Plugin(entry.name, distribution, tuple(entry.extras), entry)
    return out


def loading() -> str | None:
    """The plugin whose register() is running."""
    return _loading


def load_plugin(plugin: Plugin) -> None:
    """Load one plugin now; its failure is kept as its `error`."""
    global _loading
    if plugin.loaded or plugin.error:
        return
    import transom

    _loading = plugin.name
    try:
        plugin.entry.load()(transom)
        plugin.loaded = True
    except Exception as error:  # whatever it raises is its reason: it must not break a call
        plugin.error = f"plugin {plugin.name} failed to load: {type(error).__name__}: {error}"
        plugin.trace = traceback.format_exc()
    finally:
        _loading = None


def load(op: Op[..., Any], device: str) -> None:
    """Make every implementation of `op` that could serve `device` known; each source is tried
    once."""
    with _lock:  # a thread that comes meanwhile waits: it would miss what is not yet added
        if device in op._loaded:
            return
        op._loaded.add(device)
        for plugin in plugins().values():
            if not plugin.devices or device in plugin.devices:
                load_plugin(plugin)
        if op.path and "" not in op._loaded:
            op._loaded.add("")
            for backend in backends().values():
                _load_backend(op, backend)


def _load_backend(op: Op[..., Any], backend: Backend) -> None:
    from .op import Impl

    module = f"transom.backends.{backend.name}.{op.path.replace('/', '.')}"
    try:
        if importlib.util.find_spec(module) is None:
            return
    except ModuleNotFoundError:  # the backend has no folder for this family
        return
    reason = backend.unavailable
    if reason is None:
        try:
            importlib.import_module(module)
            return
        except ImportError as error:
            reason = f"{module} failed to import: {error}"
    if backend.name not in op.impls:
        op._add(
            Impl(op.name, backend.name, backend.name, _never, tier="portable", unavailable=reason)
        )


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an unavailable implementation was run")


def serves(impl: Impl, facts: Facts) -> bool:
    """True if this implementation is for the call's device type, so that not running it is worth a
    warning."""
    backend = backends().get(impl.backend)
    if impl.unavailable:
        return backend is not None and facts.device in backend.devices
    return all(r(facts) is None for r in impl.requires if r.kind == "device")
