"""Write docs/operators.md, docs/support.md and docs/edge_cases.md from the declarations and tests;
`--check` exits 1 if they are not current."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import transom
from transom.dtypes import SHORT
from transom.op import Impl, Op
from transom.plugins import load
from transom.selection import TIERS

HERE = Path(__file__).parent
NOTE = "<!-- made by `python docs/generate.py`; edit the declarations in kernels/ instead -->\n"
FAMILIES = {
    "moe": "Mixture of experts",
    "attention": "Sparse attention",
    "linear_attention": "Linear attention",
    "engram": "Engram",
    "mhc": "Hyper-connections",
    "quant": "Quantised weights",
}


def operators() -> str:
    """The reference page: every public operator with its signature, shapes, dtypes and
    docstring."""
    out = [NOTE, "# Operators\n", INTRODUCTION]
    for family, title in FAMILIES.items():
        members = [o for o in transom.ops().values() if o.family == family]
        out.append(f"## {title}\n")
        public = [o for o in members if not helper(o)]
        out += [page(o) for o in public]
        rest = ", ".join(f"`{o.name}`" for o in members if helper(o))
        if rest:
            out.append(f"Operators that these call (gradients, variants that write): {rest}.\n")
    return "\n".join(out)


def helper(op: Op) -> bool:
    """True for gradients and for variants with another name than their file's first operator."""
    return (
        "_backward" in op.name
        or bool(op.mutates)
        or any(
            op.name.startswith(f"{o.name}_") and o.module == op.module
            for o in transom.ops().values()
        )
    )


def page(op: Op) -> str:
    """One operator."""
    signature = str(inspect.signature(op)).replace("'", "")
    text = inspect.cleandoc(op.__doc__ or "")
    return (
        f"### `{op.name}`\n\n```python\ntransom.{op.name}{signature}\n```\n\n"
        f"```text\n{text}\n```\n\n"
        f"Declared as `{op.shapes_text}`; dtypes `{op.dtypes_text}`. {transforms(op)}\n"
    )


def transforms(op: Op) -> str:
    """What vmap and autocast do with an operator."""
    casts = {
        mode: ", ".join(n for n, m in op.autocast.items() if m == mode) for mode in ("low", "f32")
    }
    cast = "; ".join(
        f"autocast casts {names} to {'its dtype' if mode == 'low' else 'float32'}"
        for mode, names in casts.items()
        if names
    )
    batch = f"vmap folds into {op.batch}" if op.batch else "no vmap"
    return f"{batch}; {cast or 'autocast changes nothing'}."


INTRODUCTION = """\
Shapes: B batch, S queries, N keys or entries, H heads, D head or hidden size, T flattened tokens,
E experts, K (k) experts per token, I expert inner size, R residual streams. `float` is float64,
float32, bfloat16 or float16; `index` is int32 or int64; `quant` is a `QuantizedWeight`. Sums over
bfloat16 and float16 are kept in float32 and rounded once at the end.

**Index contract.** int32 or int64 in, int32 out; valid entries first, -1 after them; ties go to
the lowest index. Whatever stands behind a -1 can never reach an output, NaN included.

**Bad input** raises ValueError (shapes, values) or TypeError (dtypes, types) with one line before
anything is written, in eager mode and under `torch.compile` alike (there inside torch's own error,
at trace time for shapes and dtypes, at run time for values). *Values* (offsets that decrease, ids
out of range, ...) are checked on CPU tensors at every call. On accelerators that would wait for
the device, so they are checked there only with `TRANSOM_DEBUG=1`; without it, out-of-range values
are clamped before an address is formed from them, and results for them are unspecified.

**Bounds.** A tensor has at most 2^48 elements, and one without elements no size above 2^24; the
parts of a quantised weight fit each other; a tensor with elements has memory. Iterations of
Sinkhorn are at most 1000, `top_k`, `window`, `block_size` and groups of a scale 2^20, `dilation`
2^16, rows of an embedding's gradient 2^44. So a call on small tensors ends within a second.
Ctrl-C during a longer one is raised when the kernel returns; an argument that an operator
writes is then written whole.

**Transforms.** `torch.vmap` is free where calls along a leading dim are independent: it folds into
that dim, and refuses by name an argument that the dim shares. Autocast casts the arguments that an
operator names; inside implementations it is off. `torch.compile(fullgraph=True)` and
`torch.export` keep each operator as one node.

**Gradients** are first order, deterministic, and operators of their own, so that they too are
selected, recorded and explained.
"""


def edge_cases() -> str:
    """Every numbered edge case with the tests that carry its number."""
    shown: dict[int, set[str]] = {}
    for path in sorted((HERE.parent / "tests").rglob("test_*.py")):
        for chain in re.findall(r"edge_((?:\d{1,3}_(?:and_)?)+)", path.read_text(encoding="utf-8")):
            for number in re.findall(r"\d+", chain):
                shown.setdefault(int(number), set()).add(path.relative_to(HERE.parent).as_posix())
    rows = ["| | family | case | shown by |", "|---|---|---|---|"]
    for line in (HERE / "edge_cases.tsv").read_text(encoding="utf-8").splitlines():
        number, family, text, *note = line.split("\t")
        where = (
            ", ".join(f"`{f}`" for f in sorted(shown.get(int(number), ())))
            or (note or ["**nothing**"])[0]
        )
        rows.append(f"| {number} | {family} | {text} | {where} |")
    return f"{NOTE}\n# Edge cases\n\n{EDGES}\n" + "\n".join(rows) + "\n"


BACKENDS = {"native": "tuned", "numba": "portable", "ascend": "tuned", "triton": "portable"}
"""Those of this tree, and the tier of their implementations."""
_FLOATS = ("f32", "bf16", "f16", "f64")


def support_matrix() -> str:
    """A Markdown table, operator x implementation: dtypes, forward and backward, made from the
    declarations."""
    everything = transom.ops()
    rows = [
        "| operator | implementation | backend | dtypes | forward | backward |",
        "|---|---|---|---|---|---|",
    ]
    backward = {n for n in everything if n.partition("_backward")[1] or _backward_of(everything[n])}
    for name, op in everything.items():
        if name in backward:
            continue
        load(op, "cpu")
        # Whether a backend can be used depends on the machine: its files say what it has.
        for backend, tier in BACKENDS.items():
            if not _written(backend, op):
                continue
            mine = _differentiated(name)
            gradients = [o for o in everything.values() if _backward_of(o) == mine]
            have = sum(_written(backend, o) for o in gradients)
            back = _some(have, len(gradients)) if op.differentiated else "none"
            rows.append(
                f"| `{name}` | {backend} ({tier}) | {backend} "
                f"| by call: `transom explain {name}` | yes | {back} |"
            )
        for impl in sorted(op.impls.values(), key=lambda i: (-TIERS.index(i.tier), i.name)):
            if impl.tier not in ("composite", "reference"):
                continue
            rows.append(
                f"| `{name}` | {impl.name} ({impl.tier}) | {impl.backend} "
                f"| {', '.join(_dtypes(op, impl))} | "
                f"yes | {_backward_text(op, impl, everything)} |"
            )
    return "\n".join(rows) + "\n"


def _written(backend: str, op: Op) -> bool:
    """True if the backend's files compute the operator."""
    if backend == "native":
        return (HERE.parent / f"csrc/cpu/{op.family}/{op.name}.cpp").exists()
    twin = HERE.parent / f"backends/{backend}/{op.path}.py"
    registered = rf"\b{op.name}\.impl\(|@offer\(\s*{op.name}\b"
    return twin.exists() and re.search(registered, twin.read_text("utf-8")) is not None


def _some(have: int, wanted: int) -> str:
    if not have:
        return "by the composite"
    return "yes" if have == wanted else f"{have} of {wanted}; the rest by the composite"


def _backward_of(op: Op) -> str | None:
    """The forward operator that `op` is a gradient of: one of the same file whose name it
    extends."""
    for name, other in transom.ops().items():
        if (
            other.module == op.module
            and op.name != name
            and op.name.startswith(name)
            and other.differentiated
            and not op.mutates
            and op.differentiated is None
        ):
            return name
    return None


def _differentiated(name: str) -> str:
    """The operator whose gradients `name` has: its own, or those of the one it calls."""
    return {"hashed_embedding_pooled": "hashed_embedding"}.get(name, name)


def _backward_text(op: Op, impl: Impl, everything: dict[str, Op]) -> str:
    if op.differentiated is None:
        return "none"
    names = [n for n, o in everything.items() if _backward_of(o) == _differentiated(op.name)]
    have = [
        n for n in names if any(i.backend == impl.backend for i in everything[n].impls.values())
    ]
    if impl.tier == "reference":
        return "forward only"
    return _some(len(have), len(names))


def _dtypes(op: Op, impl: Impl) -> list[str]:
    """The dtypes of the first floating tensor, and the quantised formats of its weights."""
    out: list[str] = []
    for p in op.parameters:
        alternatives = op.rules.alternatives.get(p.name, ())
        limit = next(
            (
                r.limits["dtype"][1]
                for r in impl.requires
                if r.limits.get("dtype", ("",))[0] == p.name
            ),
            None,
        )
        if not out and set(alternatives) & set(_FLOATS):
            out += [a for a in alternatives if a in SHORT and (limit is None or SHORT[a] in limit)]
        if "quant" in alternatives and "quant weights" not in out:
            out.append(
                "quant weights"
                if limit is None
                else " ".join(k for k in limit if isinstance(k, str))
            )
    return [o for o in out if o] or ["integers"]


EDGES = """\
Cases that have broken implementations elsewhere, by number; the tests carry the number in their
names (`pytest -k edge_23`).
"""


def main() -> int:
    pages = {
        "edge_cases.md": edge_cases(),
        "operators.md": operators(),
        "support.md": f"{NOTE}\n# Support matrix\n\n{SUPPORT}\n{support_matrix()}",
    }
    stale = [
        n
        for n, text in pages.items()
        if not (HERE / n).exists() or (HERE / n).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        if stale:
            print(
                f"docs: {', '.join(stale)} not current; run python docs/generate.py",
                file=sys.stderr,
            )
        return int(bool(stale))
    for name, text in pages.items():
        (HERE / name).write_text(text, encoding="utf-8")
    return 0


SUPPORT = """\
Every operator and every implementation of it in this tree. *composite* is the operator's meaning
in torch: any device, bounded memory. *reference* is NumPy in float64, on request. What a plugin
adds on your machine: `transom doctor`, `transom explain`. *native* is C++ for CPUs, in
`csrc/cpu`; *numba* serves machines without a compiler. What was run where: everything on an x86-64
CPU, the native kernels at their baseline, AVX2 and AVX-512 levels; NEON cross-compiled and run
under qemu, never on an ARM processor. *triton* serves CUDA, ROCm and, through triton-ascend, Ascend
devices; *ascend* calls the vendor's own operators through torch_npu. No accelerator was at hand for
this version: the Triton kernels ran in Triton's interpreter and were compiled ahead of time
([triton.md](triton.md) says for what); on Ascend's side they were lowered, executed on a CPU and
planned for three chips ([ascend.md](ascend.md) says which), and the calls of torch_npu were checked
against its schemas. No binary of theirs has run on a device.
"""

if __name__ == "__main__":
    sys.exit(main())
