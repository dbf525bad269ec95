"""What our playbooks print: a failure is one line with the reason in it, and silence never lasts."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def progress() -> ModuleType:
    """The plugin, loaded as Ansible does: by its path."""
    spec = importlib.util.spec_from_file_location("callback_progress", ROOT / "plugins/callback/progress.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"msg": "port 2222 is in use:\n  end it"}, "port 2222 is in use: end it"),
        (
            {
                "msg": "failed to validate",
                "rc": 78,
                "stderr": "a warning\nxen9p: error: export home: /srv/none does not exist: create it\n\n",
            },
            "xen9p: error: export home: /srv/none does not exist: create it",
        ),
        (
            {"msg": "non-zero return code", "cmd": ["mkfs", "/dev/vdb"], "stderr": "", "stdout": "one\nno space\n"},
            "mkfs /dev/vdb: no space",
        ),
        (
            {"msg": "non-zero return code", "cmd": ["/bin/sh", "-s", "x"], "stderr": "export x: create it\n"},
            "export x: create it",
        ),
        (
            {"msg": "Task failed: MODULE FAILURE: see stderr", "module_stderr": "python3: not found\n---\n"},
            "python3: not found",
        ),
        (
            {"msg": "MODULE FAILURE", "module_stderr": "killed\nShared connection to host closed.\n"},
            "killed",
        ),
        ({"msg": "All items completed", "results": [{}, {"failed": True, "msg": "the second"}]}, "the second"),
        ({}, "no message"),
    ],
)
def test_the_reason_is_one_line(progress: ModuleType, data: dict[str, Any], line: str) -> None:
    assert progress._reason(data) == line


def test_a_password_that_sudo_wants_has_a_remedy(progress: ModuleType) -> None:
    said = "Task failed: Premature end of stream waiting for become success. >>> sudo: a password is required"
    assert "ARGS=-K" in progress._reason({"msg": said})


def test_silence_is_broken_in_time_with_what_the_task_is_at(tmp_path: Path) -> None:
    """A task that says nothing for 5 s under a silence of 1 s: a line at least every 4 s, with the file's text."""
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": {"ansible_python_interpreter": sys.executable},
        "tasks": [
            {"name": "Check", "lab_preflight": {"roles_dir": str(ROOT / "roles"), "state_dir": str(tmp_path)}},
            {"name": "Sleep", "ansible.builtin.command": {"argv": ["sleep", "5"]}, "changed_when": False},
        ],
    }
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    (tmp_path / "progress").write_text("at the third of nine packages\n")
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "localhost,", str(tmp_path / "play.yml")]
    env = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "XEN9P_SILENCE": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stamped = [(time.monotonic(), line.rstrip()) for line in process.stdout]
    assert process.returncode == 0, [line for _, line in stamped]
    began = next(index for index, (_, line) in enumerate(stamped) if line.startswith("TASK [Sleep]"))
    times = [when for when, _ in stamped[began:]]
    assert max(after - before for before, after in itertools.pairwise(times)) < 4.0
    assert any(line.startswith("    ... ") and "third of nine" in line for _, line in stamped)
