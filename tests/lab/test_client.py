"""Our own client in a guest: files from the host with no kernel 9P, over a ring that the guest's user space shares."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lab import Dom0, connect, wait_until
from user import GUEST, TAG, User, attached


@pytest.fixture(scope="module")
def user(dom0: Dom0) -> Iterator[User]:
    with attached(dom0, "client-test") as made:
        yield made


def test_the_kernel_leaves_the_device_alone(dom0: Dom0, user: User) -> None:
    device = dom0.device(GUEST, TAG)
    assert device is not None
    front = f"/local/domain/{device['domid']}/device/xen9p/{device['devid']}"
    assert dom0.store(f"{front}/tag") == TAG
    assert dom0.store(f"{front}/state") == "1"
    assert user.run(f"mount -t 9p -o trans=xen,version=9p2000.L {TAG} /mnt").rc != 0
    assert json.loads(user.out("xen9p tags --json")) == {"tags": [TAG]}


def test_files_go_both_ways_and_the_kernel_sees_the_same(user: User) -> None:
    user.out(f"head -c 3000001 /dev/urandom > /tmp/sent; xen9p cp /tmp/sent {user.path('sent')}")
    assert user.out(f"cmp /tmp/sent {user.kernel('sent')}") == ""
    user.out(f"xen9p cp {user.path('sent')} /tmp/back; cmp /tmp/sent /tmp/back; rm /tmp/sent /tmp/back")
    user.out(f"echo more | xen9p write {user.path('text')}")
    assert user.out(f"cat {user.kernel('text')}") == "more"
    listed = user.out(f"xen9p ls -l {user.path('')}").splitlines()
    assert [line.split()[4::3] for line in listed] == [["3000001", "sent"], ["5", "text"]]


def test_errors_are_one_line(user: User) -> None:
    for command, said in (
        (f"xen9p cat {user.path('nobody')}", "No such file or directory"),
        ("xen9p ls nothing:/", f"no device nothing for user space (its devices: {TAG}"),
    ):
        result = user.run(command)
        assert result.rc == 1
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_host_knows_when_it_is_over(dom0: Dom0, user: User) -> None:
    user.out(f"xen9p ls {user.path('')}")
    device = dom0.device(GUEST, TAG)
    assert device is not None
    assert device["state"] == "initwait"


def test_one_process_at_a_time_and_a_killed_one_leaves_nothing(dom0: Dom0, user: User) -> None:
    guest = connect(GUEST)
    # It waits for its input, which does not end.
    guest.check_output(f"(sleep 600 | xen9p write {user.path('held')}) > /dev/null 2>&1 < /dev/null &")
    try:
        wait_until("a process has the device", lambda: dom0.connected(GUEST, TAG))
        busy = user.run(f"xen9p ls {user.path('')}")
        assert busy.rc == 1
        assert "in use by process" in busy.stderr
        guest.check_output("pkill -KILL -f '[x]en9p write'")
        # Its kernel tells the worker, without a word in XenStore.
        wait_until("the worker has let go", lambda: not dom0.connected(GUEST, TAG))
        assert user.run(f"xen9p ls {user.path('')}").rc == 0
    finally:
        guest.run("pkill -f '[s]leep 600'")


def test_a_device_that_is_taken_away_ends_the_command(dom0: Dom0, user: User) -> None:
    assert user.run(f"xen9p ls {user.path('')}").rc == 0
    dom0.out(f"xen9p detach {GUEST} {TAG}")
    gone = user.run(f"xen9p ls {user.path('')}")
    assert gone.rc == 1
    assert "its devices: none" in gone.stderr
    dom0.out(f"xen9p attach {GUEST} home --tag {TAG}")
    assert user.run(f"xen9p ls {user.path('')}").rc == 0
