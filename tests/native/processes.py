"""What test_processes.py starts: every native operator by threads, in children, in other processes.

    python processes.py threads | together | fork | spawn

Silent if all results have the same bits.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading

import torch

import transom
from transom.backends.native import library
from transom.conformance import checks
from transom.conformance.agree import same_bits
from transom.conformance.cases import Case, build

ANSWER_WITHIN = 60
"""Seconds: a child that waits for threads which fork() did not copy would wait forever."""


@functools.cache
def accepted() -> list[tuple[str, Case]]:
    """(implementation, small call) of every operator, in float32 and bfloat16.

    Made once: torch's own operators, which make them, do not survive fork() where they are
    parallel.
    """
    calls = []
    for entry in library().entries:
        op = transom.ops()[entry.op]
        tried = [
            build(op, op.examples[0], d, s)
            for d in (torch.float32, torch.bfloat16)
            for s in range(8)
        ]
        found = [case for case in tried if not checks.refuses(op, entry.name, case)]
        assert found, f"{op.name}: {checks.refuses(op, entry.name, tried[0])}"
        calls += [(entry.name, case) for case in found[:1] + found[-1:]]
    return calls


def results() -> list[torch.Tensor]:
    """Of all of them, one after the other."""
    out: list[torch.Tensor] = []
    for name, case in accepted():
        written = case.op.mutates  # each thread has its own of those
        values = [
            v.clone() if p.name in written else v
            for p, v in zip(case.op.parameters, case.values, strict=True)
        ]
        got = checks.run(case.op, name, values)
        assert isinstance(got, tuple), got
        out += [t.clone() for t in got]
    return out


def must_equal(got: list[torch.Tensor], want: list[torch.Tensor], where: str) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if not same_bits(a, b)]
    if wrong:
        names = [c.op.name for n, c in accepted() for _ in checks.run(c.op, n, c.values)]
        sys.exit(f"{where}: other bits from {sorted({names[i] for i in wrong})}")


def in_child(want: list[torch.Tensor], where: str, deeper: int = 0) -> None:
    """The same in a forked child, which does it again in its own."""
    child = os.fork()
    if child == 0:
        signal.alarm(ANSWER_WITHIN)
        try:
            must_equal(results(), want, where)
            if deeper:
                in_child(want, where + ", and again", deeper - 1)
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(f"{where}: the child ended with status {status}")


def by_threads(want: list[torch.Tensor]) -> None:
    for n in (1, 2, 3, 7):
        torch.set_num_threads(n)
        must_equal(results(), want, f"{n} threads")


def together(want: list[torch.Tensor], during: bool = False) -> None:
    """Four threads call at once, each on torch's three; `during`: one forks meanwhile."""
    failures: list[str] = []

    def call() -> None:
        try:
            torch.set_num_threads(3)
            for _ in range(3):
                must_equal(results(), want, "several threads at once")
        except BaseException as error:
            failures.append(repr(error))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    if during:
        in_child(want, "forked while other threads compute")
    for caller in callers:
        caller.join()
    if failures:
        sys.exit("; ".join(failures))


def main(what: str) -> None:
    if what == "fork":
        torch.set_num_threads(3)
        want = results()
        in_child(want, "forked after the pool has started", deeper=1)
        must_equal(results(), want, "the parent afterwards")
        together(want, during=True)
    elif what == "spawn":
        want = results()
        torch.set_num_threads(3)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for got in pool.map(answer, range(2)):
                must_equal(
                    [torch.from_numpy(a).view(b.dtype) for a, b in zip(got, want)], want, "spawned"
                )
    else:
        torch.set_num_threads(1)
        (by_threads if what == "threads" else together)(results())


def answer(_: int) -> list:
    """The results as bytes in arrays, which need no shared memory to be sent."""
    return [t.flatten().view(torch.uint8).reshape(*t.shape[:-1], -1).numpy() for t in results()]


if __name__ == "__main__":
    main(sys.argv[1])
