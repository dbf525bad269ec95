"""Ends the processes of a lab: those in its folder or with it in their environment, but no shell of a person."""

import contextlib
import os
import signal
import sys
import time

WORK = sys.argv[1]


def of_the_lab(pid: str) -> bool:
    if int(pid) in (os.getpid(), os.getppid()):
        return False
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            inside = f"LAB_WORK={WORK}".encode() in file.read().split(b"\0")
        folder = os.readlink(f"/proc/{pid}/cwd")
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/comm") as file:
            name = file.read().strip()
    except OSError:
        return False
    # A shell at a terminal is somebody who types; its fields[4] is tty_nr (proc_pid_stat(5)).
    if name in ("bash", "sh", "dash") and fields[4] != "0":
        return False
    return inside or (folder + "/").startswith(WORK + "/")


def found() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and of_the_lab(name)]


for number in (signal.SIGTERM, signal.SIGKILL):
    for pid in found():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    end = time.monotonic() + 2
    while found() and time.monotonic() < end:
        time.sleep(0.1)
