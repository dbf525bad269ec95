"""The guests' mounts: type, tag, options, msize; and that there is no disk."""

from __future__ import annotations

import pytest

from lab import GUESTS, connect

EACH_GUEST = pytest.mark.parametrize("guest", GUESTS)
MSIZE = 512 * 1024


def options(guest: str, path: str) -> tuple[str, str, dict[str, str]]:
    """Device, type and options of a mount, as the guest's kernel shows them."""
    for line in connect(guest).check_output("cat /proc/mounts").splitlines():
        device, where, kind, flags, *_ = line.split()
        if where == path:
            pairs = (flag.partition("=") for flag in flags.split(","))
            return device, kind, {name: value for name, _, value in pairs}
    raise AssertionError(f"{guest} has nothing mounted at {path}")


@EACH_GUEST
@pytest.mark.parametrize(
    ("path", "tag", "access", "cache"),
    [("/", "root", "rw", "loose"), ("/home", "home", "rw", None), ("/course", "course", "ro", None)],
)
def test_mount(guest: str, path: str, tag: str, access: str, cache: str | None) -> None:
    device, kind, flags = options(guest, path)
    assert (device, kind) == (tag, "9p")
    assert access in flags
    assert flags["trans"] == "xen"
    assert int(flags["msize"]) == MSIZE
    # Linux 6.1 shows the mode as a word of its own, and nothing for none.
    assert flags.keys() & {"loose", "fscache", "mmap"} == ({cache} if cache else set())


@EACH_GUEST
def test_the_guest_has_no_block_device(guest: str) -> None:
    assert connect(guest).check_output("ls /sys/block") == ""


@EACH_GUEST
def test_the_guest_is_debian_and_healthy(guest: str) -> None:
    host = connect(guest)
    assert host.system_info.distribution == "debian"
    assert host.check_output("hostname") == guest
    assert host.check_output("cat /sys/hypervisor/type") == "xen"
    assert host.run("systemctl is-system-running --wait").stdout.strip() == "running", host.run(
        "systemctl --failed --no-legend"
    ).stdout
