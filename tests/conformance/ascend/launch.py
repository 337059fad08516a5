"""One launch of a kernel: its lowering by the vendor's frontend, and its execution here."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transom.backends.triton._launch import Launch
from transom.config import cache_folder

from .environment import PINS, Environment
from .source import name_of, standalone

SECONDS = 900.0
"""A child that takes longer is taken to hang."""


class Failed(Exception):
    """A stage refused a kernel, or died of it; one sentence, and which stage."""

    def __init__(self, stage: str, why: str) -> None:
        super().__init__(why)
        self.stage = stage


@dataclass(frozen=True)
class Program:
    """A lowered kernel: the folder with its texts (see lower.py)."""

    name: str
    folder: Path

    def linalg(self, newer: bool) -> str:
        """What the compiler of the 950 family (newer) or the 910 family takes."""
        return (self.folder / ("a5.mlir" if newer else "a2.mlir")).read_text()

    @property
    def executables(self) -> list[Path]:
        """LLVM IR of each family; one, where they are the same program."""
        return sorted(self.folder.glob("*.ll"))


def lower(environment: Environment, launch: Launch) -> Program:
    """L1: the kernel as the vendor's frontend makes it; kept, so that it is made once. Failed says
    what refused it."""
    types, constants = launch.signature(), launch.constexprs()
    numbers = {name: at for at, name in enumerate(types)}
    task = {
        "name": name_of(launch.kernel),
        "signature": {name: kind for name, kind in types.items() if name not in constants},
        "constants": {name: _plain(value) for name, value in constants.items()},
        "divisible": [numbers[name] for name in launch.divisible()],
    }
    text = standalone(launch.kernel)
    lowering = Path(__file__).with_name("lower.py")
    made_of = json.dumps([task, text, PINS, lowering.read_text()], sort_keys=True)
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    place = cache_folder() / "ascend" / "programs" / f"{task['name']}-{key}"
    if not (place / "stage").exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as made:
            folder = Path(made) / "program"
            folder.mkdir()
            (folder / "task.json").write_text(json.dumps(task))
            (folder / "kernel.py").write_text(text)
            status = run_child([environment.python, "-I", lowering, folder], folder, environment)
            if status is None:  # not kept: the machine may have been busy
                raise Failed("frontend", f"the compiler {how_it_died(status)}")
            if died := how_it_died(status):
                (folder / "error").write_text(f"the compiler's process {died}")
            shutil.rmtree(folder / "triton", ignore_errors=True)
            try:
                folder.rename(place)
            except OSError:  # another process was faster
                pass
    if not (place / "a5.mlir").exists():
        raise Failed((place / "stage").read_text(), _told(place))
    return Program(task["name"], place)


def execute(
    environment: Environment,
    launch: Launch,
    program: Program,
    *,
    newer: bool = False,
    seed: int = 0,
) -> None:
    """L2: run the lowered kernel over the launch's tensors, which hold the results afterwards.
    Failed says what it did wrong."""
    if (stage := (program.folder / "stage").read_text()) != "done":
        raise Failed(stage, _told(program.folder))
    types, constants = launch.signature(), launch.constexprs()
    storages: dict[int, torch.UntypedStorage] = {}
    names: dict[str, str] = {}
    described: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for name, kind in types.items():
            if name in constants:
                continue
            value = launch.arguments[name]
            if not isinstance(value, torch.Tensor):
                described.append([kind, value])
                continue
            storage = value.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage)
            at = list(storages).index(storage.data_ptr())
            names.setdefault(f"{at}.bytes", name)
            described.append(["tensor", at, value.storage_offset() * value.element_size()])
        for at, storage in enumerate(storages.values()):
            data = ctypes.string_at(storage.data_ptr(), storage.nbytes())
            (folder / f"{at}.bytes").write_bytes(data)
        grid = (*launch.grid, 1, 1)[:3]
        task = {
            "program": str(program.executables[-1 if newer else 0]),
            "symbols": str(environment.symbols),
            "storages": [f"{at}.bytes" for at in range(len(storages))],
            "names": names,
            "arguments": described,
            "grid": grid,
            "seed": seed,
        }
        (folder / "launch.json").write_text(json.dumps(task))
        child = Path(__file__).with_name("execute.py")
        status = run_child([environment.python, "-I", child, folder], folder, environment)
        if not (folder / "done").exists():
            error = folder / "error"
            why = error.read_text() if error.exists() else _fault(folder, status)
            raise Failed("execute", why)
        for at, storage in enumerate(storages.values()):
            data = (folder / f"{at}.bytes").read_bytes()
            ctypes.memmove(storage.data_ptr(), data, len(data))


def run_child(
    command: list[Any], folder: Path, environment: Environment, seconds: float = SECONDS
) -> int | None:
    """The child's status; None if it had to be ended. What it printed lies in `printed`."""
    with (folder / "printed").open("wb") as printed:
        try:
            return subprocess.run(
                [str(part) for part in command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment.variables(folder),
            ).returncode
        except subprocess.TimeoutExpired:
            return None


def how_it_died(status: int | None) -> str | None:
    """What became of a child that did not end by itself, or None."""
    if status is None:
        return f"did not end within {SECONDS:.0f} s"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else None


def _told(folder: Path) -> str:
    """Why lowering failed: what was raised, and the compiler's own diagnosis."""
    lines = (folder / "printed").read_text(errors="replace").splitlines()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return ": ".join([(folder / "error").read_text(), *errors[:1]])


def _fault(folder: Path, status: int | None) -> str:
    if status is not None and -status in (signal.SIGSEGV, signal.SIGBUS):
        return "read or wrote outside its tensors: an unreadable page beside one of them was hit"
    told = (folder / "printed").read_text(errors="replace").strip().splitlines()
    return f"the process {how_it_died(status) or f'ended with status {status}'}: {told[-1:]}"


def _plain(value: Any) -> Any:
    """A constexpr as JSON takes it."""
    value = getattr(value, "value", value) if type(value).__name__ == "constexpr" else value
    if type(value).__module__.startswith("triton.language"):  # a dtype
        return {"dtype": str(value)}
    return value
