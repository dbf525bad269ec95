"""The lab caching without Xen: real servers and FUSE mounts of this machine, directories in place of v9fs.

What checks of the kernel's own cache say is for the host that stands (tests/lab/test_labs.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab_parts import ROOT, Bench, bench

SOURCE = ROOT / "xen9p-src" / "src"
COMMAND = "import sys; from xen9p.cli import main; sys.exit(main())"
# In place of xen9p on the host: the counters of a server, from the trace that it writes.
METRICS = """#!/usr/bin/env python3
import json, pathlib, time
for tag in ("slow", "fast"):
    path, size, read = pathlib.Path("@/trace-" + tag + ".json"), -1, 0
    while size != (size := path.stat().st_size):  # it is written a moment later
        time.sleep(0.5)
    for line in path.read_text().splitlines():
        reply = json.loads(line).get("reply") or {}
        read += reply.get("count", 0) if reply.get("type") == "Rread" else 0
    print('xen9p_read_bytes_total{guest="g1",tag="%s",export="own"} %d' % (tag, read))
"""


def lacks() -> str:
    """What this machine lacks; "" if nothing."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "root and /dev/fuse"
    found = subprocess.run(["/usr/bin/python3", "-c", "import pyfuse3"], capture_output=True, check=False)
    return "" if found.returncode == 0 else "pyfuse3 (apt-get install python3-pyfuse3)"


pytestmark = pytest.mark.skipif(bool(lacks()), reason=f"this machine lacks {lacks()}")


@pytest.fixture
def caching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = bench("caching", tmp_path, monkeypatch)
    for guest in ("g1", "g2"):
        (tmp_path / guest / "mnt").mkdir()
        (tmp_path / guest / "mnt/plain").symlink_to(made.part / "own")
    shim = tmp_path / "host/usr/local/bin/xen9p"
    shim.write_text(METRICS.replace("@", str(tmp_path)))
    shim.chmod(0o755)
    return made


@contextmanager
def mount(caching: Bench, tmp_path: Path, tag: str, *options: str) -> Iterator[None]:
    """A server of the export, and a mount of it in g1 with these options."""
    work = Path(caching.look.out("guest", 'echo "$LAB_WORK"').strip())
    environment = {**os.environ, "PYTHONPATH": f"{work}{os.pathsep}{SOURCE}"}
    socket, trace, point = tmp_path / f"{tag}.socket", tmp_path / f"trace-{tag}.json", tmp_path / "g1/mnt" / tag
    trace.unlink(missing_ok=True)
    point.mkdir(exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    try:
        serve = ["serve", "--export", str(caching.part / "own"), "--unix", str(socket), "--trace", str(trace)]
        started.append(subprocess.Popen([sys.executable, "-c", COMMAND, *serve], env=environment))
        until(socket.exists)
        command = ["/usr/bin/python3", "-c", COMMAND, "mount", "-f", "--unix", str(socket), str(point), *options]
        started.append(subprocess.Popen(command, env=environment))
        until(lambda: os.path.ismount(point))
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        if os.path.ismount(point):
            subprocess.run(["umount", "-l", point], check=False)


def until(holds: Callable[[], bool]) -> None:
    """Waits."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "not within 30 s"
        time.sleep(0.05)


def solve(caching: Bench, old: str = "", new: str = "") -> None:
    """The solution's cache, or a variant of it."""
    text = caching.lab.read("solution/steps.md").split("cat > fast.py << 'END'\n", 1)[1].split("END\n", 1)[0]
    assert old in text
    Path(caching.look.out("guest", 'echo "$LAB_WORK/fast.py"').strip()).write_text(text.replace(old, new))


def test_nothing_is_mounted_at_the_start(caching: Bench) -> None:
    assert {name: caching.check(name).part for name in ("modes", "stale", "faster", "never")} == dict.fromkeys(
        ("modes", "stale", "faster", "never"), 0.0
    )


def test_each_cache_gets_what_it_should(caching: Bench, tmp_path: Path) -> None:
    """As handed out, as solved, with a time that anybody can set, and good for some seconds."""
    own, timed = ("--cache", "fast:Fast"), ("--cache", "timed", "--cache-seconds", "60")
    with mount(caching, tmp_path, "slow", "--cache", "slow:Slow"):
        with mount(caching, tmp_path, "fast", *own):
            assert caching.check("faster").part == 0
            assert caching.check("never").part == 1
        solve(caching)
        with mount(caching, tmp_path, "fast", *own):
            for name in ("faster", "never"):
                verdict = caching.check(name)
                assert verdict.part == 1, verdict
        solve(caching, "ctime_ns", "mtime_ns")
        with mount(caching, tmp_path, "fast", *own):
            never = caching.check("never")
            assert (never.part, never.found) == (0, "old data after: kept-time")
        with mount(caching, tmp_path, "fast", *timed):
            assert caching.check("faster").part == 1
            never = caching.check("never")
            assert never.part == 0
            assert "removed" in never.found
