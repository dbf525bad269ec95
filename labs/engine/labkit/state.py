"""What is remembered of a student's lab on the host: what was once achieved, hints taken, how the start looked.

It is a signed file, /var/lib/xen9p/labs/STUDENT/LAB.json. Beside it lies the lock: one run at a time works on a
student's lab, from whatever controller. The lock names its holder and ends by itself, so that a run that was killed
keeps nobody out for long.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from labkit import signing
from labkit.course import Student
from labkit.errors import BusyError, LabError, TamperedError
from labkit.transport import HOST, System

_BUSY: Final = 9


@dataclass
class Kept:
    """What is in the file. *achieved*: check -> the most points that it ever had, and when (seconds since 1970)."""

    started: float = 0.0
    manifest: list[str] | None = None
    achieved: dict[str, dict[str, float]] = field(default_factory=dict)
    hints: dict[str, int] = field(default_factory=dict)
    """Check -> how many of its hints were taken."""
    attempts: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    """The results of the last time."""


def folder(student: Student) -> str:
    """Where it is on the host, as a word of the shell without quotes."""
    return f"${{ROOT:-}}/var/lib/xen9p/labs/{student.name}"


def load(system: System, student: Student, lab: str) -> Kept:
    """What is remembered; a new one if there is nothing.

    Raises:
        TamperedError: somebody changed the file.
    """
    path = f"{folder(student)}/{lab}.json"
    done = system.run(HOST, f'[ ! -e "{path}" ] || cat "{path}"')
    if done.code != 0:
        raise LabError(f"{system.name(HOST)}: {done.said}", "is the store or the root filesystem broken?")
    if not done.out.strip():
        return Kept()
    try:
        document = json.loads(done.out)
        signing.verify(document, student.key, f"{lab}.json on {system.name(HOST)}")
        body = document["kept"]
        if (document["student"], document["lab"]) != (student.name, lab):
            raise TamperedError(f"{lab}.json on {system.name(HOST)} is of {document['student']} and {document['lab']}")
        return Kept(**body)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TamperedError(
            f"{lab}.json on {system.name(HOST)} cannot be read", "somebody changed it; start anew: lab start --forget"
        ) from None


def save(system: System, student: Student, lab: str, kept: Kept) -> None:
    """Writes it, whole or not at all."""
    document = signing.sign({"student": student.name, "lab": lab, "kept": vars(kept)}, student.key)
    text = base64.b64encode(json.dumps(document).encode()).decode()
    path = f"{folder(student)}/{lab}.json"
    done = system.run(
        HOST,
        f'set -e; install -d -m 0700 "{folder(student)}"\n'
        f'base64 -d >"{path}.new" <<\'END\'\n{text}\nEND\nsync "{path}.new"; mv "{path}.new" "{path}"',
    )
    if done.code != 0:
        raise LabError(f"results cannot be kept on {system.name(HOST)}: {done.said}", "make room there, and try again")


def forget(system: System, student: Student, lab: str) -> None:
    """Puts the file aside, for one that was changed by hand."""
    path = f"{folder(student)}/{lab}.json"
    system.run(HOST, f'[ ! -e "{path}" ] || mv "{path}" "{path}.$(date +%s)"')


@contextmanager
def held(system: System, student: Student, lab: str, seconds: float) -> Iterator[None]:
    """Keeps everybody else off a student's lab, *seconds* at the most.

    Raises:
        BusyError: somebody else has it.
    """
    token = secrets.token_hex(8)
    who = re.sub(r"[^\w .-]", "", f"{socket.gethostname()} process {os.getpid()}")
    lock = f"{folder(student)}/{lab}.lock"
    take = f"""
install -d -m 0700 "{folder(student)}"
exec 9>"{lock}.guard"; flock 9
now=$(date +%s)
if [ -e "{lock}" ]; then
  read -r until token who <"{lock}"
  if [ "${{until:-0}}" -gt "$now" ]; then echo "$who"; echo $((until - now)); exit {_BUSY}; fi
fi
echo "$((now + {int(seconds)})) {token} {who}" >"{lock}" || exit 1
"""
    done = system.run(HOST, take)
    if done.code == _BUSY:
        other, left = (done.out.splitlines() + ["somebody", "0"])[:2]
        raise BusyError(
            f"{student.name}'s lab {lab} is being worked on by {other}",
            f"wait until that has ended; if it was killed, for {left} s",
        )
    if done.code != 0:
        raise LabError(f"{system.name(HOST)}: {done.said}", "is its root filesystem full or read-only?")
    try:
        yield
    finally:
        # Whoever took it after our time was over keeps it.
        with suppress(LabError):
            system.run(
                HOST,
                f'exec 9>"{lock}.guard"; flock 9; read -r _ t _ <"{lock}"; [ "$t" != {token} ] || rm -f "{lock}"',
            )
