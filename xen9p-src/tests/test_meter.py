"""The line that says how far something is."""

from __future__ import annotations

import io

import pytest

from xen9p import meter
from xen9p.meter import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, *, after: float, quiet: bool = False) -> str:
    """What is written of three steps in one moment."""
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(meter, "AFTER", after)
    with Meter(quiet=quiet) as line:
        for step in range(3):
            line.show(lambda _, step=step: f"step {step}")  # type: ignore[misc]
    return stderr.getvalue()


def test_it_is_shown_once_in_a_while_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), after=0) == "\r\x1b[Kstep 0\r\x1b[K"


def test_what_is_quick_or_quiet_or_no_terminal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, Terminal(), after=60) == ""
    assert shown(monkeypatch, Terminal(), after=0, quiet=True) == ""
    assert shown(monkeypatch, io.StringIO(), after=0) == ""
