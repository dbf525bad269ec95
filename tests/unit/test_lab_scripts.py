"""What labs hand out, and what their checks expect of it, are the same: run here, without Xen, in plain directories."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from labkit import course, guide, look, setup, spec, transport
from labkit.errors import CouldNotLookError
from labkit.look import Look
from xen9p import control
from xen9p.errors import ControlError
from xen9p.loop import Loop

NAME = socket.gethostname()
STUDENT = course.from_document(
    {
        "course": "x",
        "seed": "5e" * 32,
        "hosts": {"h": {"address": "192.0.2.1"}},
        "students": [{"name": "ada", "host": "h", "guests": [NAME, "another"]}],
    }
).student("ada")


def checks(name: str) -> Any:
    """The module of a lab's checks."""
    lab = spec.load(name)
    found = look.load_checks(lab)
    return sys.modules[next(iter(found.values())).__module__]


def values(name: str, **more: str) -> dict[str, str]:
    """A student's values, as a shell has them."""
    return {key: str(value) for key, value in setup.values_of(spec.load(name), STUDENT).items()} | more


def run(command: str, folder: Path, variables: Mapping[str, str]) -> str:
    """What a command of the shell prints; it must work."""
    env = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=env, check=True, capture_output=True, text=True).stdout


def written(name: str, place: str, folder: Path, variables: Mapping[str, str]) -> None:
    """The files that the reference solution writes at a place by `cat > FILE << 'END'`, as it writes them."""
    for block in guide.blocks(spec.load(name).read("solution/steps.md"), name):
        if block.place == place:
            for text in re.findall(r"(?ms)^cat > \w+ << 'END'\n.*?^END\n", block.commands):
                run(text, folder, variables)


@pytest.mark.parametrize("place", ["guest", "guest2"])
@pytest.mark.parametrize("solved", [False, True], ids=["start", "solution"])
def test_what_dedups_installer_installs_is_what_its_check_expects(tmp_path: Path, place: str, solved: bool) -> None:
    lab = spec.load("dedup")
    mine = values("dedup") | {"guest": NAME if place == "guest" else "another"}
    for script in ("install", "show"):
        (tmp_path / script).write_bytes((lab.folder / "start" / "guest" / script).read_bytes())
    if solved:
        written("dedup", place, tmp_path, mine)
    shown = run("sh ./install tree 2345678; sh ./show tree", tmp_path, mine)
    # Both guests have this machine's name here: install asks the kernel.
    looked = Look(lab, STUDENT, {**mine, "guest": NAME, "guest2": NAME}, system=_nowhere(), ends=0)
    assert hashlib.sha256(shown.encode()).hexdigest() == checks("dedup").shown(looked, place, 2345678)
    assert checks("dedup").shown(looked, place, 2345679) != checks("dedup").shown(looked, place, 2345678)


def test_dedups_check_counts_blocks_of_the_disk_and_no_others() -> None:
    text = (
        "Filesystem type is: 9123683e\nFile size of a is 9000 (3 blocks of 4096 bytes)\n"
        " ext:     logical_offset:        physical_offset: length:   expected: flags:\n"
        "   0:        0..       1:       3328..      3329:      2:             shared\n"
        "   1:        2..       2:       9000..      9000:      1:       3330: last,shared,eof\n"
        "a: 2 extents found\n"
        "   0:        0..     499:          0..       499:    500:             last,not_aligned,inline,eof\n"
    )
    assert checks("dedup").blocks(text) == {3328, 3329, 9000}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A student's part of the capstone."""
    script = setup.tree_script(spec.load("capstone"), STUDENT).replace("chown 0:0", "true")
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    return tmp_path / "tree"


def prepared(tree: Path) -> str:
    """The checksum that the check expects of the app, after it has changed the sources."""
    program = checks("capstone").PREPARE
    return subprocess.run(
        ["python3", "-I", "-c", program, tree], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_capstones_build_makes_the_app_and_writes_what_is_predicted(tree: Path) -> None:
    mine = values("capstone")
    wanted = prepared(tree)
    sizes = {path: path.stat().st_size for path in sorted(tree.rglob("*")) if path.is_file()}
    run(f"sh {spec.load('capstone').folder}/start/guest/build {tree} 1 1", tree, {})
    assert hashlib.sha256((tree / "out" / "app").read_bytes()).hexdigest() == wanted
    made = {path: path.stat().st_size for path in tree.glob("out/1/*")}
    written_bytes = sum(made.values()) + (tree / "out" / "app").stat().st_size
    whole = 12 * (int(mine["header"]) + 33 + int(mine["unit"]))
    assert written_bytes == whole + 2 * 12 * 68
    # Every change of the check leaves the sizes alone, so an answer stays right.
    assert prepared(tree) != wanted
    assert all(path.stat().st_size == size for path, size in sizes.items())


def test_the_capstones_solution_makes_the_same_in_parts_and_anew(tree: Path, tmp_path: Path) -> None:
    mine = values("capstone")
    for place in ("guest", "guest2"):
        (tmp_path / place).mkdir()
        written("capstone", place, tmp_path / place, mine)
    for _ in range(2):
        wanted = prepared(tree)
        subprocess.run(["rm", "-rf", tree / "out"], check=True)
        (tree / "out").mkdir()
        both = f"sh guest/build {tree} 1 2 & sh guest2/build {tree} 2 2; wait"
        run(both, tmp_path, mine)
        assert hashlib.sha256((tree / "out" / "app").read_bytes()).hexdigest() == wanted
    assert not [path for path in Path("/dev/shm").glob("head.*") if path.stat().st_mtime > tree.stat().st_mtime]


def test_the_capstones_race_is_scored_by_ratios_step_by_step() -> None:
    module = checks("capstone")
    theirs, mine = module.Work(), module.Work()
    for begin in (1_000, 2_000):
        said = f"stat 100 8 50 16\ntime {begin}000000000\ntime {begin + 4}000000000\nstat 110 208 60 2016\n"
        theirs.count([said, said], writes=True)
        theirs.took([said, said])
    assert (theirs.requests, theirs.read, theirs.written, theirs.times) == (
        80,
        4 * 200 * 512,
        4 * 2000 * 512,
        [4.0, 4.0],
    )
    mine = module.Work(requests=0.1, read=0.1, written=0.1, times=[9.0, 2.0])
    assert module.score(mine, theirs).part == 1
    steps = module.STEPS
    assert {name for name, _ in module.amounts(mine, theirs).items()} == set(steps)
    half = module.Work(80 * steps["requests"][1], theirs.read * steps["read"][1], theirs.written * 9, times=[4.0, 8.0])
    found = module.score(half, theirs)
    assert found.part == pytest.approx((1 + 0.5 + 0.5 + 0 + 1) / 5)
    assert "written: 9.00" in found.found
    with pytest.raises(CouldNotLookError, match="has no read"):
        module.score(mine, module.Work(1, 0, 1, [1.0]))


def test_who_tampers_in_the_lab_snapshots_leaves_size_and_time(tmp_path: Path) -> None:
    lab = spec.load("snapshots")
    script = setup.tree_script(lab, STUDENT)
    subprocess.run(["bash", "-c", re.sub(r"chown \S+", "true", script)], cwd=tmp_path, check=True)
    files = sorted((tmp_path / "data").iterdir())
    before = {path: (path.read_bytes(), path.stat()) for path in files}
    run(f"sh {lab.folder}/start/guest/tamper {tmp_path}", tmp_path, {})
    assert sorted((tmp_path / "data").iterdir()) == files
    differs = []
    for path, (data, was) in before.items():
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
        differs += [at for at, (one, other) in enumerate(zip(data, path.read_bytes(), strict=True)) if one != other]
    assert len(differs) == 3
    assert differs[-1] - differs[0] == 2


def _nowhere() -> transport.System:
    """A student's machines, for what asks none of them."""
    return transport.connect(
        course.from_document(
            {
                "course": "x",
                "seed": "5e" * 32,
                "hosts": {"h": {"local": "/nonexistent"}},
                "students": [{"name": "ada", "host": "h", "guests": []}],
            }
        ).student("ada")
    )


class Xen9pd:
    """Devices of guests, at a control socket that is the supervisor's own; what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[control.Request] = []
        self.reloading = 1
        """How often a device is refused, as while a new policy is on its way."""
        self.devices = [
            {"guest": guest, "tag": tag, "path": path, "export": "e", "access": "rw", "state": "connected"}
            for guest, tag, path in (
                ("g1", "own", "/store/labs/ada/tour/own"),
                ("g1", "all", "/store/labs/ada/tour"),
                ("g1", "home", "/store/labs/ada/tour-two"),
                ("g2", "own", "/store/labs/ada/tour/own"),
                ("g3", "own", "/store/labs/ada/tour/own"),
            )
        ]
        self.path = folder / "control.sock"
        self._loop = Loop()
        self._server = control.ControlServer(self._loop, self.path, self._handle)
        self._told, self._tell = socket.socketpair()
        self._loop.add(self._told, self._loop.stop)
        self._thread = threading.Thread(target=self._loop.run)
        self._thread.start()

    def _handle(self, request: control.Request, answer: control.Answer) -> None:
        self.asked.append(request)
        match request:
            case control.Detach("g2", tag):
                raise ControlError(f"guest g2 has no tag {tag}")
            case control.Detach("g3", _):
                raise ControlError("XenStore does not answer")
            case control.Attach(guest="off"):
                raise ControlError("no guest off is running")
            case control.Attach(guest, _, tag) if any((d["guest"], d["tag"]) == (guest, tag) for d in self.devices):
                raise ControlError(f"guest {guest} has tag {tag} already")
            case control.Attach() if self.reloading:
                self.reloading -= 1
                raise ControlError("the policy gives guest g1 no export")
            case control.Attach(guest, export, tag):
                state = {"guest": guest, "tag": tag, "path": "/p", "export": export, "access": "rw", "state": "init"}
                self.devices.append(state)
            case control.Status():
                answer({"ok": True, "devices": [dict(device) for device in self.devices]})
                for device in self.devices:
                    device["state"] = "connected"
                return
        answer({"ok": True})

    def close(self) -> None:
        self._tell.send(b"!")
        self._thread.join(5)
        self._server.close()
        self._told.close()
        self._tell.close()


@pytest.fixture
def xen9pd(tmp_path: Path) -> Iterator[Xen9pd]:
    made = Xen9pd(tmp_path)
    yield made
    made.close()


def devices(path: Path, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Runs devices.py as the scripts do."""
    command = [sys.executable, "-I", "-S", "-c", (setup.SCRIPTS / "devices.py").read_text(), str(path), *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=30, check=False)


def test_a_labs_devices_are_taken_away_and_no_others(xen9pd: Xen9pd) -> None:
    done = devices(xen9pd.path, "detach", "/store/labs/ada/tour", "g1")
    assert (done.returncode, done.stderr) == (0, "")
    assert xen9pd.asked == [control.Status(), control.Detach("g1", "all"), control.Detach("g1", "own")]
    assert devices(xen9pd.path, "detach", "/store/labs/ada/tour", "g2").returncode == 0, "somebody else was quicker"
    done = devices(xen9pd.path, "detach", "/store/labs/ada/tour", "g3")
    assert (done.returncode, done.stderr) == (3, "error: g3 keeps own: XenStore does not answer\n")


def test_a_labs_devices_are_given_whatever_is_there_and_waited_for(xen9pd: Xen9pd) -> None:
    done = devices(xen9pd.path, "attach", given="g1 e own kernel\ng1 e new kernel\ng1 e user user\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert xen9pd.reloading == 0, "what is refused at first is asked for again"
    assert {(d["guest"], d["tag"]) for d in xen9pd.devices} >= {("g1", "own"), ("g1", "new"), ("g1", "user")}
    looks = [request for request in xen9pd.asked if isinstance(request, control.Status)]
    assert len(looks) == 2  # it was not connected at first
    done = devices(xen9pd.path, "list", "/store/labs/ada/tour", "g1")
    assert done.stdout.splitlines() == [
        "device g1 all e rw /store/labs/ada/tour",
        "device g1 own e rw /store/labs/ada/tour/own",
    ], "those of another lab are not this one's affair"


def test_a_guest_that_is_off_and_a_service_that_is_not_there_are_one_line(xen9pd: Xen9pd, tmp_path: Path) -> None:
    done = devices(xen9pd.path, "attach", given="off e own kernel\n")
    assert (done.returncode, done.stderr) == (3, "error: off does not run: xl create /etc/xen/off.cfg\n")
    done = devices(tmp_path / "nobody", "list", "/store", "g1")
    assert (done.returncode, done.stderr) == (3, "error: xen9pd does not answer: systemctl status xen9pd\n")
