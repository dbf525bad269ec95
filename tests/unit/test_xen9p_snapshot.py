"""The module for snapshots: arguments first, nothing done twice, and check mode asks and changes nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import modules

PATH = modules.PLUGINS / "modules" / "xen9p_snapshot.py"


@pytest.fixture(scope="module")
def snapshot() -> ModuleType:
    return modules.load("xen9p_snapshot")


def given(**more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "target": "g1",
        "name": None,
        "state": "present",
        "reason": "",
        "paths": [],
        "online": False,
    }
    paths = {"command": "xen9p", "policy": "/p", "runtime_dir": "/r"}
    return {**options, "force": False, "new": None, "keep": None, **paths, **more}


class Host:
    """Answers as the command does, and notes what it was asked."""

    def __init__(self, *names: str, exports: tuple[str, ...] = ("g1-root", "home")) -> None:
        self.exports = exports
        self.snapshots = [{"export": e, "name": n} for n in names for e in exports]
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, verb: str, *words: str, paths: list[str] | None = None) -> dict[str, Any]:
        self.asked.append((verb, *words, *(paths or [])))
        match verb:
            case "list":
                return {"exports": list(self.exports), "snapshots": self.snapshots}
            case "clone":
                return {"changed": "new" in words, "path": "/srv/new"}
            case _:
                return {"changed": True}

    @property
    def changing(self) -> list[tuple[str, ...]]:
        return [asked for asked in self.asked if asked[0] != "list" and "--dry-run" not in asked]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"state": "absent"}, "state absent needs the name of a snapshot"),
        ({"state": "restored"}, "state restored needs the name of a snapshot"),
        ({"state": "cloned", "name": "a"}, "state cloned needs new"),
        ({"state": "pruned"}, "state pruned needs keep"),
        ({"state": "pruned", "keep": {"last": 0}}, "it would delete every snapshot"),
        ({"state": "pruned", "keep": {"last": -1}}, "keep.last is -1"),
        ({"target": "--force"}, "target is '--force'; it cannot begin with a dash"),
        ({"name": "-x"}, "name is '-x'"),
        ({"paths": ["a"]}, "paths are for state restored"),
    ],
)
def test_arguments_are_checked_first(snapshot: ModuleType, options: dict[str, Any], line: str) -> None:
    assert line in "; ".join(snapshot.problems(given(**options)))
    assert snapshot.problems(given(name="a")) == []


def test_present(snapshot: ModuleType) -> None:
    host = Host("a")
    assert snapshot.work(given(name="a"), False, host)["changed"] is False
    assert host.changing == []
    assert snapshot.work(given(name="b", reason="-x", force=True), False, host)["changed"] is True
    assert host.changing == [("create", "--force", "--reason=-x", "g1", "b")]
    assert snapshot.work(given(), False, host)["changed"] is True, "without a name each is a new one"
    host.snapshots.pop()
    assert snapshot.work(given(name="a"), True, host)["changed"] is True, "one export has none"


def test_absent(snapshot: ModuleType) -> None:
    host = Host("a")
    assert snapshot.work(given(name="b", state="absent"), False, host)["changed"] is False
    assert host.changing == []
    assert snapshot.work(given(name="a", state="absent"), False, host)["changed"] is True
    assert host.changing == [("delete", "g1", "a")]


def test_the_others(snapshot: ModuleType) -> None:
    host = Host("a")
    snapshot.work(given(name="a", state="restored", paths=["x", "-y"], online=True), False, host)
    snapshot.work(given(state="pruned", keep={"last": 2, "daily": 7, "hourly": 0}), False, host)
    snapshot.work(given(state="pruned", keep={"last": 1}, reason="lesson"), False, host)
    assert snapshot.work(given(name="a", state="cloned", new="old"), False, host)["changed"] is False
    assert snapshot.work(given(name="a", state="cloned", new="new"), False, host)["changed"] is True
    assert host.changing == [
        ("restore", "--online", "g1", "a", "x", "-y"),
        ("prune", "--keep-last=2", "--keep-daily=7", "g1"),
        ("prune", "--reason=lesson", "--keep-last=1", "g1"),
        ("clone", "g1", "a", "new"),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "b"},
        {},
        {"name": "a", "state": "absent"},
        {"name": "a", "state": "restored"},
        {"name": "a", "state": "cloned", "new": "new"},
        {"state": "pruned", "keep": {"last": 1}},
    ],
)
def test_check_mode_changes_nothing(snapshot: ModuleType, options: dict[str, Any]) -> None:
    host = Host("a")
    assert snapshot.work(given(**options), True, host)["changed"] is True
    assert host.changing == []


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Runs the module as Ansible does."""
    text = json.dumps({"ANSIBLE_MODULE_ARGS": arguments})
    done = subprocess.run([sys.executable, str(PATH)], input=text, capture_output=True, text=True, check=False)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_an_error_of_the_command_is_one_line(tmp_path: Path) -> None:
    command = tmp_path / "xen9p"
    command.write_text("#!/bin/sh\necho 'xen9p: error: no export x (its exports: home)' >&2\nexit 1\n")
    command.chmod(0o755)
    said = run({"target": "x", "command": str(command)})
    assert (said["failed"], said["msg"]) == (True, "snapshots: no export x (its exports: home)")
    said = run({"target": "x", "command": str(tmp_path / "none")})
    assert "run roles/xen9p on this host first" in said["msg"]
    assert "needs the name" in run({"target": "x", "state": "absent", "command": str(tmp_path / "none")})["msg"]


def test_what_it_asks_the_real_command_understands(snapshot: ModuleType, tmp_path: Path) -> None:
    """Every line that the module makes is one that the parser of xen9p takes."""
    parser = importlib.import_module("xen9p.parser").build_parser()
    host = Host("a")
    for options in (
        {"name": "b", "reason": "r", "force": True},
        {"name": "a", "state": "absent"},
        {"name": "a", "state": "restored", "paths": ["x"], "online": True},
        {"name": "a", "state": "cloned", "new": "new"},
        {"state": "pruned", "keep": {"last": 1, "hourly": 1, "daily": 1, "weekly": 1, "monthly": 1, "yearly": 1}},
    ):
        for dry in (False, True):
            snapshot.work(given(**options), dry, host)
    log = tmp_path / "log"
    command = tmp_path / "xen9p"
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "" >> {log}\necho "{{}}"\n')
    command.chmod(0o755)
    ask = snapshot.asker(given(command=str(command)))
    for verb, *words in host.asked:
        plain = words[: words.index("x")] if "x" in words else words
        ask(verb, *plain, paths=["x"] if "x" in words else None)
    lines = [block.split("\n") for block in log.read_text().strip("\n").split("\n\n")]
    assert len(lines) == len(host.asked)
    for line in lines:
        assert parser.parse_args(line).command == "snapshot"
