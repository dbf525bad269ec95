"""Extended attributes and ACLs through v9fs, as a guest's programs use them, and what dom0 has of them."""

from __future__ import annotations

import errno
import struct

import pytest

from lab import Dom0, connect, home_mounted, scratch

CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0).hex()  # cap_net_raw=ep
# rwx for the owner, r for user 1234, - for the group, mask r, - for others.
ACL = (
    struct.pack("<I", 2)
    + b"".join(
        struct.pack("<HHI", *entry)
        for entry in ((1, 7, 2**32 - 1), (2, 4, 1234), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1))
    )
).hex()
WHERE = pytest.mark.parametrize(
    ("here", "there"), [("/root", "/srv/xen9p/guests/g1/root"), ("/home", "/srv/xen9p/home")]
)


def python(where: str, statement: str) -> str:
    """Runs a statement with the interpreter of dom0 or of a guest; prints an OSError's number instead."""
    lines = f"import os\ntry:\n    {statement}\nexcept OSError as error:\n    print(error.errno)"
    return str(connect(where).check_output(f"python3 -c '{lines}'")).strip()


@WHERE
def test_set_get_list_remove(here: str, there: str) -> None:
    with scratch(connect("g1"), f"{here}/xattr") as path:
        connect("g1").check_output(f"touch {path}/f")
        f = f'"{path}/f"'
        assert python("g1", f'os.setxattr({f}, "user.a", b"one" * 1000)') == ""
        assert python("host", f'print(os.getxattr("{there}/xattr/f", "user.a") == b"one" * 1000)') == "True"
        assert python("g1", f'print(os.getxattr({f}, "user.a") == b"one" * 1000)') == "True"
        assert python("g1", f"print(os.listxattr({f}))") == "['user.a']"
        assert python("g1", f'os.setxattr({f}, "user.a", b"", os.XATTR_CREATE)') == str(errno.EEXIST)
        assert python("g1", f'os.setxattr({f}, "user.none", b"x", os.XATTR_REPLACE)') == str(errno.ENODATA)
        assert python("g1", f'os.setxattr({f}, "user.empty", b"")') == ""
        assert python("g1", f'print(os.getxattr({f}, "user.empty"))') == "b''"
        assert python("g1", f'os.removexattr({f}, "user.a")') == ""
        assert python("g1", f'os.removexattr({f}, "user.a")') == str(errno.ENODATA)
        assert python("host", f'print(os.listxattr("{there}/xattr/f"))') == "['user.empty']"


def test_what_is_dom0s_stays_dom0s(dom0: Dom0) -> None:
    with scratch(connect("g1"), "/home/xattr") as path:
        connect("g1").check_output(f"touch {path}/f")
        assert python("host", f'os.setxattr("/srv/xen9p{path}/f", "trusted.x", b"mine")') == ""
        assert python("host", f'os.setxattr("/srv/xen9p{path}/f", "btrfs.compression", b"zstd")') == ""
        assert python("g1", f'print(os.listxattr("{path}/f"))') == "[]"
        for name in ("trusted.x", "btrfs.compression"):
            assert python("g1", f'os.getxattr("{path}/f", "{name}")') == str(errno.EOPNOTSUPP)
            assert python("g1", f'os.setxattr("{path}/f", "{name}", b"forged")') == str(errno.EOPNOTSUPP)
        assert python("host", f'print(os.getxattr("/srv/xen9p{path}/f", "trusted.x"))') == "b'mine'"


@WHERE
def test_the_capabilities_of_a_program(here: str, there: str) -> None:
    """What the packages of ping and others set after unpacking. The program then has them."""
    g1 = connect("g1")
    with scratch(g1, f"{here}/xattr") as path:
        g1.check_output(f"cp /bin/cat {path}/cat && chmod 755 {path} {path}/cat && chmod o+x {here}")
        name = "security.capability"
        assert python("g1", f'os.setxattr("{path}/cat", "{name}", bytes.fromhex("{CAPABILITY}"))') == ""
        assert python("host", f'print(os.getxattr("{there}/xattr/cat", "{name}").hex())') == CAPABILITY
        caps = g1.check_output(f"setpriv --reuid 99 --regid 99 --clear-groups {path}/cat /proc/self/status")
        effective = next(line for line in caps.splitlines() if line.startswith("CapEff"))
        assert int(effective.split()[1], 16) == 1 << 13
        g1.check_output(f"echo more >> {path}/cat")
        assert python("g1", f'os.getxattr("{path}/cat", "{name}")') == str(errno.ENODATA)


def test_access_control_lists(dom0: Dom0) -> None:
    g1 = connect("g1")
    read = "setpriv --reuid {} --regid {} --clear-groups cat /home/xattr/f"
    with home_mounted("none", "access=client,posixacl"), scratch(g1, "/home/xattr") as path:
        g1.check_output(f"chmod 755 {path} && echo secret > {path}/f && chmod 700 {path}/f")
        assert g1.run(read.format(1234, 1234)).rc != 0
        acl = f'"{path}/f", "system.posix_acl_access"'
        assert python("g1", f'os.setxattr({acl}, bytes.fromhex("{ACL}"))') == ""
        assert python("g1", f"print(os.getxattr({acl}).hex())") == ACL
        assert g1.check_output(read.format(1234, 1234)) == "secret"
        assert "Permission denied" in g1.run(read.format(1235, 1235)).stderr
        assert python("host", f'print(os.getxattr("/srv/xen9p{path}/f", "system.posix_acl_access").hex())') == ACL
        assert python("g1", f"os.removexattr({acl})") == ""
        assert python("host", f'print(os.listxattr("/srv/xen9p{path}/f"))') == "[]"
        assert g1.run(read.format(1234, 1234)).rc != 0


def test_a_readonly_export(dom0: Dom0) -> None:
    dom0.out("echo x > /srv/xen9p/course/xattr-f")
    try:
        assert python("host", 'os.setxattr("/srv/xen9p/course/xattr-f", "user.a", b"seen")') == ""
        assert python("g1", 'print(os.getxattr("/course/xattr-f", "user.a"))') == "b'seen'"
        assert python("g1", 'os.setxattr("/course/xattr-f", "user.a", b"x")') == str(errno.EROFS)
    finally:
        dom0.out("rm /srv/xen9p/course/xattr-f")
