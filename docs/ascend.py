"""docs/ascend.json and docs/ascend.md from what `transom verify --target ascend --json FILE` wrote:

python docs/ascend.py FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEMORIES = ("UB", "L1", "L0C")


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """What the page needs: counts of calls by operator, and the plans."""
    names = list(dict.fromkeys(r["op"] for r in (*report["ran"], *report["refused"])))
    ops = {}
    for name in names:
        mine = [r for r in report["ran"] if r["op"] == name]
        refused = [r for r in report["refused"] if r["op"] == name]
        ops[name] = {
            "calls": len(mine), "failed": sum(bool(r["stage"]) for r in mine),
            "launches": sum(r["launches"] for r in mine), "refused": len(refused),
            "why": sorted({r["why"] for r in refused}),
        }  # fmt: skip
    capacity = {}
    for f in report["fits"]:
        if f["plan"]["fits"]:
            capacity[f["plan"]["target"]] = f["plan"]["capacity"]
    plans = [
        [f["kernel"], f["tile"], f["plan"]["target"], f["chosen"], f["plan"]["fits"],
         f["plan"]["use"], f["plan"]["why"]]
        for f in report["fits"]
    ]  # fmt: skip
    kept = ("note", "tools", "date", "commit", "passed", "levels", "seconds", "contract", "unasked")
    return {**{k: report.get(k) for k in kept}, "ops": ops, "capacity": capacity, "plans": plans}


def rendered(kept: dict[str, Any]) -> str:
    """docs/ascend.json: a line for each operator and plan."""

    def lines(items: Any) -> str:
        return ",\n  ".join(items)

    plain = {k: v for k, v in kept.items() if k not in ("ops", "plans")}
    ops = lines(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in kept["ops"].items())
    plans = lines(map(json.dumps, kept["plans"]))
    head = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in plain.items())
    return f'{{{head},\n "ops": {{\n  {ops}\n }},\n "plans": [\n  {plans}\n ]}}\n'


def page(kept: dict[str, Any]) -> str:
    """docs/ascend.md."""
    out = [HEAD.format(note=kept["note"], tools=", ".join(kept["tools"][:2]), date=kept["date"])]
    out += ["| level | passed | failed | refused |", "|---|---:|---:|---:|"]
    out += [f"| {n} | {a} | {b} | {c} |" for n, (a, b, c) in kept["levels"].items()]
    schemas = kept["unasked"] or f"{len(kept['contract'])} schemas have changed"
    out.append(f"\nL4, the vendor's operators: {schemas}.\n")
    out += ["## Executed\n", "| operator | calls | failed | refused | launches |"]
    out.append("|---|---:|---:|---:|---:|")
    for name, o in kept["ops"].items():
        counts = (o["calls"], o["failed"] or "", o["refused"] or "", o["launches"])
        out.append(f"| `{name}` | {' | '.join(map(str, counts))} |")
    reasons = [(n, why) for n, o in kept["ops"].items() for why in o["why"]]
    if reasons:
        out.append("\nRefused, as `transom explain` says on device `npu`:\n")
        out += [f"- `{name}`: {why}" for name, why in reasons]
    out.append(f"\n## Planned\n\n{PLANNED}")
    out += ["| kernel | tile | chip | fits | UB | L1 | L0C | fullest |"]
    out.append("|---|---|---|---|---:|---:|---:|---|")
    for kernel, tile, chip, chosen, fits, use, why in kept["plans"]:
        capacity = kept["capacity"].get(chip, {})
        cells = [f"{use[m] / 1024:.1f}" if m in use else "" for m in MEMORIES]
        shares = [(use[m] / capacity[m], m) for m in use if capacity.get(m)]
        fullest = f"{max(shares)[1]} {max(shares)[0]:.0%}" if shares else ""
        said = "yes" if fits else "no" if chosen else "(no)"
        told = fullest if fits or shares else why
        row = (f"`{kernel}`", tile or "-", chip, said, *cells, told)
        out.append(f"| {' | '.join(row)} |")
    return "\n".join(out) + "\n"


HEAD = """\
<!-- made by `python docs/ascend.py` from the report of `transom verify --target ascend` -->

# The Triton kernels on Ascend, without a device

{note}

Made with {tools}, {date}, by `transom verify --target ascend --quick --json FILE`: every operator's
small calls (three dtypes, sizes 0 and 1, models' shapes shrunk), and its kernels at a model's full
size in bfloat16, and in mxfp4 where it has weights. Without `--quick` all dtypes, formats and tiles
are planned; that has not been run whole.
"""
PLANNED = """\
KiB of a core's memories that the compiler gives each kernel with its tile. `yes`: it fits; `no`: it
doesn't, and it is the tile that a call takes; `(no)`: it doesn't, and is only listed. Above 100 %
is what it would need. Tiles were chosen by `--fit`, or are the tables' general ones where those
fit.
"""


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    kept = compact(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    (HERE / "ascend.json").write_text(rendered(kept), encoding="utf-8")
    (HERE / "ascend.md").write_text(page(kept), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
