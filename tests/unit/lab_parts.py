"""Parts of the labs that need no Xen: a lab's checks on directories of this machine in place of host and guests."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from labkit import course, guide, setup, spec, transport
from labkit.look import Look, Verdict, load_checks
from labkit.spec import Lab

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Bench:
    """A lab's working folders and values, without store, policy and devices."""

    lab: Lab
    look: Look
    part: Path

    def check(self, name: str) -> Verdict:
        """What one check says now."""
        self.look.facts.clear()
        self.look.ends = time.monotonic() + 60
        verdict = load_checks(self.lab)[name](self.look)
        assert isinstance(verdict, Verdict)
        return verdict

    def follow(self, path: str) -> None:
        """Runs the commands of a text."""
        guide.follow(self.lab.read(path), path, self.look.system, {}, lambda _: None)


def bench(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The lab of that name, handed out below tmp_path to a student whose guests are g1 and g2."""
    lab = spec.load(name)
    document = {
        "course": "tests",
        "seed": "5e" * 32,
        "hosts": {"h": {"local": str(tmp_path), "store": "/store"}},
        "students": [{"name": "ada", "host": "h", "guests": ["g1", "g2"]}],
    }
    student = course.from_document(document).student("ada")
    system = transport.connect(student)
    paths = setup.where(lab.name, student)
    bin_folder = "usr/local/bin"
    for place in ("host", "guest", "guest2"):
        root = tmp_path / system.name(place)
        work = root / paths.work.removeprefix("${ROOT:-}/")
        kit = lab.folder / "start" / ("host" if place == "host" else "guest")
        shutil.copytree(kit, work, dirs_exist_ok=True) if kit.is_dir() else work.mkdir(parents=True)
        (work / "values").write_text(setup.values_file(lab, student))
        (root / bin_folder).mkdir(parents=True)
        shutil.copy(setup.SCRIPTS / "lab-values", root / bin_folder)
    monkeypatch.setenv("XEN9P_PYTHON", sys.executable)
    source = f"{ROOT}/xen9p-src/src"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    part = tmp_path / system.name("host") / paths.part.removeprefix("${ROOT:-}/")
    part.mkdir(parents=True)
    done = system.run("host", f'cd "{paths.part}" && {setup.tree_script(lab, student)}')
    assert done.code == 0, done.said
    look = Look(lab, student, setup.values_of(lab, student), system, time.monotonic() + 60)
    return Bench(lab, look, part)
