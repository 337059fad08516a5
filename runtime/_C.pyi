"""csrc/bind.cpp: calls of C implementations without cffi between them."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from torch import Tensor

ABI: Final[tuple[int, int]]
"""The version of transom_plugin.h that it was compiled with."""
TENSOR: Final[int]
WEIGHT: Final[int]
"""Kinds of a parameter; that of a plain one is its tag."""

def set_up(
    tensor: type,
    quantized: type,
    threads: Callable[[], int],
    deterministic: Callable[[], bool],
    written: Callable[[Sequence[Tensor]], None],
) -> str | None:
    """Learn the types and functions that calls use. None, or why this torch's tensors cannot be
    read."""

def watch(
    parameter: type,
    grad_enabled: Callable[[], bool],
    dispatch_modes: Callable[[], int],
    function_modes: Callable[[], int],
    transforms: Callable[[], Any],
    tracing: Callable[[], Any],
    any_autocast: Callable[[], bool],
    autocast: Callable[[str], bool],
    capturing: Callable[[], bool],
) -> None:
    """Learn whom direct() asks whether a call may go past torch's dispatcher."""

def direct(
    parameters: list[tuple[int, bool]],
    plans: dict[Any, Any],
    selection: dict[str, Any],
    recorders: list[Any],
    plan_of: Callable[[tuple[Any, ...], Any], Any],
    otherwise: Callable[..., Any],
) -> Callable[..., Any]:
    """A built-in function of one operator's declared arguments, for eager calls.

    parameters  (kind, may be None) in declared order
    plans       the operator's own; plan_of (arguments, key) makes a missing one and keeps it there
    selection   holds `_choice`, what use() asks for
    recorders   while there are any, and for calls that are out of the ordinary, otherwise (every
                argument) answers
    """

def bind(
    impl: int,
    op: str,
    parameters: list[tuple[str, int, bool]],
    makers_of: Callable[
        [Sequence[Any]],
        tuple[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any] | None], ...],
    ],
    fail: Callable[[int, int, bytes], NoReturn],
    greedy: Callable[[int], NoReturn],
    far: Callable[[Any, int], tuple[int, Tensor | None]],
    packed: Callable[[int, Any], Tensor | None] | None,
    written: list[int],
) -> Callable[..., Any]:
    """A built-in function that runs the transom_impl at this address.

    parameters  (name, kind, may be None) in declared order
    makers_of   (arguments) -> for each output the function that makes it, its arguments, keywords
    fail        (code, status code, text) raises; greedy (bytes of workspace) likewise
    far         (device, bytes) -> stream, workspace; asked for devices other than the host
    packed      (place, weight) -> its packed form or None
    written     arguments that it writes to, by number
    """

def ranges(
    given: list[tuple[int, int, bool, int, int]], count: int, otherwise: Callable[..., None]
) -> Callable[..., None]:
    """A built-in function of one operator's declared arguments, `count` of them: does nothing where
    every range holds, else otherwise (every argument) is called.

    given  (argument, argument to add or the same one, rising, low, high) for each range
    """
