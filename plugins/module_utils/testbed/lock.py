"""Who is at work: one run at a time on a lab, one build at a time in a cache."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TestbedError


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file *path*; wait for another holder, after calling *on_wait* once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # To read is enough to lock: root's lock file in a user's cache serves that user, and the other way round.
    with open(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644), "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(path: Path, pid: int, what: str) -> None:
    """Record that process *pid* works on the lab called *what*, until it ends. Raises TestbedError if another does.

    The record outlives the caller, for a task of a playbook is a process of its own; it counts only as long as
    the process that it names is alive, so that a run that was killed leaves nothing to clean up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        holder = _holder(file.read())
        if holder is not None and holder != pid:
            raise TestbedError(
                f"another run (pid {holder}) is working on lab {what!r}: wait until it ends, "
                "or use a lab of your own with -e testbed_name=NAME -e testbed_ssh_port=PORT"
            )
        file.truncate(0)
        file.write(json.dumps({"pid": pid, "started": _start_time(pid)}) + "\n")


def _holder(text: str) -> int | None:
    """Return the pid in a lock's record if that very process still runs."""
    try:
        record = json.loads(text)
        pid, started = int(record["pid"]), record["started"]
    except (ValueError, KeyError, TypeError):
        return None
    return pid if started is not None and _start_time(pid) == started else None


def _start_time(pid: int) -> str | None:
    """Return when *pid* started (clock ticks since boot), which tells it from a later process of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
