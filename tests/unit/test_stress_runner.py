"""The runner of others' torture tells what passed from what did not; with programs that stand for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import stress

PROGRAM = """#!/bin/sh
case "$1" in
--hdd) exit 0 ;;
--flock) echo 'fail: a lock was had twice'; exit 2 ;;
--fpunch) echo 'skipping: no holes'; exit 4 ;;
--dirdeep) exec sleep 60 ;;
-c) echo "Throughput 1 MB/sec"; exit 0 ;;
esac
"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Programs of another system, with a loader that starts them."""
    (tmp_path / "bin").mkdir()
    for name in ("stress-ng", "dbench", "postmark", "fio"):
        (tmp_path / "bin" / name).write_text(PROGRAM)
    (tmp_path / "ld.so").write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    for program in (*(tmp_path / "bin").iterdir(), tmp_path / "ld.so"):
        program.chmod(0o755)
    return tmp_path


def test_results(tools: Path) -> None:
    """A program that ends well and says nothing has not passed, if it is one that says how fast it was."""
    wanted = {
        "hdd": ("passed", ""),
        "flock": ("failed", "fail: a lock was had twice"),
        "fpunch": ("skipped", "skipping: no holes"),
        "dbench": ("passed", ""),
        "postmark": ("failed", ""),
    }
    only = [f"--only={name}" for name in wanted]
    command = [sys.executable, stress.__file__, str(tools / "place"), "--tools", str(tools), *only]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"]: (one["result"], one["said"]) for one in found} == wanted
    assert list((tools / "place").iterdir()) == []


def test_what_does_not_end_is_ended(tools: Path) -> None:
    work = next(work for work in stress.works(str(tools / "w"), 1, "") if work.name == "dirdeep")
    found = stress.run(work, str(tools / "w"), str(tools), 0.3)
    assert found == {"name": "dirdeep", "result": "failed", "said": "not done within 0.3 s"}
