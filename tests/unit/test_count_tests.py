"""The last line of CI counts every test, and a report that is not whole is called out, never a traceback."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import count_tests

NONE = '<testsuites><testsuite tests="0" failures="0" errors="0" skipped="0"/></testsuites>'
GOOD = '<testsuites><testsuite tests="5" failures="{}" errors="0" skipped="1"/></testsuites>'


def reports(folder: Path, unit: str | None, lab: str | None) -> Path:
    """Write these reports; None is a missing one. The others have nothing in them."""
    for name in ("junit-package.xml", "junit-store.xml", "junit-long.xml"):
        (folder / name).write_text(NONE)
    for name, text in (("junit-unit.xml", unit), ("junit-lab.xml", lab)):
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_two_whole_reports(tmp_path: Path) -> None:
    folder = reports(tmp_path, GOOD.format(0), GOOD.format(0))
    assert count_tests.summary(folder, 0) == (["8 passed, 0 failed, 2 skipped"], True)


def test_the_real_host_counts_when_it_was_tested(tmp_path: Path) -> None:
    folder = reports(tmp_path, GOOD.format(0), GOOD.format(0))
    (folder / "junit-real-host.xml").write_text(GOOD.format(1))
    assert count_tests.summary(folder, 0) == (["11 passed, 1 failed, 3 skipped"], False)
    (folder / "junit-real-host.xml").write_text(GOOD[:30])
    lines, well = count_tests.summary(folder, 0)
    assert not well
    assert lines[0].endswith("the tests of the real host were cut off")


def test_a_failure_counts(tmp_path: Path) -> None:
    folder = reports(tmp_path, GOOD.format(0), GOOD.format(2))
    assert count_tests.summary(folder, 0) == (["6 passed, 2 failed, 2 skipped"], False)


@pytest.mark.parametrize("broken", ["", GOOD[:30], GOOD.format("x"), "\0"])
def test_a_truncated_report_is_one_line(tmp_path: Path, broken: str) -> None:
    lines, well = count_tests.summary(reports(tmp_path, GOOD.format(0), broken), 0)
    assert not well
    assert lines[0].startswith("error: junit-lab.xml cannot be read")
    assert lines[1:] == ["4 passed, 0 failed, 1 skipped"]


def test_a_lab_that_was_never_tested_is_called_out(tmp_path: Path) -> None:
    lines, well = count_tests.summary(reports(tmp_path, GOOD.format(0), None), 2)
    assert not well
    assert "no junit-lab.xml" in lines[0]
    assert lines[1:] == ["error: make test failed with exit status 2", "4 passed, 0 failed, 1 skipped"]


def test_ci_keeps_the_status_of_make(tmp_path: Path) -> None:
    """The script itself, with a make that fails before any test."""
    root = Path(__file__).resolve().parents[2]
    for name in (".ci/run", "tools/count_tests.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "make").write_text("#!/bin/sh\nexit 2\n")
    (tmp_path / "bin" / "make").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", tmp_path / ".ci/run"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0 passed, 0 failed, 0 skipped"
