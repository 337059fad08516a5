"""The command line: `transom run`, `doctor`, `explain`, `tune`, `bench`, `verify`,
`new-backend`.

Status 0: done. 1: outputs disagree, or a measurement failed its check. 2: bad input, told in one
line on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from . import bench, doctor, explain, new_backend, run, tune, verify
from .console import Refusal

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=run.EPILOG)(run.run)
app.command(epilog=doctor.EPILOG)(doctor.doctor)
app.command(epilog=explain.EPILOG)(explain.explain)
app.command(epilog=tune.EPILOG)(tune.tune)
app.command(epilog=bench.EPILOG)(bench.bench)
app.command(epilog=verify.EPILOG)(verify.verify)
app.command("new-backend", epilog=new_backend.EPILOG)(new_backend.new_backend)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"transom {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Start with: [bold]transom doctor[/bold], what this machine can run; "
    "[bold]transom run[/bold], a model through every operator.\n\n"
    "Each command's own help: [bold]transom run --help[/bold]. "
    "Environment variables are listed by transom doctor."
)
def transom(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """The sparse operators of DeepSeek-V4-class models, on any device that PyTorch can reach."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's) and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        status = app(arguments, prog_name="transom", standalone_mode=False)
    except Refusal as error:
        command = next((a for a in arguments if not a.startswith("-")), "")
        print(f"transom {command}: {error}", file=sys.stderr)
        return 2
    except typer.Abort:
        print("transom: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Usage errors of the parser (an unknown option, a missing value): one line instead of its
        # panel. Their class is click's or typer's own copy of it, by version; both have this
        # method.
        if not hasattr(error, "format_message"):
            raise
        text = " ".join(error.format_message().split()).rstrip(".")
        if text:
            print(f"transom: {text}; see transom --help", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0


__all__ = ["app", "main"]
