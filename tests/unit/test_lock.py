"""One run at a time works on a lab, and a run that died stands in nobody's way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import lock
from testbed.errors import TestbedError


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that lives until it is told to go."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def test_the_same_run_may_claim_again(tmp_path: Path) -> None:
    lock.claim(tmp_path / "lock", os.getpid(), "lab")
    lock.claim(tmp_path / "lock", os.getpid(), "lab")


def test_another_run_is_refused_in_one_line(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    lock.claim(tmp_path / "lock", other.pid, "lab")
    with pytest.raises(TestbedError, match=rf"another run \(pid {other.pid}\) is working on lab 'lab'") as caught:
        lock.claim(tmp_path / "lock", os.getpid(), "lab")
    assert "\n" not in str(caught.value)


def test_a_dead_holder_does_not_count(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    lock.claim(tmp_path / "lock", other.pid, "lab")
    other.communicate()
    lock.claim(tmp_path / "lock", os.getpid(), "lab")


def test_a_reused_pid_does_not_count(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    (tmp_path / "lock").write_text(json.dumps({"pid": other.pid, "started": "1"}))
    lock.claim(tmp_path / "lock", os.getpid(), "lab")


@pytest.mark.parametrize("text", ["", "rubbish", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_damaged_record_does_not_count(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    lock.claim(tmp_path / "lock", os.getpid(), "lab")


def test_exclusive_waits_for_the_other_holder(tmp_path: Path) -> None:
    waited: list[bool] = []
    code = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()

    def on_wait() -> None:
        waited.append(True)
        holder.communicate()

    with lock.exclusive(tmp_path / "lock", on_wait):
        assert waited == [True]


def test_a_lock_file_that_cannot_be_written_still_locks(tmp_path: Path) -> None:
    (tmp_path / "lock").touch(0o444)
    with lock.exclusive(tmp_path / "lock"):
        pass
