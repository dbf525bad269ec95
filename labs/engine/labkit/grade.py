"""Runs the checks of a lab for one student, and says what came of each.

Each check is a process of its own, forked from this one: it ends with its time whatever it does, and what it raises,
exits with or dies of is its own. The outcomes:

    passed, partial, failed   the system was looked at
    not_tried                 a check before it has not passed
    unreachable               a machine or a file of the student's could not be looked at: nothing is said of the work
    error                     the check itself is broken or too slow: the instructor has to look
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

from labkit import state, values
from labkit.course import Course, Student
from labkit.errors import CouldNotLookError, LabError
from labkit.look import Look, Verdict, load_checks
from labkit.setup import guest_places, values_of
from labkit.spec import CheckSpec, Lab
from labkit.transport import CONNECT, HOST, System

GRACE: Final = 2.0
"""Seconds that a check has to end by itself after its time, so that it can say what it was waiting for."""
HIDDEN: Final = "(hidden)"
UNDECIDED: Final = ("unreachable", "error")

Checks = Mapping[str, Callable[[Look], Verdict]]


@dataclass(frozen=True, slots=True)
class Place:
    """Whose work is looked at, and where."""

    lab: Lab
    student: Student
    system: System


@dataclass
class Outcome:
    """What came of one check. *points* hold now; *achieved* is the most that there ever was; *counted* goes into the
    score: one or the other, less what hints cost."""

    name: str
    title: str
    possible: int
    status: str
    read: str
    points: float = 0.0
    achieved: float = 0.0
    counted: float = 0.0
    hint_cost: int = 0
    expected: str = ""
    found: str = ""
    parent: str = ""
    seconds: float = 0.0
    trouble: str = ""
    """For the instructor: what broke, and where."""
    same_as: list[str] = field(default_factory=list)
    """For the instructor: students for whom the wrong answer would have been right, as ANSWER: NAME."""


def run_checks(
    lab: Lab,
    student: Student,
    system: System,
    *,
    course: Course | None = None,
    only: str | None = None,
    say: Callable[[Outcome], None] = lambda _: None,
    checks: Checks | None = None,
) -> list[Outcome]:
    """The outcomes of all checks, or of one and those that it needs. Changes nothing on the student's machines.

    Args:
        course: to look for answers that are another student's.
        say: called with each outcome as it comes.
        checks: in place of the lab's checks.py.
    """
    found = load_checks(lab) if checks is None else checks
    # Opens the connections that all checks share, outside of their time; says that there is no host.
    system.run(HOST, "true", CONNECT)
    for place in guest_places(lab, student):
        with contextlib.suppress(CouldNotLookError):  # the checks that need it will say so
            system.run(place, "true", CONNECT)
    wanted = _wanted(lab, only)
    done: dict[str, Outcome] = {}
    for spec in lab.checks:
        if spec.name not in wanted:
            continue
        parent = next((p for p in spec.needs if done[p].status != "passed"), None)
        if parent is not None:
            outcome = Outcome(spec.name, spec.title, spec.points, "not_tried", spec.read, parent=parent)
            if done[parent].status in UNDECIDED or _blocked(done, parent):
                # Nobody knows whether the work before it is done, so nobody knows about this one.
                outcome.status, outcome.found = "unreachable", f"{parent} could not be looked at"
        else:
            outcome = _one(Place(lab, student, system), spec, found[spec.name], course)
        done[spec.name] = outcome
        say(outcome)
    return list(done.values())


def _blocked(done: Mapping[str, Outcome], name: str) -> bool:
    """Whether a check was not tried because one far above it could not be looked at."""
    parent = done[name].parent
    return bool(parent) and (done[parent].status in UNDECIDED or _blocked(done, parent))


def _wanted(lab: Lab, only: str | None) -> set[str]:
    if only is None:
        return {check.name for check in lab.checks}
    found, todo = set(), [lab.check(only).name]
    while todo:
        name = todo.pop()
        found.add(name)
        todo += [parent for parent in lab.check(name).needs if parent not in found]
    return found


def _one(place: Place, spec: CheckSpec, function: Callable[[Look], Verdict], course: Course | None) -> Outcome:
    outcome = Outcome(spec.name, spec.title, spec.points, "error", spec.read)
    began = time.monotonic()
    said = _apart(place, spec, function)
    outcome.seconds = round(time.monotonic() - began, 2)
    kind, about = said.pop("kind"), said
    if kind == "verdict":
        part = about["part"]
        outcome.status = "passed" if part >= 1 else "partial" if part > 0 else "failed"
        outcome.points = round(spec.points * part, 2)
        outcome.expected, outcome.found = about["expected"], about["found"]
    elif kind == "away":
        outcome.status, outcome.found = "unreachable", about["text"]
    else:
        outcome.trouble = about["text"]
        outcome.found = "the check itself failed, which is not your fault: tell your instructor"
    answers = about.get("answers", {})
    _conceal(place.lab, place.student, outcome, answers)
    if course is not None and outcome.status in ("failed", "partial"):
        outcome.same_as = _others(place.lab, place.student, answers, course)
    return outcome


def _apart(place: Place, spec: CheckSpec, function: Callable[[Look], Verdict]) -> dict[str, Any]:
    """Runs a check in a process of its own; what it says as plain data."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, place, spec, function))
    process.start()
    there.close()
    try:
        if not here.poll(spec.seconds + GRACE):
            return {"kind": "broken", "text": f"no end within {spec.seconds:g} s"}
        said: dict[str, Any] = here.recv()
    except EOFError:
        process.join(1)
        return {"kind": "broken", "text": f"its process ended with {process.exitcode} and said nothing"}
    else:
        return said
    finally:
        here.close()
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        process.join()


def _work(pipe: Connection, place: Place, spec: CheckSpec, function: Callable[[Look], Verdict]) -> None:
    """In the check's process."""
    os.setsid()  # so that all that it starts ends with it
    values_ = values_of(place.lab, place.student)
    look = Look(place.lab, place.student, values_, place.system, time.monotonic() + spec.seconds)
    try:
        verdict = function(look)
        if not isinstance(verdict, Verdict) or not 0 <= verdict.part <= 1:
            raise TypeError(f"it returned {verdict!r}, which is no verdict")
        said = {"kind": "verdict", "part": verdict.part, "expected": verdict.expected, "found": verdict.found}
    except CouldNotLookError as error:
        said = {"kind": "away", "text": str(error)}
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = {
            "kind": "broken",
            "text": f"{type(error).__name__}: {error} at {last.filename.rpartition('/')[2]}:{last.lineno}",
        }
    try:
        said["answers"] = {name: look.answer(name) or "" for name in spec.answers}
    except CouldNotLookError:
        said["answers"] = {}
    pipe.send(said)
    pipe.close()


def _conceal(lab: Lab, student: Student, outcome: Outcome, answers: Mapping[str, str]) -> None:
    """Takes hidden values out of what a student reads, unless it is their own answer that is quoted."""
    mine = values_of(lab, student)
    for value in lab.values:
        secret = str(mine[value.name])
        if not value.hidden or secret in answers.values():
            continue
        for name in ("expected", "found"):
            text: str = getattr(outcome, name)
            # A number counts only by itself: 3 is not told by 1234.
            concealed = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
            if concealed != text:
                setattr(outcome, name, concealed)
                outcome.trouble = (outcome.trouble + f"; it would have told the hidden value {value.name}").lstrip("; ")


def _others(lab: Lab, student: Student, answers: Mapping[str, str], course: Course) -> list[str]:
    """ANSWER: NAME for each other student of whom a wrong answer is the right one."""
    mine = values_of(lab, student)
    keys = {name: key for name, key in course.keys().items() if name != student.name}
    found = []
    for name, answer in answers.items():
        if answer and answer != str(mine[name]):
            found += [f"{name}: {other}" for other in values.others(answer, name, lab.values, keys, lab.name)]
    return found


@dataclass
class Graded:
    """A lab of a student, graded."""

    outcomes: list[Outcome]
    kept: state.Kept
    score: float
    undecided: float
    """Points of checks about which nothing can be said now."""
    notes: list[str]
    """For the instructor."""


def grade(
    lab: Lab,
    student: Student,
    system: System,
    *,
    course: Course | None = None,
    only: str | None = None,
    say: Callable[[Outcome], None] = lambda _: None,
    checks: Checks | None = None,
) -> Graded:
    """Runs the checks and remembers on the host what was achieved.

    Raises:
        LabError: the lab was ended: what it came to stays as it was.
        BusyError: the student's lab is being graded, started or reset.
        TamperedError: what is remembered was changed by hand.
        UnreachableError: the host does not answer.
    """
    with state.held(system, student, lab.name, seconds=300 + sum(c.seconds + GRACE for c in lab.checks)):
        kept = state.load(system, student, lab.name)
        if kept.started and kept.manifest is None:
            raise LabError(
                f"{student.name} has ended lab {lab.name}: its points are those of the last time",
                f"lab start {lab.name} begins anew",
            )
        outcomes = run_checks(lab, student, system, course=course, only=only, say=say, checks=checks)
        notes = [f"{o.name}: {o.trouble}" for o in outcomes if o.trouble]
        notes += [f"{o.name}: the answer would be right for {same}" for o in outcomes for same in o.same_as]
        kept.attempts += 1
        for outcome in outcomes:
            count(outcome, lab.check(outcome.name), kept)
        score = round(sum(o.counted for o in outcomes), 2)
        if only is None:
            statuses = {o.name: o.status for o in outcomes}
            kept.last = {"at": round(time.time()), "score": score, "statuses": statuses}
        state.save(system, student, lab.name, kept)
    return Graded(
        outcomes=outcomes,
        kept=kept,
        score=score,
        undecided=sum(_open(o, lab.check(o.name)) for o in outcomes if o.status in UNDECIDED),
        notes=notes,
    )


def _open(outcome: Outcome, spec: CheckSpec) -> float:
    """The points of a check that could not be looked at that may be missing: what was once achieved may count."""
    return outcome.possible - (outcome.achieved if spec.counts == "once" else 0)


def count(outcome: Outcome, spec: CheckSpec, kept: state.Kept) -> None:
    """Puts together what holds now, what was once achieved and what hints cost."""
    before = kept.achieved.get(spec.name, {"points": 0.0, "at": 0.0})
    if outcome.points > before["points"]:
        before = {"points": outcome.points, "at": round(time.time())}
        kept.achieved[spec.name] = before
    outcome.achieved = before["points"]
    outcome.hint_cost = sum(hint.cost for hint in spec.hints[: kept.hints.get(spec.name, 0)])
    reached = outcome.achieved if spec.counts == "once" else outcome.points
    outcome.counted = round(max(0.0, reached - outcome.hint_cost), 2)
