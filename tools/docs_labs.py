"""The pages of the labs that are made from their folders and schemas: guides, format, tables. Root in, Markdown out."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_ROOT: Final = Path(__file__).resolve().parents[1]
for _source in ("labs/engine", "xen9p-src/src"):
    sys.path.append(str(_ROOT / _source))

from labkit import guide, spec, values  # noqa: E402

_MARK: Final = re.compile(r"<!-- (labs|schedule|generators|keys: ([a-z ]+)) -->")
_WEEK: Final = 180
"""Minutes of labs in a week of the schedule."""


def guides(root: Path) -> dict[str, Callable[[Path], str]]:
    """Page -> what makes it, for each lab in the order of their numbers."""
    return {f"labs/{name}.md": _guide(name) for name in spec.names(root / "labs")}


def _guide(name: str) -> Callable[[Path], str]:
    return lambda root: guide.page(spec.load(name, root / "labs"))


def marked(markdown: str, root: Path) -> str:
    """A page with the tables put in that it asks for by marks: labs, schedule, generators, keys: SCHEMA PART."""

    def made(match: re.Match[str]) -> str:
        if match[2]:
            return keys(match[2])
        if match[1] == "generators":
            return generators()
        labs = [spec.load(name, root / "labs") for name in spec.names(root / "labs")]
        return table(labs) if match[1] == "labs" else schedule(labs)

    return _MARK.sub(made, markdown)


def table(labs: list[spec.Lab]) -> str:
    """A line for each lab."""
    rows = [f"| {x.number} | [{x.title}]({x.name}.md) | {x.minutes} min | {x.guests} | {x.summary} |" for x in labs]
    return "\n".join(["| | lab | time | guests | what it is about |", "| --- | --- | --- | --- | --- |", *rows])


def schedule(labs: list[spec.Lab]) -> str:
    """The labs in weeks, none with more than three hours of them."""
    weeks: list[list[spec.Lab]] = []
    for lab in labs:
        if weeks and sum(x.minutes for x in weeks[-1]) + lab.minutes <= _WEEK:
            weeks[-1].append(lab)
        else:
            weeks.append([lab])
    rows = [
        f"| {number} | {', '.join(f'[{x.title}]({x.name}.md)' for x in week)} | {sum(x.minutes for x in week)} min |"
        for number, week in enumerate(weeks, 1)
    ]
    return "\n".join(["| week | labs | time |", "| --- | --- | --- |", *rows])


def keys(what: str) -> str:
    """The table of a schema's keys: `lab`, or one of its parts, as `lab check`."""
    name, _, part = what.partition(" ")
    schema = spec.schema(name)
    inner = {
        "lab hint": lambda: schema["$defs"]["check"]["properties"]["hints"]["items"],
        "course host": lambda: schema["properties"]["hosts"]["additionalProperties"],
        "course student": lambda: schema["properties"]["students"]["items"],
        "results check": lambda: schema["properties"]["checks"]["items"],
    }
    found = inner[what]() if what in inner else schema["$defs"][part] if part else schema
    return "\n".join(_keys(found))


def generators() -> str:
    """The types of values."""
    rows = [f"| `{kind}` | {about} |" for kind, (_, about) in values.GENERATORS.items()]
    return "\n".join(["| type | what it makes |", "| --- | --- |", *rows])


def _keys(schema: Mapping[str, Any]) -> Iterator[str]:
    """A table of an object's keys."""
    yield "| key | type | meaning |"
    yield "| --- | --- | --- |"
    required = schema.get("required", [])
    for name, about in schema["properties"].items():
        yield f"| `{name}` | {_type(about)} | {_meaning(about, name in required)} |"


def _type(about: Mapping[str, Any]) -> str:
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if "const" in about:
        return f"`{about['const']}`"
    if "$ref" in about:
        return "table"
    kind = about.get("type", "")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {_plural(about.get('items', {}))}"
    return "table" if kind == "object" else str(kind)


def _plural(items: Mapping[str, Any]) -> str:
    kind = items.get("type")
    return "tables" if "$ref" in items or kind == "object" else f"{kind}s" if isinstance(kind, str) else "values"


def _meaning(about: Mapping[str, Any], required: bool) -> str:
    text = str(about.get("description", ""))
    if required:
        text += " Required."
    default = about.get("default")
    if default not in (None, "", [], {}):
        shown = str(default).lower() if isinstance(default, bool) else default
        text += f" Default `{shown}`."
    return text.strip().replace("|", "\\|")
