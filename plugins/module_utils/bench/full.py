"""The full benchmark: all sides in one guest, in turn, with caches dropped and meters read by dom0."""

from __future__ import annotations

import json
import select
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import content, cost, files, plan, trees
from .host import BenchError, create, destroy, domains, drop_caches, pss, run, wait_for
from .settings import FULL, Settings
from .sides import DISK, FLOOR_UNIT, FUSE, V9FS, Side, backends, chosen

AGENT = "/root/agent.py"
TOOLS = "/mnt/tools"
# Seconds for one group on one side: far more than any takes.
PATIENCE = 300.0


def add(given: Settings) -> None:
    """Add to the guest's tree what it needs, and make the sides' files; for trees.prepare()."""
    plan.groups(given)  # refuses a group that does not exist before minutes have gone by
    content.make(given)
    content.bring_tools(given, given.seed / "opt/bench")
    content.install_client(given, given.seed)


def start(given: Settings, programs: dict[str, str]) -> dict[str, Any]:
    """Start the guest and mount every side; the mounts, and how soon each worker was ready.

    *programs*: agent.py and workloads.py for the guest, serve.py and floor.c for dom0, as text.
    """
    bring_watcher(given, programs)
    if any(side.served == "floor" for side in chosen(given)):
        (given.run / "floor/floor.c").write_text(programs["floor.c"])
        # Beside the files, and not where it runs: /run may be mounted noexec.
        run(*_floor(given, "build"), "--source", given.source)
    room = f"mkdir -p {TOOLS} && mount -t tmpfs -o size=75% tmpfs {TOOLS} && cp -r /opt/bench/. {TOOLS}"
    return bring_up(given, {name: programs[name] for name in ("agent.py", "workloads.py")}, room)


def bring_watcher(given: Settings, programs: Mapping[str, str]) -> None:
    """Put serve.py, which watches devices become ready and serves the floor, where it is run."""
    folder = given.run / "floor"
    folder.mkdir()
    (folder / "serve.py").write_text(programs["serve.py"])


def bring_up(given: Settings, programs: Mapping[str, str], more: str = "true") -> dict[str, Any]:
    """Start the guest with *programs* in its /root, run the command *more* in it, and mount every side."""
    drop_caches()
    create(FULL, trees.config(given, FULL), given.address, given.timeout)
    for name, text in programs.items():
        files.inside(given, f"cat > /root/{name}", text=text)
    files.inside(given, f"modprobe 9pnet_xen && modprobe 9p && modprobe ext4 && {more}")
    with _readiness(given) as found:
        _attach(given)
        mounts = _mount(given)
    return {"mounts": mounts, "ready": found, "guest_kernel": files.inside(given, "uname -r").strip()}


@contextmanager
def _readiness(given: Settings) -> Iterator[dict[str, float]]:
    """Watch while devices are attached and mounted; tag -> seconds from the guest's rings to a serving worker."""
    count = len([side for side in chosen(given) if side.served == "xen9p"])
    found: dict[str, float] = {}
    command = [f"{given.client}/bin/python3", str(given.run / "floor/serve.py"), "ready", FULL, str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stderr is not None
        try:
            if watcher.stdout.readline().strip() != "watching":
                raise BenchError(f"cannot watch XenStore: {watcher.stderr.read().strip() or 'no output'}")
            yield found
            line = watcher.stdout.readline()
            if not line:
                raise BenchError(f"devices do not connect: {watcher.stderr.read().strip() or 'no output'}")
            found.update(json.loads(line))
        finally:
            watcher.kill()


def _attach(given: Settings) -> None:
    for side in chosen(given):
        if side.served == "xen9p":
            files.attach(FULL, side.name)
        if side.served == "floor":
            size = ("--size", str(given.file_mib << 20), "--files", "4")
            serve = (*_floor(given, "serve"), FULL, side.name, *size)
            run("systemd-run", "--quiet", "--collect", f"--unit={FLOOR_UNIT}", *serve)


def _floor(given: Settings, verb: str) -> tuple[str, ...]:
    program = (f"{given.client}/bin/python3", str(given.run / "floor/serve.py"))
    return (*program, verb, "--library", str(given.area / "floor.so"))


def _mount(given: Settings) -> dict[str, str]:
    """Mount every side; the options that the guest's kernel then shows for each."""
    script = []
    for side in chosen(given):
        script.append(f"mkdir -p {side.place}")
        command = _mount_command(given, side)
        # A device that was attached just now may need a moment.
        script.append(f"for i in $(seq 30); do {command} && break; sleep 1; done 2>/tmp/mount-{side.name}")
    files.inside(given, "\n".join(script), timeout=300)
    rows = [line.split() for line in files.inside(given, "cat /proc/mounts").splitlines()]
    found = {row[1].removeprefix("/mnt/"): f"{row[2]} {row[3]}" for row in rows if row[1].startswith("/mnt/")}
    if missing := [side.name for side in chosen(given) if side.name not in found]:
        said = files.inside(given, f"head -n 1 /tmp/mount-{missing[0]}").strip()
        raise BenchError(f"{', '.join(missing)} cannot be mounted in {FULL}: {said or 'see xen9p status'}")
    return {side.name: found[side.name] for side in chosen(given)}


def _mount_command(given: Settings, side: Side) -> str:
    if side.how == FUSE:
        return f"xen9p mount {side.name} {side.place}"
    if side.how == DISK:
        return f"mount -t ext4 /dev/{side.device} {side.place}"
    assert side.how == V9FS
    cache = given.caching if side.cached else given.cache
    options = f"trans=xen,version=9p2000.L,msize={given.msize},cache={cache}"
    return f"mount -t 9p -o {options} {side.name} {side.place}"


class Agent:
    """The program in the guest that does one piece of work at a time."""

    def __init__(self, given: Settings, program: str = AGENT) -> None:
        command = files.ssh(given, f"cd /root && exec env BENCH_TOOLS={TOOLS} python3 {program}")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have it done; the agent's answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise BenchError(f"{FULL} did not {request['do']} {request.get('place', '')} within {PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"the program in {FULL} has ended while it did {request['do']}: see xl console {FULL}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"in {FULL}, {request.get('place', '')}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def measure(given: Settings, number: int) -> dict[str, Any]:
    """Run one round, which is numbered from 0: every group through every side that can do it."""
    serving = backends(given)
    samples: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    agent = Agent(given)
    try:
        agent.ask({"do": "drop"})
        for index, group in enumerate(plan.groups(given)):
            for side in plan.order([side for side in chosen(given) if group.fits(side)], number, index):
                if group.cold:
                    agent.ask({"do": "drop"})
                    drop_caches()
                # v9fs has an msize of contiguous memory for each request and reply: what has been in use for a while
                # may have none left, and then a read gets ENOMEM, through any backend.
                agent.ask({"do": "compact"})
                asked = group.request | {"name": group.name, "round": number, "place": side.place}
                if group.warms(side):
                    agent.ask({"do": "warm", "work": asked, "place": side.place})
                before, began = cost.read(serving), time.monotonic()
                answer = agent.ask(asked)
                wall = time.monotonic() - began
                spent = cost.between(before, cost.read(serving), side.name, FULL)
                where = {"round": number, "side": side.name}
                samples += [where | {"workload": name} | found for name, found in answer["sections"].items()]
                operations = sum(found["operations"] for found in answer["sections"].values())
                costs.append(where | {"group": group.name, "operations": operations, "wall": round(wall, 2)} | spent)
    finally:
        agent.close()
    return {"samples": samples, "costs": costs, "pss_kib": memory(given, serving)}


def memory(given: Settings, serving: dict[str, list[int]]) -> dict[str, int]:
    """Return the proportional share of memory of what serves each side, in KiB; kernel threads have none."""
    found = {side: sum(pss(pid) for pid in pids) for side, pids in serving.items()}
    status = json.loads(run("xen9p", "status", "--json"))
    if status.get("host", {}).get("pid"):
        found["supervisor"] = pss(status["host"]["pid"])
    if "fuse" in found:
        rows = files.inside(given, "cat /proc/$(pgrep -of 'xen9p mount')/smaps_rollup").splitlines()
        found["fuse_guest"] = sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
    return {name: kib for name, kib in found.items() if kib}


def stop() -> bool:
    """End the floor and the guest; whether there was anything."""
    running = subprocess.run(["systemctl", "is-active", "--quiet", FLOOR_UNIT], check=False).returncode == 0
    if running:
        run("systemctl", "stop", FLOOR_UNIT)
    there = FULL in domains()
    if there:
        destroy(FULL)
        left = f"the backend still has devices of {FULL}: see xen9p status"
        wait_for(lambda: FULL not in run("xen9p", "status"), 30, left, pause=2.0)
    return running or there
