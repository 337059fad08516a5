"""Every check of a backend's implementations, in a process of their own: `transom verify`.

A process that dies is a finding: the call that it was making is shown, and the rest goes on in a
new process. So is one that does not come back.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .exceptions import Exceptions
from .levels import CHECKS, Finding

SECONDS = 300.0
"""After so long without a sign a process is taken to hang."""


@dataclass
class Outcome:
    """What a verification came to."""

    backend: str | None
    device: str
    level: int
    examples: int
    findings: list[Finding] = field(default_factory=list)
    crashes: int = 0
    seconds: float = 0.0

    @property
    def failed(self) -> list[Finding]:
        """Failures that no exception covers, and exceptions that cover none."""
        return [f for f in self.findings if f.status in ("fail", "stale")]

    @property
    def passed(self) -> bool:
        """No failure, and something that passed."""
        return not self.failed and any(f.status == "pass" and f.op for f in self.findings)

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        about = {k: v for k, v in vars(self).items() if k != "findings"}
        return {**about, "passed": self.passed, "findings": [f.plain() for f in self.findings]}


class Died(Exception):
    """The process ended, or was ended, before it had answered; how, as a sentence."""


def verify(
    backend: str | None = None,
    device: str = "cpu",
    *,
    ops: list[str] | None = None,
    level: int = 5,
    examples: int = 15,
    exceptions: Exceptions | None = None,
    seconds: float = SECONDS,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Outcome:
    """The checks up to `level` for the implementations of a backend, plugin or implementation name
    (None: all but the composites) on a device, in child processes.

    ops         only these operators
    examples    drawn calls for each check that draws
    exceptions  failures that are excused
    seconds     after which a silent process is taken to hang
    progress    told (jobs done, jobs in all)
    """
    began = time.monotonic()
    outcome = Outcome(backend, device, level, examples)
    checks = [c.name for c in CHECKS if c.level <= level]
    offers = _plan(outcome, ops, seconds)
    jobs = list(enumerate((op, impl, check) for op, impl in offers for check in checks))
    total = len(jobs)
    while jobs:
        jobs = _some(outcome, jobs, seconds, lambda at: progress(at, total))
    if exceptions is not None:
        outcome.findings = exceptions.applied(outcome.findings)
    outcome.seconds = time.monotonic() - began
    return outcome


def _plan(outcome: Outcome, ops: list[str] | None, seconds: float) -> list[tuple[str, str]]:
    """Level 0's findings, and what there is to check."""
    offers: list[tuple[str, str]] = []
    request = {"device": outcome.device, "plan": outcome.backend, "ops": ops}
    try:
        for event in _events(request, seconds):
            if "finding" in event:
                outcome.findings.append(Finding(**event["finding"]))
            else:
                op, impl = event["offers"]
                offers.append((op, impl))
    except Died as died:
        outcome.crashes += 1
        text = f"while it was loaded, {died}"
        outcome.findings.append(Finding("", outcome.backend or "", 0, "loads", "fail", text))
    return offers


Job = tuple[int, tuple[str, str, str]]


def _some(
    outcome: Outcome, jobs: list[Job], seconds: float, progress: Callable[[int], None]
) -> list[Job]:
    """Work in one process until all is done or it dies; what is left then."""
    now: int | None = None
    trying = ("", "")
    done: set[int] = set()
    request = {"device": outcome.device, "jobs": jobs, "examples": outcome.examples}
    try:
        for event in _events(request, seconds):
            if "start" in event:
                now, trying = event["start"], ("", "")
                progress(event["start"])
            elif "trying" in event:
                trying = tuple(event["trying"])
            else:
                outcome.findings.append(Finding(**event["finding"]))
                done.add(event["done"])
                now = None
    except Died as died:
        outcome.crashes += 1
        if now is None:  # before its first job, or as it ended: the next one is to blame
            now = next((number for number, _ in jobs if number not in done), None)
        if now is not None:
            op, impl, name = dict(jobs)[now]
            level = next(c.level for c in CHECKS if c.name == name)
            outcome.findings.append(Finding(op, impl, level, name, "fail", str(died), *trying))
            done.add(now)
    return [job for job in jobs if job[0] not in done]


def _events(request: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """What the child tells. Raises Died if it ends in any other way than by finishing."""
    read, write = os.pipe()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "transom.conformance.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(write,),
            text=True,
        )
        os.close(write)
        try:
            assert child.stdin is not None
            try:
                with child.stdin as to:
                    json.dump({**request, "pipe": write}, to)
            except BrokenPipeError:
                pass  # it has died already: its status says how
            yield from _lines(read, seconds)
            code = child.wait(seconds)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise Died(f"the process did not come back within {seconds:.0f} seconds") from None
        finally:
            os.close(read)
            child.kill()
            child.wait()
        if code:
            errors.seek(0)
            raise Died(_how(code, errors.read()))


def _lines(pipe: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Lines of JSON from a pipe until it is closed; TimeoutError if none comes for so long."""
    held = b""
    with selectors.DefaultSelector() as waiting:
        waiting.register(pipe, selectors.EVENT_READ)
        while True:
            if not waiting.select(seconds):
                raise TimeoutError
            some = os.read(pipe, 1 << 16)
            if not some:
                return
            *whole, held = (held + some).split(b"\n")
            for line in whole:
                yield json.loads(line)


def _how(code: int, errors: str) -> str:
    """How a process ended, as a sentence."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"the process died of {name}"
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    return f"the process ended with status {code}: {' '.join(last.split())[:300]}"
