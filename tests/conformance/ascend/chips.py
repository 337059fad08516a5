"""L3: a lowered kernel through the vendor's compiler for a chip, and the memory plan that it makes.

The compiler reports its plan differently by family: as JSON in its folder for the 910s, of which
buffer lies where; on the 950s as a line with the unified buffer's use, and as constant addresses in
the final program, which the stand-in for the closed last step keeps (environment.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transom.config import cache_folder

from .environment import PINS, Environment
from .launch import Program, how_it_died, run_child

TARGETS = ("Ascend910B3", "Ascend910_9391", "Ascend950PR_9589")
"""One chip of each generation: 910B, 910C, 950PR."""

SPACES = {"ub": "UB", "cbuf": "L1", "cc": "L0C"}
"""The compiler's names of the memories that a kernel plans, and everybody's."""

OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")
UB_LINE = re.compile(r"UB size = (\d+) bits")
CAPACITY = re.compile(r'"(UB|L1|L0C)_SIZE", (\d+)')
CORES = re.compile(r'"(AI|VECTOR)_CORE_COUNT", (\d+)')
CONSTANT = re.compile(r"(%[\w$]+) = (?:llvm\.mlir\.constant\(|arith\.constant )(\d+) : i64")
BUFFER = re.compile(
    r"pointer_cast\(([^)]*)\)[^:]*: memref<([^#]*?)[,>]?\s*#hivm\.address_space<(\w+)>"
)
BITS = {"bf16": 16, "index": 64}


@dataclass(frozen=True)
class Plan:
    """What the compiler for a chip made of a kernel."""

    target: str
    fits: bool
    use: Mapping[str, int] = field(default_factory=dict)
    """Bytes by memory: UB, L1, L0C. Of a kernel that doesn't fit, of the memory that overflowed."""
    capacity: Mapping[str, int] = field(default_factory=dict)
    cores: int = 0
    why: str = ""
    """Why it doesn't fit, or was refused otherwise."""

    @property
    def fullest(self) -> tuple[str, float] | None:
        """The memory that is used most, and how much of it."""
        shares = [(n / self.capacity[m], m) for m, n in self.use.items() if self.capacity.get(m)]
        return (max(shares)[1], max(shares)[0]) if shares else None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def compile_for(environment: Environment, program: Program, target: str) -> Plan:
    """The plan of one program on one chip; kept, so that it is made once."""
    newer = "950" in target
    # the frontend's own remark to the launcher; its compiler refuses it
    text = re.sub(r', mix_mode\s*=\s*"[^"]*"', "", program.linalg(newer))
    made_of = "|".join((text, target, *PINS, Path(__file__).read_text()))
    name = f"{program.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.json"
    place = cache_folder() / "ascend" / "plans" / name
    if place.exists():
        return Plan(**json.loads(place.read_text()))
    status, plan = _compiled(environment, text, target)
    if status is not None and status != -signal.SIGKILL:  # else it may have been the machine
        place.parent.mkdir(parents=True, exist_ok=True)
        new = place.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        new.write_text(json.dumps(plan.plain()))
        new.replace(place)
    return plan


def _compiled(environment: Environment, text: str, target: str) -> tuple[int | None, Plan]:
    """The compiler's status, and its plan."""
    newer = "950" in target
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "kernel.mlir").write_text(text)
        report = "--enable-print-memory-allocated-size" if newer else "--enable-memory-display"
        command = [
            environment.compiler(newer),
            "kernel.mlir",
            f"--target={target}",
            report,
            # with threads it loses messages, and crashes now and then
            "--mlir-disable-threading",
            "--enable-auto-multi-buffer=true",
            "--enable-hfusion-compile=true",
            "--enable-hivm-compile=true",
            "--enable-triton-kernel-compile=true",
            "-o",
            "kernel",
        ]
        status = run_child(command, folder, environment)
        printed = (folder / "printed").read_text(errors="replace")
        records = [json.loads(p.read_text()) for p in sorted(folder.glob("memory_info_*.json"))]
        final = folder / "final.mlir"
        told = final.read_text() if final.exists() else ""
        return status, read_plan(target, status, printed, records, told)


def read_plan(
    target: str, status: int | None, printed: str, records: Iterable[Mapping[str, Any]], final: str
) -> Plan:
    """The plan in what a compiler left: its status, its messages, its records, its program."""
    capacity = {name: int(bits) // 8 for name, bits in CAPACITY.findall(final)}
    cores = {kind: int(n) for kind, n in CORES.findall(final)}
    # a message may be lost when the compiler ends, its record isn't
    records = list(records)
    printed += "".join("\n" + p["error_info"] for r in records for p in r["Record"])
    if status != 0 and (overflow := list(OVERFLOW.finditer(printed))):
        space, needed, available = overflow[-1].groups()
        memory = SPACES.get(space, space)
        needed, available = int(needed) // 8, int(available) // 8
        why = f"{memory} needs {needed} bytes; the chip has {available}"
        return Plan(target, False, {memory: needed}, {memory: available}, 0, why)
    if status != 0:
        return Plan(target, False, why=_refusal(status, printed))
    # of the 910s the records: the final program pads and splits buffers
    use = _recorded(records) or _addresses(final)
    if line := UB_LINE.search(printed):
        use["UB"] = int(line[1]) // 8
    return Plan(target, True, use, capacity, cores.get("AI", 0))


def _recorded(records: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The end of the last buffer in each memory, of the 910s' records."""
    use: dict[str, int] = {}
    for record in records:
        for part in record["Record"]:
            if part["status"] != "success":  # an attempt that the compiler mended itself
                continue
            memory = SPACES.get(part["scope"], part["scope"])
            for buffer in part["memory_info_array"]:
                end = max(buffer["offset"], default=0) + buffer["extent"] // 8
                use[memory] = max(use.get(memory, 0), end)
    return use


def _addresses(final: str) -> dict[str, int]:
    """The same of the final program's constant addresses."""
    use: dict[str, int] = {}
    for function in final.split("func.func ")[1:]:
        constants = {name: int(n) for name, n in CONSTANT.findall(function)}
        for at, shape, space in BUFFER.findall(function):
            *sizes, element = shape.split(",")[0].strip().split("x")
            starts = [constants[a.strip()] for a in at.split(",") if a.strip() in constants]
            if not starts or space not in SPACES or not all(s.isdigit() for s in sizes):
                continue  # a view of a buffer that is counted itself
            bits = BITS.get(element) or int(re.sub(r"\D", "", element))
            end = max(starts) + math.prod(map(int, sizes)) * max(8, bits) // 8
            use[SPACES[space]] = max(use.get(SPACES[space], 0), end)
    return use


def _refusal(status: int | None, printed: str) -> str:
    """One sentence of what a compiler said before it ended, without paths."""
    lines = [line.strip() for line in printed.splitlines()]
    told = [x.partition("error: ")[2] for x in lines if "error: " in x]
    told = [x for x in told if "Failed to run" not in x] or told
    told = [x.partition("Assertion ")[2] for x in lines if "Assertion " in x] or told
    told = told or [x for x in lines if "LLVM ERROR" in x] or [x for x in lines if x][-1:]
    died = how_it_died(status)
    head = f"the compiler {died}" if died else f"the compiler ended with status {status}"
    return f"{head}: {told[0][:200]}" if told else head
