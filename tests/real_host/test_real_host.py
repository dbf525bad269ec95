"""A Debian machine that the roles turned into a Xen host through its own GRUB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab import CONTROL, LIVE, REPOSITORY, STATE, Dom0, ask, drop_connection, wait_until

SCENARIO = REPOSITORY / "molecule" / "real_host"


@dataclass(frozen=True)
class Look:
    """The machine at one moment of molecule/real_host/prepare.yml."""

    boot_id: str
    command_line: str
    xen_files: int


@dataclass(frozen=True)
class Seen:
    """What prepare.yml kept: the refusals by their case, and the machine before, after refusals, and after the stop."""

    said: dict[str, str]
    before: Look
    refused: Look
    stopped: Look


@pytest.fixture(scope="session")
def dom0() -> Iterator[Dom0]:
    """The Xen host."""
    assert (STATE / "ssh_config").exists(), f"no machine stands in {STATE}; run: make test-real-host"
    yield Dom0()
    for name in list(LIVE):
        drop_connection(name)
    CONTROL.rmdir()


@pytest.fixture(scope="session")
def seen() -> Seen:
    """What prepare.yml kept."""
    kept = json.loads((STATE / "refusals.json").read_text())

    def look(name: str) -> Look:
        boot_id, command_line, files = kept[name]
        return Look(boot_id, command_line, int(files))

    return Seen(kept["said"], look("before"), look("refused"), look("stopped"))


def boot_id(dom0: Dom0) -> str:
    return dom0.out("cat /proc/sys/kernel/random/boot_id").strip()


def test_the_machine_was_plain_debian_that_grub_had_booted(seen: Seen) -> None:
    assert seen.before.command_line.startswith("BOOT_IMAGE=/boot/vmlinuz-")
    assert seen.before.xen_files == 0


def test_without_grub_it_is_refused_and_nothing_is_changed(seen: Seen) -> None:
    assert "real does not run under Xen and has no update-grub; boot it into Xen" in seen.said["grub"]
    assert len(seen.said["grub"].splitlines()) == 1
    assert seen.refused == seen.before


def test_a_dom0_that_would_not_boot_is_refused_and_nothing_is_changed(seen: Seen) -> None:
    assert seen.said["memory"].startswith("xen_host_dom0_memory is 100 MiB")
    assert len(seen.said["memory"].splitlines()) == 1
    assert seen.refused == seen.before


def test_it_is_not_rebooted_without_leave(seen: Seen) -> None:
    assert seen.said["reboot"] == "real has to boot into Xen; reboot it by hand, or set xen_host_reboot: true"
    assert seen.stopped.boot_id == seen.before.boot_id
    assert seen.stopped.xen_files > 0


def test_the_reboot_went_into_xen(dom0: Dom0, seen: Seen) -> None:
    assert boot_id(dom0) != seen.before.boot_id
    assert dom0.out("cat /sys/hypervisor/type").strip() == "xen"
    assert "control_d" in dom0.out("cat /proc/xen/capabilities")


def test_grub_started_xen_with_what_the_variables_ask(dom0: Dom0) -> None:
    # QEMU was given no kernel: what runs was found on the disk.
    command = Path(f"/proc/{(STATE / 'qemu.pid').read_text().strip()}/cmdline").read_bytes().split(b"\0")
    assert b"-kernel" not in command
    # The first word is one that GRUB's own script for Xen gives dom0's kernel.
    assert dom0.out("cat /proc/cmdline").startswith("placeholder root=UUID=")
    xen = dom0.out("xl info xen_commandline").split()
    assert {"dom0_mem=1280M,max:1280M", "console=com1", "com1=115200,8n1", "spec-ctrl=no", "xpti=no"} <= set(xen)
    assert dom0.out("xl list Domain-0").splitlines()[-1].split()[:3] == ["Domain-0", "0", "1280"]
    # The rest of the machine is for guests.
    assert int(dom0.out("xl info free_memory")) > 1024


def test_the_bridge_and_the_way_out(dom0: Dom0) -> None:
    assert "10.9.0.1/24" in dom0.out("ip -4 address show dev xenbr0")
    assert "masquerade" in dom0.out("nft list table ip xen_host")
    assert dom0.out("cat /proc/sys/net/ipv4/ip_forward").strip() == "1"
    # The machine's own network is still what ifupdown made of it.
    assert "10.0.2.15" in dom0.out("ip -4 address show dev ens5")
    assert "unmanaged" in dom0.out("networkctl --no-legend list ens5")


def test_a_device_with_data_is_refused(dom0: Dom0) -> None:
    dom0.out("mkfs.ext4 -q -F /dev/vdb && mkdir -p /mnt/data && mount /dev/vdb /mnt/data")
    dom0.out("echo treasure > /mnt/data/file && umount /mnt/data")
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(SCENARIO / "inventory")]
    done = subprocess.run(
        [*command, str(REPOSITORY / "tests" / "real_host" / "store.yml")],
        env={**os.environ, "ANSIBLE_CONFIG": str(REPOSITORY / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "/dev/vdb" in errors[0]
    assert "ext4" in errors[0]
    assert dom0.out("mount -o ro /dev/vdb /mnt/data && cat /mnt/data/file && umount /mnt/data").strip() == "treasure"


def test_all_of_it_comes_back_after_a_reboot(dom0: Dom0) -> None:
    dom0.out("echo kept > /srv/xen9p/home/file && sync")
    before = boot_id(dom0)
    dom0.run("systemd-run --on-active=1 systemctl reboot")
    drop_connection("host")

    def back() -> bool:
        now = ask("host", "cat /proc/sys/kernel/random/boot_id")
        return now is not None and now != before

    wait_until("the machine is back", back, 480)
    assert dom0.out("systemctl is-system-running --wait || systemctl --failed --no-legend").strip() == "running"
    assert "control_d" in dom0.out("cat /proc/xen/capabilities")
    mount = dom0.host.mount_point("/srv/xen9p")
    assert mount.filesystem == "btrfs"
    assert mount.device.startswith("/dev/loop")
    assert dom0.out(f"losetup --noheadings --output BACK-FILE {mount.device}").strip() == "/var/lib/xen9p/store.img"
    assert dom0.out("cat /srv/xen9p/home/file").strip() == "kept"
    if os.environ.get("XEN9P_SKIP", "xen9p") != "xen9p":
        assert dom0.host.service("xen9pd").is_running
    assert "10.9.0.1/24" in dom0.out("ip -4 address show dev xenbr0")
    assert "masquerade" in dom0.out("nft list table ip xen_host")
