"""A lab's folder: lab.yml, checked against its schema, and what lies beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

from labkit.errors import LabError, SpecError
from labkit.values import ValueSpec

LABS: Final = Path(os.environ.get("XEN9P_LABS") or Path(__file__).resolve().parents[2])
"""Where the labs are: this repository's, or an instructor's own."""
SCHEMAS: Final = Path(__file__).resolve().parent / "schemas"
FOLDERS: Final = ("guide.md", "checks.py", "solution/steps.md")


@dataclass(frozen=True, slots=True)
class Hint:
    """A hint, and how many points of its check it costs."""

    text: str
    cost: int


@dataclass(frozen=True, slots=True)
class CheckSpec:
    """A check as lab.yml describes it; *seconds* is its time limit."""

    name: str
    title: str
    points: int
    read: str
    needs: tuple[str, ...]
    seconds: float
    counts: str
    answers: tuple[str, ...]
    hints: tuple[Hint, ...]


@dataclass(frozen=True, slots=True)
class Export:
    """An export of the student's own; *attach* is auto, manual or none, *guests* count from 1."""

    name: str
    path: str
    tag: str
    access: str
    attach: str
    guests: tuple[int, ...]
    terms: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StartFile:
    """A file in the student's part of the store: *text*, or *size* bytes of the line *fill*. All may have ${value}."""

    path: str
    text: str | None
    size: str
    fill: str
    mode: str
    owner: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """A documented wrong turn and the points that it scores."""

    name: str
    about: str
    score: float
    after: str


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab."""

    name: str
    folder: Path
    title: str
    number: int
    minutes: int
    summary: str
    objectives: tuple[str, ...]
    guests: int
    store_size: int
    values: tuple[ValueSpec, ...]
    exports: tuple[Export, ...]
    files: tuple[StartFile, ...]
    mounts: tuple[str, ...]
    restart_guests: bool
    reset: Mapping[str, str]
    left: Mapping[str, str]
    checks: tuple[CheckSpec, ...]
    wrong: tuple[Wrong, ...] = field(default=())

    @property
    def points(self) -> int:
        """What can be had, 100."""
        return sum(check.points for check in self.checks)

    def check(self, name: str) -> CheckSpec:
        """The check of that name. LabError if there is none."""
        for check in self.checks:
            if check.name == name:
                return check
        raise LabError(f"lab {self.name} has no check {name}", f"its checks: {', '.join(c.name for c in self.checks)}")

    def read(self, path: str) -> str:
        """The text of a file of its folder."""
        return (self.folder / path).read_text()


def names(root: Path = LABS) -> list[str]:
    """The labs there are, by number."""
    found = [path.parent.name for path in root.glob("*/lab.yml")]
    return sorted(found, key=lambda name: (_number(root / name / "lab.yml"), name))


def _number(path: Path) -> int:
    try:
        return int(yaml.safe_load(path.read_text())["number"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return 1 << 30


def load(name: str, root: Path = LABS) -> Lab:
    """The lab of that name.

    Raises:
        LabError: there is no such lab.
        SpecError: its lab.yml is not as it should be, a line for each problem.
    """
    folder = root / name
    if "/" in name or not (folder / "lab.yml").is_file():
        raise LabError(f"there is no lab {name}", f"there are: {', '.join(names(root)) or 'none'}")
    document = read_yaml(folder / "lab.yml")
    if problems := schema_problems(document, "lab"):
        raise SpecError("\n".join(f"{name}/lab.yml: {line}" for line in problems))
    lab = _lab(folder, document)
    if problems := list(_problems(lab)):
        raise SpecError("\n".join(f"{name}/lab.yml: {line}" for line in problems))
    return lab


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. SpecError with the line if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise SpecError(f"{path.parent.name}/{path.name}: {where}{getattr(error, 'problem', error)}") from None


@cache
def schema(name: str) -> dict[str, Any]:
    """One of the schemas: lab, course, results."""
    found: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    return found


def schema_problems(document: Any, name: str) -> list[str]:
    """What a document has that its schema does not allow, a line each."""
    import jsonschema  # a third of the command's start

    validator = jsonschema.Draft202012Validator(schema(name))
    errors = sorted(validator.iter_errors(document), key=lambda e: [str(part) for part in e.absolute_path])
    return [f"{_where(error.absolute_path)}{error.message}" for error in errors]


def _where(path: Iterable[Any]) -> str:
    text = ".".join(str(part) for part in path)
    return f"{text}: " if text else ""


def _lab(folder: Path, document: Mapping[str, Any]) -> Lab:
    """The document, with the schema's defaults where it says nothing."""
    spec = schema("lab")
    inner = spec["$defs"]
    top = _with_defaults(document, spec)
    values = tuple(
        ValueSpec(
            name=name,
            type=value["type"],
            options={k: v for k, v in value.items() if k not in ("type", "hidden", "about")},
            hidden=bool(value.get("hidden", False)),
            about=str(value.get("about", "")),
        )
        for name, value in top["values"].items()
    )
    exports = tuple(
        Export(
            name=e["name"],
            path=e.get("path", e["name"]),
            tag=str(e.get("tag", e["name"])),
            access=e["access"],
            attach=e["attach"],
            guests=tuple(e["guests"]),
            terms=e["terms"],
        )
        for e in (_with_defaults(e, inner["export"]) for e in top["exports"])
    )
    files = tuple(
        StartFile(f["path"], f.get("text"), str(f.get("size", "")), f["fill"], f["mode"], f["owner"])
        for f in (_with_defaults(f, inner["file"]) for f in top["files"])
    )
    checks = tuple(
        CheckSpec(
            name=c["name"],
            title=c["title"],
            points=c["points"],
            read=c["read"],
            needs=tuple(c["needs"]),
            seconds=float(c["seconds"]),
            counts=c["counts"],
            answers=tuple(c["answers"]),
            hints=tuple(Hint(h["text"], int(h.get("cost", 0))) for h in c["hints"]),
        )
        for c in (_with_defaults(c, inner["check"]) for c in top["checks"])
    )
    wrong = tuple(
        Wrong(w["name"], w["about"], float(w["score"]), w["after"])
        for w in (_with_defaults(w, inner["wrong"]) for w in top["wrong"])
    )
    return Lab(
        name=folder.name,
        folder=folder,
        title=top["title"],
        number=top["number"],
        minutes=top["minutes"],
        summary=top["summary"],
        objectives=tuple(top["objectives"]),
        guests=top["guests"],
        store_size=top["store_size"],
        values=values,
        exports=exports,
        files=files,
        mounts=tuple(top["mounts"]),
        restart_guests=top["restart_guests"],
        reset=top["reset"],
        left=top["left"],
        checks=checks,
        wrong=wrong,
    )


def _with_defaults(given: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {name: option["default"] for name, option in spec["properties"].items() if "default" in option}
    return {**defaults, **given}


def _problems(lab: Lab) -> Iterable[str]:
    """What no schema can say."""
    names = [check.name for check in lab.checks]
    if lab.points != 100:
        yield f"checks: their points add up to {lab.points}; they have to add up to 100"
    yield from (f"checks: {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1}))
    hidden = {value.name for value in lab.values if value.hidden}
    for index, check in enumerate(lab.checks):
        yield from _check_problems(check, names[:index], hidden)
    for value in lab.values:
        yield from _value_problems(value)
    for export in lab.exports:
        for guest in export.guests:
            if guest > lab.guests:
                yield f"exports.{export.name}: guest {guest} of {lab.guests}: raise guests"
    for file in lab.files:
        if (file.text is None) == (not file.size):
            yield f"files: {file.path} needs one of text and size"
        if file.path.startswith("/") or ".." in file.path.split("/"):
            yield f"files: {file.path} leads out of the student's part of the store"


def _check_problems(check: CheckSpec, above: Sequence[str], hidden: set[str]) -> Iterable[str]:
    for parent in check.needs:
        if parent not in above:
            yield f"checks.{check.name}: needs {parent}, which is no check above it"
    if sum(hint.cost for hint in check.hints) >= check.points:
        yield f"checks.{check.name}: its hints cost all of its points; the last ones would be for nothing"
    for answer in check.answers:
        if answer not in hidden:
            yield f"checks.{check.name}: answers names {answer}, which is no hidden value"


def _value_problems(value: ValueSpec) -> Iterable[str]:
    needed: dict[str, Sequence[str]] = {
        "int": ("min", "max"),
        "size": ("min", "max"),
        "choice": ("of",),
        "offset": ("max",),
    }
    for option in needed.get(value.type, ()):
        if option not in value.options:
            yield f"values.{value.name}: a value of type {value.type} needs {option}"
            return
    low, high = value.options.get("min"), value.options.get("max")
    if low is not None and high is not None and low > high:
        yield f"values.{value.name}: min {low} is more than max {high}"
