"""What is wrong with a lab's folder, as far as that can be seen without a host."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from labkit import guide, spec
from labkit.course import REPOSITORY, Host, Student
from labkit.errors import LabError
from labkit.look import load_checks
from labkit.setup import policy_block, tree_script, values_of
from labkit.spec import FOLDERS, LABS, Lab
from labkit.values import spread, student_key
from xen9p import policy
from xen9p.errors import PolicyError

CLASS: Final = 30
"""Students of a class in which a hidden value shall not be somebody else's by chance."""
_SEED: Final = bytes(32)


def problems(name: str, root: Path = LABS, docs: Path = REPOSITORY / "docs") -> list[str]:
    """A line for each problem; none is how it should be."""
    try:
        lab = spec.load(name, root)
    except LabError as error:
        return error.message.splitlines()
    return [f"{name}: {line}" for line in _problems(lab, docs)]


def _problems(lab: Lab, docs: Path) -> Iterator[str]:
    for path in FOLDERS:
        if not (lab.folder / path).is_file():
            yield f"{path} is missing"
            return
    try:
        load_checks(lab)
    except LabError as error:
        yield str(error)
    yield from _texts(lab)
    yield from _wrong_turns(lab)
    yield from _links(lab, docs)
    yield from _made(lab)
    for value in lab.values:
        if value.hidden and spread(value) < CLASS * 10:
            yield f"values.{value.name}: {spread(value)} different values are few: answers of others are not told apart"
        if not value.hidden and not value.about:
            yield f"values.{value.name}: about is missing; the guide's table has it"
    try:
        for other in spec.names(lab.folder.parent):
            if other != lab.name and spec.load(other, lab.folder.parent).number == lab.number:
                yield f"number {lab.number} is {other}'s, too"
    except LabError:
        pass  # that one says so itself


def _texts(lab: Lab) -> Iterator[str]:
    for path in ["guide.md", "solution/steps.md", *(f"wrong/{w.name}.md" for w in lab.wrong)]:
        if not (lab.folder / path).is_file():
            continue
        text = lab.read(path)
        try:
            found = guide.blocks(text, path)
        except LabError as error:
            yield error.message
            continue
        if not found:
            yield f"{path} has no commands: ```console host begins some"
        for block in found:
            for number in [int(block.place[5:] or 1)] if block.place.startswith("guest") else []:
                if number > lab.guests:
                    yield f"{path}:{block.line}: {block.place}, and the lab has {lab.guests} guests"
    if (lab.folder / "guide.md").is_file() and re.search(r"(?m)^# ", lab.read("guide.md")):
        # A comment in a block of commands looks the same.
        outside = re.sub(r"(?ms)^```.*?^```", "", lab.read("guide.md"))
        if re.search(r"(?m)^# ", outside):
            yield "guide.md has a title of its own: the page gets it from lab.yml"


def _wrong_turns(lab: Lab) -> Iterator[str]:
    there = {path.stem for path in (lab.folder / "wrong").glob("*.md")}
    named = {wrong.name for wrong in lab.wrong}
    yield from (f"wrong/{name}.md is missing" for name in sorted(named - there))
    yield from (f"wrong/{name}.md is not in lab.yml" for name in sorted(there - named))


def _links(lab: Lab, docs: Path) -> Iterator[str]:
    for check in lab.checks:
        page, _, anchor = check.read.partition("#")
        path = docs / page
        if page.startswith("labs/") and page.removeprefix("labs/").removesuffix(".md") in spec.names(lab.folder.parent):
            path = lab.folder.parent / page.removeprefix("labs/").removesuffix(".md") / "guide.md"
        if not path.is_file():
            yield f"checks.{check.name}: read names {page}, which is no page of the site"
        elif anchor and anchor not in _anchors(path.read_text()):
            yield f"checks.{check.name}: {page} has no heading #{anchor}"


def _anchors(text: str) -> set[str]:
    """Anchors of the headings, as the site makes them: lower case, words joined by dashes."""
    found = set()
    for title in re.findall(r"(?m)^#{1,6} (.+)$", text):
        plain = re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()
        found.add(re.sub(r"[\s-]+", "-", plain))
    return found


def _made(lab: Lab) -> Iterator[str]:
    """What is made from it for a student: files and policy."""
    host = Host("host", ssh_config="none")
    guests = tuple(f"g{number + 1}" for number in range(lab.guests))
    student = Student("somebody", host, guests, student_key(_SEED, "somebody"), alone=True)
    try:
        tree_script(lab, student)
        block = policy_block(lab, student)
        if block:
            policy.parse(f"version = 1\n{block}", "its rules")
        values: Mapping[str, object] = values_of(lab, student)
    except (LabError, PolicyError) as error:
        yield from error.message.splitlines()
        return
    except ValueError as error:
        yield f"files: {error}"
        return
    for reserved in ("part", "PATH", "HOME", "ROOT"):
        if reserved in values:
            yield f"values.{reserved}: the name is taken"
