"""Selection: asked for > measured > tier, reasons, use(), record(), the plan cache, value
checks."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import transom
from transom import dispatch, registry
from transom.measured import _table
from transom.requires import absent, at_most, device, dtype, last_dim_contiguous, multiple_of


def call(op, dtype=torch.float32, d=8):
    return op(torch.randn(3, d, dtype=dtype), torch.ones(d, dtype=dtype))


def add(op, name, *requires, tier="portable", **options):
    def function(x, weight, bias=None, *, eps=1e-6):
        return op.impls["composite"].function(x, weight, bias, eps=eps)

    function.__name__ = name
    op.impl(requires=requires, tier=tier, **options)(function)


def test_the_composite_runs_when_nothing_else_can(norm):
    with transom.record() as calls:
        call(norm)
    assert [(c.op, c.impl, c.device) for c in calls] == [("scaled_norm", "composite", "cpu")]


def test_a_better_tier_is_chosen_and_recorded(norm):
    add(norm, "plain")
    add(norm, "tuned", tier="tuned")
    with transom.record() as calls:
        call(norm)
    assert calls[0].impl == "tuned"
    assert norm.explain(torch.randn(3, 8), torch.ones(8)).why == "tier tuned"


def test_ties_within_a_tier_go_to_the_first_name(norm):
    add(norm, "beta")
    add(norm, "alpha")
    assert norm.explain(torch.randn(3, 8), torch.ones(8)).chosen == "alpha"


def test_every_reason_is_told_and_a_drop_warns_once(norm):
    add(norm, "small", at_most("D", 4), dtype("x", torch.float16), last_dim_contiguous("x"))
    with pytest.warns(
        transom.SlowPath,
        match=r"scaled_norm: runs as composite; small: D = 8; supported: at most 4",
    ):
        call(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(norm, d=8)
        norm(torch.randn(5, 8), torch.ones(8))
    text = str(norm.explain(torch.randn(8, 3).t(), torch.ones(8)))
    assert "D = 8; supported: at most 4" in text and "x is float32; supported: float16" in text
    assert "x is not last dim of stride 1" in text


def test_an_implementation_for_another_device_is_no_reason_to_warn(norm):
    add(norm, "far", device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(norm)


def test_fallback_can_be_made_an_error(norm, monkeypatch):
    monkeypatch.setenv("TRANSOM_FALLBACK", "error")
    add(norm, "even", multiple_of("D", 3))
    with pytest.raises(transom.NotSupported, match="only the composite can run"):
        call(norm)


def test_a_forced_choice_that_cannot_run_raises_with_its_reasons(norm):
    add(norm, "small", at_most("D", 4))
    with transom.use(scaled_norm="small"):
        with pytest.raises(
            transom.NotSupported, match=r"'small' was asked for and cannot run; small: D = 8"
        ):
            call(norm)
        call(norm, d=4)
    with transom.use("nowhere"), pytest.raises(transom.NotSupported, match="not registered"):
        call(norm)


def test_use_nests_and_ends(norm):
    add(norm, "better")
    with transom.record() as calls:
        with transom.use("composite"):
            call(norm)
            with transom.use(scaled_norm="better"):
                call(norm)
            call(norm)
        call(norm)
    assert [c.impl for c in calls] == ["composite", "better", "composite", "better"]


def test_environment_asks_for_implementations(norm, monkeypatch):
    add(norm, "better")
    monkeypatch.setenv("TRANSOM_USE", "scaled_norm=composite")
    registry.forget_plans()
    with transom.record() as calls:
        call(norm)
    assert calls[0].impl == "composite"


def test_use_of_an_unknown_operator_lists_what_there_is():
    with pytest.raises(
        ValueError, match="scaled_nrom: is not an operator; expected one of .*scaled_norm"
    ):
        with transom.use(scaled_nrom="composite"):
            pass


def test_gradients_are_named_after_their_operator():
    """<op>_backward, or <op>_backward_<of what> where an operator has several."""
    forward = [n for n, op in transom.ops().items() if op.path and op.differentiated]
    for name in (n for n, op in transom.ops().items() if op.path and "_backward" in n):
        assert name.partition("_backward")[0] in forward


def test_a_former_name_is_understood(monkeypatch):
    """Asked for in every way that takes an operator's name; the attribute says what it is now."""
    now = transom.ops()["grouped_gemm_backward_x"]
    with pytest.warns(DeprecationWarning, match="is named grouped_gemm_backward_x"):
        assert transom.grouped_gemm_dx is now
    monkeypatch.setenv("TRANSOM_USE", "grouped_gemm_dx=reference")
    rows = torch.randn(4, 3), torch.randn(2, 3, 5), torch.tensor([1, 4])
    assert transom.explain("grouped_gemm_dx", *rows).chosen == "reference"
    with transom.use(grouped_gemm_dx="composite"):
        assert now.explain(*rows).chosen == "composite"


def test_the_reference_runs_only_on_request_and_agrees(norm):
    x, w = torch.randn(3, 8), torch.rand(8)
    y, rms = norm(x, w)
    with transom.use("reference"), transom.record() as calls:
        y2, rms2 = norm(x, w)
    assert calls[0].impl == "reference"
    torch.testing.assert_close(y, y2)
    torch.testing.assert_close(rms, rms2)


def test_plans_are_bounded(norm):
    for n in range(dispatch.PLANS + 10):
        norm(torch.randn(n % 5 + 1, 8), torch.ones(8), eps=float(n))
    assert 0 < len(norm.engine.plans()) <= dispatch.PLANS


def test_a_requirement_on_an_unknown_dim_is_refused_at_registration(norm):
    with pytest.raises(ValueError, match="reads 'Q'"):
        add(norm, "bad", at_most("Q", 4))


def test_an_implementation_must_have_the_declared_parameters(norm):
    with pytest.raises(
        TypeError, match=r"impl 'short' takes \['x'\]; expected \['x', 'weight', 'bias', 'eps'\]"
    ):

        @norm.impl()
        def short(x):
            return x


def test_names_are_unique(norm):
    add(norm, "one")
    with pytest.raises(ValueError, match="has an implementation 'one'"):
        add(norm, "one")


def test_nondeterministic_implementations_step_back_when_determinism_is_asked(norm):
    add(norm, "racy", deterministic=False)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.warns(transom.SlowPath, match="use_deterministic_algorithms is on"):
            call(norm)
    finally:
        torch.use_deterministic_algorithms(False)
    assert norm.explain(torch.randn(3, 8), torch.ones(8)).chosen == "racy"


def test_optional_tensors_are_facts(norm):
    add(norm, "bare", absent("bias"))
    x, w = torch.randn(3, 8), torch.ones(8)
    assert norm.explain(x, w).chosen == "bare"
    assert norm.explain(x, w, w).chosen == "composite"


def test_value_checks_run_on_every_call_and_before_anything_else(linear):
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"scaled_linear: index holds 3; expected below N = 3"):
            linear(x, w, torch.tensor([0, 3]))
    linear(x, w, torch.tensor([0, 2]))


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        (
            lambda: (torch.randn(3, 8), torch.randn(7)),
            ValueError,
            "scaled_norm: weight has D = 7; x has D = 8",
        ),
        (
            lambda: (torch.randn(3, 8), torch.randn(2, 8)),
            ValueError,
            r"weight has shape \[2, 8\]; expected \[D\]",
        ),
        (
            lambda: (torch.tensor(1.0), torch.randn(8)),
            ValueError,
            r"x has shape \[\]; expected \[\*B, D\]",
        ),
        (
            lambda: (torch.ones(3, 8, dtype=torch.int32), torch.randn(8)),
            TypeError,
            "x is int32; expected float64, fl",
        ),
        (lambda: ([1.0], torch.randn(8)), TypeError, "x is list; expected a torch.Tensor"),
        (lambda: (torch.randn(3, 0), torch.randn(0)), ValueError, "D is 0; expected 1 or more"),
    ],
)
def test_bad_input_is_one_clear_line(norm, arguments, error, text):
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=text) as caught:
            norm(*arguments())
        assert "\n" not in str(caught.value)


def test_bad_plain_arguments(norm):
    with pytest.raises(ValueError, match="scaled_norm: eps is -1.0; expected >= 0"):
        norm(torch.randn(3, 8), torch.ones(8), eps=-1.0)
    with pytest.raises(TypeError, match="scaled_norm: eps is '1'; expected float"):
        norm(torch.randn(3, 8), torch.ones(8), eps="1")
    with pytest.raises(
        TypeError, match=r"scaled_norm\(\) got an unexpected keyword argument 'epz'"
    ):
        norm(torch.randn(3, 8), torch.ones(8), epz=1.0)


def test_arguments_that_cannot_be_hashed_are_named(norm):
    with torch.no_grad(), pytest.raises(TypeError, match=r"scaled_norm: eps is \[1\]; expected"):
        norm(torch.randn(3, 8), torch.ones(8), eps=[1])


def test_tensors_must_share_a_device(norm):
    with pytest.raises(ValueError, match="weight is on meta; x is on cpu"):
        norm(torch.randn(3, 8), torch.ones(8, device="meta"))


def test_recording_with_timing_counts_work(norm):
    with transom.record(timing=True) as calls:
        call(norm)
    assert calls[0].flops == 4 * 3 * 8 and calls[0].seconds > 0
    assert calls[0].bytes == 4 * (24 + 8 + 24 + 3)


def test_threads_call_at_once(norm):
    failures = []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        for n in range(50):
            x = torch.randn(n % 7 + 1, 8, generator=g)
            y, _ = norm(x, torch.ones(8))
            want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            if not torch.allclose(y, want, atol=1e-5):
                failures.append((seed, n))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failures


def test_tune_chooses_the_fastest_verified_implementation(norm, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))
    _table.cache_clear()
    import time

    def slow(x, weight, bias=None, *, eps=1e-6):
        time.sleep(0.01)
        return norm.impls["composite"].function(x, weight, bias, eps=eps)

    norm.impl(tier="tuned")(slow)
    x, w = torch.randn(3, 8), torch.ones(8)
    assert norm.explain(x, w).chosen == "slow"
    found = transom.tune("scaled_norm", x, w, repeats=3)
    assert found.chosen == "composite" and found.seconds["slow"] > 0.01
    assert norm.explain(x, w).chosen == "composite"
    assert norm.explain(torch.randn(4, 8), w).why == "measured fastest", (
        "3 and 4 rows round to the same power of two"
    )
    assert norm.explain(torch.randn(9, 8), w).chosen == "slow"
    monkeypatch.setenv("TRANSOM_TUNE", "off")
    assert norm.explain(x, w).chosen == "slow"


def test_tune_refuses_an_implementation_that_is_wrong(norm, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path))

    def wrong(x, weight, bias=None, *, eps=1e-6):
        return torch.zeros_like(x), x.new_zeros(x.shape[:-1])

    norm.impl()(wrong)
    with pytest.raises(ValueError, match="impl 'wrong' differs from the composite"):
        transom.tune(norm, torch.randn(3, 8), torch.ones(8))
