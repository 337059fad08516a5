"""bench.accelerator: its road on a machine without an accelerator."""

from __future__ import annotations

import json

from transom.bench import accelerator

CALL = ["--ops", "route", "--tokens", "4", "--format", "plain", "--repeats", "1"]


def test_every_candidate_is_measured_and_written(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert accelerator.main(["--device", "cpu", *CALL, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"composite", "torch topk"} <= {row["candidate"] for row in rows}
    assert all(row["seconds"] > 0 and row["flops"] > 0 for row in rows)
    assert "torch topk" in capsys.readouterr().out


def test_a_device_that_is_not_there_is_refused(capsys):
    assert accelerator.main(["--device", "npu", *CALL]) == 2
    assert "device is 'npu'; available here: cpu" in capsys.readouterr().err


def test_a_wrong_candidate_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(
        accelerator.torch_,
        "route",
        lambda v: (v["logits"].topk(v["k"], largest=False).indices,) * 2,
    )
    assert accelerator.main(["--device", "cpu", *CALL]) == 1
    assert "left out: differs" in capsys.readouterr().out
