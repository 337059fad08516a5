"""Ranges of integers within which a rule on values holds, so that transom._C can check a call
without asking the rule.

    @op.check_values
    @satisfied_by("1 <= sizes; 1 <= sizes + starts <= V; 0 <= rising ends <= M")
    def _(sizes, starts, ends, V, M): ...

Bounds are inclusive, expressions over dims and plain arguments. What is added up is added element
by element; of that, a tensor which is not given adds nothing. A rising one is never less than the
element before. The rule stays what decides: it is asked, and words the error, where a range does
not hold, and where there is no extension or a tensor is none that it reads (csrc/ranges.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..shapes import Expression
from . import road

if TYPE_CHECKING:
    from ..op import Op

F = TypeVar("F", bound=Callable[..., Any])
LEAST, MOST = -(2**63), 2**63 - 1
_RANGE = re.compile(
    r"(?P<low>.+?) <= (?P<rising>rising )?(?P<one>[a-z]\w*)(?: \+ (?P<other>[a-z]\w*))?"
    r"(?: <= (?P<high>.+))?"
)


@dataclass(frozen=True)
class Range:
    """low <= the sum of the tensors <= high."""

    tensors: tuple[str, ...]
    rising: bool
    low: Expression
    high: Expression

    @classmethod
    def parse(cls, text: str) -> Range:
        found = _RANGE.fullmatch(text)
        if found is None:
            form = "low <= [rising] tensor [+ tensor] [<= high]"
            raise ValueError(f"range {text!r}; expected {form}")
        names = tuple(filter(None, found.group("one", "other")))
        high = Expression(found["high"] or str(MOST))
        return cls(names, bool(found["rising"]), Expression(found["low"]), high)


def satisfied_by(text: str) -> Callable[[F], F]:
    """Say of a rule on values that it answers None wherever these ranges hold, with ; between
    them."""
    ranges = tuple(Range.parse(part.strip()) for part in text.split(";"))

    def mark(rule: F) -> F:
        rule.ranges = ranges  # type: ignore[attr-defined]
        return rule

    return mark


def ranges_of(rule: Callable[..., Any]) -> Sequence[Range]:
    """What satisfied_by() said of it."""
    return getattr(rule, "ranges", ())


def ahead_of(
    check: Callable[..., None], op: Op[..., Any], bound: Mapping[str, Any]
) -> Callable[..., None]:
    """`check`, a function of all declared arguments, behind its rule's ranges in a call with these
    dims and plain arguments."""
    ranges = ranges_of(op._check_values) if op._check_values else ()
    extension = road.extension()
    if not ranges or extension is None:
        return check
    given = []
    for r in ranges:
        places = [op._rank[name] for name in r.tensors]
        low, high = (min(max(LEAST, e(bound)), MOST) for e in (r.low, r.high))
        given.append((places[0], places[-1], r.rising, low, high))
    made: Callable[..., None] = extension.ranges(given, len(op.parameters), check)
    return made
