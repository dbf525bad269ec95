"""Byte-range locks: between two guests, and between a guest and dom0. The death of a guest: test_zz_lifecycle.py."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from lab import Dom0, connect, scratch
from locks import attempt, flock, hold, posix

BUSY = str(errno.EAGAIN)
THERE = "/srv/xen9p/home/locks/f"


@pytest.fixture
def file() -> Iterator[str]:
    with scratch(connect("g1"), "/home/locks") as path:
        connect("g1").check_output(f"touch {path}/f")
        yield f"{path}/f"


def test_two_guests(file: str) -> None:
    g1, g2 = connect("g1"), connect("g2")
    pid = hold(g1, file, posix(True, 100, 50))
    assert attempt(g2, file, posix(True, 149, 1)) == BUSY
    assert attempt(g2, file, posix(False, 0, 0)) == BUSY
    assert attempt(g2, file, posix(True, 150, 10)) == "held"
    assert attempt(g1, file, posix(True, 120, 1)) == BUSY, "and inside one guest"
    g1.check_output(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")
    assert attempt(g2, file, posix(True)) == "held"


def test_shared_locks(file: str) -> None:
    g1, g2 = connect("g1"), connect("g2")
    pid = hold(g1, file, posix(False))
    assert attempt(g2, file, posix(False)) == "held"
    assert attempt(g2, file, posix(True)) == BUSY
    g1.check_output(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")


def test_flock_is_a_lock_of_the_whole_file(file: str) -> None:
    """Also on a descriptor for reading, as on a local filesystem."""
    g1, g2 = connect("g1"), connect("g2")
    pid = hold(g1, file, flock(True), "os.O_RDONLY")
    assert attempt(g2, file, flock(True), "os.O_RDONLY") == BUSY
    assert attempt(g2, file, flock(False)) == BUSY
    g1.check_output(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")
    assert attempt(g2, file, flock(True)) == "held"


def test_programs_of_dom0(dom0: Dom0, file: str) -> None:
    g1 = connect("g1")
    pid = hold(g1, file, posix(True, 5, 10))
    assert attempt(dom0.host, THERE, posix(True, 14, 1)) == BUSY
    assert attempt(dom0.host, THERE, posix(True, 15, 1)) == "held"
    g1.check_output(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")
    pid = hold(dom0.host, THERE, posix(True))
    assert attempt(g1, file, posix(False)) == BUSY
    dom0.out(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")
    assert attempt(g1, file, posix(False)) == "held"


def test_who_is_in_the_way(file: str) -> None:
    """F_GETLK names the range; the process is in another guest, so it has no number here."""
    g1, g2 = connect("g1"), connect("g2")
    pid = hold(g2, file, posix(True, 7, 3))
    ask = "import fcntl, os, struct; file = os.open('/home/locks/f', os.O_RDWR);" + (
        "raw = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 0, 0);"
        "print(*struct.unpack('hhqqi4x', fcntl.fcntl(file, fcntl.F_GETLK, raw)))"
    )
    kind, _, start, length, owner = map(int, g1.check_output(f'python3 -c "{ask}"').split())
    assert (kind, start, length) == (1, 7, 3)
    assert owner != pid
    g2.check_output(f"kill -9 {pid}; while kill -0 {pid} 2>/dev/null; do sleep 0.1; done")


def test_a_waiting_lock_is_asked_for_again(file: str) -> None:
    """F_SETLKW of another guest's lock: v9fs asks again after its locktimeout."""
    g1, g2 = connect("g1"), connect("g2")
    pid = hold(g1, file, posix(True))
    wait = "import fcntl, os; fcntl.lockf(os.open('/home/locks/f', os.O_RDWR), fcntl.LOCK_EX); print('got it')"
    g2.check_output(f'nohup python3 -c "{wait}" > /tmp/waiter 2>&1 < /dev/null &')
    g2.check_output("sleep 2")
    assert g2.check_output("cat /tmp/waiter") == ""
    g1.check_output(f"kill -9 {pid}")
    limit = 45  # the default of locktimeout is 30 seconds
    said = g2.check_output(f"for i in $(seq {limit}); do [ -s /tmp/waiter ] && break; sleep 1; done; cat /tmp/waiter")
    assert said.strip() == "got it"
