"""Commands of dom0, and what they say of guests."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ansible.module_utils.guests import ssh

# Seconds for the banner once sshd has accepted: trying again would only start another sshd in a guest that is booting.
PATIENCE = 30.0


class BenchError(Exception):
    """Something the user can act on. The message is one line: what is wrong; then what to do."""


@contextlib.contextmanager
def alone(path: Path = Path("/run/lock/xen9p-bench")) -> Iterator[None]:
    """Hold the host for one part of a run: one whose controller went away may still be at it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode(errors="replace").strip() or "unknown"
            raise BenchError(f"an earlier run (pid {owner}) is still at work on the host: wait, or kill it") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def run(*command: str, timeout: float = 300.0) -> str:
    """Run *command*; its output, or a BenchError that names it and repeats its last line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except FileNotFoundError as error:
        raise BenchError(f"{command[0]} is not installed on the host: run site.yml first") from error
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"`{' '.join(command)}` did not end within {timeout:.0f} s: look at the host") from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise BenchError(f"`{' '.join(command)}` failed: {words[-1]}")
    return done.stdout


def wait_for(condition: Callable[[], bool], seconds: float, failure: str, pause: float = 0.3) -> None:
    """Wait until *condition* holds; raise BenchError(*failure*) when it does not within *seconds*."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(failure)
        time.sleep(pause)


def domains() -> dict[str, int]:
    """Return the running domains: name -> domid."""
    rows = (line.split() for line in run("xl", "list").splitlines()[1:])
    return {row[0]: int(row[1]) for row in rows}


def create(name: str, config: Path, address: str, timeout: float) -> tuple[float, float]:
    """Start a guest; seconds from the start of `xl create` to its end, and to the banner of the guest's sshd."""
    began = time.monotonic()
    run("xl", "create", "-q", str(config))
    created = time.monotonic() - began
    failure = f"{name} does not answer by ssh after {timeout:.0f} s: look with xl console {name}, or try again"
    wait_for(lambda: ssh.answers(address, PATIENCE), timeout, failure, pause=0.1)
    return created, time.monotonic() - began


def destroy(name: str) -> None:
    """End a guest, if it runs, and wait until the backends have let go of it."""
    domid = domains().get(name)
    if domid is None:
        return
    with contextlib.suppress(BenchError):  # it may have ended by itself meanwhile
        run("xl", "destroy", name)
    left = f"domain {domid} ({name}) does not go away: a backend still maps its memory; see xl list and xen9p status"
    wait_for(lambda: domid not in domains().values(), 60, left, pause=1.0)


def drop_caches() -> None:
    """Write out what is dirty, then empty the page cache of dom0: the next start reads from the disk."""
    run("sync")
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def pss(pid: int) -> int:
    """Return the proportional share of memory of a process, in KiB; 0 for a kernel thread, which has none."""
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except ProcessLookupError:
        return 0
    for line in rows:
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def device_model(domid: int) -> int | None:
    """Return the pid of the QEMU that xl started for a guest."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"qemu" in words[0] and b"-xen-domid" in words and str(domid).encode() in words:
                return int(folder.name)
    return None
