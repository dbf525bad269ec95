"""Tests of a standing lab, over ssh, from dom0 and from the guests.

Which lab: the environment's XEN9P_LAB, by default `lab`. Nothing here is simulated: without a lab these tests fail.
"""

from __future__ import annotations

import json
import os
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


def connect(name: str) -> Host:
    """A testinfra host of the lab, over one ssh connection that is kept."""
    return testinfra.get_host(f"ssh://{name}?ssh_config={STATE}/ssh_config&controlpersist=600")


def wait_until(what: str, check: Callable[[], bool], timeout: float = 60.0) -> float:
    """Seconds until check() held; fails naming what did not happen."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < timeout, f"not within {timeout:.0f} s: {what}"
        time.sleep(0.5)
    return time.monotonic() - began


class Dom0:
    """What the tests ask of the host."""

    def __init__(self, host: Host) -> None:
        self.host = host

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


def guest_answers(guest: str) -> bool:
    """Whether ssh into the guest works (a new connection: the kept one may be to a guest that is gone)."""
    command = f"ssh -F {STATE}/ssh_config -o ControlMaster=no -o ControlPath=none -o ConnectTimeout=8 {guest} true"
    return bool(testinfra.get_host("local://").run(command).rc == 0)


def drop_connection(guest: str) -> None:
    """Closes the kept ssh connection to a guest that is about to go away."""
    LIVE.pop(guest, None)


LIVE: dict[str, Host] = {}


def guest_host(guest: str) -> Host:
    """The testinfra host of a guest."""
    if guest not in LIVE:
        LIVE[guest] = connect(guest)
    return LIVE[guest]


@contextmanager
def scratch(host: Host, path: str) -> Iterator[str]:
    """A directory that is gone afterwards."""
    host.check_output(f"mkdir -p {path}")
    try:
        yield path
    finally:
        host.check_output(f"rm -rf {path}")
