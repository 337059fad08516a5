"""transom bench below its command: cases, measuring, ceilings, peers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from toy_bench import TOY, toy, wanted  # noqa: F401 - the fixture holds for every test

import transom
from transom.bench import measure, models, peers
from transom.bench.cases import Case, Draw, Inputs, cases, fitting, short
from transom.bench.cases.attention import selected
from transom.bench.ceilings import Ceilings, Sample
from transom.bench.measure import Candidate, Settings
from transom.registry import OPS

_NAMES = sorted(n for n, op in OPS.items() if op.family in ("moe", "attention", "engram", "mhc"))
# Packing the rows of a cache is storage.
_STORAGE = {"pack_cache_rows", "unpack_cache_rows"}
GRADIENTS = [n for n in _NAMES if "_backward" in n or n.endswith("_kl")]
FORWARD = [n for n in _NAMES if n not in GRADIENTS and n not in _STORAGE]


class FakeCeilings:
    """Rates of 10^9 of everything, without measuring."""

    threads, level = 1, "avx2"

    def fma(self):
        return Sample(1e9, 1.0)

    dot = read = fma

    def rows(self, table):
        return Sample(1e9, 1.0)


class FakeClock:
    """Stands still but for what candidates add."""

    now = 0.0

    def __call__(self):
        return self.now


def a_case(**changes) -> Case:
    """mhc_post of two tokens."""
    (case,) = [c for c in cases(["mhc_post"], ["toy"], wanted((2,)))]
    return dataclasses.replace(case, **changes)


def timed(clock: FakeClock, *seconds: float, name="peer", call=None):
    """A candidate of another library that takes these times, call by call."""
    times = iter(seconds)

    def prepare(_):
        def run(v):
            clock.now += next(times)
            return transom.mhc_post(**v) if call is None else call(v)

        return run

    return Candidate(name, "torch", prepare)


def measured(clock: FakeClock, *others: Candidate, rounds=3, seconds=1e9, rates=None, case=None):
    rows = measure.measure(
        case or a_case(),
        lambda *_: others,
        FakeCeilings(),
        Settings(rounds, seconds, 1e9, clock),
        rates,
    )
    return {row.candidate: row for row in rows}


# Cases ------------------------------------------------------------------------------------------


def test_every_forward_operator_of_the_families_has_cases():
    assert {c.op for c in cases([], ["toy"], wanted())} == set(FORWARD)


def test_every_backward_operator_has_cases():
    want = {name for name in GRADIENTS if not name.startswith("lightning_indexer_kl")}
    assert {c.op for c in cases([], ["toy"], wanted(), backward=True)} >= want


@pytest.mark.parametrize("model", [m for m in models.MODELS if m != "toy"])
def test_every_model_has_cases_with_names_of_their_own(model):
    found = list(cases([], [model], wanted((1, 64), (1024, 65536))))
    assert found
    keys = [(c.op, c.model, c.label, c.dtype, c.format) for c in found]
    assert len(keys) == len(set(keys))


def all_measured(op, want, backward=False):
    """(case, its rows) with torch and transformers as peers."""
    loaded, _ = peers.load(["torch", "transformers"])
    settings = Settings(1, 1e-3, 1e9)
    with torch.inference_mode():
        for case in cases([op], ["toy"], want, backward):
            yield case, measure.measure(case, peers.candidates(loaded), FakeCeilings(), settings)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", FORWARD)
def test_every_candidate_of_every_case_is_right_and_timed(op, dtype):
    for case, rows in all_measured(op, wanted(dtypes=(dtype,))):
        assert not [r for r in rows if r.left_out], case.title
        assert all(r.seconds and r.error is not None and r.bytes > 0 for r in rows)
        assert sum(r.chosen for r in rows) == 1


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("op", ["moe_experts", "grouped_gemm", "hashed_embedding"])
def test_every_candidate_of_quantised_weights_is_right_and_timed(op, format):
    seen = list(all_measured(op, wanted(formats=(format,))))
    assert seen and not [r for _, rows in seen for r in rows if r.left_out]


@pytest.mark.parametrize("op", GRADIENTS)
def test_every_candidate_of_every_backward_case_is_right_and_timed(op):
    for case, rows in all_measured(op, wanted(), backward=True):
        assert not [r for r in rows if r.left_out], case.title


def test_a_model_is_cut_in_experts_to_fit_the_memory():
    one = 3 * TOY.experts.width * TOY.hidden * 4
    (case,) = cases(["moe_experts"], ["toy"], wanted(memory=9 * one))
    assert case.scaled == "8 of 16 experts" and case.dims["E"] == 8
    assert case.uncut == {"E": 16}
    assert case.make(Draw("f32")).draws[0]["gate_up"].shape[0] == 8


def test_experts_can_be_asked_for():
    found = list(cases(["moe_experts"], ["toy"], wanted(experts=(4, 8, 99))))
    assert [c.dims["E"] for c in found] == [4, 8, 16]
    assert [c.sweep for c in found] == [("experts", 4.0), ("experts", 8.0), ("experts", 16.0)]


@pytest.mark.parametrize(
    "count, least, memory, kept",
    [(16, 2, 1600, 16), (16, 2, 1599, 8), (384, 6, 3900, 32), (16, 6, 100, 6)],
)
def test_how_many_experts_fit(count, least, memory, kept):
    assert fitting(count, least, 100.0, memory) == kept


def test_each_draw_reads_other_experts_and_does_the_same_work():
    (case,) = cases(["moe_experts"], ["toy"], wanted((1,)))
    draws = case.make(Draw("f32")).draws
    chosen = [frozenset(d["ids"].flatten().tolist()) for d in draws]
    assert {len(c) for c in chosen} == {2} and len(set(chosen)) > 1
    assert len({id(d["gate_up"]) for d in draws}) == 1


def test_selected_entries_are_visible_distinct_and_ascending():
    visible = torch.tensor([0, 1, 3, 9, 9])
    found = selected(Draw("f32"), visible, 9, 4)
    assert found.shape == (5, 4) and found.dtype == torch.int32
    for row, seen in zip(found.tolist(), visible.tolist(), strict=True):
        kept = [i for i in row if i >= 0]
        assert len(kept) == min(seen, 4) and kept == sorted(set(kept))
        assert all(i < seen for i in kept) and row == kept + [-1] * (4 - len(kept))


def test_useful_work_counts_attended_pairs_only():
    found = {c.label: c.make(Draw("f32")) for c in cases(["sparse_attention"], ["toy"], wanted())}
    # 16 queries with a window of 4: 1 + 2 + 3 + 13 * 4 pairs, 4 heads of 512 + 512
    assert found["prefill 16, window"].flops == 2 * 4 * 1024 * 58
    # and entries of 4 tokens, all of the at most 4 that there are: 4 * (1 + 2 + 3) + 4
    assert found["prefill 16, CSA"].flops == 2 * 4 * 1024 * (58 + 28)


def test_lengths_are_written_short():
    assert [short(n) for n in (5, 1024, 65536, 1 << 20, 1500)] == ["5", "1k", "64k", "1M", "1,500"]


def test_a_checkpoints_configuration_is_a_model(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "deepseek_v4",
                "hidden_size": 64,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "num_attention_heads": 4,
                "head_dim": 16,
                "sliding_window": 8,
                "index_topk": 4,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "compress_ratios": [0, 4, 128, 4],
                "hc_mult": 4,
                "swiglu_limit": 10.0,
            }
        )
    )
    try:
        found = models.find(str(folder))
        assert found.experts == models.Experts(8, 2, 32, "sqrtsoftplus", limit=10.0)
        assert found.attention.ratios == (4, 128) and found.streams == 4
        assert {c.op for c in cases([], ["mine"], wanted())} >= {"moe_experts", "lightning_indexer"}
    finally:
        models.MODELS.pop("mine", None)


def test_a_dense_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ValueError, match="neither routed experts nor an indexer"):
        models.find(str(tmp_path))


# Measuring --------------------------------------------------------------------------------------


def test_medians_and_spreads_are_of_the_rounds():
    clock = FakeClock()
    # two calls to check it and to warm up, then the rounds
    row = measured(clock, timed(clock, 1.0, 1.0, 5.0, 1.0, 3.0))["peer"]
    assert row.calls == 3
    assert row.seconds == [3.0, 1.0, 2.0, 4.0, 5.0]


def test_shares_are_of_the_attainable_time():
    clock = FakeClock()
    row = measured(clock, timed(clock, *[1e-3] * 50, name="peer"), rounds=1)["peer"]
    least = max(row.flops, row.bytes) / 1e9
    assert row.attained[0] == pytest.approx(least / 1e-3)
    assert row.bound == ("arithmetic" if row.flops > row.bytes else "memory")
    assert row.of_fma == pytest.approx(row.flops / 1e9 / 1e-3)


def test_a_short_call_is_repeated_within_a_round():
    clock = FakeClock()
    tick = measure.SAMPLE / 10
    row = measured(clock, timed(clock, *[tick] * 100), rounds=2)["peer"]
    assert row.calls == 20
    assert row.median == pytest.approx(tick)


def test_a_call_of_many_seconds_is_timed_once():
    clock = FakeClock()
    row = measured(clock, timed(clock, 8.0, 9.0, 9.0, 9.0), seconds=1.0, rounds=9)["peer"]
    assert row.calls == 1 and row.median == 9.0


def test_what_would_take_too_long_is_left_out():
    clock, rates = FakeClock(), {}
    measured(clock, timed(clock, 1.0, 1.0, 1.0, 1.0, 1.0), rates=rates)
    (large,) = cases(["mhc_post"], ["toy"], wanted((2000,)))
    row = measured(clock, timed(clock), rates=rates, case=large)["peer"]
    assert not row.seconds
    assert row.left_out.startswith("about ") and row.left_out.endswith("at a smaller size")


def test_a_wrong_result_is_not_timed():
    clock = FakeClock()
    wrong = timed(clock, 1.0, 1.0, call=lambda v: torch.zeros_like(v["x"]))
    row = measured(clock, wrong)["peer"]
    assert not row.seconds and row.error > 0.1
    assert row.left_out.startswith("differs from the reference")


def test_a_result_that_is_wrong_outside_the_checked_rows_is_not_timed():
    clock = FakeClock()
    (case,) = cases(["mhc_post"], ["toy"], wanted((9,)))

    def nearly(v):
        out = transom.mhc_post(**v)
        out[2] = 0
        return out

    row = measured(clock, timed(clock, 1.0, 1.0, call=nearly), case=case)["peer"]
    assert row.left_out.startswith("differs from the first candidate")


def test_not_a_number_is_wrong():
    clock = FakeClock()
    row = measured(clock, timed(clock, 1.0, 1.0, call=lambda v: v["x"] * torch.nan))["peer"]
    assert not row.seconds and row.left_out


def test_a_peer_that_fails_does_not_end_the_run():
    clock = FakeClock()

    def fail(_):
        raise RuntimeError("no kernel\nfor this")

    rows = measured(clock, timed(clock, 1.0, call=fail))
    assert rows["peer"].left_out == "RuntimeError: no kernel for this"
    assert rows["composite"].seconds


def test_a_candidate_that_needs_too_much_memory_is_left_out():
    clock = FakeClock()
    big = dataclasses.replace(timed(clock), bytes=2e9)
    assert measured(clock, big)["peer"].left_out == "needs about 2 GB beside the inputs"


def test_chosen_is_what_a_call_takes_by_itself():
    rows = measured(FakeClock())
    ran = transom.explain("mhc_post", **a_case().make(Draw("f32")).draws[0]).chosen
    assert [name for name, row in rows.items() if row.chosen] == [ran]


@pytest.mark.parametrize(
    "flops, moved, rows, bound",
    [(1e6, 1.0, 0.0, "arithmetic"), (1.0, 1e6, 0.0, "memory"), (1.0, 1e6, 9e5, "random rows")],
)
def test_what_bounds_a_call(flops, moved, rows, bound):
    clock = FakeClock()
    case = a_case()

    def make(draw):
        table = torch.zeros(4, 4) if rows else None
        return Inputs(case.make(draw).draws, flops, moved, None, table, rows)

    found = measured(clock, timed(clock, *[1.0] * 9), case=dataclasses.replace(case, make=make))
    assert found["peer"].bound == bound


def test_a_peer_may_round_what_it_computes_on_the_way_and_ours_may_not():
    (case,) = cases(["mhc_post"], ["toy"], wanted((3,), dtypes=("bf16",)))
    values = case.make(Draw(case.dtype)).draws[0]
    want, dims = transom.mhc_post(**values), measure.dims_of(OPS["mhc_post"], values)
    off = (want.float() + 0.02 * want.float().abs().max()).bfloat16()
    assert measure.agrees(case, off, want, dims, "peer") is None
    assert "differ" in measure.agrees(case, off, want, dims, "transom")


# Ceilings ---------------------------------------------------------------------------------------


def test_the_ceilings_are_measured():
    ceilings = Ceilings(1, 1)
    assert ceilings.fma().rate > 1e8 and ceilings.read().rate > 1e8
    assert ceilings.rows(torch.zeros(1000, 33)).rate > 1e6
    found = ceilings.found()
    assert found["threads"] == 1 and found["fma"] > 0.1 and found["read"] > 0.1
    assert found["compiled"] == (transom.backends()["native"] is None)


def test_without_compiled_probes_torch_stands_in(monkeypatch):
    monkeypatch.setattr("transom.bench.ceilings.library", lambda: None)
    ceilings = Ceilings(1, 1)
    assert ceilings.dot() is None and ceilings.fma().rate > 1e8
    assert ceilings.rows(torch.zeros(1000, 33)).rate > 1e6
    assert ceilings.found()["compiled"] is False


# Peers ------------------------------------------------------------------------------------------


def test_every_peer_has_an_adapter_or_a_reason():
    found, absent = peers.load([*peers.PEERS])
    assert set(found) | set(absent) == set(peers.PEERS)
    assert all(reason and "\n" not in reason for reason in absent.values())
    assert "torch" in found and set(peers.versions(found)) == set(found)
    folder = Path(peers.__file__).parent
    modules = {module for module, _ in peers.PEERS.values()}
    assert modules == {p.stem for p in folder.glob("*.py")} - {"__init__"}


def test_a_package_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "torch", ("torch_", "no-such-package"))
    assert peers.load(["torch"]) == ({}, {"torch": "no-such-package is not installed"})
