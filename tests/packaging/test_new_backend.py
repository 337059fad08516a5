"""`transom new-backend`: each form builds, installs and passes `transom verify` as it is."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest

from transom.cli import main


def run(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("kind", ["c", "python", "triton"])
def test_a_new_backend_passes_verify(kind, tmp_path):
    if kind == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install 'transom[triton]'")
    if kind == "c" and shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler; apt install gcc")
    source, site = tmp_path / "acme", tmp_path / "site"
    assert main(["new-backend", "acme", f"--{kind}", "--folder", str(source)]) == 0
    built = run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(site),
        str(source),
    )
    assert built.returncode == 0, built.stderr
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    done = run(
        sys.executable,
        "-m",
        "transom.cli",
        "verify",
        "--backend",
        "acme",
        "--device",
        "cpu",
        "--examples",
        "4",
        "--exceptions",
        str(source / "exceptions.txt"),
        PYTHONPATH=path,
        TRITON_INTERPRET="1",
        TRANSOM_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: " in done.stdout


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["Acme"], "name is 'Acme'; expected lower-case letters, digits and _, a letter first"),
        (["class"], "name is 'class'; expected lower-case"),
        (["acme", "--device", "N PU"], "device is 'N PU'; expected lower-case"),
        (["acme", "--c", "--triton"], "--c and --triton were given; expected one of them"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["new-backend", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"transom new-backend: {says}")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(capsys, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert main(["new-backend", "acme", "--folder", str(tmp_path)]) == 2
    assert "exists; expected a folder to make, or an empty one" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
