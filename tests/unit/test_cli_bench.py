"""transom bench: the command, keeping and comparing, the report, and bad input in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from toy_bench import a_row, lines, toy, wanted  # noqa: F401 - the fixture holds for every test

import transom
from transom.bench import charts, measure, records, report
from transom.bench.cases import Draw, cases
from transom.bench.measure import Row, Settings
from transom.bench.run import Found, Plan
from transom.cli import main
from transom.registry import OPS


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(["bench", *arguments])
    done = capsys.readouterr()
    return status, done.out, done.err


def refused(capsys, *arguments: str) -> str:
    status, out, err = call(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.count("\n") == 1, err
    return err.strip()


TINY = (
    "--model",
    "toy",
    "--tokens",
    "5",
    "--context",
    "16",
    "--rounds",
    "1",
    "--seconds",
    "0.001",
    "--memory",
    "0.1",
    "--threads",
    "1",
)


# Records ----------------------------------------------------------------------------------------


def test_a_line_stands_for_itself():
    (line,) = lines(a_row())
    assert line["commit"] == "abc" and line["machine"] and line["versions"]["torch"]
    assert line["gflops"] == 1.0 and line["gbytes"] == 0.1
    assert records.row_of(json.loads(json.dumps(line))) == a_row()


def test_saved_lines_are_read_back_and_replaced(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    records.save(path, lines(a_row(), a_row("composite")))
    records.save(path, lines(a_row(median=2.0)))
    found = [records.row_of(line) for line in records.load(path)]
    assert [(r.candidate, r.median) for r in found] == [("native", 2.0), ("composite", 1.0)]


@pytest.mark.parametrize(
    "before, now, noise, verdict",
    [
        (0.5, 0.6, 0.01, "faster"),
        (0.6, 0.5, 0.01, "slower"),
        (0.5, 0.51, 0.001, "same"),  # apart, but by less than is told
        (0.5, 0.6, 0.2, "same"),  # the ranges overlap
    ],
)
def test_a_change_is_one_beyond_the_noise(before, now, noise, verdict):
    found = records.compare(
        lines(a_row(attained=before, noise=noise)), lines(a_row(attained=now, noise=noise))
    )
    (change,) = found.changes
    assert change.verdict == verdict and change.factor == pytest.approx(now / before)
    assert found.other_machine is None


def test_a_slower_machine_is_not_a_slower_kernel():
    found = records.compare(lines(a_row(median=1.0)), lines(a_row(median=2.0)))
    assert [c.verdict for c in found.changes] == ["same"]


def test_without_ceilings_seconds_are_compared():
    found = records.compare(
        lines(a_row(median=1.0, attained=0.5), a_row("whole", median=1.0, peer="x")),
        lines(a_row("whole", median=2.0, peer="x")),
    )
    plain = [dataclasses.replace(a_row(median=m), attained=[]) for m in (1.0, 2.0)]
    (change,) = records.compare(lines(plain[0]), lines(plain[1])).changes
    assert change.verdict == "slower" and change.factor == pytest.approx(0.5)
    assert [r.candidate for r in found.gone] == ["native"]


def test_new_and_missing_measurements_and_another_machine_are_told():
    found = records.compare(lines(a_row(), machine="old"), lines(a_row(threads=1), machine="new"))
    assert len(found.new) == len(found.gone) == 1 and not found.changes
    assert found.other_machine == "old"


# Report -----------------------------------------------------------------------------------------


def page(*rows: Row, **more) -> str:
    return report.render(Found(lines(*rows), {"llama.cpp": "it gives <whole> models"}), **more)


def test_the_report_says_what_was_measured():
    text = page(
        a_row(),
        a_row("composite", median=4.0),
        a_row("torch mm loop", median=2.0),
        dataclasses.replace(
            a_row("zentorch"), seconds=[], attained=[], left_out="RuntimeError: no"
        ),
    )
    for expected in (
        "a machine",
        "Toy, T = 5, f32",
        "torch mm loop",
        "transom 2.00 x as fast",
        "left out, RuntimeError: no",
        "it gives &lt;whole&gt; models",
        "At a glance",
        "100 GFLOP/s",
        "20.0 GB/s",
    ):
        assert expected in text, expected


def test_the_report_needs_nothing_else():
    text = page(a_row(), a_row("composite"))
    assert "src=" not in text and "href=" not in text and "@import" not in text
    assert text.count("<svg") >= 1 and 'data-op="moe_experts"' in text


def test_the_summary_compares_with_the_best_other():
    (found,) = report.summary(
        [
            a_row(median=1.0),
            a_row("composite", median=8.0),
            a_row("torch a", median=2.0),
            a_row("torch b", median=3.0),
            a_row("native", median=1.0, label="T = 9"),
            a_row("torch a", median=0.5, label="T = 9"),
        ]
    )
    assert found["cases"] == 2 and found["by"] == "native"
    assert found["best"] == pytest.approx(1.0)  # 2 and 1/2
    assert found["least"][0] == 0.5 and found["most"][0] == 2.0
    assert found["composite"] == pytest.approx(8.0)


def test_the_report_shows_what_grows_and_what_threads_give():
    rows = [
        a_row(
            median=n * 1e-3 / threads, label=f"T = {n}", sweep=("tokens", float(n)), threads=threads
        )
        for n in (1, 8, 64)
        for threads in (1, 2)
    ]
    text = page(*rows)
    assert "How it grows" in text and "2 threads over 1" in text and "2.00 x, 2.00 x" in text


def test_the_report_tells_a_change():
    compared = records.compare(lines(a_row(attained=0.8)), lines(a_row(attained=0.5)))
    text = page(a_row(attained=0.5), compared=compared)
    assert "Since the baseline" in text and "0.62 x" in text or "0.63 x" in text


def test_every_operator_of_a_family_has_a_colour_of_its_own():
    rows = [a_row(op=op) for op in ("moe_experts", "route", "grouped_gemm", "mhc_pre", "mhc_post")]
    assert len(set(charts.colours(rows).values())) == 5


# The command ------------------------------------------------------------------------------------


def test_a_run_writes_everything(capsys, tmp_path):
    files = [tmp_path / name for name in ("a.html", "a.json", "a.jsonl")]
    status, out, err = call(
        capsys,
        "mhc_post",
        "route",
        *TINY,
        "--against",
        "composite,torch,llama.cpp",
        "--html",
        str(files[0]),
        "--json",
        str(files[1]),
        "--save",
        str(files[2]),
    )
    assert status == 0
    assert "mhc_post" in out and "Toy, T = 5, bf16" in out and "not compared with llama.cpp" in out
    assert "[" in err and "route: Toy" in err
    found = json.loads(files[1].read_text())
    assert {line["op"] for line in found} == {"mhc_post", "route"}
    assert len(records.load(files[2])) == len(found)
    assert "Toy, T = 5, bf16" in files[0].read_text()
    status, out, _ = call(capsys, "route", *TINY, "--against", "none", "--compare", str(files[2]))
    assert status in (0, 1) and "measurements are as fast as in the baseline" in out


def test_saved_figures_are_shown_without_measuring(capsys, tmp_path, monkeypatch):
    path, page = tmp_path / "a.jsonl", tmp_path / "a.html"
    records.save(path, lines(a_row(), a_row("torch mm loop", median=2.0)))
    monkeypatch.setattr("transom.bench.run.run", None)
    status, out, _ = call(capsys, "--show", str(path), "--html", str(page))
    assert status == 0 and "torch mm loop" in out and "2.00 x as fast" in out
    assert "transom 2.00 x as fast" in page.read_text()


def test_json_goes_to_standard_output_alone(capsys):
    status, out, _ = call(capsys, "sinkhorn", *TINY, "--against", "none", "--json", "-")
    assert status == 0 and {line["op"] for line in json.loads(out)} == {"sinkhorn"}


def test_a_wrong_kernel_of_ours_fails_the_run(capsys, monkeypatch):
    monkeypatch.setattr(measure._Judge, "__call__", lambda *_: (0.5, "differs from the reference"))
    status, out, _ = call(capsys, "sinkhorn", *TINY, "--against", "none")
    assert status == 1 and "WRONG RESULT: sinkhorn" in out


def test_without_models_each_operator_has_one(monkeypatch):
    plan = Plan((), (), wanted((1,), (1024,)), (1,), (), Settings())
    by_op: dict[str, set[str]] = {}
    for case in plan.cases():
        by_op.setdefault(case.op, set()).add(case.model)
    assert by_op.pop("moe_experts") == {"v4-flash", "qwen3-30b"}
    assert all(len(names) == 1 for names in by_op.values())
    assert "block_sparse_attention" in by_op and "hashed_embedding" in by_op


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("bogus",), "bogus: is not an operator"),
        (("--model", "gpt-2"), "'gpt-2' is neither a folder with config.json nor one of v4-flash"),
        (("--dtype", "f64"), "--dtype: 'f64' is unknown; expected f32, bf16, f16"),
        (("--format", "int3"), "--format: 'int3' is unknown; expected plain, int8"),
        (("--tokens", "1,x"), "--tokens: 'x' was given; expected 1 or more, like 64, 64k or 1M"),
        (("--tokens", ","), "--tokens is empty"),
        (("--context", "0"), "--context: '0' was given"),
        (("--threads", "-1"), "--threads: '-1' was given"),
        (("--against", "cublas"), "--against: 'cublas' is unknown; expected composite, torch"),
        (("--rounds", "0"), "--rounds is 0; expected 1 or more"),
        (("--seconds", "0"), "--seconds is 0; expected more than 0"),
        (("--memory", "-1"), "--memory is -1"),
        (("quantize_int8",), "no case is left"),
        (("--html", "/"), "/ is a folder"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, text):
    assert text in refused(capsys, *arguments)


@pytest.mark.parametrize(
    "content, text",
    [
        ("{", "line 1: it is not JSON"),
        ("", "holds no measurement"),
        ('{"schema": 9}', "schema is 9"),
        ('{"schema": 1}', "a line has no 'op'"),
    ],
)
def test_a_damaged_baseline_is_refused(capsys, tmp_path, content, text):
    path = tmp_path / "old.jsonl"
    path.write_text(content)
    assert text in refused(capsys, "route", *TINY, "--compare", str(path))


def test_a_missing_baseline_is_refused(capsys, tmp_path):
    assert "cannot be read" in refused(capsys, "route", "--compare", str(tmp_path / "none.jsonl"))


def test_the_probes_are_where_the_command_line_help_says(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0 and "Examples:" in out and "transom bench" in out


# tune --model -----------------------------------------------------------------------------------


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Measured choices count, and are kept in a folder of the test's own."""
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    monkeypatch.setenv("TRANSOM_TUNE", "on")
    transom.measured._table.cache_clear()
    yield
    transom.measured._table.cache_clear()
    transom.registry.forget_plans()


def test_tune_stores_the_choice_for_the_whole_model(capsys, own_table):
    if transom.backends()["native"] is not None:
        pytest.skip("only the composite can run: nothing to choose")
    arguments = "--model toy --tokens 5 --context 16 --repeats 1 --memory 1".split()
    status = main(["tune", "sinkhorn", "moe_experts", *arguments])
    out = capsys.readouterr().out
    assert status == 0 and "moe_experts" in out and "Toy, T = 5, f32" in out
    values = next(cases(["moe_experts"], ["toy"], wanted())).make(Draw("f32")).draws[0]
    for ids in (torch.int32, torch.int64):
        found = OPS["moe_experts"].explain(**{**values, "ids": values["ids"].to(ids)})
        assert found.why == "measured fastest"


def test_tune_refuses_an_unknown_model(capsys):
    status = main(["tune", "--model", "gpt-2"])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and "'gpt-2' is neither" in err
