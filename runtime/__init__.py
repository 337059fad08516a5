"""transom: the sparse operators of DeepSeek-V4-class models, on any device that PyTorch can reach.

One registry of operators, each with its meaning in torch (the composite), a NumPy reference, and
implementations for the devices at hand. Start with `transom.patch(model)`, `transom.explain(op,
...)`, or `transom --help` on the command line.
"""

from __future__ import annotations

if __name__ != "transom":
    raise ImportError(
        "this folder is the package 'transom'; install it (pip install -e .) and `import transom`"
    )

import gc
import importlib
import pkgutil
import warnings
from typing import TYPE_CHECKING, Any

from . import backends as _backends  # noqa: F401 -  # before the function of that name, which then stands for it
from . import dtypes, errors, requires
from .declare import op as declare
from .errors import NotSupported, PluginError, SlowPath
from .explain import backends, explain, ops
from .facts import Facts
from .op import Impl, Op, Weight
from .plugins import plugins
from .record import Call, record
from .registry import OPS as _OPS
from .registry import RENAMED as _RENAMED
from .selection import Explanation, use
from .tune import tune
from .weights import QuantizedWeight

__version__ = "0.1.0"


def _declare_operators() -> None:
    """Import every file below kernels/: each declares its operators."""
    from . import kernels

    collecting = gc.isenabled()
    gc.disable()  # it would go through all that torch has loaded, for half of the time
    try:
        for family in pkgutil.iter_modules(kernels.__path__):
            if family.ispkg:
                package = importlib.import_module(f"{kernels.__name__}.{family.name}")
                for file in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{package.__name__}.{file.name}")
    finally:
        if collecting:
            gc.enable()


_declare_operators()

if TYPE_CHECKING:
    from .abi import CPlugin
    from .kernels.attention.block_sparse_attention import block_sparse_attention
    from .kernels.attention.compress_kv import compress_kv
    from .kernels.attention.lightning_indexer import lightning_indexer
    from .kernels.attention.sparse_attention import sparse_attention
    from .kernels.engram.engram_gate import engram_gate
    from .kernels.engram.hashed_embedding import hashed_embedding
    from .kernels.engram.hashed_embedding_pooled import hashed_embedding_pooled
    from .kernels.engram.ngram_hash import ngram_hash
    from .kernels.engram.short_conv import short_conv
    from .kernels.linear_attention.gated_delta_rule import gated_delta_rule
    from .kernels.mhc.mhc_head import mhc_head
    from .kernels.mhc.mhc_post import mhc_post
    from .kernels.mhc.mhc_pre import mhc_pre
    from .kernels.mhc.sinkhorn import sinkhorn
    from .kernels.moe.grouped_gemm import grouped_gemm
    from .kernels.moe.moe_experts import moe_experts
    from .kernels.moe.route import route
    from .kernels.quant.quantize import quantize
    from .models import patch, unpatch

_LAZY = {
    "patch": "transom.models",
    "unpatch": "transom.models",
    "quantize": "transom.kernels.quant.quantize",
    "CPlugin": "transom.abi",
    "nn": "",
    "models": "",
    "guard": "",
    "conformance": "",
}


def __getattr__(name: str) -> Any:
    if name in _OPS:
        return _OPS[name]
    if name in _RENAMED:
        text = f"transom.{name} is named {_RENAMED[name]}; the former name goes with version 0.2"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return _OPS[_RENAMED[name]]
    if name in _LAZY:
        module = importlib.import_module(_LAZY[name] or f"transom.{name}")
        return getattr(module, name) if _LAZY[name] else module
    raise AttributeError(
        f"module 'transom' has no attribute {name!r}; operators: {', '.join(sorted(_OPS))}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *_OPS, *_LAZY})


__all__ = [
    "CPlugin",
    "Call",
    "Explanation",
    "Facts",
    "Impl",
    "NotSupported",
    "Op",
    "PluginError",
    "QuantizedWeight",
    "SlowPath",
    "Weight",
    "backends",
    "block_sparse_attention",
    "compress_kv",
    "declare",
    "dtypes",
    "engram_gate",
    "errors",
    "explain",
    "gated_delta_rule",
    "grouped_gemm",
    "hashed_embedding",
    "hashed_embedding_pooled",
    "lightning_indexer",
    "mhc_head",
    "mhc_post",
    "mhc_pre",
    "moe_experts",
    "ngram_hash",
    "ops",
    "patch",
    "plugins",
    "quantize",
    "record",
    "requires",
    "route",
    "short_conv",
    "sinkhorn",
    "sparse_attention",
    "tune",
    "unpatch",
    "use",
]
