"""transom run on tiny models: agreement, figures, the report, and bad input in one line."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import pytest
import torch

import transom
from transom.cli import main
from transom.device import Peaks

transformers = pytest.importorskip("transformers")

PEAKS = Peaks("cpu", 100.0, 10.0, 1)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The built-in model is a much smaller one, and peaks are given."""
    from transom.conformance.models import tiny

    def builtin(*, seed=0, dtype=torch.float32):
        model = tiny.tiny_model("deepseek_v4", seed=seed, vocab_size=258)
        return model.to(dtype), tiny.ByteTokenizer()

    monkeypatch.setattr(tiny, "builtin_model", builtin)
    monkeypatch.setattr("transom.device.peaks", lambda device: PEAKS)
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRANSOM_USE", raising=False)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(("run", *arguments))
    done = capsys.readouterr()
    return status, done.out, done.err


SMALL = ("--prompt", "some text that is long enough", "--tokens", "3")


# The whole job ------------------------------------------------------------------------------------


@pytest.fixture
def report(tiny, capsys, tmp_path):
    """One whole run: status, what it printed, its figures, its report."""
    figures, page = tmp_path / "sub" / "figures.json", tmp_path / "report.html"
    status, out, err = run(capsys, *SMALL, "--json", str(figures), "--html", str(page))
    return status, out, err, json.loads(figures.read_text()), page.read_text()


def test_both_runs_agree_and_the_figures_say_how(report):
    status, out, err, found, _ = report
    assert status == 0, out
    assert "outputs agree: largest logit difference is" in out
    assert "all 3 tokens are equal" in out
    assert found["agreement"]["agrees"] and found["agreement"]["rule"] == "exact"
    assert found["agreement"]["largest_of_range"] < 1e-5
    assert len(found["agreement"]["by_position_of_range"]) == found["settings"]["prompt_tokens"] + 2
    assert found["original"]["tokens"] == found["patched"]["tokens"]
    assert len(found["original"]["tokens"]) == 3
    for side in ("original", "patched"):
        assert found[side]["prefill_tokens_per_second"] > 0
        assert found[side]["decode_tokens_per_second"] > 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["patch"]["replaced"]


def test_every_operator_is_listed_with_what_ran(report):
    _, out, _, found, _ = report
    prefill, decode = found["phases"]
    assert [p["name"] for p in found["phases"]] == ["prefill", "decode"]
    assert (prefill["model_calls"], decode["model_calls"]) == (1, 2)
    ran = {r["op"]: r for r in prefill["operators"]}
    assert {"sparse_attention", "moe_experts", "route", "mhc_pre", "mhc_post"} <= ran.keys()
    assert {r["impl"] for r in prefill["operators"]} <= {"composite", "native", "numba"}
    assert all(name in out for name in ran)
    assert ran["moe_experts"]["calls"] == 4
    total = sum(r["seconds"] for r in prefill["operators"]) + prefill["seconds_outside"]
    assert math.isclose(total, prefill["seconds"], rel_tol=1e-6)


def test_progress_is_plain_lines_without_a_terminal(report):
    err = report[2]
    for stage in (
        "loading the model",
        "Hugging Face: prefill of",
        "transom: prefill of",
        "recording",
    ):
        assert stage in err
    assert "\x1b" not in err


def test_the_report_is_one_file_that_needs_no_network(report):
    page = report[4]
    for outside in ("http", "<script", "<link", "<img", "@import", "url("):
        assert outside not in page

    class Balanced(HTMLParser):
        open: list[str] = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "br"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert "The outputs agree." in page
    assert page.count("<svg") == 7  # three pairs, two shares, the roofline, the differences
    assert "sparse_attention" in page


def test_the_model_is_left_as_it_was(tiny, capsys, monkeypatch):
    from transom.cli import checkpoint

    models = []
    load = checkpoint.load

    def remember(*arguments):
        found = load(*arguments)
        models.append(found.model)
        return found

    monkeypatch.setattr(checkpoint, "load", remember)
    run(capsys, *SMALL)
    names = {type(m).__module__ for m in models[0].model.modules()}
    assert not any(name.startswith("transom") for name in names)


def test_outputs_that_disagree_end_with_status_1(tiny, capsys, tmp_path):
    op = transom.ops()["mhc_head"]
    composite = op.impls["composite"].function

    @op.impl()
    def wrong(x, fn, scale, base, *, eps, rms_eps):
        h = composite(x, fn, scale, base, eps=eps, rms_eps=rms_eps)
        return h.flip(-1).contiguous()

    page = tmp_path / "report.html"
    try:
        status, out, _ = run(capsys, *SMALL, "--backend", "mhc_head=wrong", "--html", str(page))
    finally:
        del op.impls["wrong"]
        transom.registry.forget_plans()
    assert status == 1
    assert "OUTPUTS DISAGREE: largest logit difference" in out
    assert "The outputs disagree." in page.read_text()


def test_one_token_and_a_forced_backend(tiny, capsys):
    status, out, _ = run(capsys, "--prompt", "ab", "--tokens", "1", "--backend", "reference")
    assert status == 0
    assert "reference" in out and "the token is equal" in out


def test_bfloat16_is_judged_by_the_median_position(tiny, capsys):
    status, out, _ = run(capsys, *SMALL, "--dtype", "bf16")
    assert status == 0, out
    assert "at the median position" in out


def test_a_long_text_is_cut(tiny, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("many words " * 40)
    status, out, _ = run(capsys, "--file", str(text), "--tokens", "2", "--prompt-tokens", "20")
    assert status == 0
    assert "20 tokens of" in out and "(cut from 441)" in out


def test_a_checkpoint_folder_with_its_tokenizer(tiny, capsys, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from transom.conformance.models.tiny import tiny_model

    folder = tmp_path / "mixtral"
    tiny_model("mixtral").save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(97)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    status, out, _ = run(capsys, "--model", str(folder), *SMALL)
    assert status == 0, out
    assert "moe_experts" in out
    assert "MixtralAttention : dense attention" in out


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "no-such-folder"), "model folder no-such-folder does not exist"),
        (("--model", "FILE"), "is a file; expected the folder of a Hugging Face checkpoint"),
        (("--model", "FOLDER"), "has no config.json"),
        (("--model", "BROKEN"), "cannot be loaded"),
        (("--backend", "nope"), "--backend is 'nope'; expected one of composite"),
        (("--backend", "nope=composite"), "'nope' is not an operator"),
        (("--backend", "route=nope"), "route has no implementation 'nope'"),
        (("--prompt", " "), "the text of --prompt is empty"),
        (("--prompt", "x", "--file", "y"), "--prompt and --file were both given"),
        (("--file", "no-such-file"), "no-such-file cannot be read"),
        (("--file", "BINARY"), "is not UTF-8"),
        (("--tokens", "0"), "--tokens is 0; expected 1 or more"),
        (("--prompt-tokens", "0"), "--prompt-tokens is 0"),
        (("--threads", "0"), "--threads is 0"),
        (("--tokens", "10000"), "was made for 512 positions"),
        (("--dtype", "f8"), "--dtype is 'f8'; expected f32, bf16 or f16"),
        (("--device", "bogus"), "available here: cpu"),
        (("--html", "FOLDER"), "is a folder; expected a file to write"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny, capsys, tmp_path, arguments, text):
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "config.json").write_text("{}")
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    status, out, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("[")]  # progress
    assert status == 2 and out == ""
    assert len(lines) == 1 and lines[0].startswith("transom run: ")
    assert text in lines[0]


def test_a_backend_that_cannot_be_used_here_says_why(tiny, capsys, monkeypatch):
    from transom.cli import run as command

    monkeypatch.setattr(command, "backends", lambda: {"acme": "no driver was found"})
    status, _, err = run(capsys, "--backend", "acme")
    assert status == 2
    assert err == "transom run: --backend acme cannot be used here: no driver was found\n"


def test_a_forced_choice_that_cannot_run_is_one_line(tiny, capsys):
    from transom.requires import at_most

    op = transom.ops()["mhc_post"]

    @op.impl(requires=[at_most("R", 1)])
    def narrow(f, x, post, comb): ...

    try:
        status, out, err = run(capsys, *SMALL, "--backend", "mhc_post=narrow")
    finally:
        del op.impls["narrow"]
        transom.registry.forget_plans()
    assert status == 2 and out == ""
    assert "transom run: mhc_post: 'narrow' was asked for and cannot run" in err
