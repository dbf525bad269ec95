"""What a lab's checks.py sees: the student's machines, values and answers, and the words for a verdict.

A check is a function of one argument that returns a verdict::

    def ring(look: Look) -> Verdict:
        device = look.device("guest", "home")
        if device is None:
            return failed("a device with the tag home", "none")
        return compare(look.answer("devid"), device["devid"], "the number of the device")

What cannot be looked at raises by itself (a machine that is off, a file of answers that cannot be read) and costs
nobody points. Whatever else a check raises counts as the check's own mistake: no points, and the instructor is told.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from labkit.course import Student
from labkit.errors import CouldNotLookError, LabError, TooSlowError
from labkit.setup import values_file
from labkit.spec import Lab
from labkit.transport import HOST, Done, System, quote
from labkit.values import Value, Values

ANSWERS: Final = "answers"
"""The student's answers, in the working folder on the host: lines of NAME=ANSWER, the last one of a name counts."""
_LINE: Final = re.compile(r"([a-z][a-z0-9_]*)\s*=(.*)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check has found: the part of its points, and for a student who has not all of them, why.

    Args:
        part: 0.0 to 1.0.
        expected: what was expected, in words that do not tell the answer.
        found: what was found.
    """

    part: float
    expected: str = ""
    found: str = ""


def passed() -> Verdict:
    """All of it."""
    return Verdict(1.0)


def failed(expected: str, found: object) -> Verdict:
    """Nothing of it."""
    return Verdict(0.0, expected, _short(found))


def partial(part: float, expected: str, found: object) -> Verdict:
    """A part of it, 0.0 to 1.0."""
    return Verdict(part, expected, _short(found))


def compare(answer: str | None, truth: Value, what: str) -> Verdict:
    """An answer against what is so. *what* says in words what was asked for."""
    if answer is None or answer == "":
        return failed(what, "no answer")
    return passed() if answer == str(truth) else failed(what, f"the answer {answer!r}")


def parts(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Several verdicts as one, each with the same weight; what is missing is named by the keys."""
    missing = {name: v for name, v in verdicts.items() if v.part < 1}
    return Verdict(
        sum(v.part for v in verdicts.values()) / len(verdicts),
        "; ".join(f"{name}: {v.expected}" for name, v in missing.items()),
        "; ".join(f"{name}: {v.found}" for name, v in missing.items()),
    )


def _short(value: object) -> str:
    """For one line: without control characters, 200 characters at the most."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= 200 else text[:197] + "..."


@dataclass
class Look:
    """A student's machines, as a check sees them. Every command ends with the check's time."""

    lab: Lab
    student: Student
    values: Values
    system: System
    ends: float
    """time.monotonic() at which the check's time is over."""
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, place: str, script: str) -> Done:
        """Runs a script with bash at a place: host, guest, guest2 and so on. The student's values are variables."""
        left = self.ends - time.monotonic()
        if left <= 0:
            raise TooSlowError("the check's time is over")
        # Not from the file in the student's folder, which may say something else by now, or be gone.
        return self.system.run(place, values_file(self.lab, self.student) + script, left)

    def out(self, place: str, script: str) -> str:
        """What a script prints, whether it fails or not."""
        return self.run(place, script).out

    def many(self, place: str, scripts: Mapping[str, str]) -> dict[str, Done]:
        """Several scripts in one go, each in a shell of its own."""
        names, mark = list(scripts), secrets.token_hex(8)
        lines = []
        for number, name in enumerate(names):
            lines += [f"bash -c {quote(scripts[name])} 2>&1 </dev/null; r=$?; echo; echo {mark}{number}:$r"]
        text = self.run(place, "\n".join(lines)).out
        found: dict[str, Done] = {}
        for number, name in enumerate(names):
            part, there, rest = text.partition(f"\n{mark}{number}:")
            if not there:
                raise CouldNotLookError(f"{self.system.name(place)} broke off in the middle")
            code, _, text = rest.partition("\n")
            found[name] = Done(int(code), part, "")
        return found

    def read(self, place: str, path: str, limit: int = 65536) -> bytes | None:
        """The first *limit* bytes of a file; None if there is none. *path* is a shell word: `$part/x` is fine."""
        done = self.run(place, f'[ -f "{path}" ] || exit 4; head -c {limit} -- "{path}" | base64 -w0')
        if done.code == 4:
            return None
        if done.code != 0:
            raise CouldNotLookError(f"{self.system.name(place)}: {path} cannot be read: {done.said}")
        return base64.b64decode(done.out)

    def answer(self, name: str) -> str | None:
        """What the student's answers file says; None if it says nothing about it."""
        return self.answers().get(name)

    def answers(self) -> dict[str, str]:
        """All of the student's answers.

        Raises:
            CouldNotLookError: the file is there and cannot be understood.
        """
        if ANSWERS not in self.facts:
            raw = self.read(HOST, f"$LAB_WORK/{ANSWERS}")
            self.facts[ANSWERS] = parse_answers(raw or b"")
        found: dict[str, str] = self.facts[ANSWERS]
        return found

    def status(self) -> dict[str, Any]:
        """`xen9p status --json`, looked up once a check."""
        if "status" not in self.facts:
            self.facts["status"] = self._json("xen9p status --json")
        found: dict[str, Any] = self.facts["status"]
        return found

    def device(self, place: str, tag: str) -> dict[str, Any] | None:
        """The device of a guest with that tag, as `xen9p status` has it."""
        name = self.system.name(place)
        found = [d for d in self.status()["devices"] if (d["guest"], d["tag"]) == (name, tag)]
        return found[0] if found else None

    def domid(self, place: str) -> int:
        """The domain id of a guest. CouldNotLookError if it does not run."""
        done = self.run(HOST, f"xl domid {quote(self.system.name(place))}")
        if done.code != 0 or not done.out.strip().isdigit():
            raise CouldNotLookError(
                f"{self.system.name(place)} does not run",
                f"on the host: xl create /etc/xen/{self.system.name(place)}.cfg",
            )
        return int(done.out)

    def nodes(self, paths: Sequence[str]) -> list[str | None]:
        """The values of nodes of XenStore, None for one that is not there. Paths are shell words."""
        mark = secrets.token_hex(8)  # a guest writes what it likes into its nodes
        script = "\n".join(f"xenstore-read {path} 2>/dev/null | head -n 1; echo {mark}" for path in paths)
        found = self.out(HOST, script).split(f"{mark}\n")
        return [text.rstrip("\n") or None for text in found[: len(paths)]]

    def path(self, arguments: str) -> dict[str, Any]:
        """`xen9p path --json`. *arguments* are shell text."""
        found: dict[str, Any] = self._json(f"xen9p path --json {arguments}")
        return found

    def counters(self, place: str, tag: str) -> dict[str, float]:
        """A device's counters: `requests`, `read_bytes`, `written_bytes`, and each message type's count by its name."""
        return parse_metrics(self.metrics(), self.system.name(place), tag)

    def all_counters(self, *places: str) -> dict[str, float]:
        """The same of all devices of some guests together that lead into the student's part, whatever their tags."""
        if "part" not in self.facts:
            self.facts["part"] = self.out(HOST, 'echo "$part"').strip()
        guests, text = {self.system.name(place) for place in places}, self.metrics()
        self.facts.pop("status", None)
        counted: Counter[str] = Counter()
        for d in self.status()["devices"]:
            if d["guest"] in guests and f"{d['path']}/".startswith(f"{self.facts['part']}/"):
                counted.update(parse_metrics(text, d["guest"], d["tag"]))
        return dict(counted)

    def metrics(self) -> str:
        """What `xen9p metrics` prints. CouldNotLookError if it fails."""
        done = self.run(HOST, "xen9p metrics")
        if done.code != 0:
            raise CouldNotLookError(f"xen9p metrics: {done.said}", "systemctl status xen9pd")
        return done.out

    def _json(self, command: str) -> Any:
        done = self.run(HOST, command)
        if done.code != 0:
            raise CouldNotLookError(f"{command.partition(' --')[0]}: {done.said}", "systemctl status xen9pd")
        try:
            return json.loads(done.out)
        except ValueError:
            raise CouldNotLookError(f"{command} does not speak JSON") from None


def parse_answers(raw: bytes) -> dict[str, str]:
    """The answers in a file. CouldNotLookError names the line that is none."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise CouldNotLookError("your answers file is no text", "write lines like ring_ref=12") from None
    found = {}
    for number, written in enumerate(text.splitlines(), 1):
        line = written.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise CouldNotLookError(
                f"line {number} of your answers is {_short(line)!r}", "write lines like ring_ref=12"
            )
        found[match[1]] = match[2].strip().strip("\"'")
    return found


def parse_metrics(text: str, guest: str, tag: str) -> dict[str, float]:
    """The counters of one device, from Prometheus' text format."""
    found: dict[str, float] = {}
    named = {"xen9p_read_bytes_total": "read_bytes", "xen9p_written_bytes_total": "written_bytes"}
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if match is None:
            continue
        labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
        if (labels.get("guest"), labels.get("tag")) != (guest, tag):
            continue
        if match[1] == "xen9p_operations_total":
            found[labels["type"]] = float(match[3])
        elif match[1] in named:
            found[named[match[1]]] = float(match[3])
    found["requests"] = sum(count for name, count in found.items() if name.startswith("T"))
    return found


def load_checks(lab: Lab) -> Mapping[str, Any]:
    """The functions of a lab's checks.py by name.

    Raises:
        LabError: it cannot be loaded, or lacks a check of lab.yml.
    """
    import importlib.util
    import sys

    path = lab.folder / "checks.py"
    name = f"labkit_checks_{re.sub(r'[^a-z0-9]', '_', lab.name)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LabError(f"lab {lab.name} has no checks.py", "see: lab lint")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise LabError(f"{lab.name}/checks.py: {type(error).__name__}: {error}", "correct it; see: lab lint") from None
    missing = [check.name for check in lab.checks if not callable(getattr(module, check.name, None))]
    if missing:
        raise LabError(f"{lab.name}/checks.py has no function {', '.join(missing)}", "lab.yml names it as a check")
    return {check.name: getattr(module, check.name) for check in lab.checks}
