"""The way of one read or write from a guest's path to a byte of a device: its steps, counted, as text and as JSON.

Nothing here looks anything up: file_path.py and disk_path.py do, and put steps together. A step goes from a point of
one space of names or numbers to a point of another; where both are in one space, nothing has been translated.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from xen9p.cli import table
from xen9p.errors import Xen9pError

PATH: Final = "path"
FID: Final = "fid"
REQUEST: Final = "9P request"
RING: Final = "ring"
INODE: Final = "inode"
OFFSET: Final = "file offset"
ADDRESS: Final = "store address"
DEVICE: Final = "device byte"
GUEST_INODE: Final = "guest inode"
FILE_BLOCK: Final = "file block"
GUEST_BLOCK: Final = "guest filesystem block"
SECTOR: Final = "virtual disk sector"
LOOP: Final = "loop device byte"
IMAGE: Final = "image offset"


@dataclass(frozen=True, slots=True)
class Point:
    """A name or number, and which space it is of. text is for people, values for programs; both are escaped."""

    space: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One step: who takes it, from where to where, and a command by which a student sees the same."""

    by: str
    source: Point
    target: Point
    check: str = ""
    notes: tuple[str, ...] = ()

    @property
    def translates(self) -> bool:
        """Whether it leads into another space."""
        return self.source.space != self.target.space


@dataclass(slots=True)
class Way:
    """All steps of one access. end says why it ends before the device, "" if it does not."""

    kind: str
    """"9P" or "block"."""
    served: str
    """Who serves the guest in dom0."""
    guest: str
    name: str
    """The tag, or the disk."""
    path: str
    offset: int
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    end: str = ""

    def add(self, by: str, source: Point, target: Point, check: str = "", *notes: str) -> None:
        """One more step."""
        self.steps.append(Step(by, source, target, check, tuple(note for note in notes if note)))

    @property
    def translations(self) -> int:
        """How many steps lead into another space of names or numbers."""
        return sum(step.translates for step in self.steps)

    @property
    def device(self) -> Mapping[str, Any] | None:
        """Where the byte is: {"device", "byte", ...}; None if it has no place."""
        last = self.steps[-1].target if self.steps else None
        return last.values if last is not None and last.space == DEVICE else None


def shell_word(data: bytes) -> str:
    r"""A name that a guest chose as one word of a bash command: 'a b', or $'a\x1b' if not all of it can be printed."""
    text = data.decode(errors="surrogateescape")
    if text.isprintable():
        return shlex.quote(text)
    out = []
    for char in text:
        if char in "\\'":
            out.append("\\" + char)
        elif char.isprintable():
            out.append(char)
        else:
            out += [f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape")]
    # An escape ends at two digits, so whatever follows it is itself.
    return "$'" + "".join(out) + "'"


def look(device: str, byte: int) -> str:
    """The command that shows the bytes at a place, past every cache."""
    block, rest = divmod(byte, 4096)
    skip = f" | tail -c +{rest + 1}" if rest else ""
    word = shlex.quote(device)
    return f"dd if={word} bs=4096 skip={block} count=1 iflag=direct status=none{skip} | head -c 64 | od -A d -t x1z"


def to_json(way: Way) -> dict[str, Any]:
    """For programs. from_json() takes it back."""
    return {
        "kind": way.kind,
        "served": way.served,
        "guest": way.guest,
        "name": way.name,
        "path": way.path,
        "offset": way.offset,
        "steps": [
            {
                "step": number,
                "by": step.by,
                "from": _point(step.source),
                "to": _point(step.target),
                "translates": step.translates,
                "check": step.check,
                "notes": list(step.notes),
            }
            for number, step in enumerate(way.steps, 1)
        ],
        "translations": way.translations,
        "device": None if way.device is None else dict(way.device),
        "end": way.end,
        "notes": way.notes,
    }


def _point(point: Point) -> dict[str, Any]:
    return {"space": point.space, "text": point.text, **point.values}


def from_json(value: Any) -> Way:
    """What to_json() made; its count is not believed but made again.

    Raises:
        Xen9pError: it is something else.
    """
    try:
        kind, served, guest, name, where = (str(value[key]) for key in ("kind", "served", "guest", "name", "path"))
        way = Way(kind, served, guest, name, where, int(value["offset"]))
        for step in value["steps"]:
            points = [dict(step[key]) for key in ("from", "to")]
            source, target = (Point(str(p.pop("space")), str(p.pop("text")), p) for p in points)
            way.add(str(step["by"]), source, target, str(step["check"]), *map(str, step["notes"]))
        way.notes, way.end = [str(note) for note in value["notes"]], str(value["end"])
        if not (text(way) + kind + served).replace("\n", "").isprintable():
            raise ValueError("a file that somebody changed would print what it likes")
    except (KeyError, TypeError, ValueError):
        raise Xen9pError("that is no path", "make it with: xen9p path ... --json") from None
    return way


def load(file: Path) -> Way:
    """What `xen9p path --json` wrote into a file.

    Raises:
        Xen9pError: it cannot be read, or is something else.
    """
    try:
        return from_json(json.loads(file.read_bytes()))
    except OSError as error:
        raise Xen9pError(f"{file}: {error.strerror}", "make it with: xen9p path ... --json") from None
    except (ValueError, Xen9pError):
        raise Xen9pError(f"{file} holds no path", "make it with: xen9p path ... --json") from None


def text(way: Way) -> str:
    """For people: each step with its check, and how many of them translate."""
    lines = [f"{way.guest}, {_what(way)}: {way.path}, offset {way.offset}", ""]
    width = max((len(step.by) for step in way.steps), default=0)
    indent = " " * (6 + width)
    for number, step in enumerate(way.steps, 1):
        sign = "->" if step.translates else "=="
        lines.append(f"{number:>2}  {step.by:<{width}}  {_named(step.source)}")
        lines.append(f"{indent}{sign} {_named(step.target)}")
        lines += [f"{indent}   {note}" for note in step.notes]
        if step.check:
            lines.append(f"{indent}   check: {step.check}")
    lines.append("")
    if way.end:
        lines.append(f"It ends here: {way.end}.")
    lines += [f"Note: {note}." for note in way.notes]
    lines.append(_count(way))
    return "\n".join(lines)


def _what(way: Way) -> str:
    return f"tag {way.name} (9P, {way.served})" if way.kind == "9P" else f"disk {way.name} ({way.served})"


def _named(point: Point) -> str:
    return f"{point.space}: {point.text}"


def _count(way: Way) -> str:
    stays = len(way.steps) - way.translations
    return f"{way.translations} translations in {len(way.steps)} steps; {stays} leave what they get as it is."


def compare(one: Way, other: Way) -> str:
    """Two ways side by side: a line a translation, in the order of each, and the counts.

    Lines do not belong together across: the ways are of different lengths, and that is what there is to see.
    """
    columns = [_column(one), _column(other)]
    height = max(len(column) for column in columns)
    rows = [["", *(column[i] if i < len(column) else "" for column in columns)] for i in range(height)]
    for number, row in enumerate(rows[1:], 1):
        row[0] = str(number)
    rows.append(["=", *(f"{way.translations} translations" for way in (one, other))])
    return "\n".join(table(rows, right=len(rows[0])))


def _column(way: Way) -> list[str]:
    head = f"{way.guest} {_what(way)}"
    return [head, *(f"{step.source.space} -> {step.target.space}" for step in way.steps if step.translates)]
