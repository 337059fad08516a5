"""llama.cpp's experts: graphs of ggml, built by the functions of ggml.h and ggml-backend.h.

llama-cpp-python brings ggml's libraries along; their exported C functions are its public interface,
called here through cffi. Weights are put into ggml's own formats (from the values that the weight
of the case stands for) and, as a candidate of its own, into its repacked layout.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cases import PLAIN, Case
from ..measure import Candidate, Function

Values = Mapping[str, Any]

DECLARATIONS = """
struct ggml_init_params { size_t mem_size; void* mem_buffer; bool no_alloc; };
void* ggml_init(struct ggml_init_params params);
void ggml_free(void* context);
void ggml_log_set(void* log, void* data);
size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead(void);
size_t ggml_nbytes(const void* tensor);
size_t ggml_row_size(int type, int64_t elements);
size_t ggml_quantize_chunk(int type, const float* from, void* to, int64_t start, int64_t rows,
                           int64_t row_elements, const float* importance);
void* ggml_new_tensor_2d(void* context, int type, int64_t n0, int64_t n1);
void* ggml_new_tensor_3d(void* context, int type, int64_t n0, int64_t n1, int64_t n2);
void* ggml_mul_mat_id(void* context, void* experts, void* rows, void* ids);
void* ggml_swiglu(void* context, void* both);
void* ggml_mul(void* context, void* a, void* b);
void* ggml_add(void* context, void* a, void* b);
void* ggml_view_2d(void* context, void* a, int64_t n0, int64_t n1, size_t stride, size_t offset);
void* ggml_new_graph(void* context);
void ggml_build_forward_expand(void* graph, void* tensor);

void* ggml_backend_cpu_init(void);
void ggml_backend_cpu_set_n_threads(void* backend, int threads);
void* ggml_backend_cpu_buffer_type(void);
void* ggml_backend_cpu_reg(void);

void* ggml_backend_reg_get_proc_address(void* registry, const char* name);
void* ggml_backend_reg_dev_get(void* registry, size_t index);
const char* ggml_backend_buft_name(void* buffer_type);
void* ggml_backend_alloc_ctx_tensors_from_buft(void* context, void* buffer_type);
void ggml_backend_buffer_free(void* buffer);
void ggml_backend_tensor_set(void* tensor, const void* from, size_t offset, size_t bytes);
void ggml_backend_tensor_get(const void* tensor, void* to, size_t offset, size_t bytes);
int ggml_backend_graph_compute(void* backend, void* graph);
void ggml_backend_free(void* backend);
"""

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_K": 12, "i32": 26, "bf16": 30, "mxfp4": 39}
"""enum ggml_type."""

CANDIDATES = {
    "int8": (("q8_0", False),),  # has no repacked form on x86
    "int4": (("q4_0", False), ("q4_0", True), ("q4_K", False), ("q4_K", True)),
    "mxfp4": (("mxfp4", False), ("mxfp4", True)),
}
"""(ggml's type, repacked) by the format of the case."""


@dataclass(frozen=True)
class _Ggml:
    ffi: Any
    libraries: tuple[Any, ...]
    silent: Any

    def __getattr__(self, name: str) -> Any:
        for library in self.libraries:
            try:
                return getattr(library, "ggml_" + name)
            except AttributeError:
                continue
        raise AttributeError(f"ggml_{name} is not in this llama-cpp-python")


@functools.cache
def _ggml() -> _Ggml:
    from cffi import FFI

    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise OSError("llama_cpp is not installed")
    folder = Path(spec.origin).parent / "lib"
    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    # the processor's kernels are loaded by their own name: the loader finds the base beside them
    libraries = tuple(ffi.dlopen(str(folder / f"libggml-{n}.so")) for n in ("base", "cpu"))
    ggml = _Ggml(ffi, libraries, ffi.callback("void(int, const char*, void*)", lambda *_: None))
    ggml.log_set(ggml.silent, ffi.NULL)  # it tells of every tensor that it repacks
    return ggml


def probe() -> str | None:
    """ggml's libraries must export what a graph needs."""
    try:
        ggml = _ggml()
        for name in re.findall(r"ggml_(\w+)\(", DECLARATIONS):
            getattr(ggml, name)
    except (OSError, AttributeError) as error:
        return " ".join(str(error).split())[:200]
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """Experts with SwiGLU and without biases, in each of ggml's types that answers the format."""
    plain = case.op == "moe_experts" and values["activation"] == "silu"
    if not plain or values["interleaved"] or values["gate_up_bias"] is not None:
        return []
    kinds = CANDIDATES.get(case.format, ((case.dtype, False),) if case.format == PLAIN else ())
    held = float(values["gate_up"].nbytes + values["down"].nbytes)
    found = []
    for kind, repacked in kinds:
        if repacked and _repacking() is None:
            continue
        name = f"ggml {kind}" + (", repacked" if repacked else "")
        note = "mul_mat_id, swiglu, mul_mat_id; activations in float32"
        prepare = functools.partial(_prepare, kind=kind, repacked=repacked)
        found.append(Candidate(name, "llama.cpp", prepare, note, held))
    return found


def _repacking() -> Any:
    """The buffer type in which weights lie repacked for this processor, or None."""
    ggml = _ggml()
    registry = ggml.backend_cpu_reg()
    function = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if function == ggml.ffi.NULL:
        return None
    kinds = ggml.ffi.cast("void** (*)(void*)", function)(ggml.backend_reg_dev_get(registry, 0))
    at = 0
    while kinds[at] != ggml.ffi.NULL:
        if b"REPACK" in ggml.ffi.string(ggml.backend_buft_name(kinds[at])):
            return kinds[at]
        at += 1
    return None


class _Context:
    """Tensors of one buffer, freed with it."""

    def __init__(self, tensors: int) -> None:
        ggml = self.ggml = _ggml()
        size = tensors * ggml.tensor_overhead() + ggml.graph_overhead()
        self.handle = ggml.init(
            ggml.ffi.new("struct ggml_init_params*", (size, ggml.ffi.NULL, 1))[0]
        )
        self.buffer = ggml.ffi.NULL

    def allocate(self, kind: Any = None) -> None:
        kind = self.ggml.backend_cpu_buffer_type() if kind is None else kind
        self.buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(self.handle, kind)
        if self.buffer == self.ggml.ffi.NULL:
            raise MemoryError("ggml allocates no buffer for these tensors")

    def __del__(self) -> None:
        if self.buffer != self.ggml.ffi.NULL:
            self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.handle)


def _put(tensor: Any, values: np.ndarray[Any, Any]) -> None:
    ggml = _ggml()
    if ggml.nbytes(tensor) != values.nbytes:
        raise ValueError(f"ggml wants {ggml.nbytes(tensor)} bytes, has {values.nbytes}")
    ggml.backend_tensor_set(tensor, ggml.ffi.from_buffer(values), 0, values.nbytes)


def _encoded(weight: Any, kind: str) -> np.ndarray[Any, Any]:
    """The bytes of weight[E,N,K] in ggml's type, an expert at a time."""
    ggml = _ggml()
    experts, rows, width = weight.shape
    to = np.empty((experts, rows * ggml.row_size(TYPES[kind], width)), np.uint8)
    for e in range(experts):
        one = weight[e] if isinstance(weight, Tensor) else _dequantised(weight, e)
        if kind in ("f32", "f16", "bf16"):
            to[e] = one.contiguous().view(torch.uint8).flatten().numpy()
            continue
        plain = one.float().contiguous().numpy()
        from_, into = ggml.ffi.from_buffer("float[]", plain), ggml.ffi.from_buffer(to[e])
        ggml.quantize_chunk(TYPES[kind], from_, into, 0, rows, width, ggml.ffi.NULL)
    return to


def _dequantised(weight: Any, expert: int) -> Tensor:
    zeros = None if weight.zeros is None else weight.zeros[expert]
    parts = weight.values[expert], weight.scales[expert]
    return type(weight)(weight.format, *parts, zeros, group=weight.group).dequantize()


class _Block:
    """The graph of one block of experts for T tokens."""

    def __init__(self, v: Values, kind: str, repacked: bool) -> None:
        ggml = _ggml()
        (T, D), K, (E, _, I) = v["x"].shape, v["ids"].shape[1], v["down"].shape
        self.held, self.work = _Context(2), _Context(16 + 2 * K)
        held, work = self.held.handle, self.work.handle
        gate_up = ggml.new_tensor_3d(held, TYPES[kind], D, 2 * I, E)
        down = ggml.new_tensor_3d(held, TYPES[kind], I, D, E)
        self.held.allocate(_repacking() if repacked else None)
        for tensor, weight in ((gate_up, v["gate_up"]), (down, v["down"])):
            _put(tensor, _encoded(weight, kind))
        self.x = ggml.new_tensor_3d(work, TYPES["f32"], D, 1, T)
        self.ids = ggml.new_tensor_2d(work, TYPES["i32"], K, T)
        self.weights = ggml.new_tensor_3d(work, TYPES["f32"], 1, K, T)
        inner = ggml.swiglu(work, ggml.mul_mat_id(work, gate_up, self.x, self.ids))
        rows = ggml.mul(work, ggml.mul_mat_id(work, down, inner, self.ids), self.weights)
        row, token = D * 4, K * D * 4
        y = ggml.view_2d(work, rows, D, T, token, 0)
        for k in range(1, K):
            y = ggml.add(work, y, ggml.view_2d(work, rows, D, T, token, k * row))
        self.y, self.shape = y, (T, D)
        self.graph = ggml.new_graph(work)
        ggml.build_forward_expand(self.graph, y)
        self.work.allocate()
        self.backend = ggml.ffi.gc(ggml.backend_cpu_init(), ggml.backend_free)
        ggml.backend_cpu_set_n_threads(self.backend, torch.get_num_threads())

    def __call__(self, v: Values) -> Tensor:
        ggml = _ggml()
        _put(self.x, v["x"].float().numpy())
        _put(self.ids, v["ids"].to(torch.int32).numpy())
        _put(self.weights, v["weights"].float().numpy())
        if ggml.backend_graph_compute(self.backend, self.graph) != 0:
            raise RuntimeError("ggml's graph failed")
        y = torch.empty(self.shape)
        into = ggml.ffi.from_buffer(y.numpy(), require_writable=True)
        ggml.backend_tensor_get(self.y, into, 0, y.nbytes)
        return y.to(v["x"].dtype)


def _prepare(v: Values, kind: str, repacked: bool) -> Function:
    return _Block(v, kind, repacked)
