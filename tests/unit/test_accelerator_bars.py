"""The bars of an accelerator, judged from records, and the road of `make gpu` without a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from transom import cli
from transom.bench import accelerator, accelerator_bars, accelerator_model, gpu, whole
from transom.conformance import levels
from transom.registry import OPS

PEAKS = {"peak_flops": 100.0, "peak_bytes": 10.0}


def record(candidate, seconds, **fields):
    row = dict(
        op="grouped_gemm",
        model="v4-flash",
        label="T = 4,096, gate and up",
        dtype="bf16",
        format="plain",
        dims={},
        flops=60.0,
        bytes=1.0,
        candidate=candidate,
        **PEAKS,
    )
    return {**row, **({} if seconds is None else {"seconds": seconds}), **fields}


def found(rows, text):
    return next(v for v in accelerator_bars.judged(rows) if text in v.bar.text)


def test_a_bar_is_reached_by_the_worst_of_its_cases():
    rows = [
        record(name, seconds, op="sparse_attention", label=f"prefill {label}, CSA")
        for label, pair in {"4k": (1.0, 3.5), "64k": (2.0, 6.0)}.items()
        for name, seconds in zip(("triton", "torch flex_attention"), pair, strict=True)
    ]
    verdict = found(rows, "x flex_attention")
    assert (verdict.figure, verdict.text, verdict.case) == (3.0, "reached", "prefill 64k, CSA")
    rows[-1]["seconds"] = 5.9
    assert found(rows, "x flex_attention").text == "not reached"


def test_shares_are_of_the_peaks_that_were_measured():
    rows = [record("triton", 1.0), record("torch grouped_mm", 0.9)]
    assert found(rows, "share of the matmul peak").figure == pytest.approx(0.6)
    assert found(rows, "x grouped_mm").text == "reached"
    rows[0]["seconds"] = 1.01
    assert found(rows, "GEMM, 4,096 tokens, share").text == "not reached"


@pytest.mark.parametrize("form", ("plain", "mxfp4"))
def test_few_tokens_are_64_at_most(form):
    def row(tokens, seconds):
        return record(
            "triton",
            seconds,
            op="moe_experts",
            label=f"T = {tokens}",
            dims={"T": tokens},
            format=form,
            bytes=8.0,
        )

    name = "bf16" if form == "plain" else form
    verdict = found([row(64, 1.0), row(4096, 9.0)], f"T <= 64, {name}")
    assert (verdict.figure, verdict.text) == (pytest.approx(0.8), "reached")


def test_the_last_record_of_a_case_counts():
    rows = [record("torch grouped_mm", 1.0), record("triton", 9.0), record("triton", 1.0)]
    assert found(rows, "x grouped_mm").figure == 1.0


def test_what_was_left_out_is_not_reached():
    lookups = dict(op="hashed_embedding_out", dims={"S": 4096}, bytes=9.0)
    rows = [record("triton", None, left_out="out of memory", **lookups)]
    verdict = found(rows, "row gather")
    assert (verdict.figure, verdict.text) == (None, "not measured")
    rows.append(record("triton", 1.0, label="another", **lookups))
    assert found(rows, "row gather").text == "not measured in 1 cases"
    assert found([], "patched V4").text == "not measured"


def test_the_table_has_every_bar(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**record("triton", 1.0), "device": "H200"}) + "\n")
    assert accelerator_bars.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "on H200" in text and all(f"| {bar.text} |" in text for bar in accelerator_bars.BARS)


def test_without_a_gpu_one_line_says_what_is_missing(capsys):
    if gpu.missing() is None:
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu: ") and "no GPU here" in line


def test_every_step_runs_and_failures_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu._device, "describe", lambda _: "NVIDIA H200")
    monkeypatch.setattr(gpu.shutil, "which", lambda _: None)

    def start(command, **_):
        return SimpleNamespace(returncode=3 if "tune" in command else 0)

    monkeypatch.setattr(gpu.run, "__defaults__", (start,))
    assert gpu.main(["--results", str(tmp_path)]) == 1
    steps = json.loads((tmp_path / "nvidia_h200/steps.json").read_text())
    results = {step["name"]: step["result"] for step in steps}
    assert [*results] == [step.name for step in gpu.steps(tmp_path)]
    assert results.pop("tiles") == "failed (status 3)"
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert results.pop(f"compute-sanitizer {tool}") == (
            "left out: compute-sanitizer is not here; it comes with the CUDA toolkit"
        )
    assert set(results.values()) == {"passed"}
    assert "not measured" in (tmp_path / "nvidia_h200/bars.md").read_text()


def test_a_sanitizer_is_given_the_kits_numbers_and_memory_that_is_not_pooled(tmp_path, monkeypatch):
    step = next(s for s in gpu.steps(tmp_path) if s.name == "compute-sanitizer memcheck")
    named = " ".join(check.name for check in levels.CHECKS)
    chosen = step.command[-1].split(" or ")
    assert all(word in named for word in chosen)
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "/usr/bin/compute-sanitizer")
    seen = {}

    def start(command, **more):
        seen.update(more, command=command)
        return SimpleNamespace(returncode=99)

    assert gpu.run(step, tmp_path, start).result == "failed (status 99)"
    assert seen["env"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert seen["command"][0] == "compute-sanitizer"


def test_the_commands_of_the_steps_exist():
    """Each parses its options, and with --help ends well."""
    modules = {
        "transom.bench.accelerator": accelerator.main,
        "transom.bench.accelerator_model": accelerator_model.main,
        gpu.COMMAND: cli.main,
    }
    for step in gpu.steps(gpu.ROOT / "build"):
        call = [part for part in step.command if part != gpu.sys.executable]
        if step.needs:
            continue
        try:
            status = modules[call[1]]([*call[2:], "--help"])  # behind -m or -c
        except SystemExit as ended:
            status = ended.code
        assert status == 0, step.name


CASE = SimpleNamespace(op="route", label="T = 4")


def test_a_device_fault_ends_the_run(monkeypatch, capsys):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(accelerator._device, "synchronize", broken)
    with pytest.raises(accelerator.DeviceFault, match="T = 4: the device failed under triton: x"):
        accelerator.left_out("triton", RuntimeError("x"), CASE, torch.device("cpu"))

    def raises(*_):
        raise RuntimeError("illegal")

    monkeypatch.setattr(accelerator, "candidates", lambda *_: iter([("composite", raises)]))
    call = ["--device", "cpu", "--ops", "route", "--tokens", "4", "--format", "plain"]
    monkeypatch.setattr(accelerator, "measured_peaks", lambda _: accelerator.Peaks(1.0, 1.0))
    assert accelerator.main(call) == 1
    assert "the device failed under composite: illegal" in capsys.readouterr().err


def test_an_error_of_ours_fails_and_a_peers_does_not():
    def told(name, error):
        return accelerator.left_out(name, error, CASE, torch.device("cpu"))

    assert told("composite", ValueError("no")) == {"left_out": "no", "failed": True}
    assert not told("composite", torch.OutOfMemoryError("much"))["failed"]
    assert not told("torch topk", RuntimeError("no"))["failed"]


def test_matmul_and_topk_choose_what_the_indexer_chooses():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 9, 4, 16, generator=g), torch.randn(1, 50, 16, generator=g)
    weights, visible = torch.rand(1, 9, 4, generator=g), torch.arange(1, 10)[None] * 5
    got = accelerator.matmul_topk(dict(q=q, k=k, weights=weights, visible=visible, top_k=7))
    want = OPS["lightning_indexer"].call(q, k, weights, 7, visible=visible)
    assert torch.equal(got.sort(-1).values, want.sort(-1).values)


def test_a_whole_model_is_measured_patched_and_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accelerator_model, "ROUNDS", 1)
    monkeypatch.setattr(whole, "STEPS", 1)
    pytest.importorskip("transformers")
    out = tmp_path / "rows.jsonl"
    call = ["--device", "cpu", "--dtype", "f32", "--prompt", "8", "--out", str(out)]
    assert accelerator_model.main(call) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["candidate"] for row in rows] == ["transformers eager", "transom"] * 2
    assert all(row["seconds"] > 0 and row["error"] < 1e-4 for row in rows)
    assert "tokens/s" in capsys.readouterr().out
    assert accelerator_model.main(["--device", "npu"]) == 2
