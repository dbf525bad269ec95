"""Start and reset: what a lab needs on a student's machines, made from its folder and the student's values.

A student's part of a lab is a btrfs subvolume, STORE/labs/STUDENT/LAB, and its start is a read-only snapshot beside
it. A reset exchanges the one for the other by a rename. What lies outside of the store (the working folder, the
policy's block, devices, mounts, processes) is known to the engine or named in lab.yml, is taken away and made anew,
and a manifest of the start is compared with one of what is there then.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from labkit import state
from labkit.course import Student
from labkit.errors import LabError, UnreachableError
from labkit.spec import Lab
from labkit.transport import HOST, Done, System, places, quote
from labkit.values import Values, fill, generate

SCRIPTS: Final = Path(__file__).resolve().parent / "scripts"
BIN: Final = "/usr/local/bin"
POLICY: Final = "/etc/xen9p/policy.toml"
CONTROL: Final = "/run/xen9p/control.sock"
"""Where xen9pd is asked."""
_REFUSED: Final = 3
"""Exit code of our scripts when they have something to say."""

Say = Callable[[str], None]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Places:
    """Where a student's lab is, on host and guests; shell words, as `$ROOT` stands before each."""

    work: str
    part: str
    pristine: str
    store: str


def where(lab: str, student: Student) -> Places:
    """The paths of a lab of a student."""
    store = f"${{ROOT:-}}{student.host.store}"
    return Places(
        work=f"${{ROOT:-}}/root/labs/{student.name}/{lab}",
        part=f"{store}/labs/{student.name}/{lab}",
        pristine=f"{store}/labs/.start/{student.name}/{lab}",
        store=store,
    )


def guest_places(lab: Lab, student: Student) -> list[str]:
    """The places of the guests that a lab needs. LabError if the student has not as many."""
    found = [place for place in places(student) if place != HOST][: lab.guests]
    if len(found) < lab.guests:
        raise LabError(
            f"lab {lab.name} needs {lab.guests} guests, {student.name} has {len(student.guests)}",
            "add guests (guest_guests) and name them in the course file",
        )
    return found


def export_name(lab: Lab, student: Student, name: str) -> str:
    """What the policy calls an export of a student."""
    return f"{student.name}-{lab.number}-{name}"


def values_of(lab: Lab, student: Student) -> Values:
    """A student's values: those of lab.yml, and what every lab has."""
    made = generate(lab.values, student.key, lab.name)
    made |= {"student": student.name, "lab": lab.name}
    made |= {place: name for place, name in places(student).items() if place != HOST}
    made |= {f"export_{e.name.replace('-', '_')}": export_name(lab, student, e.name) for e in lab.exports}
    return made


def values_file(lab: Lab, student: Student) -> str:
    """The file that sets a student's values as variables of the shell; hidden ones are not in it."""
    paths = where(lab.name, student)
    hidden = {value.name for value in lab.values if value.hidden}
    about = {value.name: value.about for value in lab.values}
    lines = [f"# The values of {student.name} in lab {lab.name}. Made by `lab start`; changes are lost."]
    for name, value in values_of(lab, student).items():
        if name in hidden:
            continue
        if about.get(name):
            lines.append(f"# {about[name]}")
        lines.append(f"export {name}={quote(value)}")
    lines += [f'export part="{paths.part}"', f'export LAB_WORK="{paths.work}"', f"export LAB_STUDENT={student.name}"]
    return "\n".join(lines) + "\n"


def policy_block(lab: Lab, student: Student) -> str:
    """The lab's exports and rules, as TOML for the policy; "" if it has none."""
    lines: list[str] = []
    values = values_of(lab, student)
    for export in lab.exports:
        if export.attach == "none":
            continue
        name = export_name(lab, student, export.name)
        path = f"{student.host.store}/labs/{student.name}/{lab.name}/{export.path}".removesuffix("/.")
        lines += [f"[exports.{_toml(name)}]", f"path = {_toml(path)}"]
    for export in lab.exports:
        if export.attach == "none":
            continue
        for number in export.guests:
            rule: dict[str, Any] = {
                "guest": student.guests[number - 1],
                "export": export_name(lab, student, export.name),
                "tag": fill(export.tag, values),
                "access": export.access,
                "attach": export.attach,
                **export.terms,
            }
            lines += ["[[rules]]", *(f"{key} = {_toml(value)}" for key, value in rule.items())]
    return "\n".join(lines) + "\n" if lines else ""


def _toml(value: Any) -> str:
    """A value inline. A string of JSON is one of TOML, too."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def tree_script(lab: Lab, student: Student) -> str:
    """Shell text that makes what is in the student's part, in the folder where it is run."""
    values = values_of(lab, student)
    lines = ["set -e"]
    lines += [f"mkdir -p {quote(export.path)}" for export in lab.exports]
    for file in lab.files:
        path = quote(fill(file.path, values))
        lines.append(f"mkdir -p $(dirname {path})")
        if file.text is not None:
            text = base64.b64encode(fill(file.text, values).encode()).decode()
            lines.append(f"base64 -d <<<{text} >{path}")
        else:
            # yes(1) ends by SIGPIPE, which is no failure here.
            lines.append(
                f"(yes {quote(fill(file.fill, values))} || true) | head -c {int(fill(file.size, values))} >{path}"
            )
        lines.append(f"chown {quote(fill(file.owner, values))} {path} && chmod {file.mode} {path}")
    # In whole seconds: Linux's 9P client sets no others, so no guest could bring another time back.
    lines.append('find . -type f -exec touch -d "@$(date +%s)" {} +')
    return "\n".join(lines)


def _kit(folder: Path) -> str:
    """The files of a folder as base64 of a tar archive; an empty one if there is no such folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
            if "__pycache__" not in path.parts:
                archive.add(path, str(path.relative_to(folder)), recursive=False, filter=_plain)
    return base64.b64encode(buffer.getvalue()).decode()


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def script(name: str, variables: Mapping[str, str]) -> str:
    """A script of ours with its variables before it. Values are shell text as it stands there."""
    return "".join(f"{key}={value}\n" for key, value in variables.items()) + (SCRIPTS / name).read_text()


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def check(done: Done, what: str) -> Done:
    """LabError with what one of our scripts said, if it failed."""
    if done.code == 0:
        return done
    said = done.said.removeprefix("error: ")
    message, _, remedy = said.partition(": ") if done.code == _REFUSED else (f"{what} failed", "", said)
    raise LabError(message, remedy)


class Setup:
    """A lab on the machines of a student."""

    def __init__(self, lab: Lab, student: Student, system: System, say: Say) -> None:
        self.lab = lab
        self.student = student
        self.system = system
        self.say = say
        self.guests = guest_places(lab, student)
        self.paths = where(lab.name, student)

    def start(self) -> bool:
        """Makes what is missing; what a student has made stays. Whether it is the first start.

        Where nothing is remembered of a lab that is on the host, nobody knows what was made of it: it begins anew.
        """
        with state.held(self.system, self.student, self.lab.name, seconds=300):
            kept = state.load(self.system, self.student, self.lab.name)
            first = kept.manifest is None
            if first:
                if self.system.run(HOST, f'test -d "{self.paths.pristine}"').code == 0:
                    self._clear()
                self._without_mount_points()
            self._prepare()
            if first:
                kept.started = time.time()
                kept.manifest = self._manifest()
                state.save(self.system, self.student, self.lab.name, kept)
            return first

    def reset(self) -> float:
        """Brings the start back, and compares. Seconds that it took.

        What was once achieved, and hints that were taken, stay: a reset is about the system.

        Raises:
            LabError: the lab has not been started, or something of the old state is left.
        """
        began = time.monotonic()
        with state.held(self.system, self.student, self.lab.name, seconds=300):
            kept = state.load(self.system, self.student, self.lab.name)
            if kept.manifest is None:
                raise LabError(f"{self.student.name} has not started lab {self.lab.name}", f"lab start {self.lab.name}")
            self._clear()
            self._prepare()
            left = differences(kept.manifest, self._manifest())
        if left:
            raise LabError(
                f"the reset of lab {self.lab.name} left something: {'; '.join(left[:3])}"
                + (f" and {len(left) - 3} more" if len(left) > 3 else ""),
                "take it away by hand and reset again; if it stays, tell your instructor",
            )
        return time.monotonic() - began

    def end(self) -> None:
        """Takes the lab off the machines; what was achieved stays. LabError if it has not been started."""
        with state.held(self.system, self.student, self.lab.name, seconds=300):
            kept = state.load(self.system, self.student, self.lab.name)
            self._clear()
            check(self.system.run(HOST, script("remove.sh", self._host_variables()), 120), "taking the lab away")
            kept.manifest = None
            state.save(self.system, self.student, self.lab.name, kept)

    def _without_mount_points(self) -> None:
        """Empty ones of before are no part of the start: a reset takes them away, and nobody makes them anew."""
        points = " ".join(quote(top) for top in self.lab.mounts)
        _at_once(lambda place: self.system.run(place, f"rmdir {points} 2>/dev/null"), self.guests if points else ())

    def _variables(self) -> dict[str, str]:
        return {
            "student": quote(self.student.name),
            "lab": quote(self.lab.name),
            "work": f'"{self.paths.work}"',
            "guests": quote(" ".join(self.system.name(place) for place in self.guests)),
            "mounts": quote(" ".join(self.lab.mounts)),
        }

    def _host_variables(self) -> dict[str, str]:
        return self._variables() | {
            "part": f'"{self.paths.part}"',
            "pristine": f'"{self.paths.pristine}"',
            "store": f'"{self.paths.store}"',
            "state": f'"{state.folder(self.student)}"',
            "policy": f'"${{ROOT:-}}{POLICY}"',
            "bin": f'"${{ROOT:-}}{BIN}"',
            "devices": _b64((SCRIPTS / "devices.py").read_text()),
            "control": f'"${{ROOT:-}}{CONTROL}"',
        }

    def _prepare(self) -> None:
        values = _b64(values_file(self.lab, self.student))
        command = _b64((SCRIPTS / "lab-values").read_text())
        install = f'base64 -d <<<{command} >"${{ROOT:-}}{BIN}/lab-values"; chmod 755 "${{ROOT:-}}{BIN}/lab-values"\n'
        _at_once(
            lambda place: self._to_host(values, install) if place == HOST else self._to_guest(place, values, install),
            (HOST, *self.guests),
        )

    def _to_guest(self, place: str, values: str, install: str) -> None:
        self.say(f"{self.system.name(place)}: working folder")
        variables = self._variables() | {
            "bin": f'"${{ROOT:-}}{BIN}"',
            "kit": _kit(self.lab.folder / "start" / "guest"),
            "values": values,
        }
        text = script("prepare_guest.sh", variables) + "\n" + install
        check(self.system.run(place, text, 60), f"preparing {self.system.name(place)}")

    def _to_host(self, values: str, install: str) -> None:
        self.say(f"{self.system.name(HOST)}: files, policy, devices")
        block = policy_block(self.lab, self.student)
        filled = values_of(self.lab, self.student)
        attach = [
            f"{self.student.guests[number - 1]} {export_name(self.lab, self.student, e.name)} {fill(e.tag, filled)} "
            f"{e.terms.get('frontend', 'kernel')}"
            for e in self.lab.exports
            if e.attach == "auto"
            for number in e.guests
        ]
        variables = self._host_variables() | {
            "mib": str(self.lab.store_size),
            "tree": quote(tree_script(self.lab, self.student)),
            "block": _b64(block),
            "attach": quote("\n".join(attach)),
            "kit": _kit(self.lab.folder / "start" / "host"),
            "values": values,
        }
        text = f'install -d "${{ROOT:-}}{BIN}"\n{install}' + script("prepare.sh", variables)
        check(self.system.run(HOST, text, 120), f"preparing {self.system.name(HOST)}")

    def _clear(self) -> None:
        end = _b64((SCRIPTS / "end.py").read_text())
        # Not from the file: a reset that was cut off has taken it away.
        load = values_file(self.lab, self.student)

        def clear(place: str) -> None:
            self.say(f"{self.system.name(place)}: processes, mounts, working folder")
            variables = self._variables() | {"end": end, "cleanup": quote(self.lab.reset.get("guest", ""))}
            text = load + script("clear_guest.sh", variables)
            check(self.system.run(place, text, 60), f"clearing {self.system.name(place)}")

        _at_once(clear, self.guests)
        self.say(f"{self.system.name(HOST)}: processes, policy, devices, store")
        variables = self._host_variables() | {"end": end, "cleanup": quote(self.lab.reset.get("host", ""))}
        check(self.system.run(HOST, load + script("clear.sh", variables), 120), f"clearing {self.system.name(HOST)}")
        if self.lab.restart_guests:
            self._restart()

    def _restart(self) -> None:
        names = [self.system.name(place) for place in self.guests]
        self.say(f"restarting {', '.join(names)}")
        lines = [f"xl destroy {quote(n)}; xl create -q /etc/xen/{quote(n)}.cfg || exit 3" for n in names]
        check(self.system.run(HOST, "\n".join(lines), 60), "restarting guests")
        for place in self.guests:
            self._wait(place)

    def _wait(self, place: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                self.system.run(place, "true", 30)
            except UnreachableError:
                if time.monotonic() > end:
                    raise
                time.sleep(1)
            else:
                return

    def _manifest(self) -> list[str]:
        """A line for each thing that a reset has to bring back."""
        load = f'[ ! -r "{self.paths.work}/values" ] || . "{self.paths.work}/values"\n'

        def look(place: str) -> list[str]:
            if place == HOST:
                variables = self._host_variables() | {"left": quote(self.lab.left.get("host", "")), "mounts": "''"}
            else:
                variables = self._variables() | {"left": quote(self.lab.left.get("guest", "")), "guests": "''"}
            text = load + script("manifest.sh", variables)
            done = check(self.system.run(place, text, 120), f"looking at {self.system.name(place)}")
            return [f"{place} {line}" for line in done.out.splitlines()]

        return [line for lines in _at_once(look, (HOST, *self.guests)) for line in lines]


def _at_once(work: Callable[[str], Found], places: Sequence[str]) -> list[Found]:
    """Does something at several places at the same time; what each gave, in their order. All end before one's error."""
    with ThreadPoolExecutor(max(1, len(places))) as pool:
        return list(pool.map(work, places))


def differences(before: list[str], after: list[str]) -> list[str]:
    """What two manifests do not share, a line each."""
    return list(_differences(before, after))


def _differences(before: list[str], after: list[str]) -> Iterator[str]:
    there, now = set(before), set(after)
    yield from (f"not back: {line}" for line in before if line not in now)
    yield from (f"left over: {line}" for line in after if line not in there)
