"""Backends in this tree and plugins of vendors: found, probed and loaded when a call first needs
them.

A backend is a folder of transom.backends with `probe() -> str | None` (None: usable here; else the
sentence why not) and DEVICES, the device types it can serve. Its implementation of `moe/route` is
imported from `moe/route.py` below it, unless the backend's own `offered(op)` says what registers it
(None: it has none). A plugin is an entry point of the group `transom.plugins`: a callable that
takes the package `transom` and registers implementations with public names only. What fails to load
becomes a reason, never an import error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from . import config
from .abi.plugin import refusals
from .facts import Facts
from .op import Impl, Op, registering
from .registry import OPS, forget_plans

GROUP = "transom.plugins"


@dataclass(frozen=True)
class Backend:
    """A backend of this tree: what devices it serves, why it can't be used here (None: it can)."""

    name: str
    devices: tuple[str, ...]
    unavailable: str | None
    offered: Callable[[Op[..., Any]], Callable[[], Any] | None]
    """What registers its implementations of an operator; None if it has none."""


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
    refused: dict[str, str] = field(default_factory=dict)
    """By 'operator/implementation': why part of what it offers cannot be used."""


class PluginWarning(UserWarning):
    """A plugin or a backend could not be loaded, wholly or in part; the text says why (once)."""


_lock = threading.RLock()
_OWN = ("composite", "reference")


@functools.cache
def backends() -> dict[str, Backend]:
    """The backends of this tree, each probed once a process."""
    package = importlib.import_module("transom.backends")  # the attribute is the function
    out = {}
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if not found.ispkg:
            continue
        devices: tuple[str, ...] = ()
        files = functools.partial(_file_of, found.name)
        try:
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            devices = tuple(module.DEVICES)
            offered = getattr(module, "offered", files)
            out[found.name] = Backend(found.name, devices, module.probe(), offered)
        except (Exception, SystemExit) as error:  # whatever it is, the other backends are there
            reason = f"failed to load: {_text(error)}"
            out[found.name] = Backend(found.name, devices, reason, files)
            _warn(f"backend {found.name} {reason}")
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


def load_plugin(plugin: Plugin) -> None:
    """Load one plugin now, wholly or not at all; its failure is kept as its `error`."""
    if plugin.loaded or plugin.error:
        return
    try:
        if plugin.name in (*backends(), *_OWN):
            raise ValueError("has the name of a backend of transom; expected a name of its own")
        with _all_or_nothing() as added, registering(plugin.name):
            plugin.entry.load()(importlib.import_module("transom"))
            taken = sorted({impl for _, impl in added()} & {*backends(), *_OWN})
            if taken:
                raise ValueError(
                    f"registers an implementation {taken[0]!r}, the name of a backend of transom; "
                    "expected a name of its own"
                )
        plugin.loaded = True
        plugin.refused = refusals(plugin.name)
    except (Exception, SystemExit) as error:  # whatever it is, it must not break a call
        plugin.error = f"plugin {plugin.name} failed to load: {_text(error)}"
        plugin.trace = traceback.format_exc()
        _warn(plugin.error)
    for what, why in plugin.refused.items():
        _warn(f"plugin {plugin.name}: {what} cannot be used: {why}")


def load(op: Op[..., Any], device: str) -> None:
    """Make every implementation of `op` that could serve `device` known; each source is tried
    once. One that is interrupted (Ctrl-C) is tried again at the next call."""
    if device in op.loaded:
        return
    with _lock:  # a thread that comes meanwhile waits: it would miss what is not yet added
        for plugin in plugins().values():
            if not plugin.devices or device in plugin.devices:
                load_plugin(plugin)
        if op.path and "" not in op.loaded:
            for backend in backends().values():
                _load_backend(op, backend)
            op.loaded.add("")
        op.loaded.add(device)


def _load_backend(op: Op[..., Any], backend: Backend) -> None:
    register = backend.offered(op)
    if register is None:
        return
    reason = backend.unavailable
    if reason is None:
        try:
            with _all_or_nothing():
                register()
            return
        except (Exception, SystemExit) as error:
            reason = f"{op.path} failed to load: {_text(error)}"
            _warn(f"backend {backend.name}: {reason}")
    if backend.name not in op.impls:
        op.add(
            Impl(op.name, backend.name, backend.name, _never, tier="portable", unavailable=reason)
        )


def _file_of(backend: str, op: Op[..., Any]) -> Callable[[], Any] | None:
    """What imports a backend's file of an operator; None if it has none. Nothing is imported to
    find it: a backend that is broken has its files."""
    folders = importlib.import_module("transom.backends").__path__
    if not any(Path(folder, backend, f"{op.path}.py").exists() for folder in folders):
        return None
    module = f"transom.backends.{backend}.{op.path.replace('/', '.')}"
    return functools.partial(importlib.import_module, module)


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[Any]:
    """Within the block, implementations may be registered: where it is left by an error, none of
    them is. Yields a function: the (operator, implementation) pairs that were added so far."""
    before = {name: dict(op.impls) for name, op in OPS.items()}

    def added() -> list[tuple[str, str]]:
        return [
            (name, impl)
            for name, op in OPS.items()
            for impl in op.impls
            if impl not in before.get(name, ())
        ]

    try:
        yield added
    except BaseException:
        for name in [name for name in OPS if name not in before]:
            del OPS[name]
        for name, impls in before.items():
            OPS[name].impls = impls
        forget_plans()
        raise


def _warn(text: str) -> None:
    warnings.warn(text, PluginWarning, stacklevel=2)


def _text(error: BaseException) -> str:
    """The error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an unavailable implementation was run")


def serves(impl: Impl, facts: Facts) -> bool:
    """True if this implementation is for the call's device type, so that not running it is worth a
    warning."""
    backend = backends().get(impl.backend)
    if impl.unavailable:
        return backend is not None and facts.device in backend.devices
    return all(r(facts) is None for r in impl.requires if r.kind == "device")
