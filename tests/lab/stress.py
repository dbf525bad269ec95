"""Runs others' torture of filesystems: stress-ng's class filesystem, dbench, postmark, fio with --verify.

    python3 stress.py DIRECTORY --tools TOOLS [--seconds 1] [--only NAME]...

Prints a line of JSON for each: its name, "passed", "skipped" (it says that filesystem or kernel lacks something) or
"failed", and why. TOOLS is a directory with bin/, lib/ and ld.so, so that the programs of one system run on another; ""
means that they are installed. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# What of the class filesystem (0.15.06) works on files of a directory. Not: bind-mount and binderfs (they mount),
# eventfd, procfs, ioprio, dup (other things than files), fstat and getdent (directories of the system), io (sync(2), of
# all filesystems of the machine), link and symlink (8192 names a round, however long that takes).
STRESSORS = (
    "access", "chattr", "chdir", "chmod", "chown", "copy-file", "dentry", "dir", "dirdeep", "dirmany", "dnotify",
    "fallocate", "fanotify", "fcntl", "fiemap", "file-ioctl", "filename", "flock", "fpunch", "fsize", "handle", "hdd",
    "inode-flags", "inotify", "iomix", "lease", "locka", "lockf", "lockofd", "mknod", "open", "rename",
    "sync-file", "touch", "utime", "verity", "xattr",
)  # fmt: skip
# Little data and few names, so that it is the operations that count, and a round ends within the time.
LITTLE = {
    **{name: (f"--{name}-bytes", "1m") for name in ("fallocate", "fiemap", "hdd", "iomix", "sync-file")},
    "chdir": ("--chdir-dirs", "64"),
    "dentry": ("--dentries", "128"),
    "dir": ("--dir-dirs", "128"),
}
NOT_PASSED = {3: "skipped", 4: "skipped"}
"""stress-ng(1), exit status: not enough resources, not implemented; it says so of what a filesystem lacks, too."""
GRACE = 60.0


@dataclass(frozen=True)
class Work:
    """A program to run in a directory of its own."""

    name: str
    command: tuple[str, ...]
    said: str = ""
    """What its output must have if it went well."""
    given: str = ""
    """Standard input."""


def works(place: str, seconds: int, load: str) -> Iterator[Work]:
    """All of them, for a directory."""
    for name in STRESSORS:
        options = ("--verify", "--timeout", f"{seconds}s", "--temp-path", place)
        yield Work(name, ("stress-ng", f"--{name}", "1", *LITTLE.get(name, ()), *options))
    yield Work("dbench", ("dbench", "-c", load, "-t", str(4 * seconds), "-D", place, "2"), "Throughput")
    orders = f"set location {place}\nset size 500 20000\nset number {60 * seconds}\nset seed 7\n"
    orders += f"set transactions {120 * seconds}\nrun\nquit\n"
    yield Work("postmark", ("postmark",), "seconds of transactions", orders)
    for name, more in (
        ("fio-verify", ("--rw=randwrite", "--bs=4k", "--end_fsync=1")),
        ("fio-verify-large", ("--rw=write", "--bs=256k", "--fsync=8")),
        ("fio-verify-mixed", ("--rw=randrw", "--bsrange=4k-64k", "--numjobs=2")),
    ):
        size = f"--size={2 * seconds}m"
        checks = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--verify_state_save=0", "--thread")
        same = ("--ioengine=psync", "--fallocate=none", f"--directory={place}", "--minimal")
        yield Work(name, ("fio", f"--name={name}", *more, size, *checks, *same))


def tool(tools: str, command: Sequence[str]) -> list[str]:
    """The command, with the other system's loader and libraries if there are tools."""
    if not tools:
        return list(command)
    name, *rest = command
    return [f"{tools}/ld.so", "--library-path", f"{tools}/lib", f"{tools}/bin/{name}", *rest]


def outcome(code: int, text: str, work: Work) -> str:
    """How it went."""
    if code == 0:
        return "passed" if work.said in text else "failed"
    return NOT_PASSED.get(code, "failed") if work.command[0] == "stress-ng" else "failed"


def run(work: Work, place: str, tools: str, limit: float) -> dict[str, str]:
    """Runs one in a new directory, which is gone afterwards."""
    os.mkdir(place)
    process = subprocess.Popen(
        tool(tools, work.command), cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(work.given, timeout=limit)
        result = outcome(process.returncode, text, work)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        result, text = "failed", f"{text}\nnot done within {limit:g} s"
    shutil.rmtree(place, ignore_errors=True)
    lines = [line for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if "fail" in line or "skip" in line or "rror" in line]
    return {
        "name": work.name,
        "result": result,
        "said": "" if result == "passed" else " / ".join(wrong or lines)[-400:],
    }


def main() -> int:
    """Run all; 0 however they go."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--tools", default="", help="directory with bin/, lib/ and ld.so; default: what is installed")
    parser.add_argument("--seconds", type=int, default=1, help="of each of stress-ng's, and a measure of the others'")
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    given = parser.parse_args()
    os.makedirs(given.directory, exist_ok=True)
    load = f"{given.tools}/client.txt" if given.tools else "/usr/share/dbench/client.txt"
    place = os.path.join(given.directory, "work")
    for work in works(place, given.seconds, load):
        if not given.only or work.name in given.only:
            print(json.dumps(run(work, place, given.tools, GRACE + 10 * given.seconds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
