"""Profiles: which files, and which stretches of them, a guest of an image reads while it boots, in order of first use.

A profile is learned from what a guest does, and read by another guest's worker: so it is bounded when it is made, and
checked when it is read, whoever has written the file. Paths are of the export, and are only ever resolved beneath it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from xen9p.errors import Xen9pError

FORMAT: Final = 1
MOST_FILES: Final = 4096
MOST_RANGES: Final = 64
"""Of one file; after that, what lies between two of them is taken with them."""
MOST_BYTES: Final = 512 << 20
"""Of all stretches together: what a guest can have another guest's worker read."""
MOST_PATH: Final = 1024
MOST_TEXT: Final = 192 << 10
"""Bytes of a profile as JSON: it goes over a worker's socket in one line (jsonlines.MAX_LINE)."""
BLOCK: Final = 64 << 10
"""Stretches begin and end at multiples of this."""
_LIMIT: Final = 1 << 62
_NAME: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Range = tuple[int, int]
"""Where a stretch begins and ends, in bytes."""


@dataclass(slots=True)
class Profile:
    """What is known of an image's boot.

    Attributes:
        files: by path beneath the export, without a slash at its begin, in order of first use; a file's stretches are
            in order and do not touch. A file without was only looked at, or is a directory that was read.
        guest: whose boot it was.
        made: when, in seconds since 1970.
        seconds: how long it took from the attach to the last new file.
    """

    files: dict[bytes, list[Range]] = field(default_factory=dict)
    guest: str = ""
    made: int = 0
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        """Of all stretches together."""
        return sum(end - start for ranges in self.files.values() for start, end in ranges)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        rows: list[Any] = [
            [_text(path), *(number for one in ranges for number in one)] for path, ranges in self.files.items()
        ]
        return {
            "format": FORMAT,
            "guest": self.guest,
            "made": self.made,
            "seconds": round(self.seconds, 2),
            "files": rows,
        }


def _text(path: bytes) -> str:
    """A path for JSON: as it is, or, if it is not UTF-8, a mark and base64."""
    with contextlib.suppress(UnicodeDecodeError):
        text = path.decode()
        if not text.startswith("\0"):
            return text
    return "\0" + base64.b64encode(path).decode()


def _path(text: object) -> bytes:
    if not isinstance(text, str):
        raise ValueError("a path is no string")
    if text.startswith("\0"):
        try:
            path = base64.b64decode(text[1:], validate=True)
        except binascii.Error:
            raise ValueError("a path is no base64") from None
    else:
        path = text.encode()  # UnicodeEncodeError is a ValueError
    if not is_plain(path):
        raise ValueError("a path leads elsewhere")
    return path


def is_plain(path: bytes) -> bool:
    """Whether a path may stand in a profile: beneath the export, without detours, and not too long."""
    return len(path) <= MOST_PATH and b"\0" not in path and not any(p in (b"", b".", b"..") for p in path.split(b"/"))


def parse(value: object) -> Profile:
    """A profile from JSON, checked as what a stranger sent.

    Raises:
        ValueError: says what is wrong.
    """
    if not isinstance(value, Mapping) or value.get("format") != FORMAT:
        raise ValueError(f"it is no profile of format {FORMAT}")
    guest, made, seconds, rows = (value.get(key) for key in ("guest", "made", "seconds", "files"))
    if not isinstance(guest, str) or len(guest) > 255 or not guest.isprintable():
        raise ValueError("guest is no name")
    if type(made) is not int or not 0 <= made < _LIMIT:
        raise ValueError("made is no time")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= 86400:
        raise ValueError("seconds is no duration")
    if not isinstance(rows, list) or len(rows) > MOST_FILES:
        raise ValueError(f"files is no list of at most {MOST_FILES}")
    files: dict[bytes, list[Range]] = {}
    for row in rows:
        if not isinstance(row, list) or len(row) % 2 != 1 or len(row) > 1 + 2 * MOST_RANGES:
            raise ValueError("a file is no path with pairs of numbers")
        path, numbers = _path(row[0]), row[1:]
        if path in files:
            raise ValueError("a path is there twice")
        if not all(type(number) is int and 0 <= number < _LIMIT for number in numbers):
            raise ValueError("a stretch has no numbers")
        if any(second <= first for first, second in itertools.pairwise(numbers)):
            raise ValueError("stretches are not in order")
        files[path] = list(zip(numbers[::2], numbers[1::2], strict=True))
    found = Profile(files, guest, made, float(seconds))
    if found.bytes > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES} bytes to read")
    return found


class Recorder:
    """Makes a profile of what is read, within its bounds whatever that is."""

    def __init__(self) -> None:
        self.profile = Profile()
        self.full = False
        self._bytes = 0
        self._text = 200

    def look(self, path: bytes) -> bool:
        """A file was found or opened; whether it is new."""
        path = path.lstrip(b"/")
        if path in self.profile.files or not path:
            return False
        cost = len(path) * 4 // 3 + 40
        if not is_plain(path) or len(self.profile.files) >= MOST_FILES or self._text + cost > MOST_TEXT:
            self.full = self.full or is_plain(path)
            return False
        self._text += cost
        self.profile.files[path] = []
        return True

    def read(self, path: bytes, offset: int, length: int) -> bool:
        """A stretch was read; whether any of it is new."""
        if length <= 0 or offset + length >= _LIMIT:
            return False
        self.look(path)
        ranges = self.profile.files.get(path.lstrip(b"/"))
        if ranges is None:
            return False
        start, end = offset // BLOCK * BLOCK, -(-(offset + length) // BLOCK) * BLOCK
        merged = _merge(ranges, start, end)
        grown = sum(e - s for s, e in merged) - sum(e - s for s, e in ranges)
        cost = 40 * (len(merged) - len(ranges))
        if not grown:
            return False
        if self._bytes + grown > MOST_BYTES or self._text + cost > MOST_TEXT:
            self.full = True
            return False
        self._bytes += grown
        self._text += cost
        ranges[:] = merged
        return True


def _merge(ranges: list[Range], start: int, end: int) -> list[Range]:
    """Stretches with one more, in order, joined where they touch, and at most MOST_RANGES of them."""
    kept: list[Range] = []
    for one in sorted([*ranges, (start, end)]):
        if kept and one[0] <= kept[-1][1]:
            kept[-1] = kept[-1][0], max(kept[-1][1], one[1])
        else:
            kept.append(one)
    while len(kept) > MOST_RANGES:
        i = min(range(len(kept) - 1), key=lambda i: kept[i + 1][0] - kept[i][1])
        kept[i : i + 2] = [(kept[i][0], kept[i + 1][1])]
    return kept


# The profiles of a host.


def place(folder: Path, image: str) -> Path:
    """The file of an image's profile."""
    return folder / f"{image}.json"


def load(folder: Path, image: str) -> Profile | None:
    """An image's profile; None if there is none.

    Raises:
        Xen9pError: the file is none that we have written. It is left as it is.
    """
    path = place(folder, image)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Xen9pError(f"{path}: {error.strerror}", "run it as root, or: xen9p cache forget") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Xen9pError(f"{path} is no file", "remove it")
        data = os.pread(fd, MOST_TEXT + 1, 0)
    finally:
        os.close(fd)
    try:
        if len(data) > MOST_TEXT:
            raise ValueError(f"it is longer than {MOST_TEXT} bytes")
        return parse(json.loads(data))
    except (ValueError, RecursionError) as error:
        why = "no JSON" if isinstance(error, json.JSONDecodeError | RecursionError | UnicodeDecodeError) else error
        raise Xen9pError(f"{path} is no profile: {why}", f"xen9p cache forget {image}") from None


def save(folder: Path, image: str, profile: Profile) -> None:
    """Replaces an image's profile, at once or not at all, however this ends.

    Raises:
        OSError: ENOSPC, EROFS, ...
    """
    if not _NAME.fullmatch(image):
        raise ValueError(f"{image!r} is no uuid")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = folder / f".{image}.{secrets.token_hex(4)}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w") as file:
            json.dump(profile.plain(), file, separators=(",", ":"))
            file.flush()
            os.fsync(fd)
        fresh.replace(place(folder, image))
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Removes what a save() that was killed has left."""
    for left in folder.glob(".*-*.????????"):
        with contextlib.suppress(OSError):
            left.unlink()


def images(folder: Path) -> Iterator[str]:
    """The images that have a profile, or a file in its place."""
    for path in sorted(folder.glob("*.json")):
        if _NAME.fullmatch(path.stem):
            yield path.stem


def forget(folder: Path, image: str) -> bool:
    """Removes a profile; False if there was none. Raises OSError."""
    try:
        place(folder, str(UUID(image))).unlink()
    except FileNotFoundError:
        return False
    return True
