"""Ranges of integers within which a rule on values holds, so that transom._C can check a call
without asking the rule.

    @op.check_values
    @satisfied_by("1 <= sizes; 1 <= sizes + starts <= V; 0 <= rising ends <= M")
    def _(sizes, starts, ends, V, M): ...

Bounds are inclusive, expressions over dims and plain arguments. What is added up is added element
by element; of that, a tensor which is not given adds nothing. A rising one is never less than the
element before. The rule stays what decides: it is asked, and words the error, where a range does
not hold, and where there is no extension or a tensor is none that it reads (csrc/python/).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from .op import Op
from .shapes import Expression

F = TypeVar("F", bound=Callable[..., Any])
Bounds: TypeAlias = tuple[int, int, bool, int, int]
"""Positions of the first and the last tensor (one and the same: it stands alone), whether their sum
rises, and what it lies between."""
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


def bounds(op: Op[..., Any], scope: Mapping[str, Any]) -> list[Bounds]:
    """The ranges of an operator's rule on values, in a call with these dims and plain arguments."""
    given = []
    for r in ranges_of(op.rule_on_values.function) if op.rule_on_values else ():
        places = [op.position[name] for name in r.tensors]
        low, high = (min(max(LEAST, e(scope)), MOST) for e in (r.low, r.high))
        given.append((places[0], places[-1], r.rising, low, high))
    return given
