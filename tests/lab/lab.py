"""Tests of a standing lab, over ssh, from dom0 and from the guests.

Which lab: the environment's XEN9P_LAB, by default `lab`. Nothing here is simulated: without a lab these tests fail.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import testinfra
from testinfra.backend.base import CommandResult
from testinfra.host import Host

REPOSITORY = Path(__file__).resolve().parents[2]
STATE = REPOSITORY / ".lab" / os.environ.get("XEN9P_LAB", "lab")
GUESTS = ("g1", "g2")
TAGS = {"root": "rw", "home": "rw", "course": "ro"}
BACKEND = "/local/domain/0/backend/xen9p"
MOUNT = "mount -t 9p -o trans=xen,version=9p2000.L,msize=524288"


CONTROL = Path(tempfile.mkdtemp(prefix="xen9p-"))
"""Where the kept ssh connections have their sockets: two labs have guests of the same name and address."""
LIVE: dict[str, Host] = {}


def connect(name: str) -> Host:
    """A testinfra host of the lab, over one ssh connection that is kept until drop_connection()."""
    if name not in LIVE:
        LIVE[name] = testinfra.get_host(
            f"ssh://{name}",
            ssh_config=str(STATE / "ssh_config"),
            controlpath=str(CONTROL / name),
            controlpersist=600,
            timeout=90,  # seconds to connect: two handshakes under emulation
        )
    return LIVE[name]


def drop_connection(name: str) -> None:
    """Closes the kept connection to a machine that goes away; the next connect() makes another."""
    LIVE.pop(name, None)
    local(f"ssh -F {STATE}/ssh_config -o ControlPath={CONTROL}/{name} -O exit {name}")
    (CONTROL / name).unlink(missing_ok=True)


def local(command: str) -> CommandResult:
    """Runs a command on the controller."""
    return testinfra.get_host("local://").run(command)


def ask(name: str, command: str) -> str | None:
    """What a command prints, over a connection of its own; None while the machine does not answer."""
    options = "-o ControlMaster=no -o ControlPath=none -o ConnectTimeout=8"
    result = local(f"ssh -F {STATE}/ssh_config {options} {name} {command}")
    return str(result.stdout).strip() if result.rc == 0 else None


def answers(name: str) -> bool:
    """Whether ssh works over a connection of its own."""
    return ask(name, "true") is not None


def wait_for_sshd(dom0: Dom0, guest: str, timeout: float) -> None:
    """Waits until a guest that boots answers ssh.

    The host looks, and for the banner alone: to try whole connections meanwhile takes the processor from who boots.
    """
    found = dict(line.split(" ", 1) for line in local(f"ssh -G -F {STATE}/ssh_config {guest}").stdout.splitlines())
    banner = f"timeout 5 bash -c 'exec 3<>/dev/tcp/{found['hostname']}/22 && head -c 4 <&3' 2> /dev/null | grep -q SSH-"
    more = "[ $(date +%s) -lt $end ]"
    done = dom0.run(f"end=$(($(date +%s) + {timeout:.0f})); while {more}; do {banner} && exit 0; sleep 1; done; exit 1")
    assert done.rc == 0, f"not within {timeout:.0f} s: {guest} has a running sshd"
    wait_until(f"{guest} answers ssh", lambda: answers(guest), 60)


def wait_until(what: str, check: Callable[[], bool], timeout: float = 60.0) -> float:
    """Seconds until check() held; fails naming what did not happen."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < timeout, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - began


class Dom0:
    """What the tests ask of the host."""

    @property
    def host(self) -> Host:
        """The testinfra host."""
        return connect("host")

    def run(self, command: str) -> CommandResult:
        return self.host.run(command)

    def out(self, command: str) -> str:
        """Standard output of a command that must work."""
        return str(self.host.check_output(command))

    def domid(self, guest: str) -> int | None:
        """The guest's domain id, if it runs."""
        result = self.run(f"xl domid {guest}")
        return int(result.stdout) if result.rc == 0 else None

    def status(self) -> dict[str, Any]:
        """`xen9p status --json`."""
        found: dict[str, Any] = json.loads(self.out("xen9p status --json"))
        return found

    def pid(self, guest: str, tag: str) -> int | None:
        """The worker's process id, while the device has one."""
        device = self.device(guest, tag)
        return device["pid"] if device else None

    def pids(self) -> dict[tuple[str, str], int | None]:
        """The workers of all devices, by guest and tag."""
        return {(d["guest"], d["tag"]): d["pid"] for d in self.status()["devices"]}

    def device(self, guest: str, tag: str) -> dict[str, Any] | None:
        """One device of the status, if there is one."""
        found = [d for d in self.status()["devices"] if (d["guest"], d["tag"]) == (guest, tag)]
        assert len(found) < 2, f"two devices {guest}/{tag}: {found}"
        return found[0] if found else None

    def connected(self, guest: str, tag: str) -> bool:
        device = self.device(guest, tag)
        return device is not None and device["state"] == "connected" and device["domid"] == self.domid(guest)

    def store(self, path: str) -> str | None:
        """A XenStore node's value, or None."""
        result = self.run(f"xenstore-read {path}")
        return result.stdout.rstrip("\n") if result.rc == 0 else None

    def backends(self, domid: int) -> list[str]:
        """The device ids that our backend has for a domain."""
        return str(self.run(f"xenstore-list {BACKEND}/{domid}").stdout).split()


@contextmanager
def scratch(host: Host, path: str) -> Iterator[str]:
    """A directory that is gone afterwards."""
    host.check_output(f"mkdir -p {path}")
    try:
        yield path
    finally:
        host.check_output(f"rm -rf {path}")


@contextmanager
def home_mounted(mode: str, more: str = "") -> Iterator[None]:
    """g1's /home in another cache mode, with *more* options, and then as it was."""
    g1 = connect("g1")
    g1.check_output("umount /home")
    try:
        options = f"rw,trans=xen,version=9p2000.L,msize=524288,cache={mode}{',' if more else ''}{more}"
        g1.check_output(f"mount -t 9p home /home -o {options}")
        yield
    finally:
        g1.check_output("umount /home; mount /home")
