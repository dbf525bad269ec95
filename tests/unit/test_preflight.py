"""Bad input to the real playbooks: one line with the remedy before anything is changed, and then it works.

Each case is a run of ansible-playbook on a throw-away inventory of a host that is never reached. The runs are
started side by side, because each spends about a second on starting Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import modules
from testbed import manifest

ROOT = Path(__file__).resolve().parents[2]
GUESTS = [{"name": "g1", "address": "10.9.0.11"}, {"name": "g2", "address": "10.9.0.12"}]


@dataclass(frozen=True)
class Case:
    """Variables that are wrong, words that the one line has, and variables that put it right.

    Without a remedy, to leave the variable out is one: the first case is the proof that this works.
    """

    name: str
    wrong: dict[str, Any]
    said: tuple[str, ...]
    remedy: dict[str, Any] = field(default_factory=dict)
    hosts: tuple[str, ...] = ("host",)


CASES = (
    Case("nothing wrong", {}, ()),
    Case("no hosts", {}, ("no host in group 'xen_hosts'", "inventory/classroom/"), hosts=()),
    Case("typo", {"guest_memmory": 512}, ("'guest_memmory'", "did you mean 'guest_memory'?"), {"guest_memory": 512}),
    Case("prefix typo", {"xenhost_bridge": "br0"}, ("did you mean 'xen_host_bridge'?",), {"xen_host_bridge": "br0"}),
    Case("wrong type", {"guest_memory": "much"}, ("guest_memory", "'much'", "int")),
    Case(
        "unknown guest in a rule",
        {"xen9p_rules": [{"guest": "g9", "export": "home", "tag": "x"}]},
        ("g9", "not in guest_guests (g1, g2)"),
        {"xen9p_rules": [{"guest": "g2", "export": "home", "tag": "x"}]},
    ),
    Case(
        "unknown export in a rule",
        {"xen9p_rules": [{"guest": "g1", "export": "hoem", "tag": "x"}]},
        ("hoem", "correct the name or add the export"),
    ),
    Case("mistyped key of an export", {"xen9p_exports": {"x": {"pth": "/srv/xen9p/home"}}}, ('did you mean "path"?',)),
    Case(
        "path that nothing makes",
        {"xen9p_exports": {"x": {"path": "/srv/xen9p/hoem"}}},
        ("export x: /srv/xen9p/hoem does not exist", "correct xen9p_exports"),
        {"xen9p_exports": {"x": {"path": "/srv/xen9p/home/x"}}},
    ),
    Case(
        "tag given twice",
        {"xen9p_rules": [{"guest": "g1", "export": "course", "tag": "home"}]},
        ('tag "home" is given twice', "give each its own tag"),
    ),
    Case(
        "too much for the nested host",
        {"testbed_enabled": True, "guest_memory": 4096},
        ("set testbed_memory to 9928 or more",),
        {"testbed_enabled": True, "testbed_memory": 9928},
    ),
    Case("claimed by a live run", {"testbed_enabled": True}, ("another run (pid", "wait until it ends")),
)


@dataclass(frozen=True)
class Run:
    """How a run of the playbook ended."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(("error:", "fatal:", "[ERROR]", "ERROR"))]


class Playbooks:
    """Runs the checks at the head of site.yml, without what comes after them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        golden_tree(self.cache)
        book = [{"name": name, "ansible.builtin.import_playbook": str(ROOT / "playbooks" / name)} for name in HEAD]
        (folder / "head.yml").write_text(yaml.safe_dump(book))

    def run(self, name: str, values: dict[str, Any], hosts: tuple[str, ...]) -> Run:
        """Run them on an inventory of its own with these variables."""
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir()
        values = {"testbed_enabled": False, "testbed_state_dir": str(self.folder / "lab"), **values}
        group = {"hosts": {name: {"ansible_host": "192.0.2.1"} for name in hosts}}
        inventory = {"all": {"vars": {"guest_guests": GUESTS, **values}, "children": {"xen_hosts": group}}}
        (folder / "hosts.yml").write_text(yaml.safe_dump(inventory))
        command = [sys.executable, "-m", "ansible", "playbook", "-i", str(folder / "hosts.yml")]
        env = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_LOCAL_TEMP": str(folder / "tmp"),
            "ANSIBLE_NOCOLOR": "1",
            "XEN9P_CACHE": str(self.cache),
        }
        done = subprocess.run(
            [*command, str(self.folder / "head.yml")],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        return Run(done.returncode, done.stdout)


HEAD = ("preflight.yml", "check.yml")


def golden_tree(cache: Path) -> None:
    """Put a golden tree of the default inputs into *cache*, as far as looking at it goes."""
    golden = modules.load("guest_golden")
    defaults = yaml.safe_load((ROOT / "roles/guest/defaults/main.yml").read_text())
    names = {"suite": "guest_suite", "packages": "guest_packages", "kernel_modules": "guest_kernel_modules"}
    given = {key: defaults[name] for key, name in names.items()}
    inputs = golden.described({**given, "files": str(ROOT / "roles/guest/files/golden")})
    tree = cache / f"golden-{manifest.digest(inputs)}"
    tree.mkdir(parents=True)
    manifest.write(tree, inputs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """The run of each case, and of its remedy, all under way."""
    playbooks = Playbooks(tmp_path_factory.mktemp("preflight"))
    started: dict[str, Future[Run]] = {}
    lab = playbooks.folder / "lab"
    lab.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            for case in CASES:
                values = dict(case.wrong)
                if case.name.startswith("claimed"):
                    claim(lab, other.pid)
                elif values.get("testbed_enabled"):
                    values["testbed_state_dir"] = str(playbooks.folder / "other-lab")
                started[case.name] = pool.submit(playbooks.run, case.name, values, case.hosts)
                if case.said and case.remedy:
                    right = {"testbed_state_dir": str(playbooks.folder / f"lab-{len(started)}"), **case.remedy}
                    started[f"remedy of {case.name}"] = pool.submit(
                        playbooks.run, f"remedy of {case.name}", right, case.hosts
                    )
            yield started
        other.communicate()


def claim(lab: Path, pid: int) -> None:
    """Write the lock's record of a run that is alive."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    (lab / "lock").write_text(json.dumps({"pid": pid, "started": ticks}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_the_remedy_works(case: Case, runs: dict[str, Future[Run]]) -> None:
    run = runs[case.name].result()
    if not case.said:
        assert (run.code, run.errors) == (0, []), run.output
        return
    assert run.code != 0, run.output
    assert len(run.errors) == 1, run.output
    assert "Traceback" not in run.output
    for words in case.said:
        assert words in run.errors[0]
    if case.remedy:
        again = runs[f"remedy of {case.name}"].result()
        assert (again.code, again.errors) == (0, []), again.output
