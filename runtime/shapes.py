"""Shapes of a declaration: `x[*B, D], bias?[E] -> y[*B, D]`.

A dim is a symbol (bound where it is first seen), `*B` (any leading dims), a number, or an
expression over symbols and integer arguments (`(2+R)*R`). `?` marks a tensor that may be absent.
The same text gives the checks with their messages, the shapes of the outputs, fake kernels and the
shapes of property tests.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

Bound = dict[str, Any]
"""What a call's symbols stand for: an int each, a tuple of ints for `*B`."""

MOST_ELEMENTS = 1 << 48
"""Of a tensor of a call: what is computed from sizes then stays within 64 bits everywhere."""
MOST_OF_EMPTY = 1 << 24
"""The largest size of a tensor without elements, which costs its maker nothing: a kernel that goes
through them one by one ends within a second."""

_NODES = (
    ast.Expression,
    ast.BinOp,
    ast.UnaryOp,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Compare,
    ast.IfExp,
    ast.Add,
    ast.Sub,
    ast.Mult,
    ast.Div,
    ast.FloorDiv,
    ast.Mod,
    ast.Pow,
    ast.USub,
    ast.Gt,
    ast.GtE,
    ast.Lt,
    ast.LtE,
    ast.Eq,
    ast.NotEq,
    ast.Attribute,
)
_FUNCTIONS: Bound = {
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "prod": math.prod,
    "log2": math.log2,
}


def size_fault(shape: Sequence[int]) -> str | None:
    """None, or the sentence why a tensor of this shape is none that a kernel is given."""
    most = max(shape, default=0)
    if 0 in shape and most > MOST_OF_EMPTY:
        return f"has shape {list(shape)} without elements; sizes may be at most {MOST_OF_EMPTY}"
    if math.prod(size for size in shape if size) > MOST_ELEMENTS:
        return f"has shape {list(shape)}; supported: 2^48 elements"
    return None


class Expression:
    """Arithmetic over symbols; parsed at first use, since `import transom` declares hundreds."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()

    @functools.cached_property
    def _parsed(self) -> tuple[CodeType, frozenset[str]]:
        tree = ast.parse(self.text, mode="eval")
        for node in ast.walk(tree):
            if not isinstance(node, _NODES):
                raise ValueError(
                    f"expression {self.text!r}: {type(node).__name__} is not arithmetic"
                )
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") not in _FUNCTIONS:
                raise ValueError(
                    f"expression {self.text!r}: expected one of {', '.join(_FUNCTIONS)}"
                )
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - set(_FUNCTIONS)
        return compile(tree, self.text, "eval"), frozenset(names)

    @property
    def names(self) -> frozenset[str]:
        """The symbols that it reads."""
        return self._parsed[1]

    def __call__(self, bound: Mapping[str, Any]) -> Any:
        return eval(self._parsed[0], {"__builtins__": {}, **_FUNCTIONS}, dict(bound))


@dataclass(frozen=True)
class Shape:
    """The declared shape of one tensor."""

    name: str
    dims: tuple[str, ...]
    optional: bool
    star: int | None
    expressions: tuple[Expression | None, ...]

    @classmethod
    def parse(cls, name: str, optional: bool, text: str) -> Shape:
        dims = tuple(d.strip() for d in text.split(",") if d.strip())
        star = next((i for i, d in enumerate(dims) if d.startswith("*")), None)
        expressions = tuple(
            None if d.isidentifier() or d.startswith("*") else Expression(d) for d in dims
        )
        return cls(name, dims, optional, star, expressions)

    def __str__(self) -> str:
        return f"[{', '.join(self.dims)}]"

    def sizes(self, bound: Mapping[str, Any]) -> tuple[Any, ...]:
        """The shape that `bound` gives."""
        out: list[Any] = []
        for dim, expression in zip(self.dims, self.expressions, strict=True):
            if expression is not None:
                out.append(expression(bound))
            elif dim.startswith("*"):
                out.extend(bound[dim[1:]])
            else:
                out.append(bound[dim])
        return tuple(out)


_TENSOR = re.compile(r"(\w+)(\??)\[([^\]]*)\]")


@dataclass(frozen=True)
class Signature:
    """The declared shapes of an operator's tensors."""

    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]

    @classmethod
    def parse(cls, text: str) -> Signature:
        left, _, right = text.partition("->")

        def side(part: str) -> dict[str, Shape]:
            return {n: Shape.parse(n, bool(q), dims) for n, q, dims in _TENSOR.findall(part)}

        return cls(side(left), side(right))

    def symbols(self) -> list[str]:
        """The dim symbols in order of appearance, `*B` as 'B'."""
        out: dict[str, None] = {}
        for shape in (*self.inputs.values(), *self.outputs.values()):
            for dim, expression in zip(shape.dims, shape.expressions, strict=True):
                for symbol in (
                    (dim.lstrip("*"),) if expression is None else sorted(expression.names)
                ):
                    out.setdefault(symbol)
        return list(out)

    def bind(
        self, op: str, shapes: Mapping[str, Sequence[int]], arguments: Mapping[str, Any]
    ) -> Bound:
        """Symbols of the call from the shapes of its tensors.

        Raises ValueError with one line that names the tensor, what it has and what was expected.
        """
        bound: Bound = {k: v for k, v in arguments.items() if isinstance(v, int)}
        source: dict[str, str] = dict.fromkeys(bound, "the argument")
        later: list[tuple[str, str, Expression, int]] = []
        for name, declared in self.inputs.items():
            if name not in shapes:
                continue
            shape = tuple(shapes[name])
            need = len(declared.dims) - (declared.star is not None)
            if len(shape) < need or (declared.star is None and len(shape) != need):
                raise ValueError(
                    f"{op}: {name} has shape {list(shape)}; expected {declared}"
                    + (f" ({need} or more dims)" if declared.star is not None else "")
                )
            for dim, expression, size in self._pairs(declared, shape):
                if expression is not None:
                    later.append((name, dim, expression, size))
                elif dim not in bound:
                    bound[dim], source[dim] = size, name
                elif bound[dim] != size:
                    raise ValueError(
                        f"{op}: {name} has {dim} = {_text(size)}; "
                        f"{source[dim]} has {dim} = {_text(bound[dim])}"
                    )
        for name, dim, expression, size in later:
            if expression.names <= bound.keys() and expression(bound) != size:
                raise ValueError(
                    f"{op}: {name} has {size} where {self.inputs[name]} is declared; "
                    f"expected {dim} = {expression(bound)}"
                )
        return bound

    @staticmethod
    def _pairs(declared: Shape, shape: tuple[int, ...]) -> list[tuple[str, Expression | None, Any]]:
        if declared.star is None:
            return list(zip(declared.dims, declared.expressions, shape, strict=True))
        star, tail = declared.star, len(declared.dims) - declared.star - 1
        end = len(shape) - tail
        sizes = (*shape[:star], shape[star:end], *shape[end:])
        return [
            (d.lstrip("*"), e, s)
            for d, e, s in zip(declared.dims, declared.expressions, sizes, strict=True)
        ]


def _text(size: Any) -> str:
    return str(list(size)) if isinstance(size, tuple) else str(size)
