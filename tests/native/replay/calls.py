"""Calls of the conformance kit as a file for replay.cpp, and its answers against the reference."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

import transom
from transom.abi import frame as abi
from transom.conformance import agree, cases
from transom.conformance.cases import Case, build, edges
from transom.op import Op, kind_of
from transom.weights import QuantizedWeight
from transom.weights.layout import contiguous

ROOT = Path(__file__).resolve().parents[3]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """A call of the kit, and the strides that its tensors get instead of their own, by place."""

    case: Case
    strides: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.case!r}" + (f" strides={dict(self.strides)}" if self.strides else "")


@dataclass(frozen=True)
class Answer:
    """What replay.cpp says of one call."""

    refusal: str | None
    threads: int
    """The most that a run took."""
    tensors: tuple[torch.Tensor, ...]


def operators() -> list[Op[..., Any]]:
    """The operators of csrc/cpu, found by their files."""
    names = {path.stem for path in (ROOT / "csrc/cpu").glob("*/*.cpp")}
    return [op for name, op in sorted(transom.ops().items()) if name in names]


def drawn(op: Op[..., Any], count: int, dtype: torch.dtype) -> list[Call]:
    """`count` calls from the operator's declaration, the same ones each time."""
    return [Call(case) for case in cases.drawn(op, count, (dtype,))]


def borders(op: Op[..., Any]) -> list[Call]:
    """The first example with each dim 0 and 1."""
    return [Call(case) for case in edges(op)]


def everything(count: int) -> list[Call]:
    """`count` drawn calls of every operator in every dtype, and the borders."""
    return [
        call
        for op in operators()
        for some in (*(drawn(op, count, dtype) for dtype in DTYPES), borders(op))
        for call in some
    ]


def example(op: Op[..., Any], dtype: torch.dtype = torch.float32, **dims: Any) -> Call:
    """The operator's first example, which is small."""
    return Call(build(op, {**op.examples[0], **dims}, dtype))


def quantised(op: Op[..., Any], dtype: torch.dtype, **dims: Any) -> list[Call]:
    """The operator's first example with other dims, its weights in each format of integers."""
    plain = example(op, dtype, **dims).case
    found = []
    for format in ("int8", "int4", "mxfp4"):
        values = [
            transom.quantize(v.float(), format)
            if isinstance(v, torch.Tensor) and v.dim() == 3 and v.is_floating_point()
            else v
            for v in plain.values
        ]
        found.append(Call(replace(plain, values=tuple(values), text=f"{format}: {plain.text}")))
    return found


FAR = 2**31 + 64
"""Elements between two places of a dim: neither an index nor an offset in bytes has 32 bits."""


def far(call: Call) -> list[Call]:
    """The call with each dim of each tensor in turn FAR apart, in address space without memory."""
    found = []
    for i, value in enumerate(_places(call)):
        if isinstance(value, torch.Tensor) and value.numel():
            for dim, size in enumerate(value.shape):
                if 1 < size <= 64:  # a terabyte: 47 bits hold a hundred
                    strides = list(value.stride())
                    strides[dim] = FAR
                    found.append(Call(call.case, {i: tuple(strides)}))
    return found


def run(
    driver: Sequence[str | Path],
    library: Path,
    calls: Sequence[Call],
    folder: Path,
    threads: Sequence[int] = (1, 2, 3, 7),
    **environment: str,
) -> list[Answer]:
    """The answers of the driver, which must have found nothing wrong."""
    with open(folder / "calls", "wb") as file:
        _numbers(file, len(calls))
        for call in calls:
            _write(file, call)
    done = subprocess.run(
        [*driver, library, folder / "calls", folder / "results", *map(str, threads)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
        env={**os.environ, "TRANSOM_TEST_SPLIT": "1", **environment},
    )
    assert done.returncode == 0, f"{done.stderr[-6000:]}\nexit status {done.returncode}"
    with open(folder / "results", "rb") as file:
        return [_read(file, call) for call in calls]


def wrong(calls: Sequence[Call], answers: Sequence[Answer]) -> list[str]:
    """Answers that differ from the reference by more than the kit's tolerance."""
    found = []
    for call, answer in zip(calls, answers, strict=True):
        if answer.refusal is None:
            given = agree.as_given(call.case)
            if (problem := agree.with_reference(call.case, given, answer.tensors)) is not None:
                found.append(f"{call}: {problem}")
    return found


def threads_of(calls: Sequence[Call], answers: Sequence[Answer], least: int = 1) -> set[str]:
    """The operators that have run, in at least one call on so many threads."""
    return {
        call.case.op.name
        for call, answer in zip(calls, answers, strict=True)
        if answer.refusal is None and answer.threads >= least
    }


def _places(call: Call) -> Iterator[Any]:
    """The arguments as transom_call has them: a weight takes four places."""
    for p, value in zip(call.case.op.parameters, call.case.values, strict=True):
        if isinstance(value, QuantizedWeight):
            yield from (value.values, value.scales, value.zeros, value.spec)
        else:
            yield value
            if p.role == "weight":
                yield from (None,) * 3


def _outputs(case: Case) -> list[tuple[tuple[int, ...], torch.dtype]]:
    if case.op.mutates:
        return []
    kinds = {n: kind_of(t) for n, t in case.op.tensors(case.values).items()}
    return case.op.outputs(case.dims, kinds)


def _written(case: Case) -> list[torch.Tensor]:
    return [
        v for p, v in zip(case.op.parameters, case.values, strict=True) if p.name in case.op.mutates
    ]


def _numbers(file: BinaryIO, *numbers: int) -> None:
    file.write(struct.pack(f"<{len(numbers)}q", *numbers))


def _text(file: BinaryIO, text: bytes) -> None:
    _numbers(file, len(text))
    file.write(text)


def _tensor(
    file: BinaryIO,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    written: bool,
    dense: bytes,
) -> None:
    code, bits = abi._DTYPES[dtype]
    _numbers(file, code, bits, written)
    _numbers(file, len(shape), *shape)
    _numbers(file, len(strides), *strides)
    _text(file, dense)


def _bytes(tensor: torch.Tensor) -> bytes:
    dense = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return dense.view(torch.uint8).numpy().tobytes()


def _write(file: BinaryIO, call: Call) -> None:
    case, places = call.case, list(_places(call))
    _text(file, case.op.name.encode())
    _numbers(file, len(places))
    written = {id(t) for t in _written(case)}
    for i, value in enumerate(places):
        if value is None:
            _numbers(file, abi._NONE)
        elif isinstance(value, torch.Tensor):
            _numbers(file, abi._TENSOR)
            strides = call.strides.get(i, value.stride())
            _tensor(file, value.shape, strides, value.dtype, id(value) in written, _bytes(value))
        elif isinstance(value, bool):
            _numbers(file, abi._BOOL, value)
        elif isinstance(value, (int, float)):
            _number(file, case.op, places, i, value)
        elif isinstance(value, str):
            _numbers(file, abi._STRING)
            _text(file, value.encode())
        else:
            _numbers(file, abi._INTS, len(value), *value)
    kinds = [p.role for p in case.op.parameters for _ in range(4 if p.role == "weight" else 1)]
    weights = [i for i, kind in enumerate(kinds) if kind == "weight"][::4]
    _numbers(file, len(weights), *weights)
    outputs = _outputs(case)
    _numbers(file, len(outputs))
    for shape, dtype in outputs:
        _tensor(file, shape, contiguous(shape, dtype)[2], dtype, True, b"")


def _number(file: BinaryIO, op: Op[..., Any], places: list[Any], at: int, value: float) -> None:
    """An int or a float, as the declaration says: 1 may stand for 1.0."""
    kinds = [p.type for p in op.parameters for _ in range(4 if p.role == "weight" else 1)]
    if kinds[at].startswith("float"):
        _numbers(file, abi._FLOAT)
        file.write(struct.pack("<d", value))
    else:
        _numbers(file, abi._INT, int(value))


def _read(file: BinaryIO, call: Call) -> Answer:
    def number() -> int:
        return int(struct.unpack("<q", file.read(8))[0])

    code, threads = number(), number()
    text, count = file.read(number()).decode(), number()
    raw = [file.read(number()) for _ in range(count)]
    assert code < 2, f"{call}: failed, {text}"
    if code == 1:
        assert text, f"{call}: refused without a sentence"
        return Answer(text, threads, ())
    wanted = _outputs(call.case) or [(tuple(t.shape), t.dtype) for t in _written(call.case)]
    tensors = [
        torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
        if data
        else torch.empty(shape, dtype=dtype)
        for data, (shape, dtype) in zip(raw, wanted, strict=True)
    ]
    return Answer(None, threads, tuple(tensors))
