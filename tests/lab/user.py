"""A device for user space in a guest, and what the tests of our own client ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testinfra.backend.base import CommandResult

from lab import Dom0, connect, scratch, wait_until

GUEST, EXPORT, TAG = "g1", "home", "user"


class User:
    """The guest's side: xen9p with tag user, on the export that /home shows through the kernel."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.removeprefix("/home/")

    def run(self, command: str) -> CommandResult:
        """Runs a command in the guest."""
        return connect(GUEST).run(command)

    def out(self, command: str) -> str:
        """Standard output of a command that must work."""
        return str(connect(GUEST).check_output(command))

    def path(self, name: str) -> str:
        """A path for our commands."""
        return f"{TAG}:/{self.folder}/{name}"

    def kernel(self, name: str) -> str:
        """The same file through the guest's v9fs."""
        return f"/home/{self.folder}/{name}"


@contextmanager
def attached(dom0: Dom0, name: str) -> Iterator[User]:
    """The device, and a directory on it that is gone afterwards."""
    dom0.run(f"xen9p detach {GUEST} {TAG}")  # what an interrupted run left
    dom0.out(f"xen9p attach {GUEST} {EXPORT} --tag {TAG}")
    try:
        with scratch(connect(GUEST), f"/home/{name}") as folder:
            yield User(folder)
    finally:
        dom0.run(f"xen9p detach {GUEST} {TAG}")
        wait_until("the device is gone", lambda: dom0.device(GUEST, TAG) is None)
