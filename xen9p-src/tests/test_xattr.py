"""Extended attributes on real files, as v9fs asks for them: the same as the host's own calls give, and no more."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import struct
from pathlib import Path

import pytest

from hostile import NEW
from serving import Session, memory_session, serve_memory, socket_session
from test_races import together
from xen9p import codec
from xen9p.client import Client
from xen9p.transport.memory import MemoryRingTransport

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root's capabilities")
CREATE, REPLACE = os.XATTR_CREATE, os.XATTR_REPLACE
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep
# struct posix_acl_xattr: rwx for the owner, r for user 1234, - for the group, mask r, - for others.
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 7, 2**32 - 1), (2, 4, 1234), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1))
)


def refused(err: int) -> object:
    return pytest.raises(OSError, match=os.strerror(err))


def get(client: Client, fid: int, name: bytes, piece: int = 1 << 20) -> bytes:
    """getxattr(2), or listxattr(2) with an empty name, in pieces of that many bytes."""
    found, size = client.xattrwalk(fid, name)
    try:
        value = b""
        while data := client.read(found, len(value), piece):
            value += data
        assert len(value) == size
        return value
    finally:
        client.clunk(found)


def put(client: Client, fid: int, name: bytes, value: bytes, flags: int = 0) -> None:
    """setxattr(2); with an empty value and REPLACE, removexattr(2)."""
    clone = client.walk(fid)
    try:
        client.xattrcreate(clone, name, len(value), flags)
        if value:
            client.write_all(clone, 0, value)
    except OSError:
        with contextlib.suppress(OSError):
            client.clunk(clone)
        raise
    client.clunk(clone)


def names(client: Client, fid: int) -> set[bytes]:
    return set(get(client, fid, b"").split(b"\0")) - {b""}


def test_set_get_list_remove(session: Session) -> None:
    client, path = session.client, session.served.path / "f"
    client.write_file(session.root, b"f", b"content")
    fid = client.walk(session.root, b"f")
    put(client, fid, b"user.a", b"one\0two")
    put(client, fid, b"user.b", b"x" * 900)
    assert os.getxattr(path, "user.a") == b"one\0two"
    assert get(client, fid, b"user.b", piece=100) == b"x" * 900
    assert names(client, fid) == {b"user.a", b"user.b"}
    put(client, fid, b"user.a", b"", REPLACE)
    assert os.listxattr(path) == ["user.b"]
    with refused(errno.ENODATA):
        get(client, fid, b"user.a")
    with refused(errno.ENODATA):
        put(client, fid, b"user.a", b"", REPLACE)
    os.setxattr(path, "user.c", b"by the host")
    assert get(client, fid, b"user.c") == b"by the host"
    assert client.read_file(session.root, b"f") == b"content"


def test_create_and_replace_are_checked_at_the_clunk(session: Session) -> None:
    client = session.client
    client.write_file(session.root, b"f", b"")
    fid = client.walk(session.root, b"f")
    with refused(errno.ENODATA):
        put(client, fid, b"user.a", b"1", REPLACE)
    put(client, fid, b"user.a", b"2", CREATE)
    with refused(errno.EEXIST):
        put(client, fid, b"user.a", b"3", CREATE)
    put(client, fid, b"user.a", b"4", REPLACE)
    assert get(client, fid, b"user.a") == b"4"
    put(client, fid, b"user.a", b"")
    assert get(client, fid, b"user.a") == b""
    assert names(client, fid) == {b"user.a"}, "an empty value is a value"
    with refused(errno.EINVAL):
        put(client, fid, b"user.a", b"5", 4)


@pytest.mark.parametrize("size", [1, 4000, 4096 - 23, 20_000, 65536])
def test_any_size_does_what_the_host_says(export: Path, size: int) -> None:
    """In pieces of the smallest msize. How large a value may be is the filesystem's to say, and its errno arrives."""
    (export / "f").touch()
    (export / "twin").touch()
    value = random.Random(size).randbytes(size)
    with memory_session(export, order=2) as session:
        client = session.client
        fid = client.walk(session.root, b"f")
        try:
            os.setxattr(export / "twin", "user.a", value)
        except OSError as error:
            with refused(error.errno or 0):
                put(client, fid, b"user.a", value)
            assert os.listxattr(export / "f") == []
        else:
            put(client, fid, b"user.a", value)
            assert os.getxattr(export / "f", "user.a") == value
            assert get(client, fid, b"user.a") == value


@AS_ROOT
def test_what_is_the_hosts_is_neither_seen_nor_made(session: Session) -> None:
    client, path = session.client, session.served.path / "f"
    client.write_file(session.root, b"f", b"")
    fid = client.walk(session.root, b"f")
    hidden = ("trusted.x", "security.selinux", "security.ima.x", "user.xen9p.journal")
    for name in (*hidden, "user.mine"):
        os.setxattr(path, name, b"value")
    assert names(client, fid) == {b"user.mine"}
    for name in (*hidden, "btrfs.compression", "system.other", "nonsense", "user", "xen9p.x"):
        want = errno.ENODATA if name.startswith("user.xen9p") else errno.EOPNOTSUPP
        with refused(want):
            get(client, fid, name.encode())
        want = errno.EPERM if name.startswith("user.xen9p") else errno.EOPNOTSUPP
        for value, flags in ((b"forged", 0), (b"", REPLACE), (b"", 0)):
            with refused(want):
                put(client, fid, name.encode(), value, flags)
    assert {name: os.getxattr(path, name) for name in hidden} == dict.fromkeys(hidden, b"value")


def test_names_at_the_edge(session: Session) -> None:
    client = session.client
    client.write_file(session.root, b"f", b"")
    fid = client.walk(session.root, b"f")
    longest = b"user." + b"n" * 250
    put(client, fid, longest, b"v")
    assert names(client, fid) == {longest}
    for name, err in ((longest + b"n", errno.ERANGE), (b"user.a\0b", errno.EINVAL), (b"user.", errno.EINVAL)):
        with refused(err):
            get(client, fid, name)
        with refused(err):
            put(client, fid, name, b"v")
    with refused(errno.EOPNOTSUPP):
        client.xattrcreate(client.walk(fid), b"", 1)


@AS_ROOT
def test_the_capabilities_of_a_program(session: Session) -> None:
    """What a package's setcap does; and they go when the file is written, as on any filesystem."""
    client, path = session.client, session.served.path / "ping"
    client.write_file(session.root, b"ping", b"#!")
    fid = client.walk(session.root, b"ping")
    with refused(errno.ENODATA):
        get(client, fid, b"security.capability")
    put(client, fid, b"security.capability", CAPABILITY)
    assert os.getxattr(path, "security.capability") == CAPABILITY
    assert get(client, fid, b"security.capability") == CAPABILITY
    assert names(client, fid) == {b"security.capability"}
    client.write_file(session.root, b"ping", b"#!/changed")
    assert os.listxattr(path) == []
    with refused(errno.EINVAL):
        put(client, fid, b"security.capability", b"nonsense")


def test_access_control_lists(session: Session) -> None:
    client, path = session.client, session.served.path
    client.write_file(session.root, b"f", b"")
    client.mkdir(session.root, b"d")
    file, folder = client.walk(session.root, b"f"), client.walk(session.root, b"d")
    put(client, file, b"system.posix_acl_access", ACL)
    assert os.getxattr(path / "f", "system.posix_acl_access") == ACL
    assert stat.S_IMODE((path / "f").stat().st_mode) == 0o740, "the mask shows as the group's bits"
    assert names(client, file) == {b"system.posix_acl_access"}
    put(client, folder, b"system.posix_acl_default", ACL)
    made = client.walk(folder)
    client.lcreate(made, b"heir", os.O_RDWR, 0o666)
    assert struct.pack("<HHI", 2, 4, 1234) in os.getxattr(path / "d" / "heir", "system.posix_acl_access")
    with refused(errno.EACCES):
        put(client, file, b"system.posix_acl_default", ACL)
    for flags in (0, REPLACE):  # v9fs removes with both
        put(client, file, b"system.posix_acl_access", ACL)
        for _ in range(2):  # also where there is none
            put(client, file, b"system.posix_acl_access", b"", flags)
            assert os.listxattr(path / "f") == []
    with refused(errno.EINVAL):
        put(client, file, b"system.posix_acl_access", struct.pack("<I", 2) + b"no list")


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", pytest.param("device", marks=AS_ROOT)])
def test_what_is_no_regular_file(session: Session, kind: str) -> None:
    """On the thing itself, never on what a link points to, and nothing is opened; errnos are the host's."""
    client, path = session.client, session.served.path
    outside = path.parent / "outside"
    for name in ("it", "twin"):
        if kind == "symlink":
            (path / name).symlink_to("../outside")
        elif kind == "directory":
            (path / name).mkdir()
        else:
            os.mknod(path / name, {"fifo": stat.S_IFIFO, "device": stat.S_IFCHR}[kind] | 0o600, os.makedev(1, 3))
    fid = client.walk(session.root, b"it")

    def direct(name: str, value: bytes) -> int:
        try:
            os.setxattr(path / "twin", name, value, follow_symlinks=False)
        except OSError as error:
            return error.errno or 0
        return 0

    for name, value in (("user.a", b"v"), ("security.capability", CAPABILITY), ("system.posix_acl_access", ACL)):
        want, got = direct(name, value), 0
        try:
            put(client, fid, name.encode(), value)
        except OSError as error:
            got = error.errno or 0
        assert got == want, name
    assert names(client, fid) == {n.encode() for n in os.listxattr(path / "twin", follow_symlinks=False)}
    assert os.listxattr(outside) == []


def test_offsets_and_lengths(session: Session) -> None:
    """64-bit offsets, real lengths: a reply has what is there, and never what lies behind it in memory."""
    client, path = session.client, session.served.path / "f"
    client.write_file(session.root, b"f", b"")
    fid = client.walk(session.root, b"f")
    put(client, fid, b"user.a", b"0123456789")
    found, size = client.xattrwalk(fid, b"user.a")
    assert size == 10
    for offset, count, want in (
        (0, 0xFFFFFFFF, b"0123456789"),
        (7, 100, b"789"),
        (9, 1, b"9"),
        (10, 10, b""),
        (11, 10, b""),
        (2**32, 10, b""),
        (2**32 + 5, 10, b""),
        (2**63 - 1, 10, b""),
        (2**64 - 5, 10, b""),
        (3, 0, b""),
    ):
        assert client.rpc(codec.Tread(found, offset, count)) == codec.Rread(want)
    with refused(errno.EINVAL):
        client.write(found, 0, b"x")
    clone = client.walk(fid)
    client.xattrcreate(clone, b"user.b", 10)
    for offset, data, err in (
        (1, b"hole", errno.EINVAL),
        (2**32, b"x", errno.EINVAL),
        (2**64 - 1, b"x" * 5, errno.EINVAL),
        (0, b"x" * 11, errno.ENOSPC),
        (0, b"x" * 5000, errno.ENOSPC),
    ):
        with refused(err):
            client.write(clone, offset, data)
    with refused(errno.EINVAL):
        client.read(clone, 0, 10)
    assert client.write(clone, 0, b"abcdef") == 6
    assert client.write(clone, 4, b"EFGHIJ") == 6
    with refused(errno.ENOSPC):
        client.write(clone, 10, b"x")
    assert client.write(clone, 10, b"") == 0
    client.clunk(clone)
    assert os.getxattr(path, "user.b") == b"abcdEFGHIJ"
    for size in (65537, 2**32, 2**32 + 3, 2**63, 2**64 - 1):
        with refused(errno.E2BIG):
            client.xattrcreate(client.walk(fid), b"user.c", size)


def test_half_a_value_is_not_set(session: Session) -> None:
    client, path = session.client, session.served.path / "f"
    client.write_file(session.root, b"f", b"")
    fid = client.walk(session.root, b"f")
    put(client, fid, b"user.a", b"before")
    for count in (0, 99):
        clone = client.walk(fid)
        client.xattrcreate(clone, b"user.a", 100)
        client.write(clone, 0, b"x" * count)
        with refused(errno.EINVAL):
            client.clunk(clone)
    removed = client.walk(fid)
    client.xattrcreate(removed, b"user.a", 1)
    client.write(removed, 0, b"x")
    with refused(errno.EBADF):
        client.remove(removed)  # Tremove gives the fid up, and is no Tclunk
    clone = client.walk(fid)
    client.xattrcreate(clone, b"user.a", 1)
    client.write(clone, 0, b"x")
    client.version()
    assert os.getxattr(path, "user.a") == b"before"


def test_the_value_is_that_of_the_walk_and_the_file_that_of_the_fid(session: Session) -> None:
    client, path = session.client, session.served.path
    client.write_file(session.root, b"f", b"")
    fid = client.walk(session.root, b"f")
    put(client, fid, b"user.a", b"old")
    found, _ = client.xattrwalk(fid, b"user.a")
    clone = client.walk(fid)
    client.xattrcreate(clone, b"user.a", 3)
    client.write(clone, 0, b"new")
    (path / "f").rename(path / "g")
    (path / "f").symlink_to("../outside")
    client.clunk(clone)
    assert os.getxattr(path / "g", "user.a") == b"new"
    assert client.read(found, 0, 10) == b"old"
    assert os.listxattr(path.parent / "outside") == []
    (path / "g").unlink()
    put(client, fid, b"user.a", b"unlinked")
    assert get(client, fid, b"user.a") == b"unlinked"


def test_nothing_else_works_on_such_a_fid(session: Session) -> None:
    client = session.client
    client.write_file(session.root, b"f", b"content")
    fid = client.walk(session.root, b"f")
    put(client, fid, b"user.a", b"v")
    reading, _ = client.xattrwalk(fid, b"user.a")
    setting = client.walk(fid)
    client.xattrcreate(setting, b"user.b", 1)
    for it in (reading, setting):
        for message in (
            codec.Twalk(it, NEW, ()),
            codec.Twalk(it, NEW, (b"..",)),
            codec.Tlopen(it, os.O_RDWR),
            codec.Tlcreate(it, b"made", os.O_RDWR, 0o600, 0),
            codec.Tgetattr(it, codec.GETATTR_BASIC),
            codec.Tsetattr(it, codec.SETATTR_SIZE, 0, 0, 0, 0, 0, 0, 0, 0),
            codec.Treaddir(it, 0, 100),
            codec.Treadlink(it),
            codec.Tstatfs(it),
            codec.Tfsync(it, 0),
            codec.Tlock(it, 0, 0, 0, 0, 1, b"c"),
            codec.Tgetlock(it, 0, 0, 0, 1, b"c"),
            codec.Tlink(session.root, it, b"made"),
            codec.Trename(it, session.root, b"made"),
            codec.Tmkdir(it, b"made", 0o755, 0),
            codec.Txattrwalk(it, NEW, b"user.a"),
            codec.Txattrcreate(it, b"user.a", 1, 0),
        ):
            with refused(errno.EBADF):
                client.rpc(message)
        with refused(errno.EINVAL):
            client.rpc(codec.Txattrwalk(fid, it, b"user.a"))
    client.lopen(fid, os.O_RDWR)
    with refused(errno.EINVAL):
        client.xattrcreate(fid, b"user.c", 1)
    assert client.read(fid, 0, 10) == b"content"
    assert os.listdir(session.served.path) == ["f"]


def test_fids_and_bytes_are_bounded(export: Path) -> None:
    (export / "f").touch()
    with memory_session(export) as session:
        client = session.client
        fid = client.walk(session.root, b"f")
        put(client, fid, b"user.a", b"v")
        held = [client.xattrwalk(fid, b"user.a")[0] for _ in range(256)]
        with refused(errno.EMFILE):
            client.xattrwalk(fid, b"user.a")
        for one in held:
            client.clunk(one)
        held = []
        with refused(errno.ENOMEM):
            while len(held) < 100:
                clone = client.walk(fid)
                client.xattrcreate(clone, b"user.b", 65536)
                held.append(clone)
        assert len(held) == 32
        client.version()
        fid = client.walk(client.attach(), b"f")
        assert get(client, fid, b"user.a") == b"v", "a new session has its whole share again"


def test_a_readonly_export_shows_and_keeps(export: Path) -> None:
    (export / "f").touch()
    os.setxattr(export / "f", "user.a", b"v")
    with socket_session(export, readonly=True) as session:
        fid = session.client.walk(session.root, b"f")
        assert get(session.client, fid, b"user.a") == b"v"
        assert names(session.client, fid) == {b"user.a"}
        for value, flags in ((b"w", 0), (b"", REPLACE)):
            with refused(errno.EROFS):
                put(session.client, fid, b"user.a", value, flags)
    assert os.getxattr(export / "f", "user.a") == b"v"


def test_writes_and_the_clunk_at_once(export: Path) -> None:
    """One ring writes a value while the other clunks its fid: the value is set whole or not at all."""
    (export / "f").touch()
    seen: set[str] = set()
    with serve_memory(export, rings=2) as (rings, served):
        first, root = Client.connect(MemoryRingTransport(rings[0]))
        second = Client(MemoryRingTransport(rings[1]), msize=first.msize)
        second._next_tag = 30_000  # tags are the device's and not a ring's
        fid = first.walk(root, b"f")
        # On a busy machine one side may win for long: go on until all has been seen.
        for round_ in range(6000):
            if round_ >= 300 and len(seen) == 3:
                break
            value = bytes([round_ % 250 + 1]) * 40
            clone = first.walk(fid)
            first.xattrcreate(clone, b"user.a", 40)

            def write(clone: int = clone, value: bytes = value) -> None:
                for offset in (0, 20):
                    try:
                        first.write(clone, offset, value[offset : offset + 20])
                    except OSError as error:
                        seen.add("write " + errno.errorcode[error.errno or 0])

            def clunk(clone: int = clone, wait: int = round_ % 7) -> None:
                for _ in range(wait):
                    second.rpc(codec.Tstatfs(root))
                try:
                    second.rpc(codec.Tclunk(clone))
                    seen.add("set")
                except OSError as error:
                    seen.add("clunk " + errno.errorcode[error.errno or 0])

            together(write, clunk)
            if os.listxattr(export / "f"):
                got = os.getxattr(export / "f", "user.a")
                assert len(set(got)) == 1
                assert len(got) == 40
        first.close()
        second.close()
        assert served.device.stats()["fids"] == 2
    assert seen <= {"set", "clunk EINVAL", "write EBADF"}
    assert len(seen) == 3, f"the race has only known {seen}"
