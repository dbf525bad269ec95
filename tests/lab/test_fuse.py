"""Our FUSE mount in a guest, beside the kernel's own v9fs: the same files, and no traces after its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Dom0, connect, wait_until
from user import GUEST, TAG, User, attached

MNT = "/mnt"


@pytest.fixture(scope="module")
def user(dom0: Dom0) -> Iterator[User]:
    with attached(dom0, "fuse-test") as made:
        made.out(f"xen9p mount {TAG} {MNT}")
        try:
            yield made
        finally:
            made.run(f"umount {MNT}")


def test_both_mounts_show_the_same(user: User) -> None:
    mine = f"{MNT}/{user.folder}"
    user.out(f"head -c 2000001 /dev/urandom > {mine}/f; cmp {mine}/f {user.kernel('f')}")
    user.out(f"mkdir {user.kernel('d')}; ln -s f {mine}/l; ln {mine}/f {mine}/hard")
    assert user.out(f"ls {mine}").split() == ["d", "f", "hard", "l"]
    assert user.out(f"stat -c '%h %s' {mine}/f") == "2 2000001"
    assert "fuse.xen9p" in user.out("cat /proc/mounts")
    user.out(f"rm -r {mine}/*")
    assert user.out(f"ls {user.kernel('')}") == ""


def test_a_killed_mount_can_be_made_anew(dom0: Dom0, user: User) -> None:
    guest = connect(GUEST)
    guest.check_output(f"pkill -KILL -f 'xen9p mount {TAG}'")
    wait_until("the worker has let go", lambda: not dom0.connected(GUEST, TAG))
    guest.check_output(f"umount -l {MNT}")
    guest.check_output(f"xen9p mount {TAG} {MNT}")
    assert user.run(f"ls {MNT}/{user.folder}").rc == 0


def test_umount_leaves_nothing(dom0: Dom0, user: User) -> None:
    guest = connect(GUEST)
    guest.check_output(f"umount {MNT}")
    wait_until("the device is closed", lambda: not dom0.connected(GUEST, TAG))
    wait_until("the process has ended", lambda: guest.run("pgrep -f 'xen9p mount'").rc != 0)
    guest.check_output(f"xen9p mount {TAG} {MNT}")
