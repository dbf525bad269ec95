"""Who takes the course, on which host, with which guests; and the keys that values and signatures come from."""

from __future__ import annotations

import getpass
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from labkit.errors import LabError
from labkit.spec import read_yaml, schema_problems
from labkit.values import student_key

REPOSITORY: Final = Path(__file__).resolve().parents[3]
STATE: Final = REPOSITORY / ".lab" / "labs"
"""What the labs keep on the controller: the course file of one who learns alone, connections, results."""
ALONE: Final = "self-study"


@dataclass(frozen=True, slots=True)
class Host:
    """A Xen host and the way to it; see course.schema.json."""

    name: str
    ssh_config: str = ""
    alias: str = "host"
    address: str = ""
    user: str = "root"
    port: int = 22
    guests: tuple[tuple[str, str], ...] = ()
    local: str = ""
    store: str = "/srv/xen9p"


@dataclass(frozen=True, slots=True)
class Student:
    """One who takes the course. *key* is theirs; *alone*: nobody else has labs on that host."""

    name: str
    host: Host
    guests: tuple[str, ...]
    key: bytes
    alone: bool
    full_name: str = ""
    id: str = ""
    email: str = ""


@dataclass(frozen=True, slots=True)
class Course:
    """A course. *seed* is None in a student's own file."""

    name: str
    seed: bytes | None
    students: tuple[Student, ...]
    site: str = ""

    def student(self, name: str | None) -> Student:
        """The student of that name; without a name the only one there is."""
        if name is None:
            if len(self.students) == 1:
                return self.students[0]
            raise LabError("which student?", f"--student NAME; there are: {self._names()}")
        for student in self.students:
            if student.name == name:
                return student
        raise LabError(f"the course {self.name} has no student {name}", f"there are: {self._names()}")

    def keys(self) -> dict[str, bytes]:
        """The keys of all students."""
        return {student.name: student.key for student in self.students}

    def _names(self) -> str:
        return ", ".join(s.name for s in self.students)


def load(path: Path) -> Course:
    """The course in a file. LabError, a line for each problem."""
    return parse(read_yaml(path), path.name)


def parse(document: Any, source: str) -> Course:
    """The course that a document says. LabError, a line for each problem."""
    problems = schema_problems(document, "course") or list(_problems(document))
    if problems:
        raise LabError("\n".join(f"{source}: {line}" for line in problems))
    return from_document(document)


def from_document(document: Mapping[str, Any]) -> Course:
    """The course that a document of the schema says."""
    seed = bytes.fromhex(document["seed"]) if "seed" in document else None
    hosts = {name: _host(name, about or {}) for name, about in document["hosts"].items()}
    crowd = [s["host"] for s in document["students"]]
    students = tuple(
        Student(
            name=s["name"],
            host=hosts[s["host"]],
            guests=tuple(s["guests"]),
            key=student_key(seed, s["name"]) if seed is not None else bytes.fromhex(s["key"]),
            alone=crowd.count(s["host"]) == 1,
            full_name=s.get("full_name", ""),
            id=str(s.get("id", "")),
            email=s.get("email", ""),
        )
        for s in document["students"]
    )
    return Course(document["course"], seed, students, document.get("site", ""))


def _host(name: str, about: Mapping[str, Any]) -> Host:
    return Host(
        name=name,
        ssh_config=about.get("ssh_config", ""),
        alias=about.get("alias", "host"),
        address=about.get("address", ""),
        user=about.get("user", "root"),
        port=int(about.get("port", 22)),
        guests=tuple(about.get("guests", {}).items()),
        local=about.get("local", ""),
        store=about.get("store", "/srv/xen9p"),
    )


def _problems(document: Mapping[str, Any]) -> list[str]:
    found = []
    names = [s["name"] for s in document["students"]]
    found += [f"student {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    owner: dict[tuple[str, str], str] = {}
    for student in document["students"]:
        name, host = student["name"], student["host"]
        if host not in document["hosts"]:
            found.append(f"student {name}: there is no host {host} (hosts: {', '.join(document['hosts'])})")
        if "seed" not in document and "key" not in student:
            found.append(f"student {name} has no key, and the course no seed: ask the instructor for your file")
        for guest in student["guests"]:
            other = owner.setdefault((host, guest), name)
            if other != name:
                found.append(f"guest {guest} of host {host} is {other}'s and {name}'s: every student needs their own")
    for name, about in document["hosts"].items():
        ways = [key for key in ("ssh_config", "address", "local") if (about or {}).get(key)]
        if len(ways) != 1:
            found.append(f"host {name} needs one of ssh_config, address and local; it has {', '.join(ways) or 'none'}")
    return found


def default() -> Course:
    """The course of one who learns alone on the testbed ($XEN9P_LAB, or lab); its file is made at the first call.

    Raises:
        LabError: no testbed stands.
    """
    testbed = REPOSITORY / ".lab" / os.environ.get("XEN9P_LAB", "lab")
    config, path = testbed / "ssh_config", testbed / "course.yml"
    if not config.exists():
        raise LabError("no Xen host stands here", "make lab; or name your course's file: --course FILE")
    if path.exists():
        return load(path)
    names = re.findall(r"^Host (\S+)$", config.read_text(), re.M)
    name = re.sub(r"[^a-z0-9]", "", getpass.getuser().lower())[:12]
    document = {
        "course": ALONE,
        "seed": secrets.token_hex(32),
        "hosts": {"host": {"ssh_config": str(config)}},
        "students": [
            {
                "name": name if re.match("[a-z]", name) else "student",
                "host": "host",
                "guests": [n for n in names if n != "host"],
            }
        ],
    }
    write(path, document)
    return from_document(document)


def seed(path: Path) -> str:
    """The course's key in a file, which is made if it is not there. LabError if it holds something else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    found = path.read_text().strip()
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise LabError(f"{path.name} holds no key", "64 hexadecimal digits: openssl rand -hex 32")
    return found


def handout(course: Course, name: str, *, seat: bool = False) -> dict[str, Any]:
    """The document of the file that a student gets: their own key, and nobody else's.

    Args:
        seat: for their guests on their host of the course, and not for a testbed on a laptop.

    Raises:
        LabError: there is no such student, or their host cannot be reached from elsewhere.
    """
    student = course.student(name)
    host, guests = student.host, ["g1", "g2"]
    about: dict[str, Any] = {"name": student.name, "host": "host", "guests": guests, "key": student.key.hex()}
    hosts: dict[str, Any] = {"host": {"ssh_config": ".lab/lab/ssh_config"}}
    if seat:
        if not host.address:
            raise LabError(f"host {host.name} has no address", "a seat is on a host that others reach by ssh")
        mine = {guest: address for guest, address in host.guests if guest in student.guests}
        kept = {key: getattr(host, key) for key in ("alias", "address", "user", "port", "store")}
        hosts = {host.name: {**kept, "guests": mine}}
        about |= {"host": host.name, "guests": list(student.guests)}
    about |= {k: v for k, v in (("full_name", student.full_name), ("id", student.id), ("email", student.email)) if v}
    site = {"site": course.site} if course.site else {}
    return {"course": course.name, **site, "hosts": hosts, "students": [about]}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes a course file: it has keys in it, so for its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        yaml.safe_dump(dict(document), file, sort_keys=False)
