"""Where the command line writes: results to standard output, progress and messages to standard
error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


class Refusal(Exception):
    """Bad input: its text is printed as one line, and the command ends with status 2."""


def out() -> Console:
    """Standard output; without a terminal as wide as tables need, so that logs and pipes hold whole
    lines."""
    return Console(
        highlight=False,
        soft_wrap=not sys.stdout.isatty(),
        width=None if sys.stdout.isatty() else 160,
    )


def table(*columns: str, title: str | None = None) -> Table:
    """A table of plain rules; a column whose name starts with '>' holds numbers and is aligned to
    the right."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        numeric = column.startswith(">")
        made.add_column(
            column.lstrip(">"),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            header_style="dim",
            overflow="fold",
        )
    return made


def write_json(path: Path | None, figures: Any) -> None:
    """Write `figures` to a file, or print them; a Refusal says why a file cannot be written."""
    text = json.dumps(figures, indent=1, ensure_ascii=False, default=str)
    if path is None:
        print(text)
    else:
        write(path, text + "\n")


def write(path: Path, text: str) -> None:
    """Write a text file; its folder is made if it isn't there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Refusal(f"{path} cannot be written: {error.strerror}; give another path") from None


def check_writable(path: Path) -> None:
    """Refuse a path that cannot become a file; nothing is written."""
    above = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    if path.is_dir():
        raise Refusal(f"{path} is a folder; expected a file to write")
    if not above.is_dir() or not os.access(path if path.exists() else above, os.W_OK):
        raise Refusal(f"{path} cannot be written; give another path")


class Steps:
    """Progress of a job in named stages: one changing line on a terminal, plain lines elsewhere.

    Nothing is drawn between start() and the next advance(), so that drawing never falls into a
    timed section.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._began = time.perf_counter()
        self._title, self._done, self._total = "", 0, 1
        self._task = None if progress is None else progress.add_task("", start=True)

    def start(self, title: str, total: int = 1) -> None:
        """Begin a stage of `total` steps; the one before it is done."""
        self._title, self._done, self._total = title, 0, total
        if self._progress is None:
            elapsed = time.perf_counter() - self._began
            print(f"[{elapsed:6.1f} s] {title}", file=sys.stderr, flush=True)
        self._draw()

    def advance(self) -> None:
        """One step of the stage is done."""
        self._done += 1
        self._draw()

    def reach(self, done: int, total: int) -> None:
        """So many of so many steps of the stage are done."""
        self._done, self._total = done, total
        self._draw()

    def _draw(self) -> None:
        if self._progress is None or self._task is None:
            return
        count = f" ({self._done} of {self._total})" if self._total > 1 and self._done else ""
        self._progress.update(self._task, description=f"{self._title}{count}", refresh=True)


@contextmanager
def steps() -> Iterator[Steps]:
    """Progress on standard error for as long as the block lasts."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Steps(None)
        return
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        yield Steps(progress)
