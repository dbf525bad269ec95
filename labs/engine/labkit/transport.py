"""The one way in which the labs talk to a student's machines: a shell script goes to a place, its output comes back.

A *place* is `host`, `guest`, `guest2` and so on; for whom that is, a system knows. Over ssh one connection to each
machine is kept open: a script then costs a fraction of a second, so what belongs together goes into one script.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

from labkit.course import REPOSITORY, STATE, Host, Student
from labkit.errors import CouldNotLookError, LabError, TooSlowError, UnreachableError

HOST: Final = "host"
PERSIST: Final = 600
CONNECT: Final = 90.0
"""Seconds to connect: to a guest it takes two handshakes, under emulation."""
OUTPUT_LIMIT: Final = 4 << 20
"""Bytes of output that are kept: a student's machine says what it likes, and the controller's memory is not theirs."""
_SSH_FAILED: Final = 255
# All of the script is read before any of it runs, so that no command of it takes the rest as its input; by eval, as an
# argument has 128 KiB at the most. ssh keeps 255 for itself. Where nobody waits any more it ends by itself.
_WRAPPED: Final = """timeout -s KILL {seconds} bash -c 'eval "$(cat)"'; r=$?; test $r -ne 255 || r=254; exit $r"""
_AFTER: Final = 2
"""Seconds after which it does so, when we have given up."""


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a script."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Its last line, to quote."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1] if lines else "nothing"


class System(Protocol):
    """A student's machines."""

    def run(self, place: str, script: str, seconds: float = 60.0) -> Done:
        """Runs a script with bash.

        Raises:
            UnreachableError: the machine does not answer.
            TooSlowError: it did not end within *seconds*.
        """
        ...

    def shell(self, place: str) -> list[str]:
        """The command of a bash that reads its standard input, for a session that keeps its variables."""
        ...

    def name(self, place: str) -> str:
        """What the machine is called. LabError if there is no such place."""
        ...


def places(student: Student) -> dict[str, str]:
    """Place -> machine's name."""
    found = {HOST: student.host.alias}
    for number, guest in enumerate(student.guests, 1):
        found["guest" if number == 1 else f"guest{number}"] = guest
    return found


def connect(student: Student) -> System:
    """The machines of a student."""
    return LocalSystem(student) if student.host.local else SshSystem(student)


def _wrapped(seconds: float) -> str:
    return _WRAPPED.format(seconds=math.ceil(seconds) + _AFTER)


def bounded(command: Sequence[str]) -> list[str]:
    """A command that may write OUTPUT_LIMIT bytes to a file, its output among them."""
    return ["prlimit", f"--fsize={OUTPUT_LIMIT}", *command]


def _execute(
    command: Sequence[str],
    script: str,
    seconds: float,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Done:
    """Runs a command with *script* as its input; its whole process group ends with the time.

    Raises:
        TooSlowError: it did not end within *seconds*.
        CouldNotLookError: it wrote more than it may; see bounded().
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
        try:
            process.communicate(script.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            raise TooSlowError(f"no end within {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == -signal.SIGXFSZ:
            raise CouldNotLookError(f"it says more than {OUTPUT_LIMIT} bytes")
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(OUTPUT_LIMIT).decode(errors="replace"))
        return Done(process.returncode, texts[0], texts[1])


class _Named:
    def __init__(self, student: Student) -> None:
        self._student = student
        self._places = places(student)

    def name(self, place: str) -> str:
        """What the machine is called."""
        try:
            return self._places[place]
        except KeyError:
            there = ", ".join(self._places)
            raise LabError(
                f"{self._student.name} has no {place}", f"there are: {there}; give the student more guests"
            ) from None


class SshSystem(_Named):
    """Machines that are reached by ssh."""

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        self._config = _config(student.host)
        # A Unix socket's path has 108 bytes at the most, so not below the repository.
        mine = Path(tempfile.gettempdir()) / f"xen9p-labs-{os.getuid()}"
        mine.mkdir(mode=0o700, exist_ok=True)
        if mine.stat().st_uid != os.getuid():
            raise LabError(f"{mine} is another user's", "set TMPDIR to a directory of your own")
        # Guests of two hosts may have the same name and address: each host has a place of its own.
        self._control = mine / sha256(f"{self._config}\0{student.host.name}".encode()).hexdigest()[:8]
        self._control.mkdir(mode=0o700, exist_ok=True)

    def _ssh(self, place: str) -> list[str]:
        return [
            "ssh",
            "-F",
            str(self._config),
            "-o",
            "ControlMaster=auto",
            "-o",
            f"ControlPath={self._control}/%C",
            "-o",
            f"ControlPersist={PERSIST}",
            "-o",
            f"ConnectTimeout={CONNECT:.0f}",
            "-o",
            "BatchMode=yes",
            self.name(place),
        ]

    def run(self, place: str, script: str, seconds: float = 60.0) -> Done:
        """Runs a script there."""
        try:
            done = _execute(bounded([*self._ssh(place), _wrapped(seconds)]), script, seconds)
        except TooSlowError as error:
            raise TooSlowError(f"{self.name(place)}: {error.message}") from None
        except FileNotFoundError:
            raise LabError("ssh is not installed", "apt install openssh-client") from None
        if done.code == _SSH_FAILED:
            raise UnreachableError(f"{self.name(place)} does not answer: {done.said}", _how_to_look(place, self))
        return done

    def shell(self, place: str) -> list[str]:
        """A bash there."""
        # Where several students share a host, lab-values has to know whose shell it is in.
        return [*self._ssh(place), f"LAB_STUDENT={self._student.name} bash"]


def _how_to_look(place: str, system: SshSystem) -> str:
    return "is it on? make lab starts it" if place == HOST else f"on the host: xl list {system.name(place)}"


def _config(host: Host) -> Path:
    """The ssh config for a host: the one that it has, or one made from its addresses."""
    if host.ssh_config:
        path = Path(host.ssh_config).expanduser()
        path = path if path.is_absolute() else REPOSITORY / path
        if not path.exists():
            raise LabError(
                f"{host.name}: there is no {path.name} at {path.parent}", "make lab; or correct the course file"
            )
        return path
    common = ["LogLevel ERROR", "ServerAliveInterval 15", "ServerAliveCountMax 4"]
    lines = [f"Host {host.alias}", f"    HostName {host.address}", f"    User {host.user}", f"    Port {host.port}"]
    lines += [f"    {line}" for line in common]
    for name, address in host.guests:
        lines += [f"Host {name}", f"    HostName {address}", "    User root", f"    ProxyJump {host.alias}"]
        # A guest is a fresh clone each time, on a network inside of the host: its key says nothing.
        lines += ["    StrictHostKeyChecking no", "    UserKnownHostsFile /dev/null"]
        lines += [f"    {line}" for line in common]
    path = STATE / "ssh" / f"{host.name}.config"
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        partial.replace(path)
    return path


class LocalSystem(_Named):
    """Directories of this machine in place of machines: a script runs here, with its place as home and as `$ROOT`.

    For labs that need no Xen, and for the tests of what grades them. A place whose directory is not there is a
    machine that is off.
    """

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        self._root = Path(student.host.local)

    def directory(self, place: str) -> Path:
        """Where a place is."""
        return self._root / self.name(place)

    def _environment(self, place: str) -> dict[str, str]:
        directory = self.directory(place)
        if not directory.is_dir():
            raise UnreachableError(f"{self.name(place)} does not answer: there is no {directory}")
        path = f"{directory}/usr/local/bin:{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
        return {**os.environ, "HOME": f"{directory}/root", "ROOT": str(directory), "PATH": path}

    def run(self, place: str, script: str, seconds: float = 60.0) -> Done:
        """Runs a script here."""
        try:
            env = self._environment(place)
            return _execute(["sh", "-c", _wrapped(seconds)], script, seconds, env, self.directory(place))
        except TooSlowError as error:
            raise TooSlowError(f"{self.name(place)}: {error.message}") from None

    def shell(self, place: str) -> list[str]:
        """A bash here."""
        env = self._environment(place)
        env["LAB_STUDENT"] = self._student.name
        return ["env", *(f"{name}={env[name]}" for name in ("HOME", "ROOT", "PATH", "LAB_STUDENT")), "bash"]


def quote(text: str | int | Path) -> str:
    """As a word of the shell."""
    return shlex.quote(str(text))
