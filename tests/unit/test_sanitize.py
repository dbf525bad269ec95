"""Runs of the sanitizers: what they find ends the run, and only their own breakdown is tried again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import sanitize


@pytest.mark.parametrize(
    ("said", "code", "runs"),
    [
        (sanitize.BROKEN[0], 23, 2),
        ("ERROR: AddressSanitizer: heap-use-after-free", 99, 1),
        ("1 failed", 1, 1),
    ],
)
def test_only_a_breakdown_is_tried_again(
    said: str, code: int, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "runs"
    program = f"""
import pathlib, sys
log = pathlib.Path({str(log)!r})
log.write_text((log.read_text() if log.exists() else "") + "x")
if len(log.read_text()) == 1:
    print({said!r}, file=sys.stderr)
    sys.exit({code})
"""

    def command(library: Path, tests: Sequence[str]) -> list[str]:
        del library, tests
        return [sys.executable, "-c", program]

    monkeypatch.setattr(sanitize, "build", lambda _: tmp_path)
    monkeypatch.setattr(sanitize, "environment", lambda *_: {})
    monkeypatch.setattr(sanitize, "pytest_command", command)
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--quick"])
    assert sanitize.main() == (0 if runs > 1 else code)
    assert log.read_text() == "x" * runs


def test_what_breaks_down_each_time_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"print({sanitize.BROKEN[1]!r}); raise SystemExit(66)"
    monkeypatch.setattr(sanitize, "build", lambda _: tmp_path)
    monkeypatch.setattr(sanitize, "environment", lambda *_: {})
    monkeypatch.setattr(sanitize, "pytest_command", lambda *_: [sys.executable, "-c", program])
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 66
