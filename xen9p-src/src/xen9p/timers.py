"""Commands of xen9p that systemd runs at certain times: a timer, and the service that it starts (systemd.timer(5))."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from xen9p import defaults
from xen9p.errors import Xen9pError


def program() -> str:
    """The xen9p command, as a service starts it."""
    return word(shutil.which("xen9p") or "/usr/local/bin/xen9p")


def word(text: str | Path) -> str:
    """A word of a command as a unit has it (systemd.service(5), "Command lines"). Xen9pError: no unit can have it."""
    plain = str(text)
    if re.fullmatch(r"[A-Za-z0-9_@:.,/=+-]+", plain):
        return plain
    if not plain.isprintable():
        raise Xen9pError(f"{plain!r} cannot be in a unit of systemd", "choose a name without control characters")
    for mark, stands_for in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        plain = plain.replace(mark, stands_for)
    return f'"{plain}"'


@dataclass(frozen=True, slots=True)
class Timer:
    """A schedule as it is set up, or is to be.

    Args:
        name: of its units, without .timer and .service.
        folder: where systemd finds them; if it is not defaults.UNITS, systemd is told nothing.
        command: the command that sets it up, for messages: `xen9p dedup schedule`.
        about: what it does, in a line.
        slack: how exactly it keeps the time, in [Timer].
        policy: without this file it does nothing.
    """

    name: str
    folder: Path
    command: str
    about: str
    slack: str = "RandomizedDelaySec=10min"
    policy: Path = defaults.POLICY

    def units(self, when: str, service: str) -> dict[str, str]:
        """The files, by name. *service* is what the service has in [Service] but for its type."""
        head = f"# Written by {self.command}: changes are lost.\n[Unit]\nDescription="
        return {
            f"{self.name}.service": f"""{head}{self.about}
ConditionPathExists={str(self.policy).replace("%", "%%")}

[Service]
Type=oneshot
{service}NoNewPrivileges=yes
PrivateNetwork=yes
ProtectSystem=full
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
MemoryMax=512M
""",
            f"{self.name}.timer": f"""{head}Timer: {self.about}

[Timer]
OnCalendar={when}
{self.slack}
Persistent=yes

[Install]
WantedBy=timers.target
""",
        }

    def change(self, on: str | None, off: bool, service: str) -> tuple[bool, str]:
        """What the options of options.schedule() ask for: start(), stop(), or say() if there are none.

        Returns:
            Whether anything has changed, and a line about it. Xen9pError as these raise it.
        """
        if on is not None and off:
            raise Xen9pError("--on and --off contradict each other", "choose one of them")
        if on is not None:
            return self.start(on, service)
        return self.stop() if off else (False, self.say())

    def say(self) -> str:
        """What is set up, in a line."""
        timer, service = (self.folder / f"{self.name}.{kind}" for kind in ("timer", "service"))
        when = _settings(timer, "OnCalendar")
        if not when:
            return "does not run by itself (see --on)"
        return f"runs at {when[0]} ({timer}): {'; '.join(_settings(service, 'ExecStart'))}"

    def start(self, when: str, service: str) -> tuple[bool, str]:
        """Sets it up; whether that changed anything, and a line about it.

        Raises:
            Xen9pError: that is no time, the files cannot be written, or systemd refuses.
        """
        _check(when)
        wanted = self.units(when, service)
        same = all(_text(self.folder / name) == text for name, text in wanted.items())
        if not same:
            try:
                for name, text in wanted.items():
                    fresh = self.folder / f".{name}.new"
                    fresh.write_text(text)
                    fresh.rename(self.folder / name)
            except OSError as error:
                raise Xen9pError(f"{self.folder}: {error.strerror}", "run it as root") from None
        self._systemd("daemon-reload")
        self._systemd("enable", "--now", f"{self.name}.timer")
        return not same, f"runs at {when}, as before" if same else f"runs at {when}"

    def stop(self) -> tuple[bool, str]:
        """Takes it away; as start(). Xen9pError: the files cannot be removed, or systemd refuses."""
        there = [self.folder / name for name in self.units("", "") if (self.folder / name).exists()]
        if not there:
            return False, "does not run by itself, as before"
        self._systemd("disable", "--now", f"{self.name}.timer")
        try:
            for path in there:
                path.unlink()
        except OSError as error:
            raise Xen9pError(f"{self.folder}: {error.strerror}", "run it as root") from None
        self._systemd("daemon-reload")
        return True, "does not run by itself any more"

    def _systemd(self, *words: str) -> None:
        if self.folder != defaults.UNITS:
            return
        try:
            done = subprocess.run(["systemctl", *words], check=False, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise Xen9pError("systemctl is missing", "run the command from what starts things here, as cron") from None
        if done.returncode:
            raise Xen9pError(f"systemctl {' '.join(words)}: {' '.join(done.stderr.split())}", "see: systemctl status")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _settings(path: Path, key: str) -> list[str]:
    return [line.partition("=")[2] for line in _text(path).splitlines() if line.startswith(f"{key}=")]


def _check(when: str) -> None:
    if not when.strip() or "\n" in when:
        raise Xen9pError(f"{when!r} is no time", "see: man systemd.time")
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(
            ["systemd-analyze", "calendar", "--", when], check=False, capture_output=True, text=True, timeout=30
        )
        if done.returncode:
            raise Xen9pError(
                f"{when!r} is no time for systemd", "as in daily, or Mon..Fri 03:00; see: man systemd.time"
            )
