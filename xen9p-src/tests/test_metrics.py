"""`xen9p metrics` and `xen9p top`, on devices that really serve."""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from observed import Host, host
from xen9p import cli, metrics, policy, top
from xen9p.device import Device, Ring
from xen9p.errors import Xen9pError
from xen9p.histogram import BOUNDS
from xen9p.loop import Loop
from xen9p.supervisor import Guest, Managed, Supervisor
from xen9p.workers import Worker
from xen9p.xenbus import GuestId

SAMPLE = re.compile(r'(xen9p_[a-z0-9_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)*)\} ([0-9.e+-]+)')
MAIN = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path, "g1:home", "g2:root") as made:
        yield made


def parse(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and labels; fails where the text breaks the format."""
    assert text.endswith("\n")
    found: dict[tuple[str, ...], float] = {}
    family = kind = ""
    done = set()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert family not in done, "a family stands in one place"
            done.add(family)
        elif line.startswith("# TYPE "):
            assert line.split(" ")[2] == family
            kind = line.split(" ")[3]
            assert (kind == "counter") == family.endswith("_total")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name = match[1]
            assert name == family or (
                kind == "histogram" and name.removeprefix(family) in ("_bucket", "_sum", "_count")
            )
            labels = re.findall(r'[a-z]+="(?:[^"\\]|\\.)*"', match[2])
            key = (name, *labels)
            assert key not in found, "a sample stands once"
            found[key] = float(match[3])
    return found


G1 = ('guest="g1"', 'tag="home"', 'export="home-export"')


def test_a_known_workload_is_counted(lab: Host) -> None:
    home = lab.devices[0].session
    for i in range(10):
        home.client.write_file(home.root, b"f%d" % i, b"x" * 100)
    assert home.client.read_file(home.root, b"f0") == b"x" * 100
    lab.devices[0].extra = {"throttled": 3, "throttled_us": 1_500_000}
    lab.devices[0].restarts = 2
    found = parse(metrics.fetch(lab.runtime))
    assert found["xen9p_operations_total", *G1, 'type="Tlcreate"'] == 10
    assert found["xen9p_written_bytes_total", *G1] == 1000
    assert found["xen9p_read_bytes_total", *G1] == 100
    assert found["xen9p_errors_total", *G1, 'errno="ENOENT"'] == 10
    assert found["xen9p_fids", *G1] == 1
    assert found["xen9p_device_state", *G1, 'state="connected"'] == 1
    assert found["xen9p_device_state", *G1, 'state="failed"'] == 0
    assert found["xen9p_worker_restarts_total", *G1] == 2
    assert found["xen9p_violations_total", *G1] == 0
    assert found["xen9p_throttled_total", *G1] == 3
    assert found["xen9p_throttled_seconds_total", *G1] == 1.5
    assert found[("xen9p_guests",)] == 2
    name = "xen9p_request_duration_seconds"
    for stage in ("ring", "filesystem", "total"):
        labels = (*G1, 'group="change"', f'stage="{stage}"')
        buckets = [v for k, v in found.items() if k[0] == f"{name}_bucket" and k[1:-1] == labels]
        assert len(buckets) == 13
        assert buckets == sorted(buckets), "buckets are cumulative"
        assert buckets[-1] == found[f"{name}_count", *labels]
        assert buckets[-1] == pytest.approx(10, abs=1), "the last may not be counted yet"
        assert (0 if stage == "ring" else 1e-6) <= found[f"{name}_sum", *labels] < 10
    waited = found.get((f"{name}_count", *G1, 'group="change"', 'stage="queue"'), 0)
    assert waited <= 10, "most are the reader's own"


def test_labels_are_escaped_and_stand_once(lab: Host) -> None:
    lab.devices[0].guest = 'a"b\\c\nd'
    lab.devices[1].guest, lab.devices[1].tag = lab.devices[0].guest, "home"
    found = parse(metrics.fetch(lab.runtime))
    samples = [key for key in found if key[0] == "xen9p_fids"]
    assert [key[1] for key in samples] == ['guest="a\\"b\\\\c\\nd"']


@pytest.mark.parametrize("where", ["127.0.0.1:0", "[::1]:0", "unix"])
def test_prometheus_can_fetch_them(lab: Host, where: str) -> None:
    address = str(lab.runtime / "m.sock") if where == "unix" else where
    listening: list[object] = []
    ready = threading.Event()

    def took(server: object) -> None:
        listening.append(server)
        ready.set()

    thread = threading.Thread(target=metrics.serve, args=(address, lab.runtime, took), daemon=True)
    thread.start()
    assert ready.wait(5)
    server = listening[0]
    try:
        connection = http.client.HTTPConnection("localhost")
        if where == "unix":
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(address)
            assert Path(address).stat().st_mode & 0o777 == 0o660
        else:
            connection.sock = socket.create_connection(server.server_address[:2])  # type: ignore[attr-defined]
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == metrics.CONTENT_TYPE
        assert parse(answer.read().decode())
        connection.close()
        if where != "unix":
            other = http.client.HTTPConnection(*server.server_address[:2])  # type: ignore[attr-defined]
            other.request("GET", "/")
            assert other.getresponse().status == 404
            other.close()
    finally:
        server.shutdown()  # type: ignore[attr-defined]
        thread.join(5)


def test_a_textfile_is_replaced_whole(lab: Host, capsys: pytest.CaptureFixture[str]) -> None:
    file = lab.runtime / "xen9p.prom"
    file.write_text("old")
    assert cli.main(["metrics", "--output", str(file), "--runtime-dir", str(lab.runtime)]) == 0
    assert parse(file.read_text())
    assert file.stat().st_mode & 0o777 == 0o644
    assert not list(lab.runtime.glob(".xen9p.prom*"))
    for args in (["--output", "/nonexistent/x"], ["--listen", "nowhere"], ["--listen", "/nonexistent/x"]):
        assert cli.main(["metrics", *args, "--runtime-dir", str(lab.runtime)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("xen9p: error: ")


def test_the_supervisor_hears_of_them_from_the_worker(lab: Host) -> None:
    """The supervisor's end of the conversation with a real worker."""
    loop = Loop()
    device = lab.devices[0]
    path = lab.runtime / f"worker-{device.domid}-{device.devid}.sock"
    worker = Worker(loop, path, lambda: None, lambda *_: None)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    worker.adopt(os.getpid(), sock, {})
    worker.is_ready = True
    heard: list[str] = []
    assert worker.ask("metrics", lambda: heard.append("metrics"))
    assert worker.ask("stats", lambda: heard.append("stats"))
    while len(heard) < 2:
        loop.step()
    assert worker.detail["by_type"]["104"] == 1
    assert worker.detail["times"]["session"]["total"]["seconds"] > 0
    assert "by_type" not in worker.stats
    sock.close()


def test_what_the_supervisor_counts_and_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    there: Any = SimpleNamespace(connected=True, pid=1)
    supervisor = Supervisor(Loop(), there, there, policy.Policy(source="/p"), tmp_path)
    guest = supervisor.guests[5] = Guest(GuestId(5, "g1", "u"))
    managed = Managed(guest, 2, policy.Grant("home-export", tmp_path, "home", False, True), Device())
    guest.devices[2] = managed
    managed.machine.rings((Ring(1, 2),))
    managed.machine.worker_gone(0.0)
    managed.machine.violation("num-rings is 99")
    found = parse(metrics.text(supervisor.metrics()))
    assert found["xen9p_worker_restarts_total", *G1] == 1
    assert found["xen9p_violations_total", *G1] == 1
    assert ("xen9p_fids", *G1) not in found, "there is no worker that has any"
    with caplog.at_level(logging.INFO):
        managed.say("warning", "closed")
    fields = {"GUEST": "g1", "DOMID": "5", "DEVICE": "5/2", "TAG": "home", "EXPORT": "home-export"}
    assert caplog.records[0].fields == fields  # type: ignore[attr-defined]


# top


def test_once_shows_rates_of_each_device(lab: Host, capsys: pytest.CaptureFixture[str]) -> None:
    home = lab.devices[0].session
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            home.client.write_file(home.root, b"f", b"x" * 1000)
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        runtime = ["--interval", "0.2", "--runtime-dir", str(lab.runtime)]
        assert cli.main(["top", "--once", *runtime]) == 0
        table = capsys.readouterr().out.splitlines()
        assert cli.main(["top", "--once", "--json", "--sort", "name", *runtime]) == 0
        value = json.loads(capsys.readouterr().out)
    finally:
        over.set()
        thread.join()
    assert table[0].split() == list(top._HEAD)
    assert table[1].split()[0] == "g1:home", "the busiest comes first"
    assert table[2].split()[:2] == ["g2:root", "0"]
    first, second = value["devices"]
    assert (first["guest"], second["guest"]) == ("g1", "g2")
    assert first["ops"] > 10
    assert first["written"] > 1000
    assert first["p50"] in BOUNDS
    assert first["p50"] <= first["p99"]
    assert second["ops"] == 0
    assert second["p50"] is None
    assert first["fids"] >= 1


def test_a_new_worker_does_not_give_negative_rates(lab: Host) -> None:
    before = top.sample(lab.runtime)
    for device in before.answer["devices"]:
        device["detail"]["requests"] += 1000
    assert all(row.ops == 0 for row in top.rows(before, top.sample(lab.runtime)))


@pytest.mark.parametrize("width", [80, 60, 20])
def test_a_table_fits(lab: Host, width: int) -> None:
    lab.devices[0].guest = "a-guest-with-quite-a-long-name-for-a-guest"
    lab.devices[1].guest, lab.devices[1].phase = "evil\x1b[2J", "failed"
    now = top.sample(lab.runtime)
    busy = top.Row("g" * 30, "t", "e", "connected", 123456, 9.9e9, 1e12, 99999, 0.5, 8.4, 262144, 64, 64, 99999)
    lines = top.table([*top.rows(now, now), busy], width)
    assert all(len(line) <= width and line.isprintable() for line in lines)
    if width == 80:
        assert lines[0].endswith("THR/s"), "all columns fit into 80"
        assert "failed" in " ".join(lines)


def test_figures() -> None:
    assert [top.figure(n) for n in (0, 3, 0.25, 9.5, 10, 999, 1000, 12_345, 99_950, 123_456, 5_000_000)] == [
        "0", "3", "0.2", "9.5", "10", "999", "1.0k", "12.3k", "100k", "123k", "5.0M",
    ]  # fmt: skip


def read_until(fd: int, word: bytes) -> bytes:
    seen = b""
    end = time.monotonic() + 10
    while word not in seen:
        assert select.select([fd], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(fd, 65536)
    return seen


def test_the_screen_in_a_terminal(lab: Host) -> None:
    """A real pseudo-terminal: it draws, sorts, follows a new size, and leaves everything as it was."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [*MAIN, "top", "--interval", "0.2", "--runtime-dir", str(lab.runtime)],
        stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert b"\x1b[?1049h" in read_until(ours, b"g2:root")
        os.write(ours, b"l")
        read_until(ours, b"by latency")
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))
        process.send_signal(signal.SIGWINCH)  # as the kernel does for its controlling terminal
        narrow = read_until(ours, b"by latency   q quit  o ops  r \x1b[K")
        assert b"by latency   q quit  o ops  r re" not in narrow[-200:]
        os.write(ours, b"q")
        read_until(ours, b"\x1b[?25h\x1b[?1049l")
        assert process.wait(5) == 0
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


def test_no_terminal_no_screen(lab: Host) -> None:
    done = subprocess.run(
        [*MAIN, "top", "--runtime-dir", str(lab.runtime)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "xen9p: error: this is no terminal (for scripts: xen9p top --once, or --json)\n"
    with pytest.raises(Xen9pError):
        metrics.write_to(lab.runtime, "a directory")
