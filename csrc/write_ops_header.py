"""Write csrc/include/transom_ops.h from the declarations; `--check`: exit 1 if not current."""

from __future__ import annotations

import sys
from pathlib import Path

import transom
from transom.abi import arguments, schema, schema_hash
from transom.op import Op

TARGET = Path(__file__).parent / "include" / "transom_ops.h"
HEAD = """\
/* transom_ops.h: what a plugin includes. Made by `python csrc/write_ops_header.py` from the
 * declarations in kernels/; edit those instead.
 *
 * For each operator: its schema (arguments in order, shapes, dtypes), the hash of that text, and
 * the place of each argument in transom_call.args. A weight has four, see transom_plugin.h. */
#ifndef TRANSOM_OPS_H
#define TRANSOM_OPS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "transom_plugin.h"

/* True if the struct that `pointer` was given as holds `field`: ask before you read a field that
 * came with a later minor than the first one that you support. */
#define TRANSOM_HAS(pointer, type, field) \\
  ((pointer)->struct_size >= offsetof(type, field) + sizeof((pointer)->field))

#if defined(_WIN32)
#define TRANSOM_EXPORT __declspec(dllexport)
#else
#define TRANSOM_EXPORT __attribute__((visibility("default")))
#endif

/* The function that a plugin defines; its type is transom_plugin_function. */
TRANSOM_EXPORT const transom_plugin *transom_plugin_v1(const transom_host *host,
                                                       transom_status *status);

#ifdef __cplusplus
}
#endif
"""


def header() -> str:
    """The whole text."""
    return "\n".join([HEAD, *(block(op) for op in declared()), "#endif /* TRANSOM_OPS_H */\n"])


def declared() -> list[Op]:
    """The operators of this tree, by name (not those of plugins and tests)."""
    return [op for op in transom.ops().values() if op.path]


def block(op: Op) -> str:
    """The lines of one operator."""
    prefix = f"TRANSOM_{op.name.upper()}"
    names = [f"{prefix}_{name.upper()}" for name, _ in arguments(op)]
    lines = [
        *comment(schema(op)),
        f"#define {prefix}_HASH UINT64_C(0x{schema_hash(op):016x})",
        "enum {",
        *(f"  {name}," for name in names),
        f"  {prefix}_N_ARGS",
        "};",
    ]
    return "\n".join(lines) + "\n"


def comment(text: str) -> list[str]:
    """`text` as a C comment of at most 100 columns."""
    lines, line = [], "/*"
    for word in text.split():
        if len(line) + 1 + len(word) > 96:
            lines.append(line)
            line = " *"
        line += f" {word}"
    return [*lines, f"{line} */"]


def main() -> int:
    """Write, or with --check compare."""
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(header(), encoding="utf-8")
        return 0
    current = TARGET.exists() and TARGET.read_text(encoding="utf-8") == header()
    if not current:
        print(f"{TARGET.name} is not current; run `python csrc/write_ops_header.py`")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main())
