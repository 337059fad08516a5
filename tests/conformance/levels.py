"""The kit's levels: what each check asks of an implementation, and of which calls.

    0 load           the library or package is what it says it is
    1 requirements   what it accepts runs, what it refuses has a sentence, each limit at -1, 0, +1
    2 numbers        against the float64 reference, by dtype; sizes 0 and 1; unbiased rounding
    3 manners        guards intact, repeatable bits, threads, streams, no growth in memory
    4 torch          opcheck, gradients, compile, vmap, autocast
    5 speed          verified, then timed: the fraction of the device's peaks

`transom verify` runs them in a child process; test_conformance.py runs them under pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Verbosity, given, settings

import transom
from transom.abi.plugin import CFunction
from transom.op import Op
from transom.selection import reasons

from . import checks, manners, speed
from .cases import Case, build, cases, edges

LEVELS = ("load", "requirements", "numbers", "manners", "torch", "speed")
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LARGEST = 1 << 22
"""Elements of the largest tensor that is made to stand at a limit."""
SEARCHED = 1 << 12
"""The largest size at which a limit that nobody states is looked for: references are slow."""

Question = Callable[[Op[..., Any], str, Case], "str | None"]
"""(operator, implementation, call) -> None, or the sentence that says what is wrong."""


@dataclass(frozen=True)
class Finding:
    """What one check of one implementation came to."""

    op: str
    impl: str
    level: int
    check: str
    status: str
    """'pass', 'fail', 'refused' (it takes no such call) or 'none' (there is nothing to ask)."""
    text: str = ""
    """What was found, one sentence."""
    case: str = ""
    """The smallest call that shows it."""
    reproduce: str = ""
    """Lines of Python that show it again."""
    figures: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """An implementation of an operator on a device, and how many drawn calls it is asked about."""

    op: Op[..., Any]
    impl: str
    device: str
    examples: int = 15
    trying: Callable[[Case], None] = lambda case: None
    """Told of every call before it is made: if the process dies, this was the last."""


Answer = tuple[str, str, "Case | None"]
"""(status, sentence, the call that shows it)."""


@dataclass(frozen=True)
class Check:
    """One check: a question, and the calls that it is put to."""

    level: int
    name: str
    question: Question
    put: Callable[[Subject, Question], Answer]

    def ask(self, subject: Subject) -> Finding:
        """What it finds."""
        status, text, case = self.put(subject, self.question)
        return Finding(
            subject.op.name,
            subject.impl,
            self.level,
            self.name,
            status,
            text,
            repr(case) if case else "",
            self.reproduction(subject.impl, case) if case else "",
        )

    def reproduction(self, impl: str, case: Case) -> str:
        """Lines of Python that put the question to the call again."""
        draws = dict(case.draws)
        dims = draws.pop("dims")
        plain = {"absent": [], "layouts": {}, "scale": 1.0}
        rest = ", ".join(f"{k}={v!r}" for k, v in draws.items() if plain.get(k) != v)
        return (
            "from transom.conformance import cases, levels\n"
            f"case = cases.rebuild({case.op.name!r}, dims={dims!r},\n"
            f"    {rest})\n"
            f"print(levels.again({self.name!r}, {impl!r}, case))"
        )


def again(name: str, impl: str, case: Case) -> str:
    """The answer of the check `name` for one call: what is wrong, or 'nothing is wrong'."""
    check = next(c for c in CHECKS if c.name == name)
    subject = Subject(case.op, impl, case.draws["device"])
    return answer(subject, check.question, case) or "nothing is wrong"


def answer(subject: Subject, question: Question, case: Case) -> str | None:
    """The question's answer; what the implementation raises is one."""
    subject.trying(case)
    try:
        return question(subject.op, subject.impl, case)
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is a finding
        line = " ".join(str(error).split()) or "without a message"
        return f"it raised {type(error).__name__}: {line[:300]}"


# Which calls a question is put to


class _Found(Exception):
    def __init__(self, problem: str, case: Case) -> None:
        super().__init__(problem)
        self.problem, self.case = problem, case


def drawn(
    floats: tuple[torch.dtype, ...] | None = None, accepted: bool = True
) -> Callable[[Subject, Question], Answer]:
    """Calls drawn from the declaration; `accepted`: those that the implementation takes. The call
    that comes back is the smallest that hypothesis finds."""

    def put(subject: Subject, question: Question) -> Answer:
        ran: list[Case] = []
        reasons: list[str] = []
        nothing: list[str] = []

        def check(case: Case) -> None:
            if nothing:
                return
            if accepted and (why := checks.refuses(subject.op, subject.impl, case)):
                reasons.append(why[0])
                return
            ran.append(case)
            problem = answer(subject, question, case)
            if problem is not None and problem.startswith(checks.NOTHING):
                nothing.append(problem.removeprefix(checks.NOTHING))
            elif problem is not None:
                raise _Found(problem, case)

        profile = settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=subject.examples,
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        )
        try:
            profile(given(case=cases(subject.op, subject.device, floats))(check))()
        except _Found as found:
            return "fail", found.problem, found.case
        if nothing:
            return "none", nothing[0], None
        if not ran:
            return "refused", reasons[0] if reasons else "no call could be drawn", None
        return "pass", "", None

    return put


def each(subject: Subject, question: Question, calls: Iterable[Case]) -> Answer:
    """The question put to given calls, those that the implementation takes."""
    reasons: list[str] = []
    ran = False
    for case in calls:
        if why := checks.refuses(subject.op, subject.impl, case):
            reasons.append(why[0])
            continue
        ran = True
        problem = answer(subject, question, case)
        if problem is not None and problem.startswith(checks.NOTHING):
            return "none", problem.removeprefix(checks.NOTHING), None
        if problem is not None:
            return "fail", problem, case
    if not ran:
        return ("refused", reasons[0], None) if reasons else ("none", "no such call", None)
    return "pass", "", None


def small_sizes(subject: Subject, question: Question) -> Answer:
    """Each dim of the first example in turn 0 and 1."""
    return each(subject, question, edges(subject.op, subject.device))


def examples(*floats: torch.dtype) -> Callable[[Subject, Question], Answer]:
    """The operator's first example, which is small, in these dtypes and without quantised weights
    (which have no gradient)."""

    def put(subject: Subject, question: Question) -> Answer:
        calls = (plain_example(subject.op, subject.device, dtype) for dtype in floats)
        return each(subject, question, calls)

    return put


def plain_example(op: Op[..., Any], device: str, dtype: torch.dtype = torch.float32) -> Case:
    """The operator's first example, drawn until no weight is quantised."""
    for seed in range(100):
        case = build(op, op.examples[0], dtype, seed, device=device)
        if not any(isinstance(v, transom.QuantizedWeight) for v in case.values):
            return case
    raise AssertionError(f"{op.name}: every drawn example has a quantised weight")


def at_limits(subject: Subject, question: Question) -> Answer:
    """Calls at each limit on a size that the implementation states or, in C, turns out to have,
    one below and one above."""
    op, walked = subject.op, False
    for requirement in op.impls[subject.impl].requires:
        for kind, bound in requirement.limits.items():
            if kind not in ("at_most", "at_least", "multiple_of"):
                continue
            dim, limit = bound
            for size in (limit - 1, limit, limit + 1):
                meets = {
                    "at_most": size <= limit,
                    "at_least": size >= limit,
                    "multiple_of": size % limit == 0,
                }[kind]
                case = _of_size(op, subject.device, dim, size)
                if case is None:
                    continue
                walked = True
                if (requirement(transom.dispatch.facts_of(op, case.values)) is None) != meets:
                    does = "refuses" if meets else "accepts"
                    return "fail", f"it {does} {dim} = {size}; it states {requirement.text}", case
                if (problem := answer(subject, question, case)) is not None:
                    return "fail", problem, case
    for dim, most in unstated_limits(subject):
        for size in (most - 1, most, most + 1):
            case = _of_size(op, subject.device, dim, size)
            if case is None:
                continue
            walked = True
            if (problem := answer(subject, question, case)) is not None:
                return "fail", problem, case
    return ("pass", "", None) if walked else ("none", "it has no limit on a size", None)


def unstated_limits(subject: Subject) -> Iterator[tuple[str, int]]:
    """(dim, the largest size that a C library takes) of the operator's first example, for each dim
    that it refuses when larger: its supports() states no limit, so it is searched for."""
    op = subject.op
    impl = op.impls[subject.impl]
    if not isinstance(impl.function, CFunction):
        return
    facts = transom.dispatch.facts_of(op, plain_example(op, subject.device).values)

    def refused(dim: str, size: int) -> bool:
        # Without parts the tensors of other sizes are assumed; none is made.
        dims, arguments = (
            {**known, dim: size} if dim in known else known
            for known in (facts.dims, facts.arguments)
        )
        return bool(reasons(impl, replace(facts, dims=dims, arguments=arguments, parts={})))

    for dim in op.signature.symbols():
        most = op.examples[0].get(dim)
        if not isinstance(most, int) or refused(dim, most):
            continue
        more = max(most, 1)
        while more <= SEARCHED and not refused(dim, more):
            most, more = more, 2 * more
        if more > SEARCHED:
            continue
        while more - most > 1:
            middle = (most + more) // 2
            most, more = (most, middle) if refused(dim, middle) else (middle, more)
        yield dim, most


def _of_size(op: Op[..., Any], device: str, dim: str, size: int) -> Case | None:
    """The first example with this size, or None where the declaration refuses it or it is huge."""
    try:
        dims = {**op.examples[0], dim: size}
        shapes = [s.sizes(dims) for s in op.signature.inputs.values() if not s.optional]
        if size < 0 or any(torch.Size(s).numel() > LARGEST for s in shapes):
            return None
        return build(op, dims, device=device)
    except (ValueError, TypeError, KeyError, NameError):
        return None


CHECKS = (
    Check(1, "requirements", checks.requirements, drawn(accepted=False)),
    Check(1, "limits", checks.stands, at_limits),
    *(Check(2, f"numbers {name}", checks.numbers, drawn((f,))) for name, f in FLOATS.items()),
    Check(2, "sizes 0 and 1", checks.numbers, small_sizes),
    Check(2, "rounding", checks.rounds, examples(torch.bfloat16)),
    Check(3, "repeatable", checks.repeatable, drawn()),
    Check(3, "guards", manners.guards, drawn()),
    Check(3, "threads", manners.threads, examples(torch.float32, torch.bfloat16)),
    Check(3, "streams", manners.streams, examples(torch.float32)),
    Check(3, "memory", manners.memory, examples(torch.float32)),
    Check(4, "opcheck", checks.opcheck, examples(torch.float32)),
    Check(4, "compile", checks.compiles, examples(torch.float32)),
    Check(4, "gradients", checks.gradients, examples(torch.float32)),
    Check(4, "vmap", checks.maps, examples(torch.float32)),
    Check(4, "autocast", checks.autocasts, examples(torch.float32)),
    Check(5, "speed", speed.verified, speed.timed),
)
