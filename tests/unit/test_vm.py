"""The machine's state directory, its command line, and what leads into it."""

from __future__ import annotations

import tarfile
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
import yaml

from modules import load
from testbed import accel, access, vm
from testbed.errors import TestbedError
from testbed.progress import Progress
from testbed.wait import wait_for_ssh

SPEC = vm.VmSpec("lab", "/cache/host-1", "tcg", 2, 4096, 1536, 20, 2222)
GUESTS = [{"name": "g1", "address": "10.9.0.11"}]


def test_a_stale_pid_file_is_no_machine(tmp_path: Path) -> None:
    machine = vm.Vm(tmp_path)
    assert machine.pid() is None
    # A process lives under this number, but it is no QEMU of ours.
    (tmp_path / "qemu.pid").write_text("1\n")
    assert machine.pid() is None
    assert machine.stop() is False


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    machine = vm.Vm(tmp_path)
    (tmp_path / "vm.json").write_text('{"name": "lab"}')
    assert machine.recorded() is None


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    state = tmp_path / ".lab" / "lab"
    access.write_if_changed(state / "inventory" / "hosts.yml", b"---\n")
    machine = vm.Vm(state)
    assert machine.remove() is True
    assert list(tmp_path.iterdir()) == []
    assert machine.remove() is False


def test_waiting_for_a_dead_machine_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "console.log").write_text("(XEN) Panic on CPU 0:\r\n")
    with pytest.raises(TestbedError, match=r"last words: .*Panic on CPU 0"):
        wait_for_ssh(vm.Vm(tmp_path), 1, 60, Progress(None))


def test_emulation_uses_the_processor_that_works() -> None:
    command = vm.qemu_command(SPEC)
    assert vm.TCG_CPU in command
    assert "user,id=net,hostfwd=tcp:127.0.0.1:2222-:22" in command
    assert "host" in vm.qemu_command(vm.VmSpec(**{**vars(SPEC), "accelerator": "kvm"}))


def test_a_machine_that_boots_by_itself_is_given_no_kernel() -> None:
    assert "-kernel" in vm.qemu_command(SPEC)
    assert not {"-kernel", "-initrd", "-append"} & set(vm.qemu_command(vm.VmSpec(**{**vars(SPEC), "boot": "disk"})))


def test_keys_are_made_once_and_the_seed_carries_them(tmp_path: Path) -> None:
    assert access.write_all(tmp_path, 2222, GUESTS) is True
    assert access.write_all(tmp_path, 2222, GUESTS) is False
    with tarfile.open(fileobj=BytesIO((tmp_path / "seed.tar").read_bytes())) as archive:
        key = archive.extractfile("root/.ssh/authorized_keys")
        assert key is not None
        assert key.read() == (tmp_path / "id_ed25519.pub").read_bytes()
        assert archive.getmember("etc/ssh/ssh_host_ed25519_key").mode == 0o600
    assert (tmp_path / "known_hosts").read_text().startswith("[127.0.0.1]:2222 ssh-ed25519 ")


def test_the_inventory_is_literal(tmp_path: Path) -> None:
    text = access.inventory(tmp_path, GUESTS)
    groups = yaml.safe_load(text)["all"]["children"]
    assert list(groups["xen_hosts"]["hosts"]) == ["host"]
    assert list(groups["guests"]["hosts"]) == ["g1"]
    assert "{{" not in text


def test_guests_are_reached_through_the_host(tmp_path: Path) -> None:
    text = access.ssh_config(tmp_path, 2299, GUESTS)
    host, guest = text.split("\n\n") if "\n\n" in text else text.split("Host g1")
    assert "Port 2299" in host
    assert "ProxyJump host" in guest
    assert "HostName 10.9.0.11" in guest


class KilledError(Exception):
    """The run ended here."""


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Machines that were started, by image; nothing is really run."""
    started: list[str] = []

    def make(arguments: Sequence[str]) -> None:
        """Write the backing file's name, or the size, as the disk."""
        path = Path(next(word for word in arguments if word.endswith(".part")))
        path.write_text(arguments[arguments.index("-b") + 1] if "-b" in arguments else arguments[-1])

    def backing(path: Path) -> str | None:
        return str(Path(path.read_text()).parent) if path.exists() else None

    monkeypatch.setattr(vm, "_qemu_img", make)
    monkeypatch.setattr(vm, "_backing", backing)
    monkeypatch.setattr(vm.Vm, "_launch", lambda self, spec: started.append(spec.image))
    return started


@pytest.mark.parametrize("where", ["_write_record", "_make_disks", "_launch"])
def test_a_run_that_is_killed_on_the_way_to_a_new_image_can_be_repeated(
    tmp_path: Path, launches: list[str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    machine, newer = vm.Vm(tmp_path), vm.VmSpec(**{**vars(SPEC), "image": "/cache/host-2"})
    machine.start(SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(vm.Vm, where, lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            machine.start(newer)
    machine.start(newer)
    assert machine.recorded() == newer
    assert machine.host_disk.read_text() == "/cache/host-2/disk.raw"
    assert machine.store_disk.read_text() == "20G"
    assert launches == ["/cache/host-1", "/cache/host-2"]


@pytest.mark.usefixtures("launches")
def test_without_a_record_the_disk_itself_tells(tmp_path: Path) -> None:
    machine = vm.Vm(tmp_path)
    machine.start(SPEC)
    (tmp_path / "vm.json").unlink()
    assert "new host disk" not in machine.start(SPEC)
    (tmp_path / "vm.json").unlink()
    assert "new host disk" in machine.start(vm.VmSpec(**{**vars(SPEC), "image": "/cache/host-2"}))


def test_the_probe_for_kvm_believes_in_what_ran_only(tmp_path: Path) -> None:
    # Emulation stands in for a KVM that works.
    assert accel.kvm_works(vm.QEMU, accelerator="tcg", timeout=20)
    assert not accel.kvm_works("false", accelerator="tcg")
    assert not accel.kvm_works(str(tmp_path / "missing"), accelerator="tcg")


def test_a_kvm_that_gives_up_is_noticed_at_once(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho 'KVM internal error. Suberror: 1' >&2\nexec sleep 60\n")
    qemu.chmod(0o755)
    began = time.monotonic()
    assert not accel.xen_boots(str(qemu), tmp_path, timeout=50)
    assert time.monotonic() - began < 10


def test_a_machine_that_nobody_asks_has_no_status(tmp_path: Path) -> None:
    assert vm.Vm(tmp_path).status() == ""


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize(("status", "waits"), [("running", True), ("", True), ("internal-error", False)])
def test_only_what_qemu_has_stopped_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, waits: bool
) -> None:
    """A monitor that does not answer in time belongs to a busy machine: that one is shut down as always."""
    machine, stops = vm.Vm(tmp_path), list[tuple[float, ...]]()
    machine.start(SPEC)
    monkeypatch.setattr(machine, "pid", lambda: 1)
    monkeypatch.setattr(machine, "status", lambda: status)
    monkeypatch.setattr(machine, "stop", lambda *timeout: stops.append(timeout))
    machine.start(vm.VmSpec(**{**vars(SPEC), "memory": 5000}))
    assert stops == [() if waits else (0.0,)]


@pytest.mark.parametrize(("status", "probes"), [("running", 0), ("", 0), ("internal-error", 1)])
def test_a_machine_that_runs_keeps_its_accelerator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, probes: int
) -> None:
    module, machine, asked = load("testbed_vm"), vm.Vm(tmp_path), list[str]()

    def choose(wanted: str, *_: object) -> str:
        asked.append(wanted)
        return "kvm"

    machine._write_record(SPEC)
    monkeypatch.setattr(machine, "pid", lambda: 1)
    monkeypatch.setattr(machine, "status", lambda: status)
    monkeypatch.setattr(machine, "start", lambda spec: [spec.accelerator])
    monkeypatch.setattr(module.access, "write_all", lambda *_: False)
    monkeypatch.setattr(module.accel, "choose", choose)
    values = {**vars(SPEC), "accelerator": "auto", "guests": []}
    assert module.start(machine, values) == ["kvm" if probes else "tcg"]
    assert asked == ["auto"] * probes
