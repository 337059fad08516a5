"""Minor versions of the header: an older and a newer side understand each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import transom
from transom.abi import library

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[1] / "csrc/include"
STRUCTS = ("status", "tensor", "value", "call", "impl", "plugin", "host", "services")
OLDER = [(1, minor) for minor in range(library.header_version()[1])]
older = pytest.mark.parametrize("version", OLDER, ids=lambda v: f"{v[0]}.{v[1]}")


def golden(version):
    return HERE / f"golden/transom_plugin_{version[0]}_{version[1]}.h"


@pytest.fixture
def headers(tmp_path):
    """A function: a folder of headers in which transom_plugin.h has this text."""

    def make(text):
        folder = tmp_path / "include"
        folder.mkdir()
        shutil.copy(HEADERS / "transom_ops.h", folder)
        (folder / "transom_plugin.h").write_text(text)
        return folder

    return make


@older
def test_every_earlier_minor_has_its_header_kept(version):
    major, minor = version
    macros = f"#define TRANSOM_ABI_MAJOR {major}\n#define TRANSOM_ABI_MINOR {minor}\n"
    assert macros in golden(version).read_text()


@older
def test_structs_only_grow(version):
    """Every field of the older header lies where it lay, with the type that it had."""
    import cffi

    old, new = cffi.FFI(), library.interface()
    old.cdef(golden(version).read_text())

    def layout(ffi, name):
        try:
            fields = ffi.typeof(f"transom_{name}").fields
        except cffi.CDefError:  # a later minor brings it
            return []
        return [(n, f.offset, re.sub(r"\s+", " ", f.type.cname)) for n, f in fields]

    for name in STRUCTS:
        before, now = layout(old, name), layout(new, name)
        assert now[: len(before)] == before, name


@older
def test_a_plugin_of_an_older_header_works_here(build, headers, gemm, by, version):
    plugin = transom.CPlugin(build(include=headers(golden(version).read_text())))
    assert plugin.library.abi == version
    assert plugin.services is None
    x, w, offsets = gemm()
    with transom.use(grouped_gemm="composite"):
        want = transom.grouped_gemm(x, w, offsets)
    with transom.use(grouped_gemm="toy"):
        torch.testing.assert_close(transom.grouped_gemm(x, w, offsets), want)


@older
@pytest.mark.parametrize(
    "file, answer", [(None, "toy 21"), ("packs.c", "packs -1")], ids=["plain", "with services"]
)
def test_a_plugin_of_this_header_works_in_an_older_host(
    build, headers, tmp_path, version, file, answer
):
    folder, host = headers(golden(version).read_text()), tmp_path / "host"
    source = HERE / "host.c"
    subprocess.run(
        ["cc", "-std=c11", "-Wall", "-Wextra", f"-I{folder}", source, "-o", host, "-ldl"],
        check=True,
    )
    done = subprocess.run([host, build(file=file)], capture_output=True, text=True)
    this = ".".join(map(str, library.header_version()))
    assert (done.returncode, done.stdout) == (0, f"{this} {answer}\n")


def test_a_plugin_of_a_newer_header_works_here(build, headers, gemm, by):
    text = (HEADERS / "transom_plugin.h").read_text()
    major, minor = library.header_version()
    text = text.replace(f"ABI_MINOR {minor}\n", f"ABI_MINOR {minor + 1}\n")
    for name in STRUCTS[3:]:
        end = f"\n}} transom_{name};"
        assert text.count(end) == 1
        text = text.replace(end, f"\n  void *later;{end}")
    plugin = transom.CPlugin(build(include=headers(text)))
    assert plugin.library.abi == (major, minor + 1)
    x, w, offsets = gemm()
    with transom.use(grouped_gemm="toy"):
        assert transom.grouped_gemm(x, w, offsets).shape == (6, 5)


def test_sixty_lines_are_a_plugin(build, by):
    transom.CPlugin(build(file="sixty.c"))
    assert len((HERE / "sixty.c").read_text().splitlines()) <= 60
    g = torch.Generator().manual_seed(1)
    f, x = torch.randn(7, 9, generator=g), torch.randn(7, 4, 9, generator=g)
    post, comb = torch.randn(7, 4, generator=g), torch.randn(7, 4, 4, generator=g)
    with transom.use(mhc_post="composite"):
        want = transom.mhc_post(f, x, post, comb)
    with transom.record() as calls:
        got = transom.mhc_post(f, x, post, comb)
    assert [c.impl for c in calls] == ["sixty"], "a vendor's goes before ours of the same tier"
    torch.testing.assert_close(got, want)
    explained = transom.explain("mhc_post", f.double(), x.double(), post, comb)
    assert explained.rejected["sixty"] == (
        "argument 0 has dtype code 2 of 64 bits; supported: float32",
    )
    assert explained.chosen != "sixty"
