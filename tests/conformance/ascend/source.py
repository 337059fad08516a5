"""A Triton kernel as the text of a module that needs nothing but Triton.

The frontend that lowers it lives in an environment without torch and without transom, and reads a
kernel's source from its file. So a kernel is sent as text: its function, the functions and
constants that it names, and theirs.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any


class NotPortable(Exception):
    """A kernel names something that can't be sent as text."""


def standalone(kernel: Any) -> str:
    """The module: imports, constants and functions in the order they need each other."""
    found: dict[str, str] = {}
    seen: dict[str, Any] = {}
    _collect(kernel, found, seen)
    return "\n\n".join(("import triton", *found.values())) + "\n"


def function_of(kernel: Any) -> FunctionType:
    """The Python function below @triton.jit, of the compiler or of the interpreter."""
    while not isinstance(kernel, FunctionType):
        kernel = kernel.fn
    return kernel


def name_of(kernel: Any) -> str:
    return function_of(kernel).__name__


def _collect(kernel: Any, found: dict[str, str], seen: dict[str, Any]) -> None:
    function = function_of(kernel)
    if function.__closure__:
        raise NotPortable(f"{function.__name__} is a closure; expected a function of a module")
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    text = "\n".join(lines[start:])
    seen[function.__name__] = kernel
    for name, value in _names(text, function.__globals__):
        if name in seen:
            if seen[name] is not value:
                raise NotPortable(f"{name} means two things in what {function.__name__} calls")
            continue
        seen[name] = value
        if isinstance(value, ModuleType):
            found[name] = f"import {value.__name__} as {name}"
        elif _is_jit(value):
            if name != name_of(value):
                raise NotPortable(f"{name} is another name of {name_of(value)}")
            _collect(value, found, seen)
        elif callable(value) and hasattr(value, "__name__"):
            if not value.__module__.startswith("triton"):
                raise NotPortable(f"{name} is a function that Triton does not compile")
            found[name] = f"from {value.__module__} import {value.__name__} as {name}"
        else:
            found[name] = _constant(name, value)
    found[function.__name__] = f"@triton.jit\n{text}"


def _names(text: str, scope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names of its module that a function reads, each once."""
    nodes = list(ast.walk(ast.parse(text)))
    own = {n.arg for n in nodes if isinstance(n, ast.arg)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    read = [n.id for n in nodes if isinstance(n, ast.Name)]
    for name in dict.fromkeys(read):
        if name in scope and name not in own and not hasattr(builtins, name):
            yield name, scope[name]


def _is_jit(value: Any) -> bool:
    inner: Callable[..., Any] | None = getattr(value, "fn", None)
    return isinstance(inner, FunctionType) and type(value).__module__.startswith("triton.runtime")


def _constant(name: str, value: Any) -> str:
    plain = getattr(value, "value", value)  # of a tl.constexpr
    if not isinstance(plain, (int, float, str, bool, tuple)):
        raise NotPortable(f"{name} is a {type(value).__name__}; expected a function or a constant")
    text = f'float("{plain}")' if isinstance(plain, float) else repr(plain)
    return f"{name} = triton.language.constexpr({text})"
