"""Work with files through three backends in one guest, in turn."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from . import trees
from .host import BenchError, create, destroy, device_model, domains, drop_caches, pss, run, wait_for
from .settings import FILES, Settings

PROGRAM = "/root/workloads.py"
PLACES = {"ours": "/mnt/ours", "theirs": "/mnt/theirs", "block": "/root/block"}


def measure(given: Settings, rounds: int, program: str) -> dict[str, Any]:
    """Run *program* in a guest of its own; its samples, the mounts, and the memory of both backends."""
    trees.reset(given)
    drop_caches()
    create(FILES, trees.config(given, FILES), given.address, given.timeout)
    try:
        inside(given, "modprobe 9pnet_xen && modprobe 9p")
        attach(FILES, "ours")
        mounts = mount(given)
        inside(given, f"cat > {PROGRAM}", text=program)
        places = " ".join(f"{side}={path}" for side, path in PLACES.items())
        printed = inside(given, f"python3 {PROGRAM} {rounds} {places}", timeout=3600)
        return {
            "samples": [sample(line) for line in printed.splitlines() if line.startswith("sample ")],
            "mounts": mounts,
            "pss_kib": memory(),
            "guest_kernel": inside(given, "uname -r").strip(),
        }
    finally:
        destroy(FILES)


def sample(line: str) -> dict[str, Any]:
    """Read one line of the program: sample ROUND WORKLOAD SIDE SECONDS."""
    _, number, workload, side, seconds = line.split()
    return {"round": int(number), "workload": workload, "side": side, "seconds": float(seconds)}


def attach(guest: str, tag: str) -> None:
    """Have our device attached; the policy may be a moment away from being in force."""

    def attached() -> bool:
        done = subprocess.run(
            ["xen9p", "attach", guest, f"bench-{tag}", "--tag", tag], capture_output=True, text=True, check=False
        )
        said.append((done.stderr or done.stdout).strip())
        return done.returncode == 0

    said: list[str] = []
    try:
        wait_for(attached, 20, "")
    except BenchError as error:
        raise BenchError(f"xen9pd does not attach the benchmark's device: {said[-1]}") from error


def mount(given: Settings) -> dict[str, str]:
    """Mount both tags with the same options; the options that the guest's kernel then shows."""
    options = f"trans=xen,version=9p2000.L,msize={given.msize},cache={given.cache}"
    script = [f"mkdir -p {' '.join(PLACES.values())}"]
    for side in ("ours", "theirs"):
        # A device that was attached just now may need a moment.
        script.append(
            f"for i in $(seq 50); do mount -t 9p -o {options} {side} {PLACES[side]} && break; sleep 0.2; done"
        )
    inside(given, "\n".join(script))
    shown = (line.split() for line in inside(given, "cat /proc/mounts").splitlines())
    found = {row[0]: row[3] for row in shown if row[2] == "9p"}
    if missing := {"ours", "theirs"} - set(found):
        raise BenchError(
            f"the tag {', '.join(sorted(missing))} cannot be mounted in {FILES}: see xen9p status and xl dmesg"
        )
    return found


def inside(given: Settings, command: str, text: str = "", timeout: float = 120.0) -> str:
    """Run *command* in the guest; its output."""
    asked = ssh(given, command)
    try:
        done = subprocess.run(asked, input=text, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise BenchError(
            f"the benchmark's guest did not end its work within {timeout:.0f} s: see xen9p status and xl list"
        ) from error
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise BenchError(f"in the benchmark's guest: {words[-1]}")
    return done.stdout


def ssh(given: Settings, command: str) -> list[str]:
    """Return the words that run *command* in the guest."""
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "LogLevel=ERROR"]
    flags = [word for option in (*options, "ConnectTimeout=60") for word in ("-o", option)]
    return ["ssh", "-i", str(given.key), *flags, f"root@{given.address}", command]


def memory() -> dict[str, int]:
    """Return the proportional share of memory of what serves the guest, in KiB."""
    status = json.loads(run("xen9p", "status", "--json"))
    ours = [item for item in status["devices"] if item["guest"] == FILES and item["tag"] == "ours"]
    found: dict[str, int] = {}
    if ours and ours[0].get("pid"):
        found["worker"] = pss(ours[0]["pid"])
    if status.get("host", {}).get("pid"):
        found["supervisor"] = pss(status["host"]["pid"])
    qemu = device_model(domains()[FILES])
    if qemu is not None:
        found["qemu"] = pss(qemu)
    return found
