"""The `lab` command: thin, for students who do not know Ansible, and for the playbooks."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Final

import yaml

from labkit import course as courses
from labkit import grade as grading
from labkit import report, results, spec, state
from labkit.course import Course, Student
from labkit.errors import CouldNotLookError, LabError
from labkit.grade import Outcome
from labkit.report import SIGNS
from labkit.setup import Setup
from labkit.spec import Lab
from labkit.transport import connect, places
from xen9p.errors import Xen9pError, describe

LOCAL_SITE: Final = "http://127.0.0.1:8000"
RESULTS: Final = courses.STATE / "results"
EXIT_NOT_YET: Final = 1
EXIT_COULD_NOT_LOOK: Final = CouldNotLookError.exit_code
_AT_ONCE: Final = 8
_TELLING: Final = re.compile(r"^started$|^goes on|^reset in|no longer on|^[\d.]+ of \d+ points|points are undecided")


def build_parser() -> argparse.ArgumentParser:
    """The command line; the site's page of commands is made from it."""
    top = argparse.ArgumentParser(prog="lab", description="Labs on a real Xen host: start, check, reset.")
    top.add_argument(
        "--course",
        type=Path,
        default=os.environ.get("XEN9P_COURSE"),
        metavar="FILE",
        help="course file; default: $XEN9P_COURSE, else a course of your own on the host that make lab has made",
    )
    top.add_argument(
        "--student",
        default=os.environ.get("XEN9P_STUDENT"),
        metavar="NAME",
        help="default: $XEN9P_STUDENT, or the only one",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = _adder(commands)
    add("list", _list, "which labs there are")
    start = add("start", _start, "start a lab, or go on with it", lab=True, everybody=True)
    start.add_argument(
        "--forget", action="store_true", help="begin anew: forget what was made, once achieved, and hints taken"
    )
    check = add("check", _check, "look how far you are; as often as you like", lab=True)
    check.add_argument("check", nargs="?", metavar="CHECK", help="one check, and what it needs; default: all")
    hint = add("hint", _hint, "the next hint for a check; says first what it costs", lab=True)
    hint.add_argument("check", metavar="CHECK", help="name of the check")
    hint.add_argument("--yes", action="store_true", help="take it, even if it costs points")
    add("reset", _reset, "bring a lab back to its start; points once achieved stay", lab=True, everybody=True)
    add("end", _end, "take a lab off the host; points stay", lab=True, everybody=True)
    grade = add("grade", _grade, "check, and write the results to files", lab=True, everybody=True)
    grade.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where to; default: .lab/labs/results")
    progress = add("progress", _progress, "points of all labs, without looking anew", everybody=True)
    progress.add_argument("--json", action="store_true", help="as one JSON object")
    collect = add("collect", _collect, "results of a class from files, signatures checked: pages and CSV", lab=True)
    collect.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what lab grade wrote")
    collect.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="where to; default: .lab/labs/results"
    )
    handout = add("handout", _handout, "the course file for a student's own machine: their key alone")
    handout.add_argument("name", metavar="NAME", help="the student")
    handout.add_argument("--seat", action="store_true", help="for their guests on their host of the course")
    writing = add("write-course", _write_course, "for the playbooks: the course file, from JSON on standard input")
    writing.add_argument("file", type=Path, metavar="FILE", help="the course file")
    writing.add_argument("--seed-file", type=Path, required=True, metavar="FILE", help="has the key; made if missing")
    new = add("new", _new, "a folder for a new lab, which passes lab lint")
    new.add_argument("name", metavar="NAME", help="lower-case letters, digits, dashes")
    linting = add("lint", _lint, "say what is wrong with labs' folders")
    linting.add_argument("labs", nargs="*", metavar="LAB", help="default: all")
    return top


def _adder(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> Callable[..., argparse.ArgumentParser]:
    def add(
        name: str, run: Callable[[argparse.Namespace], int], about: str, *, lab: bool = False, everybody: bool = False
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        made.set_defaults(run=run)
        if lab:
            made.add_argument("lab", metavar="LAB", help="name of the lab; see lab list")
        if everybody:
            made.add_argument("--all", action="store_true", help="every student of the course, side by side")
            made.add_argument("--host", default="", metavar="HOST", help="with --all: those on this host alone")
        return made

    return add


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; errors are one line each on standard error."""
    options = build_parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except Xen9pError as error:
        lines = error.message.splitlines()
        for line in lines[:-1]:
            print(f"lab: error: {line}", file=sys.stderr)
        hint = f" ({error.hint})" if error.hint else ""
        print(f"lab: error: {lines[-1]}{hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        print(f"lab: error: a mistake of the engine: {describe(error)} (report it)", file=sys.stderr)
        return 70


def _course(options: argparse.Namespace) -> Course:
    return courses.load(Path(options.course)) if options.course else courses.default()


def _who(options: argparse.Namespace) -> tuple[Course, Student]:
    course = _course(options)
    return course, course.student(options.student)


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


# For one student.


def _list(options: argparse.Namespace) -> int:
    for name in spec.names():
        try:
            lab = spec.load(name)
        except LabError as error:
            print(f"   {name}: {error.message.splitlines()[0]}; see: lab lint {name}")
            continue
        print(f"{lab.number:>2} {lab.name:<14} {lab.minutes:>3} min  {lab.title}: {lab.summary}")
    return 0


def _start(options: argparse.Namespace) -> int:
    if options.all:
        return _everybody(options, ["start", options.lab, *(["--forget"] if options.forget else [])])
    lab = spec.load(options.lab)
    course, student = _who(options)
    system = connect(student)
    print(f"{lab.title}, for {student.name}", flush=True)
    if options.forget:
        state.forget(system, student, lab.name)
    first = Setup(lab, student, system, _say).start()
    print("started" if first else "goes on where you left it")
    there = places(student)
    print(
        f"Read {report.where(f'labs/{lab.name}.md', course.site or LOCAL_SITE)} (.venv/bin/mkdocs serve shows the site)"
    )
    print(f"On {', '.join(there.values())} begin with: . lab-values {lab.name}")
    return 0


def _reset(options: argparse.Namespace) -> int:
    if options.all:
        return _everybody(options, ["reset", options.lab])
    lab = spec.load(options.lab)
    _, student = _who(options)
    print(f"{lab.title}, for {student.name}: back to the start", flush=True)
    took = Setup(lab, student, connect(student), _say).reset()
    print(f"reset in {took:.1f} s: what is there now is what there was at the start")
    return 0


def _end(options: argparse.Namespace) -> int:
    if options.all:
        return _everybody(options, ["end", options.lab])
    lab = spec.load(options.lab)
    _, student = _who(options)
    Setup(lab, student, connect(student), _say).end()
    print(f"{lab.title} is no longer on {student.host.name}; its points are remembered there")
    return 0


def _check(options: argparse.Namespace) -> int:
    lab = spec.load(options.lab)
    course, student = _who(options)
    if options.check is not None:
        lab.check(options.check)
    print(f"{lab.title}, for {student.name}", flush=True)
    done = grading.grade(
        lab, student, connect(student), course=course, only=options.check, say=partial(_outcome, site=course.site)
    )
    return _summary(lab, done, partly=options.check is not None)


def _outcome(outcome: Outcome, site: str = "") -> None:
    """One check for people, as soon as it is known."""
    points = f"{outcome.points:g} of {outcome.possible}"
    print(f" {SIGNS[outcome.status]} {outcome.title:<52} {points:>10}", flush=True)
    match outcome.status:
        case "not_tried":
            print(f"     not tried: {outcome.parent} comes first")
        case "unreachable":
            print(f"     could not look: {outcome.found}")
        case "error":
            print(f"     {outcome.found}")
        case "failed" | "partial":
            print(f"     expected: {outcome.expected}")
            print(f"     found:    {outcome.found}")
            print(f"     read on:  {report.where(outcome.read, site)}")


def _summary(lab: Lab, done: grading.Graded, *, partly: bool) -> int:
    once = [o for o in done.outcomes if o.achieved > o.points]
    if once:
        print("   once more than now: " + ", ".join(f"{o.name} {o.achieved:g}" for o in once))
    costs = sum(o.hint_cost for o in done.outcomes)
    of = f" of {lab.points}" if not partly else ""
    print(f"{done.score:g}{of} points{f', hints have cost {costs}' if costs else ''}")
    if done.kept.manifest is None:
        print(f"This lab has not been started here: ./lab start {lab.name}")
    if done.undecided:
        print(f"{done.undecided:g} points are undecided: something could not be looked at. None of them is lost.")
        return EXIT_COULD_NOT_LOOK
    return 0 if all(o.status == "passed" for o in done.outcomes) else EXIT_NOT_YET


def _hint(options: argparse.Namespace) -> int:
    lab = spec.load(options.lab)
    course, student = _who(options)
    check = lab.check(options.check)
    system = connect(student)
    with state.held(system, student, lab.name, seconds=60):
        kept = state.load(system, student, lab.name)
        taken = kept.hints.get(check.name, 0)
        for number, old in enumerate(check.hints[:taken], 1):
            print(f"{number}. {old.text}")
        if taken >= len(check.hints):
            print("There are no more hints for it." if check.hints else "There are no hints for it.")
            print(f"Read on: {report.where(check.read, course.site)}")
            return 0
        new = check.hints[taken]
        if new.cost and not options.yes:
            print(f"The next one costs {new.cost} of {check.points} points: lab hint {lab.name} {check.name} --yes")
            return 0
        kept.hints[check.name] = taken + 1
        state.save(system, student, lab.name, kept)
    print(f"{taken + 1}. {new.text}{f' (-{new.cost} points)' if new.cost else ''}")
    return 0


def _grade(options: argparse.Namespace) -> int:
    if options.all:
        left_out: set[str] = set()
        code = _everybody(options, ["grade", options.lab, "--out", str(options.out)], left_out)
        _write_class(_course(options), spec.load(options.lab), options.out, left_out)
        return code
    lab = spec.load(options.lab)
    course, student = _who(options)
    print(f"{lab.title}, for {student.name}", flush=True)
    done = grading.grade(lab, student, connect(student), course=course, say=partial(_outcome, site=course.site))
    made = results.make(lab, student, course, done)
    folder: Path = options.out / lab.name
    results.write(folder / f"{student.name}.json", results.dump(made))
    results.write(folder / f"{student.name}.xml", results.junit([made]))
    results.write(folder / f"{student.name}.html", report.student_page(made))
    code = _summary(lab, done, partly=False)
    for note in done.notes if course.seed is not None else []:
        print(f"for the instructor: {note}")
    print(f"written: {folder}/{student.name}.json, .xml, .html")
    # That points are missing is a result, and no failure to grade.
    return code if code == EXIT_COULD_NOT_LOOK else 0


# For all.


def _everybody(options: argparse.Namespace, command: list[str], left_out: set[str] | None = None) -> int:
    """Runs the command for each student in a process of its own; the worst exit code.

    Args:
        left_out: gets the names of those for whom it failed by more than something that could not be looked at.
    """
    course = _course(options)
    students = [s for s in course.students if options.host in ("", s.host.name)]
    if not students:
        raise LabError(
            f"no student of {course.name} is on host {options.host}", "see hosts and students of the course file"
        )
    base = [sys.executable, "-m", "labkit", *(["--course", str(options.course)] if options.course else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    began = time.monotonic()

    def one(student: Student) -> tuple[Student, subprocess.CompletedProcess[str]]:
        words = [*base, "--student", student.name, *command]
        return student, subprocess.run(words, capture_output=True, text=True, check=False, env=env)

    worst = 0
    failed: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, future in enumerate(as_completed([pool.submit(one, s) for s in students]), 1):
            student, done = future.result()
            last = _last(done)
            print(f"[{number}/{len(students)}, {time.monotonic() - began:.0f} s] {student.name}: {last}", flush=True)
            # That something could not be looked at is in the results; any other failure is not, and must not hide.
            codes = {worst, done.returncode} - {0}
            worst = max(codes - {EXIT_COULD_NOT_LOOK} or codes, default=0)
            if done.returncode:
                failed.append(f"{student.name}: {last}")
                written = done.returncode == EXIT_COULD_NOT_LOOK and "written:" in done.stdout
                if left_out is not None and not written:
                    left_out.add(student.name)
    if failed:
        print(f"lab: error: {len(failed)} of {len(students)} students: {failed[0]}", file=sys.stderr)
    return worst


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says how it went for a student."""
    if done.stderr.strip():
        return done.stderr.strip().splitlines()[-1].removeprefix("lab: error: ")
    lines = done.stdout.splitlines()
    telling = [line for line in lines if _TELLING.search(line)]
    return (telling or lines or ["nothing"])[-1]


def _write_class(course: Course, lab: Lab, out: Path, left_out: Collection[str] = ()) -> None:
    """The class's page and CSV, from the results that are there.

    Args:
        left_out: whose grading has failed just now: what is there of them is old, and no grade for a platform.
    """
    found, unread = [], []
    for student in course.students:
        path = out / lab.name / f"{student.name}.json"
        try:
            if path.exists():
                found.append(results.read(path, course))
        except Xen9pError as error:
            print(f"lab: error: {error}", file=sys.stderr)
            unread.append(student.name)
    folder = out / lab.name
    title = f"{lab.number}. {lab.title}"
    results.write(folder / "class.html", report.class_page(found, [s.name for s in course.students], title))
    results.write(folder / "class.xml", results.junit(found))
    now = [r for r in found if r["student"] not in left_out]
    results.write(folder / "moodle.csv", results.moodle(now, course, lab.title))
    results.write(folder / "canvas.csv", results.canvas(now, course, lab.title))
    print(f"written: {folder}/class.html, class.xml, moodle.csv, canvas.csv")
    if waiting := sorted({*left_out, *unread, *(r["student"] for r in now if not r["complete"])}):
        print(f"not in the CSV files, as not all could be looked at: {', '.join(waiting)}; grade again")


def _collect(options: argparse.Namespace) -> int:
    course, lab = _course(options), spec.load(options.lab)
    wrong = 0
    for path in options.files:
        try:
            made = results.read(path, course)
            results.check_fit(made, lab)
            target = options.out / lab.name / f"{made['student']}.json"
            _check_newer(target, made, course)
        except Xen9pError as error:
            print(f"lab: error: {path.name}: {str(error).removeprefix(f'{path.name}: ')}", file=sys.stderr)
            wrong += 1
            continue
        text = results.dump(made)
        if not target.exists() or target.read_text() != text:
            results.write(target, text)
            results.write(target.with_suffix(".html"), report.student_page({**made, "site": course.site}))
        print(f"{made['student']}: {made['score']:g} points, signed by the {made['signed_by']}, {made['graded_at']}")
    _write_class(course, lab, options.out)
    return 1 if wrong else 0


def _check_newer(target: Path, made: results.Results, course: Course) -> None:
    """LabError if what is there already weighs more: the instructor's own run, or a later one."""
    try:
        there = results.read(target, course) if target.exists() else None
    except Xen9pError:
        return  # what cannot be read weighs nothing
    if there is None:
        return
    if (there["signed_by"], made["signed_by"]) == ("course", "student"):
        raise LabError(f"{made['student']} was graded by you at {there['graded_at']}", f"delete {target} to take it")
    if there["signed_by"] == made["signed_by"] and there["graded_at"] > made["graded_at"]:
        raise LabError(f"there is a later one of {made['student']}, of {there['graded_at']}", f"delete {target}")


def _progress(options: argparse.Namespace) -> int:
    course = _course(options)
    students = (
        [s for s in course.students if options.host in ("", s.host.name)]
        if options.all
        else [course.student(options.student)]
    )
    found: dict[str, dict[str, object]] = {}
    wrong = 0
    for student in students:
        try:
            system = connect(student)
            remembered = {name: state.load(system, student, name) for name in spec.names()}
        except Xen9pError as error:
            if not options.all:
                raise
            print(f"lab: error: {student.name}: {error}", file=sys.stderr)
            wrong += 1
            continue
        found[student.name] = {name: kept.last or {"score": None} for name, kept in remembered.items() if kept.started}
    if options.json:
        print(json.dumps(found, indent=2))
        return EXIT_COULD_NOT_LOOK if wrong else 0
    for student_name, labs in found.items():
        for name in spec.names():
            last = labs.get(name)
            words = "not started" if last is None else _bar(last)
            print(f"{student_name:<12} {name:<14} {words}")
    return EXIT_COULD_NOT_LOOK if wrong else 0


def _bar(last: object) -> str:
    score = last.get("score") if isinstance(last, dict) else None
    if not isinstance(score, int | float):
        return "started, not checked yet"
    full = round(score / 5)
    return f"{'█' * full}{'░' * (20 - full)} {score:g}"


# For instructors and authors.


def _handout(options: argparse.Namespace) -> int:
    document = courses.handout(_course(options), options.name, seat=options.seat)
    print(yaml.safe_dump(document, sort_keys=False), end="")
    return 0


def _write_course(options: argparse.Namespace) -> int:
    try:
        document = json.loads(sys.stdin.read())
    except ValueError:
        raise LabError("standard input holds no JSON", "playbooks/lab.yml knows what to say") from None
    if isinstance(document, dict) and "seed" not in document:
        document["seed"] = courses.seed(options.seed_file)
    courses.parse(document, options.file.name)
    changed = not options.file.exists() or spec.read_yaml(options.file) != document
    if changed:
        courses.write(options.file, document)
    print(f"{options.file} {'written' if changed else 'as before'}")
    return 0


def _new(options: argparse.Namespace) -> int:
    from labkit import scaffold  # only authors want it

    folder = scaffold.make(options.name)
    print(f"made {folder}: fill it, and run: lab lint {options.name}")
    return 0


def _lint(options: argparse.Namespace) -> int:
    from labkit import lint  # only authors want it, and all that it imports

    problems = 0
    for name in options.labs or spec.names():
        found = lint.problems(name)
        problems += len(found)
        for line in found:
            print(line, file=sys.stderr)
        print(f"{name}: {f'{len(found)} problems' if found else 'ok'}")
    return 1 if problems else 0
