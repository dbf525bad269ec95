"""The workers that really serve in dom0: what the kernel says they may and see."""

from __future__ import annotations

import pytest

from lab import GUESTS, TAGS, Dom0, connect

EACH = pytest.mark.parametrize(("guest", "tag"), [(g, t) for g in GUESTS for t in TAGS])
# chown, dac_override, dac_read_search, fowner, fsetid, setgid, setuid, mknod, setfcap
KEPT = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31
SYS_ADMIN = 1 << 21


def worker(dom0: Dom0, guest: str, tag: str) -> int:
    device = dom0.device(guest, tag)
    assert device is not None
    pid = device["pid"]
    assert isinstance(pid, int)
    return pid


def status(dom0: Dom0, pid: int | str) -> dict[str, str]:
    lines = dom0.out(f"cat /proc/{pid}/status").splitlines()
    return dict(line.split(":\t", 1) for line in lines)


@EACH
def test_what_a_worker_may(dom0: Dom0, guest: str, tag: str) -> None:
    fields = status(dom0, worker(dom0, guest, tag))
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(fields[name], 16) & ~KEPT == 0
    assert int(fields["CapInh"], 16) == int(fields["CapAmb"], 16) == 0
    assert fields["Seccomp"] == "2"
    assert fields["NoNewPrivs"] == "1"


@EACH
def test_what_a_worker_sees(dom0: Dom0, guest: str, tag: str) -> None:
    """A root of its own: the export, the tree that a root was cloned from, its own proc; nothing of the host."""
    pid = worker(dom0, guest, tag)
    trees = ["export", "origin"] if tag == "root" else ["export"]
    mounts = [line.split() for line in dom0.out(f"cat /proc/{pid}/mountinfo").splitlines()]
    assert sorted(mount[4] for mount in mounts) == ["/", *(f"/{tree}" for tree in trees), "/proc"]
    options = {mount[4]: mount[5].split(",") for mount in mounts}
    assert all({"nosuid", "nodev", "noexec"} <= set(found) for found in options.values())
    assert "ro" in options["/"]
    assert TAGS[tag] in options["/export"]
    assert all("ro" in options[f"/{tree}"] for tree in trees[1:])
    assert dom0.out(f"ls -A /proc/{pid}/root").split() == [*trees, "proc"]
    assert dom0.out(f"readlink /proc/{pid}/cwd").strip() == "/"


def test_workers_share_nothing_with_the_host(dom0: Dom0) -> None:
    pids = [worker(dom0, guest, tag) for guest in GUESTS for tag in TAGS]
    for kind in ("mnt", "net", "ipc", "uts"):
        host = dom0.out(f"readlink /proc/1/ns/{kind}").strip()
        found = dom0.out(" && ".join(f"readlink /proc/{pid}/ns/{kind}" for pid in pids)).split()
        assert host not in found
        # The others are the service's, and one that was started anew has new ones.
        assert kind != "mnt" or len(set(found)) == len(pids)


def test_a_worker_holds_no_directory_of_the_hosts(dom0: Dom0) -> None:
    for guest in GUESTS:
        pid = worker(dom0, guest, "root")
        targets = dom0.out(f"find /proc/{pid}/fd -mindepth 1 -printf '%l\\n'").split("\n")
        paths = {target for target in targets if target.startswith("/")}
        # /xen is the devtmpfs that the rings' devices were opened on, and which the worker has no way to any more; the
        # same holds for meminfo, which says when memory is short, and the proc of the service or of the host.
        held = ("/export", "/origin", "/dev/null", "/xen/", "/meminfo", "/proc/meminfo")
        assert {path for path in paths if not path.startswith(held)} == set()


def test_what_the_host_mounts_below_an_export_does_not_show(dom0: Dom0) -> None:
    dom0.out("mkdir -p /srv/xen9p/home/mounted && touch /srv/xen9p/home/mounted/below")
    dom0.out("mount -t tmpfs none /srv/xen9p/home/mounted && touch /srv/xen9p/home/mounted/above")
    try:
        assert connect("g1").check_output("ls /home/mounted").split() == ["below"]
    finally:
        dom0.out("umount /srv/xen9p/home/mounted && rm -r /srv/xen9p/home/mounted")


def test_the_supervisor_is_hardened(dom0: Dom0) -> None:
    """systemd's own measure, in tenths: 76 before there was any, below 50 is what it calls OK."""
    pid = dom0.out("systemctl show -P MainPID xen9pd").strip()
    fields = status(dom0, pid)
    assert int(fields["CapBnd"], 16) & ~(KEPT | SYS_ADMIN | 1 << 8) == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Seccomp"] == "2"
    assert dom0.run("systemd-analyze security --threshold=50 xen9pd.service").rc == 0
