"""Write csrc/include/transom_ops.h and csrc/cpu/base/arguments.h from the declarations.

`--check`: exit 1 if they are not current.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import transom
from transom.abi import arguments, schema, schema_hash
from transom.op import Op
from transom.registry import OPS, RENAMED

HEADERS = Path(__file__).parent / "include" / "transom_ops.h"
ARGUMENTS = Path(__file__).parent / "cpu" / "base" / "arguments.h"
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
FORMER = """\
/* Former names of operators: until version 0.2 sources that have them compile, and libraries that
 * have them load. */
"""


def header() -> str:
    """The whole text."""
    former = [block(OPS[name], old) for old, name in RENAMED.items()]
    blocks = [*(block(op) for op in declared()), FORMER, *former]
    return "\n".join([HEAD, *blocks, "#endif /* TRANSOM_OPS_H */\n"])


def declared() -> list[Op]:
    """The operators of this tree, by name (not those of plugins and tests)."""
    return [op for op in transom.ops().values() if op.path]


def block(op: Op, name: str = "") -> str:
    """The lines of one operator, or of a former name of it."""
    prefix = f"TRANSOM_{(name or op.name).upper()}"
    names = [f"{prefix}_{name.upper()}" for name, _ in arguments(op)]
    lines = [
        *comment(schema(op, name)),
        f"#define {prefix}_HASH UINT64_C(0x{schema_hash(op, name):016x})",
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


ARGUMENTS_HEAD = """\
/* The arguments of each operator by their numbers in transom_call.args, and the hash of its schema,
 * for our own kernels: transom_ops.h as C++ has it. Made by `python csrc/write_ops_header.py`. */
#pragma once

#include "transom_ops.h"

namespace transom::arguments {
"""


def arguments_header() -> str:
    """The text of csrc/cpu/base/arguments.h."""
    return "\n".join(
        [ARGUMENTS_HEAD, *map(struct, declared()), "}  // namespace transom::arguments\n"]
    )


def struct(op: Op) -> str:
    """The lines of one operator there."""
    names = ", ".join(name.upper() for name, _ in arguments(op))
    lines = textwrap.wrap(
        f"enum : int {{ {names} }};", 100, initial_indent="  ", subsequent_indent="    "
    )
    hashed = f"  static constexpr uint64_t HASH = TRANSOM_{op.name.upper()}_HASH;"
    return "\n".join([f"struct {op.name} {{", *lines, hashed, "};\n"])


def main() -> int:
    """Write, or with --check compare."""
    texts = {HEADERS: header(), ARGUMENTS: arguments_header()}
    if "--check" not in sys.argv[1:]:
        for target, text in texts.items():
            target.write_text(text, encoding="utf-8")
        return 0
    stale = [t for t, text in texts.items() if not t.exists() or t.read_text("utf-8") != text]
    for target in stale:
        print(f"{target.name} is not current; run `python csrc/write_ops_header.py`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
