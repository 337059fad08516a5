"""One kernel through the Ascend frontend, in the environment that holds triton-ascend.

A script and no module: it runs under another Python environment, once a compile, since the frontend
ends its whole process on some programs. It reads a task as JSON and leaves in the task's folder

    ttir.mlir       the kernel in Triton's dialect
    a2.mlir a5.mlir what the vendor's compiler gets: linalg on memrefs, for the 910 and 950 families
    a2.ll a5.ll     the same, lowered to LLVM IR for this machine

(a5.ll only where a5.mlir is another program). The stage being worked on stands in `stage`, so that
whoever finds the process dead knows where it died; what a failed stage said is in `error`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TO_LLVM = (
    "execution-engine-convert-hfusion-to-upstream",
    "execution-engine-convert-hivm-to-upstream",
    "convert-elementwise-to-linalg",
    "eliminate-empty-tensors",
    "empty-tensor-to-alloc-tensor",
    "one-shot-bufferize=allow-return-allocs-from-loops=true",
    "convert-linalg-to-loops",
    "convert-scf-to-cf",
    "expand-strided-metadata",
    "lower-affine",
    "convert-arith-to-llvm",
    "convert-math-to-llvm",
    "convert-math-to-libm",
    "convert-cf-to-llvm",
    "memref-expand",
    "finalize-memref-to-llvm",
    "convert-func-to-llvm",
    "convert-index-to-llvm",
    "reconcile-unrealized-casts",
)
"""Passes from the vendor's linalg form to the LLVM dialect, in order."""


class Rejected(Exception):
    """A tool refused the program; what it said."""


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())

    def reach(stage: str) -> None:
        (folder / "stage").write_text(stage)

    try:
        reach("frontend")
        texts = linalg(folder, task)
        for name, text in texts.items():
            (folder / f"{name}.mlir").write_text(text)
        reach("to LLVM IR")
        same = texts["a2"] == texts["a5"]
        for name in ("a2",) if same else ("a2", "a5"):
            (folder / f"{name}.ll").write_text(llvm_ir(folder, name))
    except Exception as error:
        (folder / "error").write_text(_sentence(error))
        return
    reach("done")


def linalg(folder: Path, task: dict[str, Any]) -> dict[str, str]:
    """The kernel as each chip family's compiler takes it."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    compiler = importlib.import_module("triton.backends.ascend.compiler")
    spec = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel"] = module
    spec.loader.exec_module(module)
    kernel = getattr(module, task["name"])
    attributes = compiler.AscendAttrsDescriptor()
    attributes.arg_properties["tt.divisibility"] = task["divisible"]
    attributes._init_slots()
    constants = {name: _constant(value) for name, value in task["constants"].items()}
    texts = {}
    for family, newer in (("a2", False), ("a5", True)):
        target = GPUTarget("npu", "Ascend910B3", 0)
        backend = make_backend(target)
        options = backend.parse_options({"compile_on_910_95": newer})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        about = {**options.__dict__, "target": target, "hash": "0", "name": task["name"]}
        source = ASTSource(kernel, task["signature"], constants, attributes)
        lowered = source.make_ir(
            options, backend.get_codegen_implementation(), backend.get_module_map(), context
        )
        lowered = compiler.make_ttir(lowered, about, options)
        (folder / "ttir.mlir").write_text(str(lowered))
        texts[family] = compiler.ttir_to_linalg(lowered, about, options, named_ops=True)
    return texts


def llvm_ir(folder: Path, family: str) -> str:
    """LLVM IR of a program, by the vendor's own optimizer tool and Triton's translation."""
    from triton._C.libtriton import ir, llvm

    dialect = folder / f"{family}.llvm.mlir"
    plain = folder / f"{family}.plain.mlir"
    plain.write_text(plain_of((folder / f"{family}.mlir").read_text()))
    command = [_tool("bishengir-opt"), plain, "-o", dialect]
    passes = [f"--{name}" for name in TO_LLVM]
    done = subprocess.run([*command, *passes], capture_output=True, text=True)
    if done.returncode:
        raise Rejected(done.stderr or f"bishengir-opt ended with status {done.returncode}")
    context = ir.context()
    ir.load_dialects(context)
    module = ir.parse_mlir_module(str(dialect), context)
    module.context = context
    return str(llvm.to_module(module, llvm.context()))


def plain_of(text: str) -> str:
    """A program without what only the vendor's compiler understands: hints, which no pass turns
    into anything, and calls of its running sum, of which the meaning is written out."""
    text = re.sub(r"(?m)^\s*annotation\.mark .*$", "", text)
    text = re.sub(r"(?m)^\s*func\.func private @triton_cumsum\w*\(.*$", "", text)
    return RUNNING_SUM.sub(_running_sum, text)


RUNNING_SUM = re.compile(
    r"(?m)^\s*%(\w+) = (?:func\.)?call @triton_cumsum\w*\(%(\w+), .*-> (tensor<(\d+)x(\w+)>)$"
)
"""Of one dimension, from its beginning: all that the kernels use."""


def _running_sum(call: re.Match[str]) -> str:
    result, source, type_, length, element = call.groups()
    add = "arith.addf" if "f" in element else "arith.addi"
    zero = "0.0" if "f" in element else "0"
    n = f"%sum_{result}"
    return f"""
    {n}_0 = arith.constant 0 : index
    {n}_1 = arith.constant 1 : index
    {n}_n = arith.constant {length} : index
    {n}_z = arith.constant {zero} : {element}
    %{result}, {n}_all = scf.for {n}_i = {n}_0 to {n}_n step {n}_1
        iter_args({n}_t = %{source}, {n}_s = {n}_z) -> ({type_}, {element}) {{
      {n}_v = tensor.extract %{source}[{n}_i] : {type_}
      {n}_w = {add} {n}_s, {n}_v : {element}
      {n}_u = tensor.insert {n}_w into {n}_t[{n}_i] : {type_}
      scf.yield {n}_u, {n}_w : {type_}, {element}
    }}"""


def _tool(name: str) -> Path:
    package = importlib.util.find_spec("ascendnpuir")
    return Path(package.submodule_search_locations[0]) / "bin" / name


def _constant(value: Any) -> Any:
    if isinstance(value, dict):  # {"dtype": "fp32"}
        import triton.language as tl

        return tl.dtype(value["dtype"])
    return value


def _sentence(error: Exception) -> str:
    """What a tool said, without the program it printed."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line.partition("error: ")[2] for line in lines if "error: " in line] or lines[-3:]
    return f"{type(error).__name__}: {' | '.join(told[:4])}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
