"""transom new-backend: a package that builds, installs, registers an operator and passes verify."""

from __future__ import annotations

import importlib
import importlib.resources
import keyword
import re
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .. import __version__
from .console import Refusal, out

EPILOG = """
Examples:

    transom new-backend acme --c

    transom new-backend acme --triton --device npu --folder ~/src/acme

Then, in its folder: pip install . and transom verify --backend acme. The guide
that leads from there to a full backend is docs/vendors.md.
"""
KINDS = ("c", "python", "triton")


def new_backend(
    name: Annotated[str, typer.Argument(help="Of the backend: lower-case letters, digits and _.")],
    c: Annotated[bool, typer.Option("--c", help="A C library behind the table.")] = False,
    python: Annotated[bool, typer.Option("--python", help="A function in Python.")] = False,
    triton: Annotated[bool, typer.Option("--triton", help="A Triton kernel.")] = False,
    device: Annotated[
        str, typer.Option(help="torch's name of the device type, 'npu' for instance.")
    ] = "cpu",
    folder: Annotated[
        Path | None, typer.Option(help="Where to write; ./NAME-transom if left out.")
    ] = None,
) -> int:
    """Writes a vendor's package: it registers one operator, and passes transom verify as it is."""
    chosen = [kind for kind, wanted in zip(KINDS, (c, python, triton), strict=True) if wanted]
    if len(chosen) > 1:
        raise Refusal(f"--{' and --'.join(chosen)} were given; expected one of them")
    for what, text in (("name", name), ("device", device)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", text) or keyword.iskeyword(text):
            raise Refusal(
                f"{what} is {text!r}; expected lower-case letters, digits and _, a letter first"
            )
    target = folder or Path(f"{name}-transom")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refusal(f"{target} exists; expected a folder to make, or an empty one")
    kind = chosen[0] if chosen else "python"
    try:
        written = _write(kind, name, device, target)
    except OSError as error:
        raise Refusal(f"{target} cannot be written: {error.strerror}; give another") from None
    console = out()
    for path in written:
        console.print(Text(str(path)))
    console.print()
    console.print(Text("next:", style="dim"))
    console.print(Text(f"  pip install {target}"))
    console.print(Text(f"  transom verify --backend {name} --device {device}"))
    return 0


def _write(kind: str, name: str, device: str, target: Path) -> list[Path]:
    """The template's files, filled in; what was written."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    values = {
        "name": name,
        "device": device,
        "package": f"{name}_transom",
        "kind": kind,
        "transom": __version__,
    }
    written = []
    for part in ("every", kind):
        root = importlib.resources.files(__package__) / "templates" / part
        with importlib.resources.as_file(root) as source:
            for path in sorted(p for p in source.rglob("*.jinja")):
                # PACKAGE and NAME stand for themselves: braces are no file names.
                relative = str(path.relative_to(source)).removesuffix(".jinja")
                relative = relative.replace("PACKAGE", values["package"]).replace("NAME", name)
                place = target / relative
                place.parent.mkdir(parents=True, exist_ok=True)
                text = environment.from_string(path.read_text("utf-8")).render(values)
                place.write_text(text, "utf-8")
                written.append(place)
    if kind == "c":
        headers = Path(importlib.import_module("transom.include").__path__[0])
        for header in ("transom_plugin.h", "transom_ops.h"):
            written.append(Path(shutil.copy(headers / header, target / "csrc" / header)))
    return written
