"""The devices: who serves them, in which state, and that it is nobody else."""

from __future__ import annotations

import pytest

from lab import BACKEND, GUESTS, TAGS, Dom0, connect

EACH = pytest.mark.parametrize(("guest", "tag"), [(g, t) for g in GUESTS for t in TAGS])


@EACH
def test_both_ends_are_connected(dom0: Dom0, guest: str, tag: str) -> None:
    device = dom0.device(guest, tag)
    assert device is not None
    domid, devid = device["domid"], device["devid"]
    assert domid == dom0.domid(guest)
    frontend = f"/local/domain/{domid}/device/9pfs/{devid}"
    assert dom0.store(f"{frontend}/backend") == f"{BACKEND}/{domid}/{devid}"
    assert dom0.store(f"{frontend}/tag") == tag
    assert dom0.store(f"{frontend}/state") == "4"
    assert dom0.store(f"{BACKEND}/{domid}/{devid}/state") == "4"
    assert dom0.store(f"{BACKEND}/{domid}/{devid}/versions") == "1"


@EACH
def test_the_process_behind_it_is_our_worker(dom0: Dom0, guest: str, tag: str) -> None:
    device = dom0.device(guest, tag)
    assert device is not None
    pid = device["pid"]
    assert dom0.out(f"cat /proc/{pid}/comm").strip() == f"x9 {guest}:{tag}"[:15]
    assert "xen9pd.service" in dom0.out(f"cat /proc/{pid}/cgroup")
    held = dom0.out(f"ls -l /proc/{pid}/fd")
    assert "/xen/gntdev" in held  # as it was named before the worker left the host's mounts
    assert "/xen/evtchn" in held
    assert "_dataplane" in dom0.out(f"cat /proc/{pid}/maps")


def test_the_hosts_kernel_has_nothing_to_complain_of(dom0: Dom0) -> None:
    """A warning with a worker's name is about something that it did (a name with a slash for its interrupt, once)."""
    assert dom0.out("journalctl -kb --no-pager | grep -B4 'Comm: \\(x9\\|xen9p\\)' || true") == ""


def test_no_qemu_serves_the_guests(dom0: Dom0) -> None:
    for guest in GUESTS:
        domid = dom0.domid(guest)
        assert dom0.run(f"pgrep -f 'qemu.*-xen-domid {domid}( |$)'").stdout == ""
        assert dom0.run(f"xenstore-list /local/domain/0/backend/9pfs/{domid}").rc != 0
        assert dom0.run(f"xenstore-list /local/domain/0/backend/vbd/{domid}").rc != 0
        assert dom0.run(f"xenstore-list /local/domain/0/backend/qdisk/{domid}").rc != 0


def test_what_a_guest_reads_is_what_its_worker_counts(dom0: Dom0) -> None:
    guest = connect("g1")
    dom0.out("head -c 3000000 /dev/urandom > /srv/xen9p/home/counted")
    before = dom0.device("g1", "home")
    assert guest.check_output("cat /home/counted | wc -c").strip() == "3000000"
    after = dom0.device("g1", "home")
    dom0.out("rm /srv/xen9p/home/counted")
    assert before is not None
    assert after is not None
    assert after["read_bytes"] - before["read_bytes"] == 3_000_000
    assert after["requests"] > before["requests"]
