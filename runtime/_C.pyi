"""csrc/python: the road of a call, from Python's arguments to what computes it."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

ABI: Final[tuple[int, int]]
"""The version of transom_plugin.h that it was compiled with."""
TENSOR: Final[int]
WEIGHT: Final[int]
"""Kinds of a parameter; that of a plain one is its tag."""

def set_up(given: Mapping[str, Any]) -> str | None:
    """Learn the types and functions of torch that calls ask (abi/extension.py names them). None, or
    why this torch's tensors cannot be read."""

def set_choice(choice: str) -> None:
    """What use() asks for, as text that goes into every key; empty outside of it."""

def set_recorded(hook: Callable[[Any, tuple[Any, ...]], Any] | None) -> None:
    """While record() listens: (plan's record, values) -> result, in place of running the plan."""

def set_workspace(bytes: int) -> None:
    """Bytes that the temporaries of a call should keep to."""

class Operator:
    """A declaration, as calls are read by it."""

    def __init__(
        self, name: str, parameters: list[tuple[str, int, bool]], host: list[int]
    ) -> None: ...

class Plan:
    """What a call of one key runs; `record` is what Python knows of it."""

    def __init__(self, record: Any) -> None: ...
    def set_check(
        self, bounds: list[tuple[int, int, bool, int, int]], function: Callable[..., None]
    ) -> None:
        """Ask `function` (every argument) about the values of a call outside these bounds:
        (argument, argument to add or the same one, rising, low, high)."""

    def set_run(self, function: Callable[..., Any]) -> None:
        """What computes the call, of every argument in order."""

class Caller:
    """How calls of one operator enter.

    most       plans that are kept
    plan_of    (values, gradient) -> a Plan, and whether it may be kept
    otherwise  (*values) -> result of a call that torch must see
    unread     (values, gradient) -> result of one that only Python can read
    """

    def __init__(
        self,
        operator: Operator,
        most: int,
        plan_of: Callable[[tuple[Any, ...], bool], tuple[Plan, bool]],
        otherwise: Callable[..., Any],
        unread: Callable[[tuple[Any, ...], bool], Any],
    ) -> None: ...
    @property
    def enter(self) -> Callable[..., Any]:
        """A built-in function of every declared argument in order, for eager calls."""

    def run(self, values: tuple[Any, ...], gradient: bool) -> Any:
        """The result of a call that torch's dispatcher has let through."""

    def plans(self) -> list[Any]:
        """The records of the plans that are kept."""

    def forget(self) -> None:
        """Drop them."""

def implementation(
    function: Any, look: Callable[[int, Any], Tensor | None] | None, operator: Operator
) -> Callable[..., Any]:
    """A built-in function that runs the transom_impl of a CFunction (abi/plugin.py).

    look  (first argument, weight) -> the packed form of a weight, or None
    """
