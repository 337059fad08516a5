"""docs/ascend.json and docs/ascend.md from what `transom verify --target ascend --json FILE` wrote:

python docs/ascend.py FILE...

With several files (runs with --ops) a later one's operators replace an earlier one's.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEMORIES = ("UB", "L1", "L0C")


def compact(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page needs of reports, a later one's operators in place of an earlier one's: counts
    of calls by operator, and the plans."""
    work = importlib.import_module("transom.conformance.ascend.verify")
    chips = importlib.import_module("transom.conformance.ascend.chips")
    offered = importlib.import_module("transom.conformance.compiled.compile").offered()
    last = {name: at for at, r in enumerate(reports) for name in _operators(r)}
    ran, refused, fits = [], [], []
    for at, report in enumerate(reports):
        mine = [name for name, where in last.items() if where == at]
        ran += [work.Ran(**r) for r in report["ran"] if r["op"] in mine]
        refused += [work.Refused(**r) for r in report.get("refused", []) if r["op"] in mine]
        for f in report["fits"]:
            if f["op"] in mine:
                fits.append(work.Fit(**{**f, "plan": chips.Plan(**f["plan"])}))
    found = work.Outcome(ran, refused, work.without_repeats(fits))
    ops = {}
    for name in sorted(last):
        calls = [r for r in ran if r.op == name]
        left = [r for r in refused if r.op == name]
        ops[name] = {
            "calls": len(calls),
            "failed": sum(bool(r.stage) for r in calls),
            "launches": sum(r.launches for r in calls),
            "refused": sum(not r.planned for r in left),
            "why": sorted({r.why for r in left}),
        }
    plans = [
        [f.kernel, f.tile, f.plan.target, f.chosen, f.plan.fits, f.plan.use, f.plan.why]
        for f in found.fits
    ]
    schemas = next((r["contract"] for r in reports if "date" in r and not r["unasked"]), None)
    return {
        "note": reports[-1]["note"],
        "tools": reports[-1]["tools"],
        "reports": len(reports),
        "seconds": round(sum(r["seconds"] for r in reports if "seconds" in r)),
        "levels": found.levels,
        "schemas changed": schemas,
        "passed": not found.failed,
        "capacity": {f.plan.target: f.plan.capacity for f in found.fits if f.plan.fits},
        "missing": [n for n in offered if n not in last],
        "ops": ops,
        "plans": plans,
    }


def _operators(report: dict[str, Any]) -> list[str]:
    return [r["op"] for kind in ("ran", "refused", "fits") for r in report.get(kind, [])]


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
    count = kept["reports"]
    one = "one run of `transom verify --target ascend --quick`"
    runs = one if count == 1 else f"{count} reports, the last one of an operator counting"
    out = [HEAD.format(note=kept["note"], tools=" and ".join(kept["tools"][:2]), reports=runs)]
    out += ["| level | passed | failed | refused |", "|---|---:|---:|---:|"]
    out += [f"| {n} | {a} | {b} | {c} |" for n, (a, b, c) in kept["levels"].items()]
    schemas = kept["schemas changed"]
    said = "not compared" if schemas is None else f"{len(schemas)} changed"
    out.append(f"\nL4, the schemas of the vendor's operators that the adapter calls: {said}.\n")
    out += ["## Executed\n", "| operator | calls | failed | refused | launches |"]
    out.append("|---|---:|---:|---:|---:|")
    for name, o in kept["ops"].items():
        counts = (o["calls"], o["failed"] or "", o["refused"] or "", o["launches"])
        out.append(f"| `{name}` | {' | '.join(map(str, counts))} |")
    if kept["missing"]:
        names = ", ".join(f"`{n}`" for n in kept["missing"])
        out.append(f"\nNot run for this page: {names}.")
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

Made with {tools} from {reports}: each operator's small calls (three dtypes, sizes 0 and 1, models'
shapes shrunk), and its kernels at a model's full size in bfloat16, and in mxfp4 where it has
weights. Without `--quick` all dtypes, formats and tiles are planned too: that was not run whole.
"""
PLANNED = """\
KiB of a core's memories that the compiler gives each kernel with its tile. `yes`: it fits; `no`: it
doesn't, and it is the tile that a call takes; `(no)`: it doesn't, and is only listed. Above 100 %
is what it would need. Tiles were chosen by `--fit`, or are the tables' general ones where those
fit.
"""


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    kept = compact([json.loads(Path(p).read_text(encoding="utf-8")) for p in sys.argv[1:]])
    (HERE / "ascend.json").write_text(rendered(kept), encoding="utf-8")
    (HERE / "ascend.md").write_text(page(kept), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
