"""`import transom` is light: no toolchain is loaded, and nothing touches a device."""

from __future__ import annotations

import subprocess
import sys


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_toolchain_is_imported():
    out = python(
        "import sys, torch; before = set(sys.modules); import transom;"
        "print([m for m in ('triton', 'numba', 'transformers', 'typer', 'rich', 'jinja2', 'cffi') "
        "if m in set(sys.modules) - before])"
    )
    assert out.strip() == "[]"


def test_no_device_is_initialised():
    out = python(
        "import transom, torch;print(torch.cuda.is_initialized(), torch.accelerator.is_available())"
    )
    assert out.startswith("False")


def test_every_public_name_resolves():
    python("import transom; [getattr(transom, n) for n in transom.__all__]")


def test_an_unknown_name_lists_the_operators():
    out = python(
        "import transom\ntry:\n    transom.rout\nexcept AttributeError as e:\n    print(e)"
    )
    assert "module 'transom' has no attribute 'rout'; operators:" in out and "route" in out
