"""Plugins in C: what a table must say, what a call hands over, what comes back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import transom
from transom.abi import table as abi
from transom.dispatch import forget_plans

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc) to build with")
pytestmark = needs_compiler


@pytest.fixture
def build(tmp_path):
    """(defines) -> path of the toy plugin compiled with them, warnings being errors."""

    def make(*defines: str, source: str | None = None, language: str = "c11") -> Path:
        file = ROOT / "csrc/toy_plugin/toy.c"
        if source is not None:
            file = tmp_path / "made.c"
            file.write_text(textwrap.dedent(source))
        library = tmp_path / f"lib{len([*tmp_path.iterdir()])}.so"
        warnings = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
        kind = ("-x", "c++" if "++" in language else "c", f"-std={language}")
        options = ("-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{ROOT / 'csrc/include'}")
        flags = [f"-D{d}" for d in defines]
        subprocess.run(
            [COMPILER, *kind, *warnings, *options, *flags, file, "-o", library], check=True
        )
        return library

    return make


@pytest.fixture(autouse=True)
def restored():
    """What a test registers on grouped_gemm is taken away again."""
    before = dict(transom.grouped_gemm.impls)
    yield
    transom.grouped_gemm.impls.clear()
    transom.grouped_gemm.impls.update(before)
    abi._open.clear()
    forget_plans()


GROUP = {"int8": "1x0", "int4": "1x128", "fp8": "128x128", "mxfp4": "1x32"}


def gemm(dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(6, 8, generator=g).to(dtype)
    return x, torch.randn(3, 5, 8, generator=g).to(dtype), torch.tensor([2, 2, 5])


def test_the_generated_header_is_current():
    script = ROOT / "csrc/write_ops_header.py"
    done = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("language", ["c11", "c17", "c++17", "c++20"])
def test_the_headers_compile_without_a_warning(build, language):
    build(source='#include "transom_ops.h"\nint seven(void);\n', language=language)


def test_the_header_is_read_by_cffi_as_it_is_and_has_the_sizes_of_abi_1_0():
    ffi = abi.interface()
    assert {s: ffi.sizeof(s) for s in abi.FIRST_SIZE} == abi.FIRST_SIZE
    assert (ffi.sizeof("transom_call"), ffi.sizeof("transom_tensor")) == (64, 48)


def test_the_version_of_the_header_is_the_hosts():
    text = (ROOT / "csrc/include/transom_plugin.h").read_text()
    major, minor = abi.header_version()
    assert f"#define TRANSOM_ABI_MAJOR {major}\n#define TRANSOM_ABI_MINOR {minor}\n" in text


def test_a_plugin_runs_and_is_recorded(build):
    plugin = transom.CPlugin(build())
    x, w, offsets = gemm()
    with transom.use(grouped_gemm="composite"):
        want = transom.grouped_gemm(x, w, offsets)
    with transom.use(grouped_gemm="toy"), transom.record() as calls:
        got = transom.grouped_gemm(x, w, offsets)
    assert [c.impl for c in calls] == ["toy"]
    torch.testing.assert_close(got, want)
    assert plugin.refused.keys() == {"no_such_operator/toy"}
    assert "no operator 'no_such_operator'" in plugin.refused["no_such_operator/toy"]


def test_strided_and_int32_arguments_arrive_as_they_are(build):
    transom.CPlugin(build())
    x, w, offsets = gemm()
    strided = torch.empty(6, 16)[:, ::2].copy_(x)
    transposed = w.transpose(1, 2).contiguous().transpose(1, 2)
    with transom.use(grouped_gemm="toy"):
        want = transom.grouped_gemm(x, w, offsets)
        assert torch.equal(transom.grouped_gemm(strided, transposed, offsets.int()), want)


def test_loading_twice_is_harmless(build):
    path = build()
    first, second = transom.CPlugin(path), transom.CPlugin(path)
    assert first.library is second.library and first.refused == second.refused


def test_the_sentence_of_supports_is_what_explain_shows(build):
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
    reasons = transom.grouped_gemm.impls["toy"].reasons(facts)
    assert reasons == (
        [f"weight is {weight}:{GROUP[weight]}; supported: float32"] if weight in GROUP else []
    )


def test_another_schema_hash_refuses_that_implementation_only(build):
    plugin = transom.CPlugin(build("TOY_HASH=7"))
    assert "was compiled for grouped_gemm as 0000000000000007" in plugin.refused["grouped_gemm/toy"]
    x, w, offsets = gemm()
    (shown,) = transom.explain("grouped_gemm", x, w, offsets).rejected["toy"]
    assert shown == plugin.refused["grouped_gemm/toy"]
    with transom.record() as calls:
        transom.grouped_gemm(x, w, offsets)
    assert calls[0].impl != "toy"


@pytest.mark.parametrize(
    "code, error",
    [(1, ValueError), (2, transom.NotSupported), (3, MemoryError), (4, transom.PluginError),
     (77, transom.PluginError)],
)  # fmt: skip
def test_the_code_of_a_failure_says_what_is_raised(build, code, error):
    transom.CPlugin(build(f"TOY_FAILS={code}"))
    with transom.use(grouped_gemm="toy"), pytest.raises(error, match="the toy is broken"):
        transom.grouped_gemm(*gemm())


def test_a_larger_entry_of_a_later_minor_is_read_as_far_as_we_know_it(build):
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
    "plugin": 'sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 1, 0, impls',
    "answer": "return &plugin;",
}
DAMAGED = {
    "null table": (dict(answer="return 0;"), "refuses this transom, unexplained"),
    "own sentence": (
        dict(answer="status->message[0] = 'n'; status->message[1] = 'o'; return 0;"), ": no$",
    ),
    "text without an end": (
        dict(answer="for (int i = 0; i < 9; i++) { status->message[i] = -1; } return 0;"), "\ufffd"
    ),
    "plugin too small": (dict(plugin='8, 1, 0, "v", "1", "cpu", 1, 0, impls'), "struct_size 8"),
    "plugin absurd": (
        dict(plugin='0xfffffff8u, 1, 0, "v", "1", "cpu", 1, 0, impls'), "struct_size 4294967288",
    ),
    "major 2": (
        dict(plugin='sizeof(transom_plugin), 2, 0, "v", "1", "cpu", 1, 0, impls'),
        "built for ABI 2.0; this transom speaks 1.0",
    ),
    "vendor null": (
        dict(plugin='sizeof(transom_plugin), 1, 0, 0, "1", "cpu", 1, 0, impls'), "vendor is NULL",
    ),
    "vendor no utf-8": (
        dict(plugin='sizeof(transom_plugin), 1, 0, "\\xff\\xfe", "1", "cpu", 1, 0, impls'),
        "vendor is .*expected UTF-8",
    ),
    "count absurd": (
        dict(plugin='sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 4000000000u, 0, impls'),
        "says it has 4000000000 implementations",
    ),
    "impls null": (
        dict(plugin='sizeof(transom_plugin), 1, 0, "v", "1", "cpu", 1, 0, 0'), "impls is NULL",
    ),
    "entry null": (dict(first="0"), "implementation 0 is NULL"),
    "entry too small": (dict(impl='16, 1, "grouped_gemm", "bad", 0, 0, 0'), "struct_size 16"),
    "tier unknown": (
        dict(impl='sizeof(transom_impl), 9, "grouped_gemm", "bad", 0, 0, 0'), "tier is 9",
    ),
    "name no name": (
        dict(impl='sizeof(transom_impl), 1, "grouped_gemm", "a b", 0, 0, 0'), "name is 'a b'",
    ),
    "name endless": (
        dict(impl=f'sizeof(transom_impl), 1, "grouped_gemm", "{"a" * 300}", 0, 0, 0'),
        "name is longer than 256 bytes",
    ),
    "run null": (dict(run="0"), "run is NULL"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_table_is_one_sentence(build, fault):
    changes, text = DAMAGED[fault]
    parts = {**PARTS, **changes}
    source = TABLE.format(**parts).replace("run_or_null", parts["run"])
    with pytest.raises(transom.PluginError, match=text) as caught:
        transom.CPlugin(build(source=source))
    assert "\n" not in str(caught.value)
    assert "bad" not in transom.grouped_gemm.impls
