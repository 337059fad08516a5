"""Plugins in C: headers, and what a table must say to be taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import transom
from transom import selection
from transom.abi import library as abi

ROOT = Path(__file__).resolve().parents[2]
GROUP = {"int8": "1x0", "int4": "1x128", "fp8": "128x128", "mxfp4": "1x32"}


def test_the_generated_header_is_current():
    script = ROOT / "csrc/write_ops_header.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("language", ["c11", "c17", "c++17", "c++20"])
def test_the_headers_compile_without_a_warning(build, language):
    build(source='#include "transom_ops.h"\nint seven(void);\n', language=language)


def test_the_header_is_read_by_cffi_as_it_is():
    sizes = {"transom_tensor": 48, "transom_value": 16, "transom_call": 80, "transom_impl": 64}
    sizes |= {"transom_plugin": 56, "transom_services": 64}
    assert {name: abi.interface().sizeof(name) for name in sizes} == sizes


def test_the_version_of_the_header_is_the_hosts():
    text = (ROOT / "csrc/include/transom_plugin.h").read_text()
    major, minor = abi.header_version()
    assert f"#define TRANSOM_ABI_MAJOR {major}\n#define TRANSOM_ABI_MINOR {minor}\n" in text


def test_loading_twice_is_harmless(build):
    path = build()
    first, second = transom.CPlugin(path), transom.CPlugin(path)
    assert first.library is second.library and first.refused == second.refused


def test_the_sentence_of_supports_is_what_explain_shows(build, gemm):
    transom.CPlugin(build())
    x, w, offsets = gemm(torch.bfloat16)
    shown = transom.explain("grouped_gemm", x, w, offsets).rejected["toy"]
    assert shown == ("x or weight is not float32; supported: float32",)
    quantised = transom.quantize(torch.randn(3, 5, 32), "int8")
    shown = transom.explain("grouped_gemm", torch.randn(6, 32), quantised, offsets).rejected["toy"]
    assert shown == ("weight is int8:1x0; supported: float32",)
    with pytest.raises(transom.NotSupported, match="x or weight is not float32"):
        with transom.use(grouped_gemm="toy"):
            transom.grouped_gemm(x, w, offsets)


@pytest.mark.parametrize("weight", [torch.float32, "int8", "int4", "fp8", "mxfp4"])
def test_facts_made_without_tensors_are_asked_about_as_contiguous(build, weight):
    transom.CPlugin(build())
    dtypes = {"x": torch.float32, "weight": weight, "offsets": torch.int64}
    dims = {"M": 4, "K": 64, "E": 2, "N": 8}
    facts = transom.Facts("cpu", "", dtypes, dims, {}, {})
    reasons = selection.reasons(transom.grouped_gemm.impls["toy"], facts)
    assert reasons == (
        [f"weight is {weight}:{GROUP[weight]}; supported: float32"] if weight in GROUP else []
    )


def test_another_schema_hash_refuses_that_implementation_only(build, gemm):
    plugin = transom.CPlugin(build("TOY_HASH=7"))
    assert "was compiled for grouped_gemm as 0000000000000007" in plugin.refused["grouped_gemm/toy"]
    x, w, offsets = gemm()
    (shown,) = transom.explain("grouped_gemm", x, w, offsets).rejected["toy"]
    assert shown == plugin.refused["grouped_gemm/toy"]
    with transom.record() as calls:
        transom.grouped_gemm(x, w, offsets)
    assert calls[0].impl != "toy"


FORMER = """
#include "transom_ops.h"
static int32_t run(const transom_call *c, transom_status *s) {{ (void)c; (void)s; return 0; }}
static const transom_impl impls[] = {{
    {{sizeof(transom_impl), 1, "grouped_gemm_dx", "toy", {hash}, 0, 0, 0, 0, run}},
    {{sizeof(transom_impl), 1, "grouped_gemm_backward_weight", "toy",
      TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_HASH, 0, 0, 0, 0, run}},
    {{sizeof(transom_impl), 1, "grouped_gemm_dw", "toy", 7, 0, 0, 0, 0, run}}}};
static const transom_impl *const listed[] = {{&impls[0], &impls[1], &impls[2]}};
static const transom_plugin plugin = {{
    sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 3, 0, listed, 0}};
const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {{
  (void)host; (void)status;
  return &plugin;
}}
"""


def test_a_library_that_names_operators_as_they_were_named_serves_them(build):
    """The present name, where the library has both, is the one that counts."""
    plugin = transom.CPlugin(build(source=FORMER.format(hash="TRANSOM_GROUPED_GEMM_DX_HASH")))
    assert plugin.refused == {}
    for name in ("grouped_gemm_backward_x", "grouped_gemm_backward_weight"):
        assert transom.ops()[name].impls["toy"].unavailable is None


def test_another_schema_under_a_former_name_is_refused(build):
    plugin = transom.CPlugin(build(source=FORMER.format(hash="7")))
    assert "compiled for grouped_gemm_backward_x as" in plugin.refused["grouped_gemm_dx/toy"]


def test_a_larger_entry_of_a_later_minor_is_read_as_far_as_we_know_it(build, gemm):
    transom.CPlugin(build("TOY_IMPL_SIZE=(sizeof(transom_impl)+64)"))
    with transom.use(grouped_gemm="toy"):
        transom.grouped_gemm(*gemm())


def test_a_path_without_a_file_is_refused():
    with pytest.raises(transom.PluginError, match="no such file"):
        transom.CPlugin("libm.so.6")


def test_a_file_that_is_no_library_is_refused(tmp_path):
    (tmp_path / "libx.so").write_text("not a library")
    with pytest.raises(transom.PluginError, match="libx.so: cannot be opened"):
        transom.CPlugin(tmp_path / "libx.so")


def test_a_library_without_the_symbol_is_refused(build):
    with pytest.raises(transom.PluginError, match="exports no transom_plugin_v1"):
        transom.CPlugin(build(source="int seven(void);\nint seven(void) { return 7; }\n"))


TABLE = """
#include "transom_ops.h"
static int32_t run(const transom_call *c, transom_status *s) {{ (void)c; (void)s; return 0; }}
static const transom_impl impl = {{{impl}, 0, 0, run_or_null}};
static const transom_impl *const impls[] = {{{first}}};
static const transom_plugin plugin = {{{plugin}}};
const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {{
  (void)host; (void)impls; (void)run; (void)plugin; (void)impl; (void)status;
  {answer}
}}
"""
PARTS = {
    "impl": 'sizeof(transom_impl), 1, "grouped_gemm", "bad", 0, 0, 0',
    "run": "run",
    "first": "&impl",
    "plugin": 'sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 1, 0, impls, 0',
    "answer": "return &plugin;",
}
DAMAGED = {
    "null table": (dict(answer="return 0;"), "refuses this transom, unexplained"),
    "own sentence": (
        dict(answer="status->message[0] = 'n'; status->message[1] = 'o'; return 0;"),
        ": no$",
    ),
    "text without an end": (
        dict(answer="for (int i = 0; i < 9; i++) { status->message[i] = -1; } return 0;"),
        "\ufffd",
    ),
    "plugin too small": (dict(plugin='8, 1, 0, "v", "1", "cpu", 1, 0, impls, 0'), "struct_size 8"),
    "plugin absurd": (
        dict(plugin='0xfffffff8u, 1, 0, "v", "1", "cpu", 1, 0, impls, 0'),
        "struct_size 4294967288",
    ),
    "major 2": (
        dict(plugin='sizeof(transom_plugin), 2, 0, "v", "1", "cpu", 1, 0, impls, 0'),
        "built for ABI 2.0; this transom speaks 1.2",
    ),
    "vendor null": (
        dict(plugin='sizeof(transom_plugin), 1, 0, 0, "1", "cpu", 1, 0, impls, 0'),
        "vendor is NULL",
    ),
    "vendor no utf-8": (
        dict(plugin='sizeof(transom_plugin), 1, 0, "\\xff\\xfe", "1", "cpu", 1, 0, impls, 0'),
        "vendor is .*expected UTF-8",
    ),
    "count absurd": (
        dict(plugin='sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 4000000000u, 0, impls, 0'),
        "says it has 4000000000 implementations",
    ),
    "impls null": (
        dict(plugin='sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 1, 0, 0, 0'),
        "impls is NULL",
    ),
    "entry null": (dict(first="0"), "implementation 0 is NULL"),
    "entry too small": (dict(impl='16, 1, "grouped_gemm", "bad", 0, 0, 0'), "struct_size 16"),
    "tier unknown": (
        dict(impl='sizeof(transom_impl), 9, "grouped_gemm", "bad", 0, 0, 0'),
        "tier is 9",
    ),
    "name no name": (
        dict(impl='sizeof(transom_impl), 1, "grouped_gemm", "a b", 0, 0, 0'),
        "name is 'a b'",
    ),
    "name endless": (
        dict(impl=f'sizeof(transom_impl), 1, "grouped_gemm", "{"a" * 300}", 0, 0, 0'),
        "name is longer than 256 bytes",
    ),
    "run null": (dict(run="0"), "run is NULL"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_table_is_one_sentence(build, fault):
    changes, text = DAMAGED[fault]
    parts = {**PARTS, **changes}
    source = TABLE.format(**parts).replace("run_or_null", parts["run"])
    with pytest.raises(transom.PluginError, match=text) as caught:
        transom.CPlugin(build(source=source))
    assert "\n" not in str(caught.value)
    assert "bad" not in transom.grouped_gemm.impls
