"""The results of one student in one lab: as signed JSON, and from that JUnit, and a class's as CSV for a platform."""

from __future__ import annotations

import csv
import io
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from labkit import signing
from labkit.course import Course, Student
from labkit.errors import LabError, TamperedError
from labkit.grade import Graded, Outcome
from labkit.spec import Lab, schema_problems

VERSION: Final = 1
_SHOWN: Final = (
    "name", "title", "status", "possible", "points", "achieved", "counted", "hint_cost", "expected", "found", "parent",
    "read", "seconds",
)  # fmt: skip

Results = dict[str, Any]


def make(lab: Lab, student: Student, course: Course, graded: Graded) -> Results:
    """The results as a document of results.schema.json, signed."""
    document: Results = {
        "version": VERSION,
        "course": course.name,
        **({"site": course.site} if course.site else {}),
        "lab": lab.name,
        "title": lab.title,
        "student": student.name,
        **{k: v for k, v in (("full_name", student.full_name), ("id", student.id), ("email", student.email)) if v},
        "host": student.host.name,
        "graded_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "score": graded.score,
        "possible": lab.points,
        "undecided": graded.undecided,
        "complete": graded.undecided == 0,
        "attempts": graded.kept.attempts,
        "checks": [_check(outcome) for outcome in graded.outcomes],
        "signed_by": "course" if course.seed is not None else "student",
    }
    if course.seed is not None:
        document["instructor"] = graded.notes
    signed = signing.sign(document, _key(document, course))
    if problems := schema_problems(signed, "results"):
        raise LabError(f"these results break their schema: {problems[0]}", "a mistake of the engine: report it")
    return signed


def _check(outcome: Outcome) -> dict[str, Any]:
    values = vars(outcome)
    return {name: values[name] for name in _SHOWN if values[name] != ""}


def _key(document: Mapping[str, Any], course: Course) -> bytes:
    if document["signed_by"] == "course":
        if course.seed is None:
            raise LabError(
                "these results were signed by the instructor", "only the instructor's course file can check them"
            )
        return course.seed
    return course.student(document["student"]).key


def read(path: Path, course: Course) -> Results:
    """The results in a file, checked.

    Raises:
        LabError: it cannot be read or is no such file.
        TamperedError: it is not what was signed.
    """
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise LabError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise LabError(f"{path.name} is no JSON", "it has to be what lab grade wrote") from None
    if problems := schema_problems(document, "results"):
        raise LabError(f"{path.name}: {problems[0]}", "it has to be what lab grade wrote")
    if document["course"] != course.name:
        raise TamperedError(f"{path.name} is of the course {document['course']}, not {course.name}")
    signing.verify(document, _key(document, course), path.name)
    found: Results = document
    return found


def write(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The class's files are written at the end of each host, maybe of two at the same time.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def dump(results: Results) -> str:
    """As it is written to a file."""
    return json.dumps(results, indent=2, ensure_ascii=False) + "\n"


_JUNIT: Final = {
    "failed": "failure",
    "partial": "failure",
    "not_tried": "skipped",
    "unreachable": "error",
    "error": "error",
}


def junit(all_results: Iterable[Results]) -> str:
    """As JUnit XML: a suite for each student and lab. What could not be looked at is an error, not a failure."""
    top = ET.Element("testsuites")
    for results in all_results:
        checks = results["checks"]
        # What counts in full is no failure, whatever holds of it now.
        kinds = [
            None if check["counted"] + check["hint_cost"] >= check["possible"] else _JUNIT.get(check["status"])
            for check in checks
        ]
        suite = ET.SubElement(
            top,
            "testsuite",
            name=f"{results['student']}.{results['lab']}",
            tests=str(len(checks)),
            failures=str(kinds.count("failure")),
            errors=str(kinds.count("error")),
            skipped=str(kinds.count("skipped")),
            timestamp=results["graded_at"].rstrip("Z"),
            time=f"{sum(check['seconds'] for check in checks):.2f}",
        )
        for check, kind in zip(checks, kinds, strict=True):
            case = ET.SubElement(
                suite, "testcase", classname=f"{results['student']}.{results['lab']}", name=check["name"],
                time=f"{check['seconds']:.2f}",
            )  # fmt: skip
            if kind is not None:
                said = f"{check['status']}: {check.get('found') or check.get('parent', '')}"
                ET.SubElement(case, kind, message=_xml(said)).text = _xml(check.get("expected", ""))
    ET.indent(top)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(top, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Without what XML 1.0 has no way to write."""
    return "".join(c if c.isprintable() else " " for c in text)


def graded(all_results: Sequence[Results]) -> list[Results]:
    """Those that have a grade, in the order of the students' names.

    The others get no line in a file for a platform: an empty field is no field that is left alone, but deletes the
    grade that is there (Moodle: grade/import/csv/classes/load_data.php; Canvas: lib/gradebook_importer.rb).
    """
    return sorted((results for results in all_results if results["complete"]), key=lambda results: results["student"])


def moodle(all_results: Sequence[Results], course: Course, title: str) -> str:
    """A lab's grades for Moodle's *Grades, Import, CSV file*: `ID number` or `Email address` maps to the user, the
    third column, called by the lab's title, to a grade item. Who somebody is says the course, and not the results."""
    rows = [["ID number", "Email address", title]]
    for results in graded(all_results):
        who = course.student(results["student"])
        rows.append([who.id, who.email, f"{results['score']:g}"])
    return _csv(rows)


def canvas(all_results: Sequence[Results], course: Course, title: str) -> str:
    """A lab's grades for the import of Canvas' gradebook, with the row of points possible."""
    rows = [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", title],
        ["    Points Possible", "", "", "", "", "100"],
    ]
    for results in graded(all_results):
        who = course.student(results["student"])
        rows.append([who.full_name or who.name, "", who.id, who.name, "", f"{results['score']:g}"])
    return _csv(rows)


def check_fit(results: Results, lab: Lab) -> None:
    """Whether results from somebody else's machine can be of this lab: its checks, and no more points than they have.

    Raises:
        LabError: they are of another lab or of another version of it, or do not add up.
    """
    if results["lab"] != lab.name:
        raise LabError(f"these results are of lab {results['lab']}, not {lab.name}")
    of = {check.name: check.points for check in lab.checks}
    there = {check["name"]: check["possible"] for check in results["checks"]}
    if there != of or len(results["checks"]) != len(of) or results["possible"] != lab.points:
        raise LabError(f"its checks are not those of lab {lab.name}", "is the student's copy of the labs another one?")
    counted = [check["counted"] for check in results["checks"]]
    fits = all(0 <= check["counted"] <= check["possible"] for check in results["checks"])
    if not fits or abs(sum(counted) - results["score"]) > 0.05:
        raise LabError("its points do not add up", "it was not written by lab grade")


def _csv(rows: Iterable[Sequence[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[_cell(cell) for cell in row] for row in rows])
    return buffer.getvalue()


def _cell(text: str) -> str:
    """A name must not become a formula in a spreadsheet."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t") else text
