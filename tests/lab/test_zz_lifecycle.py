"""Deaths and returns: of workers, the supervisor, guests and the host. Last, because it ends what it tests."""

from __future__ import annotations

import errno
import re

import pytest

from lab import BACKEND, GUESTS, TAGS, Dom0, ask, connect, drop_connection, wait_for_sshd, wait_until
from locks import attempt, hold, posix

BOOT = 150.0  # seconds that a guest may take under emulation while the other one runs


def mounted(guest: str) -> bool:
    out = connect(guest).check_output("cat /proc/mounts")
    return all(re.search(rf"^{tag} \S+ 9p ", out, re.M) for tag in TAGS)


def comes_back(dom0: Dom0, guest: str, other_than: int | None) -> None:
    """Waits until the guest answers as a new domain with all mounts working."""
    wait_until(f"{guest} is a new domain", lambda: dom0.domid(guest) not in (None, other_than), BOOT)
    wait_for_sshd(dom0, guest, BOOT)
    drop_connection(guest)
    wait_until(f"{guest} has its mounts", lambda: mounted(guest), 30)
    for tag in TAGS:
        assert dom0.connected(guest, tag)
    host = connect(guest)
    host.check_output(f"echo {guest} > /home/back-{guest} && cat /home/back-{guest} && rm /home/back-{guest}")


def assert_no_trace(dom0: Dom0, domid: int) -> None:
    """No domain (not even a zombie), XenStore node, process or socket is left of it."""
    wait_until(f"domain {domid} is gone", lambda: not re.search(rf"^\S+\s+{domid}\s", dom0.out("xl list"), re.M), 30)
    wait_until("its backends are gone", lambda: dom0.backends(domid) == [], 20)
    assert dom0.run(f"xenstore-list {BACKEND}/{domid}").rc != 0
    assert dom0.run(f"ls /run/xen9p/ | grep -E '^worker-{domid}-'").stdout == ""
    assert "(null)" not in dom0.out("xl list")
    assert [d for d in dom0.status()["devices"] if d["domid"] == domid] == []


def event_channels(dom0: Dom0) -> int:
    """How many interdomain event channels dom0 has."""
    return dom0.out("/usr/lib/xen-4.17/bin/lsevtchn 0 2>/dev/null || lsevtchn 0").count("Interdomain")


def test_a_killed_worker_is_replaced_and_the_others_never_notice(dom0: Dom0) -> None:
    g1 = connect("g1")
    before = dom0.pids()
    dom0.out(f"kill -9 {before['g1', 'home']}")
    wait_until("a new worker serves", lambda: dom0.pid("g1", "home") not in (None, before["g1", "home"]), 30)
    wait_until("the device is connected", lambda: dom0.connected("g1", "home"), 30)
    after = dom0.pids()
    assert {k: v for k, v in after.items() if k != ("g1", "home")} == {
        k: v for k, v in before.items() if k != ("g1", "home")
    }
    # The fids died with the worker, so the guest mounts anew; the ring is the same.
    g1.check_output("umount -l /home; mount /home && echo alive > /home/alive && rm /home/alive")


def test_a_restarted_supervisor_adopts_its_workers(dom0: Dom0) -> None:
    before = dom0.pids()
    g1 = connect("g1")
    g1.check_output("(for i in $(seq 100); do echo $i >> /home/during; sleep 0.1; done) > /dev/null 2>&1 &")
    dom0.out("systemctl restart xen9pd")
    wait_until("the supervisor answers", lambda: bool(dom0.run("xen9p status").rc == 0), 30)
    wait_until("it has found all its devices", lambda: dom0.pids() == before, 30)
    wait_until("the writer has ended", lambda: dom0.out("wc -l < /srv/xen9p/home/during").strip() == "100", 60)
    dom0.out("rm /srv/xen9p/home/during")


@pytest.mark.parametrize(("offset", "value"), [(128, 77), (68, 0x7FFFFFFF)])
def test_a_broken_ring_ends_its_device_and_nothing_else(dom0: Dom0, offset: int, value: int) -> None:
    """Writes into g2's shared interface page what a hostile guest could: an index, or a ring order."""
    pids = dom0.pids()
    device = dom0.device("g2", "course")
    assert device is not None
    domid, devid = device["domid"], device["devid"]
    ref = dom0.store(f"/local/domain/{domid}/device/9pfs/{devid}/ring-ref0")
    poke = f"""
import fcntl, mmap, os, struct
fd = os.open("/dev/xen/gntdev", os.O_RDWR)
arg = bytearray(struct.pack("=IIQII", 1, 0, 0, {domid}, {ref}))
fcntl.ioctl(fd, (24 << 16) | (ord("G") << 8) | 0, arg)
page = mmap.mmap(fd, 4096, offset=struct.unpack_from("=Q", arg, 8)[0])
page[{offset}:{offset + 4}] = struct.pack("=I", {value})
"""
    dom0.out(f"python3 -c '{poke}'")
    g2 = connect("g2")
    # Makes the ring busy. Nobody may wait for it: v9fs has no timeout, and its backend may be about to end.
    g2.run("nohup ls /course > /dev/null 2>&1 < /dev/null &")
    if offset == 128:
        assert dom0.connected("g2", "course"), "the order was copied when the ring was mapped; later lies do nothing"
        assert dom0.pids() == pids
        return
    wait_until("the worker has ended", lambda: dom0.pid("g2", "course") is None, 20)
    assert dom0.run(f"test -d /proc/{device['pid']}").rc != 0
    assert dom0.store(f"{BACKEND}/{domid}/{devid}/state") != "4"
    left = {k: v for k, v in dom0.pids().items() if k != ("g2", "course")}
    assert left == {k: v for k, v in pids.items() if k != ("g2", "course")}
    log = dom0.out("journalctl -u xen9pd --no-pager -n 50")
    assert len([line for line in log.splitlines() if "out of range" in line]) == 1
    assert g2.check_output("cat /proc/uptime"), "the guest's root goes on"


def test_destroy_and_create_by_hand(dom0: Dom0) -> None:
    """Also brings back what the broken ring ended: a new domain is a new beginning. Its locks end with it."""
    domid = dom0.domid("g2")
    assert domid is not None
    ports = event_channels(dom0)
    hold(connect("g2"), "/home/lock", posix(True), "os.O_RDWR | os.O_CREAT")
    assert attempt(connect("g1"), "/home/lock", posix(True)) == str(errno.EAGAIN)
    dom0.out("xl destroy g2")
    drop_connection("g2")
    assert_no_trace(dom0, domid)
    assert event_channels(dom0) < ports
    assert attempt(connect("g1"), "/home/lock", posix(True)) == "held"
    dom0.out("rm /srv/xen9p/home/lock")
    assert dom0.connected("g1", "root")
    dom0.out("xl create /etc/xen/g2.cfg")
    comes_back(dom0, "g2", domid)


def test_reboot(dom0: Dom0) -> None:
    domid = dom0.domid("g1")
    connect("g1").check_output("echo kept > /root/kept; sync")
    dom0.out("xl reboot g1")
    drop_connection("g1")
    comes_back(dom0, "g1", domid)
    assert connect("g1").check_output("cat /root/kept; rm /root/kept") == "kept"
    assert domid is not None
    assert_no_trace(dom0, domid)


def test_the_host_reboots(dom0: Dom0) -> None:
    """Everything comes back by itself, without Ansible."""
    command = "cat /proc/sys/kernel/random/boot_id"
    boot_id = dom0.out(command).strip()
    dom0.run("systemctl reboot")
    for name in ("host", *GUESTS):
        drop_connection(name)

    def rebooted() -> bool:
        return ask("host", command) not in (None, boot_id)  # it answers for a while on its way down

    wait_until("the host has rebooted", rebooted, 240)
    for guest in GUESTS:
        comes_back(dom0, guest, None)
    assert dom0.run("xen9p status").rc == 0
