"""Every kernel of every operator compiled ahead of time, without a device: `transom verify
--compile`.

Operators' host functions are called with tensors that have no memory (torch's meta device); what
they launch is noted, with every tile that the tables list, and compiled as a launch on the target
would be: the same argument types, divisibility and constants. Compilers run in processes of their
own: one that dies is a finding.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import transom
from transom.backends import triton
from transom.backends.triton._choice import ARCHITECTURES, Tile
from transom.dtypes import QUANTIZED
from transom.op import Op
from transom.selection import reasons

from ..calls import describe, without_memory
from .figures import Kept, leading, picked, summary

if TYPE_CHECKING:
    from transom.backends.triton._launch import Launch

SHARED = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}
"""KiB of shared memory that one program may have. Source: CUDA C++ Programming Guide, table of
technical specifications; AMD CDNA 3 and CDNA 4 ISA documents (LDS)."""

SPILLS = {"forward": 0, "backward": 256}
"""Bytes a thread that a chosen tile may spill."""

EDGE = "edge: "
"""How the words for a call begin that is no example of the operator."""

SECONDS = 600.0
"""After so long without a sign a compiler is taken to hang."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target, and what is wrong with it."""

    op: str
    kernel: str
    target: str
    call: str
    """The operator's call that launched it, in a few words."""
    tile: str
    chosen: bool
    """True for the table's first tile (or none) and an operator's example: what a user gets. Other
    tiles are for tuning, and calls with a dim of 1 must compile: both are shown, spills allowed."""
    registers: int = 0
    spills: int = 0
    """Bytes of a thread's stack."""
    shared: int = 0
    """Bytes of a program."""
    wide: int = 0
    """Loads of 16 bytes, the widest, in the text."""
    product: str = ""
    """The instruction that products run on, or empty."""
    seconds: float = 0.0
    before: bool = False
    """True if the figures are an earlier run's: same source, constants, target and compiler."""
    faults: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What compiling came to."""

    targets: tuple[str, ...]
    ops: tuple[str, ...]
    kernels: list[Compiled] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Compiled]:
        """Those with faults."""
        return [k for k in self.kernels if k.faults]

    @property
    def passed(self) -> bool:
        """Something was compiled, and nothing has a fault."""
        return bool(self.kernels) and not self.failed

    def summary(self) -> list[dict[str, Any]]:
        """A row for each kernel and target: the most that a chosen tile takes."""
        return summary(self.kernels)

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "passed": self.passed}


def offered() -> list[str]:
    """The operators that the backend has kernels for."""
    here = Path(triton.__file__).parent
    return [name for name, op in transom.ops().items() if (here / f"{op.path}.py").exists()]


def targets(text: str) -> tuple[str, ...]:
    """`all`, or names separated by commas; ValueError for one that is not known."""
    if text == "all":
        return ARCHITECTURES
    names = tuple(n.strip() for n in text.split(","))
    for name in names:
        if name not in SHARED:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"target is {name!r}; expected all, or some of {known}")
    return names


# The process that asks --------------------------------------------------------------------------


def compile_all(
    wanted: tuple[str, ...],
    ops: list[str] | None = None,
    *,
    every: bool = True,
    jobs: int = 1,
    seconds: float = SECONDS,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Outcome:
    """Compile what the operators launch, for each target, in `jobs` processes at a time.

    every      all that `picked` takes of examples, dtypes, formats and tiles; else the first tile
               of bfloat16 and, if the operator has quantised weights, of mxfp4
    progress   told (operator, kernels done, of how many)
    """
    began = time.monotonic()
    names = [n for n in offered() if ops is None or n in ops]
    outcome = Outcome(wanted, tuple(names))

    def one(op: str) -> list[Compiled]:
        return list(_batch(op, wanted, every, seconds, progress))

    with ThreadPoolExecutor(max(1, jobs)) as pool:
        for found in pool.map(one, names):
            outcome.kernels += found
    outcome.seconds = time.monotonic() - began
    return outcome


def _batch(
    op: str,
    wanted: tuple[str, ...],
    every: bool,
    seconds: float,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Iterator[Compiled]:
    """One operator; after a crash a new process goes on behind the kernel that crashed."""
    first = 0
    while True:
        request = {"op": op, "targets": wanted, "every": every, "first": first}
        now: dict[str, Any] | None = None
        with tempfile.TemporaryDirectory() as cache:
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(request)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_INTERPRET": "0"},
            )
            timer = _Silence(child, seconds)
            assert child.stdout is not None and child.stderr is not None
            for line in child.stdout:
                timer.again()
                event = json.loads(line) if line.startswith("{") else {}
                if "start" in event:
                    now, first = event["start"], event["number"] + 1
                    progress(op, event["number"], event["of"])
                elif "done" in event:
                    now = None
                    yield Compiled(**event["done"])
            errors = child.stderr.read()
            code = child.wait()
            timer.stop()
        if code == 0:
            return
        last = next((x for x in reversed(errors.splitlines()) if x.strip()), "")
        how = f"the compiler's process ended with status {code}: {' '.join(last.split())[:300]}"
        if now is None:  # not at a kernel: nothing to go on behind
            yield Compiled(op, "", ",".join(wanted), "", "", True, faults=[how])
            return
        yield Compiled(**{**now, "faults": [how]})


class _Silence:
    """Ends a process that has been silent for too long."""

    def __init__(self, child: subprocess.Popen[str], seconds: float) -> None:
        self.child, self.seconds = child, seconds
        self.timer: threading.Timer | None = None
        self.again()

    def again(self) -> None:
        self.stop()
        self.timer = threading.Timer(self.seconds, self.child.kill)
        self.timer.daemon = True
        self.timer.start()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


# The process that compiles ----------------------------------------------------------------------


def main(request: dict[str, Any]) -> None:
    """Compile one operator's kernels; a line of JSON before and after each."""
    op, kept = transom.ops()[request["op"]], Kept()
    full = leading(request["targets"])
    jobs = [
        job
        for target in request["targets"]
        for job in (
            picked(list(launches(op, (target,), True)), target in full, EDGE)
            if request["every"]
            else launches(op, (target,), False)
        )
    ]
    for number, (target, launch, call, chosen) in enumerate(jobs):
        if number < request["first"]:
            continue
        about = {
            "op": op.name,
            "kernel": launch.name,
            "target": target,
            "call": call,
            "tile": str(launch.tile),
            "chosen": chosen,
        }
        print(json.dumps({"start": about, "number": number, "of": len(jobs)}), flush=True)
        found = compiled(launch, target, Compiled(**about), kept)
        print(json.dumps({"done": asdict(found)}), flush=True)


def launches(
    op: Op[..., Any],
    wanted: tuple[str, ...],
    every: bool,
    taken: Callable[[str, tuple[Any, ...]], bool] = lambda *_: True,
) -> Iterator[tuple[str, Launch, str, bool]]:
    """(target, launch, call, Compiled.chosen) of every kernel that differs, of the calls (in words,
    values) that are `taken`."""
    from transom.backends.triton._launch import record

    function = implementation(op)
    for target in wanted:
        seen = set()
        for call, values in calls(op, every):
            if not taken(call, values):
                continue
            nth = more = 0
            while nth <= more:
                listed: list[int] = []

                def choose(
                    entry: str, tiles: tuple[Tile, ...], nth: int = nth, listed: list[int] = listed
                ) -> Tile:
                    listed.append(len(tiles))
                    return tiles[min(nth, len(tiles) - 1)]

                with record(target, choose) as noted:
                    for precision in ("highest", "high") if "float32" in call else ("highest",):
                        torch.set_float32_matmul_precision(precision)
                        op.invoke(function, *values)
                for launch in noted:
                    key = identity(launch)
                    if key not in seen:
                        seen.add(key)
                        yield target, launch, call, nth == 0 and not call.startswith(EDGE)
                more = max(listed, default=1) - 1 if every else 0
                nth += 1


def identity(launch: Launch) -> str:
    """What decides the machine code of a launch."""
    return repr(
        (
            launch.name,
            launch.signature(),
            launch.constexprs(),
            launch.divisible(),
            launch.tile.warps,
            launch.tile.stages,
        )
    )


def implementation(op: Op[..., Any]) -> Callable[..., Any]:
    """The operator's host function, whether or not this machine has a device for it."""
    importlib.import_module(f"{triton.__name__}.{op.path.replace('/', '.')}")
    return op.impls["triton"].function


def calls(op: Op[..., Any], every: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(in a few words, values on the meta device) of the operator's examples, in every dtype and
    every format of weights that the implementation accepts; with `every` also of the first example
    with each dim in turn 1, which Triton makes a constant of."""
    weights = [p.name for p in op.parameters if p.role == "weight"]
    at = [i for i, p in enumerate(op.parameters) if p.role == "weight"]
    formats = ("", *QUANTIZED) if weights else ("",)
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if every else (torch.bfloat16,)
    examples = op.examples[-1:]
    if every:
        first = op.examples[0]
        ones = [{**first, s: 1} for s in op.signature.symbols() if type(first.get(s)) is int]
        examples = [*op.examples, *ones]
    for example in examples:
        for dtype in dtypes:
            for name in formats if every else formats[:: len(QUANTIZED)]:
                kinds = dict.fromkeys(weights, name) if name else {}
                try:
                    call = describe(op, {}, dtype, kinds=kinds, example=example)
                    facts = call.facts("cuda", ARCHITECTURES[0])
                except (ValueError, TypeError):
                    continue  # the declaration has no such call
                odd = any(call.values[i].shape[-1] % 2 for i in at if name in ("int4", "mxfp4"))
                if odd or reasons(op.impls["triton"], facts):
                    continue
                values = without_memory(call)
                short = str(dtype).removeprefix("torch.")
                text = " ".join(f"{k}={v}" for k, v in example.items())
                edge = EDGE if example not in op.examples else ""
                yield f"{edge}{short} {name} {text}".replace("  ", " "), values


def compiled(launch: Launch, target: str, about: Compiled, kept: Kept) -> Compiled:
    """`about` with what the compiler says of the kernel; an error of the compiler is a fault."""
    key = kept.key(launch, target, identity(launch))
    figures = kept.get(key)
    before = figures is not None
    if figures is None:
        began = time.monotonic()
        try:
            binary = compile_launch(launch, target)
        except Exception as error:  # compilers raise what they like
            fault = " ".join(str(error).split())[-400:] or type(error).__name__
            return Compiled(**{**asdict(about), "faults": [fault]})
        read = _nvidia if target.startswith("sm_") else _amd
        figures = {**read(binary.asm), "shared": int(binary.metadata.shared)}
        narrow = re.search(_PRODUCT, binary.asm["ttir"])
        figures["dot"] = narrow[0] if narrow else ""
        figures["seconds"] = round(time.monotonic() - began, 2)
        kept.put(key, figures)
    dot = figures["dot"]
    told = {name: value for name, value in figures.items() if name != "dot"}
    done = Compiled(**{**asdict(about), **told, "before": before})
    done.faults.extend(faults(done, launch, dot))
    return done


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for a target, as a launch there would compile it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    source = ASTSource(
        launch.kernel,
        launch.signature(),
        constexprs={(names.index(n),): value for n, value in launch.constexprs().items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in launch.divisible()},
    )
    to = (
        GPUTarget("cuda", int(target[3:]), 32)
        if target.startswith("sm_")
        else GPUTarget("hip", target, 64)
    )
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    return triton.compile(source, target=to, options=options)


def faults(kernel: Compiled, launch: Launch, ttir: str) -> Iterator[str]:
    """What a compiled kernel must not be."""
    limit = SHARED[kernel.target] * 1024
    if kernel.shared > limit:
        yield f"shared memory is {kernel.shared} bytes; {kernel.target} has {limit}"
    way = "backward" if "_backward" in kernel.op else "forward"
    if kernel.chosen and kernel.spills > SPILLS[way]:
        yield f"a thread spills {kernel.spills} bytes; {SPILLS[way]} are allowed ({way})"
    if not kernel.product and re.search(_PRODUCT, ttir):
        yield "its products do not run on matrix instructions"
    # Of a step of 32 codes of 4 bits a row holds 16 bytes, of which several threads take parts.
    if launch.constants.get("EVEN") and not kernel.wide and not launch.entry.endswith("_codes_f32"):
        yield "no load of 16 bytes; its rows are aligned and allow them"


# A product of narrow elements, or of float32 that need not be multiplied as float32.
_PRODUCT = r"tt\.dot [^\n]*(inputPrecision = tf32|x(bf16|f16)>)"


def _nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    ptx = asm["ptx"]
    tools = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    product = re.search(r"(tcgen05\.mma|wgmma\.mma_async|mma\.sync)", ptx)
    wide = (
        r"ld\.global[.\w:]*\.(v4\.b32|v2\.b64)"
        r"|cp\.async\.c[ag][.\w:]*[^\n]*, (0x10|16)[,; ]|cp\.async\.bulk"
    )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
        "wide": len(re.findall(wide, ptx)),
        "product": product[1] if product else "",
    }


def _amd(asm: dict[str, Any]) -> dict[str, Any]:
    text = asm["amdgcn"]
    product = re.search(r"v_mfma_\w+", text)

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    # gfx950 loads 16 bytes a lane straight into shared memory.
    return {
        "registers": number("vgpr_count"),
        "spills": 4 * (number("vgpr_spill_count")),
        "wide": len(re.findall(r"(global|buffer)_load_(lds_)?dwordx4", text)),
        "product": product[0] if product else "",
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
