"""The full benchmark's hands in the guest: does one piece of work at a time, as dom0 asks, and says how long it took.

Reads a JSON object a line from standard input and answers with one; {"error": ...} when it could not be done.
fio, ls, find and tar come from a directory in memory (TOOLS), so that dropping caches does not slow their start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workloads

TOOLS = Path(os.environ.get("BENCH_TOOLS", "/mnt/tools"))
DROP = Path("/proc/sys/vm/drop_caches")
COMPACT = Path("/proc/sys/vm/compact_memory")


class WorkError(Exception):
    """One line: what could not be done."""


def tool(name: str) -> list[str]:
    """The command of a tool: dom0's program with dom0's libraries, if they have been brought; else this system's."""
    loader = TOOLS / "ld.so"
    return [str(loader), "--library-path", str(TOOLS / "lib"), str(TOOLS / "bin" / name)] if loader.exists() else [name]


def run(command: list[str], text: str = "", quiet: bool = False) -> str:
    """Run a command; its output."""
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    done = subprocess.run(command, input=text, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        words = (done.stderr or done.stdout or "").strip().splitlines() or ["no output"]
        raise WorkError(f"{command[-1]}: {words[-1]}")
    return done.stdout or ""


def job_file(place: str, request: dict[str, Any]) -> str:
    """The sections as fio reads them: each in a group of its own, one after the other."""
    lines = ["[global]", f"directory={place}", "ioengine=psync", "thread=1", "fallocate=none", "group_reporting=1"]
    lines += [f"runtime={round(request['seconds'] * 1000)}ms", "invalidate=0", "randrepeat=1", "norandommap=0"]
    for section in request["sections"]:
        lines += [f"[{section['name']}]", "stonewall", "new_group", f"filename={section['file']}"]
        lines += [f"rw={section['rw']}", f"bs={section['bs']}", f"numjobs={section['jobs']}"]
        lines += [f"size={section['area']}", f"offset_increment={section['area']}", f"io_size={section['bytes']}"]
        if "write" in section["rw"] or section["rw"] == "randrw":
            lines += ["end_fsync=1", "rwmixread=70"]
    return "\n".join(lines) + "\n"


def fio(place: str, request: dict[str, Any]) -> dict[str, Any]:
    """Run all sections; how many operations each did in how many seconds (of the slowest job, fsync included)."""
    printed = run([*tool("fio"), "--output-format=json", "-"], job_file(place, request))
    found = {}
    for job in json.loads(printed[printed.index("{") :])["jobs"]:
        if job["error"]:
            raise WorkError(f"fio, {job['jobname']}: {os.strerror(job['error'])}")
        directions = [job[way] for way in ("read", "write") if job[way]["total_ios"]]
        found[job["jobname"]] = {
            "operations": sum(way["total_ios"] for way in directions),
            # fio counts in ms; what it calls 0 is less than one.
            "seconds": max([0.0005, *(way["runtime"] / 1000 for way in directions)]),
        }
    for section in request["sections"]:
        if not found.get(section["name"], {}).get("operations"):
            raise WorkError(f"fio did nothing for {section['name']} in {place}")
        if "write" in section["rw"]:
            Path(place, section["file"]).unlink(missing_ok=True)
    return {"sections": found}


def create(place: str, request: dict[str, Any]) -> int:
    """New files with a line in each."""
    workloads.create(place, request["count"])
    return int(request["count"])


def stat(place: str, request: dict[str, Any]) -> int:
    """The attributes of files that were looked at a moment ago."""
    for number in range(request["count"]):
        os.stat(f"{place}/few/f{number}")
    return int(request["count"])


def unlink(place: str, request: dict[str, Any]) -> int:
    """Away with what create() has made."""
    for number in range(request["count"]):
        os.unlink(f"{place}/new/f{number}")
    return int(request["count"])


def find(place: str, request: dict[str, Any]) -> int:
    """`find -type f -size`: a walk through a tree, and each file's attributes."""
    listed = run([*tool("find"), f"{place}/tree", "-type", "f", "-size", "-1000"])
    return listed.count("\n")


def untar(place: str, request: dict[str, Any]) -> int:
    """A tar of small files into a new directory."""
    target = Path(place, f"untar-{request['round']}")
    target.mkdir()
    run([*tool("tar"), "-xf", str(TOOLS / "tree.tar"), "-C", str(target)])
    return int(request["entries"])


def listing(place: str, request: dict[str, Any]) -> int:
    """`ls -l`."""
    run([*tool("ls"), "-l", f"{place}/{request['folder']}"], quiet=True)
    return int(request["entries"])


WORK = {"create": create, "stat": stat, "unlink": unlink, "find": find, "untar": untar, "list": listing}


def warm(request: dict[str, Any]) -> None:
    """Read once what a piece of work is going to read."""
    if request["do"] == "fio":
        for section in request["sections"]:
            with Path(request["place"], section["file"]).open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
    else:
        WORK[request["do"]](request["place"], request)


def perform(request: dict[str, Any]) -> dict[str, Any]:
    """Do one piece of work."""
    place = request.get("place", "")
    if request["do"] == "drop":
        os.sync()
        DROP.write_text("3\n")
        return {}
    if request["do"] == "compact":
        COMPACT.write_text("1\n")
        return {}
    if request["do"] == "warm":
        warm(request["work"])
        return {}
    if request["do"] == "fio":
        return fio(place, request)
    work = WORK[request["do"]]
    began = time.monotonic()
    operations = work(place, request)
    spent = time.monotonic() - began
    return {"sections": {request["name"]: {"operations": operations, "seconds": spent}}}


def serve(perform: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Answer until standard input ends."""
    for line in sys.stdin:
        try:
            answer = perform(json.loads(line))
        except (WorkError, OSError, ValueError, KeyError) as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve(perform))
