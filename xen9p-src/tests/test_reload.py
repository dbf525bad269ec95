"""One export's missing directory: the service starts and reloads, and only the grants of that export wait."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from xen9p import daemon, policy
from xen9p.errors import ControlError, PolicyError
from xen9p.loop import Loop
from xen9p.supervisor import Guest, Supervisor
from xen9p.xenbus import GuestId


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A policy that gives g1 a directory that is there and one that is not."""
    (tmp_path / "here").mkdir()
    path = tmp_path / "policy.toml"
    path.write_text(
        "version = 1\n"
        f'[exports.gone]\npath = "{tmp_path}/gone"\n[exports.here]\npath = "{tmp_path}/here"\n'
        '[[rules]]\nguest = "g1"\nexport = "gone"\n[[rules]]\nguest = "g1"\nexport = "here"\n'
    )
    return path


@pytest.fixture
def given(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Supervisor, list[str]]:
    """A supervisor that knows g1, and the tags that it attaches."""
    nothing: Any = None
    supervisor = Supervisor(Loop(), nothing, nothing, policy.Policy(source=str(file)), file.parent)
    supervisor.guests[1] = Guest(GuestId(1, "g1", "u"))
    tags: list[str] = []
    monkeypatch.setattr(supervisor, "attach", lambda _guest, grant: tags.append(grant.tag))
    return supervisor, tags


def test_a_missing_directory_stops_no_start(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken(_runtime: Path) -> int:
        raise ControlError("the policy was taken")  # nothing after this works without Xen

    monkeypatch.setattr(daemon, "lock", taken)
    assert daemon.main(["--policy", str(file), "--runtime-dir", str(file.parent)]) == 1
    assert "the policy was taken" in capsys.readouterr().err


def test_a_policy_that_does_not_parse_stops_the_start(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("version = \n")
    assert daemon.main(["--policy", str(file), "--runtime-dir", str(file.parent)]) == 78
    assert capsys.readouterr().err.count("\n") == 1


def test_only_the_grants_of_a_missing_directory_wait(
    file: Path, given: tuple[Supervisor, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    supervisor, tags = given
    with caplog.at_level(logging.WARNING):
        supervisor.reload()
    assert tags == ["here"]
    said = {(r.levelname, r.getMessage().partition(" (")[0]) for r in caplog.records}
    missing = f"export gone: {file.parent}/gone does not exist"
    assert said == {("WARNING", f"policy: {missing}"), ("ERROR", f"guest=g1 tag=gone not attached: {missing}")}
    (file.parent / "gone").mkdir()
    tags.clear()
    supervisor.reload()
    assert tags == ["gone", "here"]


def test_a_faulty_policy_is_not_taken(file: Path, given: tuple[Supervisor, list[str]]) -> None:
    supervisor, tags = given
    before = supervisor.policy
    file.write_text('version = 1\n[exports.a]\npath = "relative"\n')
    with pytest.raises(PolicyError, match="relative"):
        supervisor.reload()
    assert supervisor.policy is before
    assert not tags
