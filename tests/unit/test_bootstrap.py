"""tools/bootstrap on machines that lack something: one line with the remedy, and nothing changed before it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [
    "bash",
    "cat",
    "cut",
    "date",
    "df",
    "dirname",
    "env",
    "flock",
    "grep",
    "mkdir",
    "printf",
    "sed",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "tail",
    "tr",
    "uname",
]


class Machine:
    """A copy of what bootstrap needs, below *folder*, with a PATH of stubs; everything is installed and enough."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        for name in ("bin", "tools", "home", ".venv/bin"):
            (folder / name).mkdir(parents=True)
        for name in ("tools/bootstrap", "requirements.txt"):
            shutil.copy(ROOT / name, folder / name)
        for name in TOOLS:
            if path := shutil.which(name):
                (self.bin / name).symlink_to(path)
        self.stub("dpkg-query", "printf installed")
        self.stub("df", "echo Avail; echo 100G")
        self.stub("sudo", '[ "$1" = -v ] || exec "$@"')
        self.memory(16384)
        version = subprocess.run(["/usr/bin/python3", "--version"], capture_output=True, check=True).stdout
        text = version + (folder / "requirements.txt").read_bytes()
        stamp = subprocess.run(["sha256sum"], input=text, capture_output=True, check=True).stdout.split()[0]
        (folder / ".venv/stamp").write_bytes(stamp + b"\n")

    def stub(self, name: str, script: str) -> None:
        """Put a command of ours in the place of the real one."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def memory(self, mib: int) -> None:
        """Set the available memory."""
        (self.folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {mib * 1024} kB\n")

    def environment(self, arguments: str = "") -> dict[str, str]:
        """Return the whole environment of a run."""
        home = self.folder / "home"
        return {
            "PATH": str(self.bin),
            "HOME": str(home),
            "XEN9P_MEMINFO": str(self.folder / "meminfo"),
            "ARGS": arguments,
        }

    def run(self, mode: str = "lab", arguments: str = "") -> tuple[int, list[str]]:
        """Return exit status and the lines of both outputs."""
        done = subprocess.run(
            ["bash", self.folder / "tools/bootstrap", mode],
            env=self.environment(arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()

    def refused(self, mode: str = "lab") -> str:
        """Run it, and return its one line, which is an error and comes before any change."""
        before = sorted(self.folder.rglob("*"))
        code, lines = self.run(mode)
        assert code == 1
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert sorted(self.folder.rglob("*")) == before
        return lines[0]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which nothing is missing."""
    if not Path("/usr/bin/python3").exists():
        pytest.skip("bootstrap is for systems with /usr/bin/python3")
    return Machine(tmp_path)


def test_nothing_to_do(machine: Machine) -> None:
    assert machine.run("lab") == (0, [])
    assert machine.run("check") == (0, [])


def test_too_little_memory_and_the_remedy_works(machine: Machine) -> None:
    machine.memory(4200)
    line = machine.refused()
    assert "4200 MiB of memory are available, 5632 are needed" in line
    assert 'ARGS="-e testbed_memory=' in line
    assert machine.run("lab", "-e testbed_memory=2560") == (0, [])
    assert machine.run("check") == (0, [])


def test_too_little_disk(machine: Machine) -> None:
    machine.stub("df", "echo Avail; echo 3G")
    assert "3 GiB are free for" in machine.refused()
    machine.stub("df", "echo Avail; echo 11G")
    assert machine.run() == (0, [])


def test_another_platform(machine: Machine) -> None:
    machine.stub("uname", '[ "$1" = -s ] && echo Linux || echo aarch64')
    assert "use another machine" in machine.refused("check")


def test_no_virtual_environment_to_stop_anything_with(machine: Machine) -> None:
    assert "tools/bootstrap check" in machine.refused("installed")
    (machine.folder / ".venv/bin/ansible-playbook").touch(0o755)
    assert machine.run("installed") == (0, [])


def test_neither_debian_nor_ubuntu(machine: Machine) -> None:
    machine.stub("dpkg-query", "exit 1")
    code, lines = machine.run()
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: this is neither Debian nor Ubuntu: install the equivalents of: gcc")
    assert "mmdebstrap" in lines[0]


def test_a_package_that_does_not_install_is_named(machine: Machine) -> None:
    machine.stub("dpkg-query", "exit 1")
    machine.stub(
        "apt-get", '[ "$2" = update ] && exit 0; echo Reading; echo "E: Unable to locate package zstd"; exit 100'
    )
    code, lines = machine.run()
    assert code == 1
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "E: Unable to locate package zstd" in lines[-1]
    machine.stub("apt-get", "exit 0")
    assert machine.run()[0] == 0


def test_a_second_run_waits_and_leaves_the_log_of_the_first_alone(machine: Machine) -> None:
    cache = machine.folder / ".cache"
    cache.mkdir()
    (cache / "steps").write_text("7 apt\n")
    (cache / "bootstrap.log").write_text("at work\n")
    with (cache / "bootstrap.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen(
            ["bash", machine.folder / "tools/bootstrap", "check"],
            env=machine.environment(),
            stdout=subprocess.PIPE,
            text=True,
        ) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == "another run is setting up the controller: waiting for it\n"
            assert (cache / "steps").read_text() == "7 apt\n"
            assert (cache / "bootstrap.log").read_text() == "at work\n"
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert second.wait(20) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root needs no sudo")
def test_neither_root_nor_sudo(machine: Machine) -> None:
    machine.stub("dpkg-query", "exit 1")
    machine.stub("apt-get", "exit 0")
    (machine.bin / "sudo").unlink()
    code, lines = machine.run()
    assert code == 1
    assert lines[0].startswith("error: packages are missing, and there is neither root nor sudo")
