"""What a guest's users are on the host, and what they may: the host's kernel decides, as it does for its own users."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from confined import child, confined_session, has_capability, needs_admin
from serving import memory_session
from test_xattr import get, put, refused
from xen9p import codec, sandbox
from xen9p._dataplane import lib
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Limits
from xen9p.errors import Xen9pError
from xen9p.users import NOBODY, Identity, Users, from_plain, listed

CAP_SETUID = 7
pytestmark = pytest.mark.skipif(not has_capability(CAP_SETUID), reason="acting as other users takes root")
CHECKED = Users(checks=True, special=True)
ALICE, BOB, CAROL, STAFF = 1000, 1001, 1002, 100
# Bob is in Alice's group, by the policy; the others have their own alone.
GROUPS = ((BOB, (BOB, STAFF)),)
TREE = Users(checks=True, special=True, groups=GROUPS)
SHIFTED = Identity(uids=((0, 100000, 1), (1000, 101000, 10)), gids=((0, 100000, 1), (1000, 201000, 10)))

Opener = Callable[..., Any]


@pytest.fixture(params=["plain", pytest.param("confined", marks=needs_admin)])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Serves a path for some users: in this process, and as a worker does."""

    @contextmanager
    def plain(path: Path, users: Users) -> Iterator[Client]:
        with memory_session(path, users=users) as session:
            yield session.client

    @contextmanager
    def confined(path: Path, users: Users) -> Iterator[Client]:
        with confined_session(path, users=users) as (client, _):
            yield client

    return plain if request.param == "plain" else confined


# The differential: what the server does for a user is what the kernel does for a process of that user.


def plant(top: Path) -> None:
    """A tree with files of Alice's and directories of several kinds."""
    top.chmod(0o755)
    for name, mode, uid, gid in (
        ("public", 0o755, 0, 0),
        ("sticky", 0o1777, 0, 0),
        ("hers", 0o700, ALICE, ALICE),
        ("staff", 0o770, 0, STAFF),
        ("setgid", 0o2777, 0, STAFF),
    ):
        (top / name).mkdir()
        os.chown(top / name, uid, gid)
        (top / name).chmod(mode)
    for name, mode, uid, gid in (
        ("f600", 0o600, ALICE, ALICE),
        ("f640", 0o640, ALICE, STAFF),
        ("f604", 0o604, ALICE, STAFF),
        ("f664", 0o664, 0, STAFF),
        ("f666", 0o666, ALICE, ALICE),
        ("f000", 0o000, ALICE, ALICE),
        ("suid", 0o6777, ALICE, STAFF),
        ("hers/inside", 0o644, ALICE, ALICE),
        ("sticky/alices", 0o666, ALICE, ALICE),
        ("staff/inside", 0o644, 0, 0),
    ):
        (top / name).write_text("content")
        os.chown(top / name, uid, gid)
        (top / name).chmod(mode)


ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in ((1, 6, 2**32 - 1), (2, 4, CAROL), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1))
)
Local = Callable[[str], object]
Remote = Callable[[Client, int], object]


def walked(client: Client, root: int, path: str) -> int:
    """By a message for each component, which has its own errno then."""
    for part in path.split("/") if path else ():
        root = client.walk(root, part.encode())
    return client.walk(root)


def opening(path: str, flags: int) -> tuple[Local, Remote]:
    def remote(client: Client, root: int) -> None:
        fid = walked(client, root, path)
        client.lopen(fid, flags)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            client.read(fid, 0, 10)
        else:
            client.write(fid, 0, b"x")

    def local(top: str) -> None:
        fd = os.open(f"{top}/{path}", flags)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            os.read(fd, 10)
        else:
            os.write(fd, b"x")

    return local, remote


def listing(path: str) -> tuple[Local, Remote]:
    return lambda top: os.listdir(f"{top}/{path}"), lambda client, root: client.listdir(root, path)


def making(folder: str, what: str) -> tuple[Local, Remote]:
    def local(top: str) -> None:
        name = f"{top}/{folder}/new"
        match what:
            case "file":
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            case "folder":
                os.mkdir(name, 0o755)
            case "symlink":
                os.symlink("to", name)
            case "fifo":
                os.mknod(name, stat.S_IFIFO | 0o644)
            case "device":
                os.mknod(name, stat.S_IFCHR | 0o644, os.makedev(1, 3))
            case "link":
                os.link(f"{top}/f666", name)
            case "move":
                os.rename(f"{top}/sticky/alices", name)

    def remote(client: Client, root: int) -> None:
        at = walked(client, root, folder)
        gid = int(client.uid)  # type: ignore[attr-defined]
        match what:
            case "file":
                client.lcreate(at, b"new", os.O_WRONLY | os.O_EXCL, 0o644, gid)
            case "folder":
                client.mkdir(at, b"new", 0o755, gid)
            case "symlink":
                client.symlink(at, b"new", b"to", gid)
            case "fifo":
                client.mknod(at, b"new", stat.S_IFIFO | 0o644, gid=gid)
            case "device":
                client.mknod(at, b"new", stat.S_IFCHR | 0o644, major=1, minor=3, gid=gid)
            case "link":
                client.link(at, walked(client, root, "f666"), b"new")
            case "move":
                client.renameat(walked(client, root, "sticky"), b"alices", at, b"new")

    return local, remote


def removing(path: str) -> tuple[Local, Remote]:
    folder, _, name = path.rpartition("/")
    return lambda top: os.unlink(f"{top}/{path}"), lambda c, root: c.unlinkat(walked(c, root, folder), name.encode())


def setting(path: str, local: Callable[[str], object], **values: int) -> tuple[Local, Remote]:
    return (
        lambda top: local(f"{top}/{path}"),
        lambda client, root: client.setattr(walked(client, root, path), **values),
    )


def attribute(path: str, name: str, value: bytes | None) -> tuple[Local, Remote]:
    if value is None:
        return (
            lambda top: os.getxattr(f"{top}/{path}", name),
            lambda client, root: get(client, walked(client, root, path), name.encode()),
        )
    return (
        lambda top: os.setxattr(f"{top}/{path}", name, value),
        lambda client, root: put(client, walked(client, root, path), name.encode(), value),
    )


FILES = ("f600", "f640", "f604", "f664", "f666", "f000", "suid", "hers/inside", "sticky/alices", "staff/inside")
FOLDERS = ("public", "sticky", "hers", "staff", "setgid")
ATTEMPTS: dict[str, tuple[Local, Remote]] = {
    **{f"read {path}": opening(path, os.O_RDONLY) for path in FILES},
    **{f"write {path}": opening(path, os.O_WRONLY) for path in FILES},
    **{f"truncate on opening {path}": opening(path, os.O_WRONLY | os.O_TRUNC) for path in FILES},
    **{f"list {path}": listing(path) for path in FOLDERS},
    **{f"make a {w} in {path}": making(path, w) for path in FOLDERS for w in ("file", "folder", "symlink", "fifo")},
    **{f"{what} into {path}": making(path, what) for path in FOLDERS for what in ("device", "link", "move")},
    **{f"remove {path}": removing(path) for path in ("hers/inside", "sticky/alices", "staff/inside")},
    **{f"chmod {path}": setting(path, lambda p: os.chmod(p, 0o640), mode=0o640) for path in FILES},
    **{f"set-group-id {path}": setting(path, lambda p: os.chmod(p, 0o2755), mode=0o2755) for path in FILES},
    **{f"chown {path}": setting(path, lambda p: os.chown(p, BOB, -1), uid=BOB) for path in FILES},
    **{f"chgrp {path} to staff": setting(path, lambda p: os.chown(p, -1, STAFF), gid=STAFF) for path in FILES},
    **{f"chgrp {path} to its own": setting(path, lambda p: os.chown(p, -1, ALICE), gid=ALICE) for path in FILES},
    **{f"truncate {path}": setting(path, lambda p: os.truncate(p, 3), size=3) for path in FILES},
    **{f"date {path}": setting(path, lambda p: os.utime(p, ns=(1, 1)), atime_ns=1, mtime_ns=1) for path in FILES},
    **{f"read an attribute of {path}": attribute(path, "user.a", None) for path in FILES},
    **{f"set an attribute of {path}": attribute(path, "user.a", b"x") for path in FILES},
    **{f"set an ACL of {path}": attribute(path, "system.posix_acl_access", ACL) for path in FILES},
    **{
        f"make {path} a program with capabilities": attribute(
            path, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
        )
        for path in FILES
    },
}


def outcome(work: Callable[[], object]) -> str:
    try:
        work()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "worked"


def traces(top: Path) -> list[tuple[str, int, int, int, int]]:
    """What there is, with owners, modes and sizes."""
    found = []
    for folder, folders, files in os.walk(top):
        for name in sorted(folders + files):
            path = Path(folder) / name
            st = path.lstat()
            size = 0 if stat.S_ISDIR(st.st_mode) else st.st_size
            found.append((str(path.relative_to(top)), st.st_mode, st.st_uid, st.st_gid, size))
    return sorted(found)


@pytest.mark.parametrize("uid", [ALICE, BOB, CAROL, 0])
def test_the_kernel_decides_as_for_a_process_of_that_user(tmp_path: Path, opener: Opener, uid: int) -> None:
    """Each attempt on a fresh tree, by a process of the user and through the server: same answer, same traces."""
    gids = dict(GROUPS).get(uid, (uid,))
    differ = {}

    def by_process() -> dict[str, Any]:
        os.chdir(tmp_path)  # whose parents are for root alone
        os.setgroups(gids)
        os.setresgid(*[gids[0]] * 3)
        os.setresuid(*[uid] * 3)
        if uid:
            assert lib.x9_drop_capabilities(0) == 0
        return {name: outcome(partial(work, f"a{i}")) for i, (name, (work, _)) in enumerate(ATTEMPTS.items())}

    for i in range(len(ATTEMPTS)):
        for kind in "ab":
            (tmp_path / f"{kind}{i}").mkdir()
            plant(tmp_path / f"{kind}{i}")
    with child(by_process) as (_, result):
        wanted = result()
    # One server for all trees: its threads go from one attempt to the next with what they have.
    with opener(tmp_path, TREE) as client:
        client.uid = uid
        root = client.attach(n_uname=uid)
        for i, (name, (_, work)) in enumerate(ATTEMPTS.items()):
            got = outcome(lambda i=i, work=work: work(client, client.walk(root, f"b{i}".encode())))
            here, there = traces(tmp_path / f"a{i}"), traces(tmp_path / f"b{i}")
            if got != wanted[name] or here != there:
                differ[name] = (wanted[name], got, sorted(set(here) ^ set(there)))
    assert differ == {}
    refusals = sum(answer != "worked" for answer in wanted.values())
    assert refusals > 20 if uid else refusals < 20  # the attempts are worth something


# What is particular to the server.


def test_threads_go_from_one_user_to_another(export: Path, opener: Opener) -> None:
    """Many users' requests at once, for the reader, the pool and Python: nobody gets what another may."""
    users = (ALICE, BOB, CAROL)
    for uid in users:
        (export / f"{uid}").mkdir(mode=0o700)
        (export / f"{uid}" / "f").touch()
        os.chown(export / f"{uid}", uid, uid)
    with opener(export, CHECKED) as client:
        fids = {(u, o): client.walk(client.attach(n_uname=u), f"{o}".encode()) for u in users for o in users}
        wrong = []
        for turn in range(100):
            asked = []
            for (user, owner), fid in fids.items():
                name = f"{user}-{turn}".encode()
                for message, reply, refusal in (
                    (codec.Twalk(fid, client.new_fid(), (b"f",)), codec.Rwalk, "EACCES"),
                    (codec.Tsetattr(fid, codec.SETATTR_MODE, 0o700, 0, 0, 0, 0, 0, 0, 0), codec.Rsetattr, "EPERM"),
                    (codec.Tmkdir(fid, name, 0o700, user), codec.Rmkdir, "EACCES"),
                ):
                    asked.append((user, owner, refusal, client.submit(message, reply)))
            for user, owner, refusal, pending in asked:
                got = outcome(pending.result)
                if got != ("worked" if user == owner else refusal):
                    wrong.append((user, owner, refusal, got))
    assert wrong == []
    for uid in users:
        assert {path.stat().st_uid for path in (export / f"{uid}").iterdir()} == {0, uid}
        assert len(list((export / f"{uid}").iterdir())) == 101


def test_each_message_takes_the_rights_of_its_own_user(export: Path, opener: Opener) -> None:
    """Before each of Bob's there is the same of root's: what a thread has left of root helps nobody."""
    export.chmod(0o755)
    for name in (b"f", b"g", b"d"):
        path = export / name.decode()
        path.mkdir() if name == b"d" else path.write_text("content")
        path.chmod(0o700)
    os.setxattr(export / "f", "user.a", b"x")
    with opener(export, TREE) as client:
        roots, bobs = (
            {name: client.walk(client.attach(n_uname=uid), *([name] if name else [])) for name in (b"", b"f", b"d")}
            for uid in (0, BOB)
        )

        def attempts(at: dict[bytes, int], mine: bytes) -> list[tuple[str, Callable[[], object]]]:
            return [
                ("EACCES", lambda: client.lopen(client.walk(at[b"f"]))),
                ("EACCES", lambda: client.lopen(client.walk(at[b"f"]), os.O_WRONLY | os.O_TRUNC)),
                ("EACCES", lambda: client.lopen(client.walk(at[b"d"]))),
                ("ENOENT/EACCES", lambda: client.walk(at[b"d"], b"none")),
                ("EACCES", lambda: client.lcreate(client.walk(at[b"d"]), mine + b"1", os.O_WRONLY)),
                ("EACCES", lambda: client.mkdir(at[b"d"], mine + b"2")),
                ("EACCES", lambda: client.mknod(at[b"d"], mine + b"3", stat.S_IFIFO)),
                ("EACCES", lambda: client.symlink(at[b"d"], mine + b"4", b"to")),
                ("EACCES/EPERM", lambda: client.link(at[b""], at[b"f"], mine + b"5")),
                ("EPERM", lambda: client.setattr(at[b"f"], mode=0o700)),
                ("EACCES", lambda: client.setattr(at[b"f"], size=3)),
                ("EACCES", lambda: get(client, at[b"f"], b"user.a")),
                ("EACCES", lambda: put(client, at[b"f"], b"user.a", b"y")),
                ("EACCES", lambda: client.renameat(at[b""], b"g", at[b""], b"g" if mine == b"root" else b"mine")),
                ("EACCES", lambda: client.unlinkat(at[b""], b"g") if mine == b"bob" else client.getattr(at[b"f"])),
            ]

        for _ in range(3):
            for i, ((refusal, by_bob), (_, by_root)) in enumerate(
                zip(attempts(bobs, b"bob"), attempts(roots, b"root"), strict=True)
            ):
                got = outcome(by_root)
                assert got == "worked" or (got, i) == ("ENOENT", 3) or got == "EEXIST", i
                assert outcome(by_bob) in refusal.split("/"), i
    assert (export / "g").read_text() == "content"


def test_nobody_has_the_groups_of_the_user_before(export: Path, opener: Opener) -> None:
    (export / "staff").mkdir()
    (export / "staff" / "f").touch()
    os.chown(export / "staff", 0, STAFF)
    (export / "staff").chmod(0o770)
    with opener(export, TREE) as client:
        bob, carol = (client.walk(client.attach(n_uname=uid), b"staff") for uid in (BOB, CAROL))
        for i in range(8):  # for each thread that there is
            for fid, wanted in ((bob, "worked"), (carol, "EACCES")):
                name = f"{i}-{wanted}".encode()
                assert outcome(lambda fid=fid: client.walk(fid, b"f")) == wanted
                assert outcome(lambda fid=fid, name=name: client.mkdir(fid, name)) == wanted
                at = client.walk(fid)
                assert outcome(lambda at=at, name=name: client.lcreate(at, name + b"f", os.O_WRONLY)) == wanted


def test_a_new_thread_has_all_rights_whoever_was_served_last(export: Path, opener: Opener) -> None:
    (export / "f").write_text("content")
    (export / "f").chmod(0o600)
    with opener(export, CHECKED) as client:
        root, alice = client.attach(n_uname=0), client.attach(n_uname=ALICE)
        fid = client.walk(root, b"f")
        client.walk(alice, b"f")  # the reader is Alice
        client.setattr(fid, size=3)  # the first thing for the pool, whose thread the reader starts
    assert (export / "f").read_text() == "con"


def test_locks_are_taken_with_the_servers_rights(export: Path, opener: Opener) -> None:
    """Whoever has a file open may lock it, as with flock(2), though it could not be opened again."""
    export.chmod(0o777)
    with opener(export, CHECKED) as client:
        alice = client.attach(n_uname=ALICE)
        fid = client.walk(alice)
        client.lcreate(fid, b"f", os.O_RDWR, 0o000, ALICE)
        client.walk(alice, b"f")  # the reader is Alice
        assert client.lock(fid, codec.LOCK_TYPE_WRLCK, proc_id=1, client_id=b"client") == codec.LOCK_SUCCESS


def test_what_is_open_stays_open(export: Path, opener: Opener) -> None:
    """As with any file: rights are looked at when it is opened, for its size too, and not any more then."""
    export.chmod(0o777)
    with opener(export, CHECKED) as client:
        root = client.attach(n_uname=ALICE)
        fid = client.walk(root)
        client.lcreate(fid, b"f", os.O_RDWR, 0o444, ALICE)  # for writing, though nobody may open it so any more
        client.write(fid, 0, b"content")
        client.setattr(fid, size=4)
        assert client.read(fid, 0, 10) == b"cont"
        os.chown(export / "f", BOB, BOB)
        (export / "f").chmod(0)
        client.write(fid, 4, b"!")
        assert client.read(fid, 0, 10) == b"cont!"
        with refused(errno.EACCES):
            client.lopen(client.walk(root, b"f"), os.O_RDONLY)


def test_a_users_writing_takes_set_id_bits_off(export: Path, opener: Opener) -> None:
    (export / "f").write_text("content")
    os.chown(export / "f", ALICE, ALICE)
    (export / "f").chmod(0o6777)
    with opener(export, CHECKED) as client:
        # Root first, so that the threads have all capabilities when the user comes.
        client.write_file(client.attach(n_uname=0), b"other", b"x")
        fid = client.walk(client.attach(n_uname=BOB), b"f")
        client.lopen(fid, os.O_WRONLY)
        client.getattr(client.walk(client.attach(n_uname=0), b"other"))
        client.lopen(client.walk(client.attach(n_uname=0), b"other"))  # the reader is root again
        client.write(fid, 0, b"evil")
    assert stat.S_IMODE((export / "f").stat().st_mode) == 0o777


def test_the_way_up_takes_the_right_to_search(export: Path, opener: Opener) -> None:
    (export / "d" / "e").mkdir(parents=True)
    (export / "d").chmod(0o755)
    (export / "d" / "e").chmod(0o711)
    with opener(export, CHECKED) as client:
        fid = client.walk(client.attach(n_uname=BOB), b"d", b"e")
        client.walk(fid, b"..", b"..")
        (export / "d" / "e").chmod(0o700)
        with refused(errno.EACCES):
            client.walk(fid, b"..")
        client.walk(client.attach(n_uname=0), b"d", b"e", b"..")


def test_renaming_and_removing_by_fid(export: Path, opener: Opener) -> None:
    """Trename and Tremove find the name by themselves, with the server's rights, and act with the user's."""
    (export / "d").mkdir(mode=0o755)
    (export / "d" / "f").write_text("content")
    os.chown(export / "d" / "f", BOB, BOB)
    (export / "sticky").mkdir()
    (export / "sticky").chmod(0o1777)
    with opener(export, CHECKED) as client:
        root = client.attach(n_uname=BOB)
        for refusal in (
            lambda: client.rename(client.walk(root, b"d", b"f"), client.walk(root, b"sticky"), b"g"),
            lambda: client.remove(client.walk(root, b"d", b"f")),
        ):
            with refused(errno.EACCES):
                refusal()
        os.chown(export / "d", BOB, BOB)
        client.rename(client.walk(root, b"d", b"f"), client.walk(root, b"sticky"), b"g")
        client.remove(client.walk(root, b"sticky", b"g"))
        # Having walked there is enough, as with an open directory: the way may be closed by now.
        (export / "d" / "e").mkdir(mode=0o755)
        (export / "d" / "e" / "f").touch()
        os.chown(export / "d" / "e", BOB, BOB)
        fid = client.walk(root, b"d", b"e", b"f")
        os.chown(export / "d", 0, 0)
        (export / "d").chmod(0o700)
        client.remove(fid)
    assert os.listdir(export / "sticky") == os.listdir(export / "d" / "e") == []


def test_the_group_that_a_message_names(export: Path, opener: Opener) -> None:
    """It decides whom a new file belongs to, and never what its maker may."""
    (export / "staff").mkdir()
    os.chown(export / "staff", 0, STAFF)
    (export / "staff").chmod(0o770)
    export.chmod(0o777)
    with opener(export, TREE) as client:
        carol, bob = client.attach(n_uname=CAROL), client.attach(n_uname=BOB)
        with refused(errno.EACCES):
            client.lcreate(client.walk(carol, b"staff"), b"f", os.O_WRONLY, 0o644, STAFF)
        with refused(errno.EACCES):
            client.mkdir(client.walk(carol, b"staff"), b"d", 0o755, STAFF)
        # Of her groups nothing is listed: the file is given away, but never with set-group-id.
        client.lcreate(client.walk(carol), b"carols", os.O_WRONLY, 0o6755, STAFF)
        client.mkdir(carol, b"folder", 0o2755, STAFF)
        client.symlink(carol, b"link", b"to", STAFF)
        # Of his groups all is listed: STAFF is one, 555 is not.
        client.lcreate(client.walk(bob, b"staff"), b"f", os.O_WRONLY, 0o2755, STAFF)
        client.lcreate(client.walk(bob), b"bobs", os.O_WRONLY, 0o644, 555)
    found = {n: (export / n).lstat() for n in ("carols", "folder", "link", "staff/f", "bobs")}
    assert {name: (st.st_uid, st.st_gid) for name, st in found.items()} == {
        "carols": (CAROL, STAFF), "folder": (CAROL, STAFF), "link": (CAROL, STAFF), "staff/f": (BOB, STAFF),
        "bobs": (BOB, BOB),
    }  # fmt: skip
    modes = {name: stat.S_IMODE(found[name].st_mode) for name in ("carols", "folder", "staff/f")}
    assert modes == {"carols": 0o4755, "folder": 0o755, "staff/f": 0o2755}


def test_a_set_group_id_directory_decides(export: Path, opener: Opener) -> None:
    """Also one whose group is the maker's own."""
    (export / "own").mkdir()
    os.chown(export / "own", CAROL, CAROL)
    (export / "own").chmod(0o2755)
    with opener(export, TREE) as client:
        carol = client.walk(client.attach(n_uname=CAROL), b"own")
        client.mkdir(carol, b"folder", 0o755, STAFF)
        client.lcreate(client.walk(carol), b"file", os.O_WRONLY, 0o644, STAFF)
    for name, mode in (("folder", 0o2755), ("file", 0o644)):
        st = (export / "own" / name).stat()
        assert (st.st_gid, stat.S_IMODE(st.st_mode)) == (CAROL, mode)


def test_only_what_the_user_has_made_is_given_away(export: Path) -> None:
    """Between making and giving, the guest may have put something else under the name."""
    with memory_session(export, users=CHECKED) as session:
        alice = session.client.attach(n_uname=ALICE)
        for owner, group in ((0, 0), (ALICE, STAFF)):
            path = export / f"of-{owner}"
            path.touch()
            os.chown(path, owner, ALICE)

            def give(fd: int) -> None:
                with session.served.device.fid(alice) as parent, session.served.device.making(parent, STAFF) as made:
                    made(fd)

            with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
                pool.submit(give, file.fileno()).result()
            assert (path.stat().st_uid, path.stat().st_gid) == (owner, group or ALICE)


# Numbers.


def test_ranges(export: Path, opener: Opener) -> None:
    for name, uid, gid in (("roots", 0, 0), ("mapped", 101003, 201004), ("beyond", 101010, 201010)):
        (export / name).write_text(name)
        (export / name).chmod(0o644)
        os.chown(export / name, uid, gid)
    export.chmod(0o777)
    with opener(export, Users(SHIFTED, checks=True)) as client:
        alice, root, stranger = (client.attach(n_uname=uid) for uid in (1000, 0, 5))

        def shown(name: bytes) -> tuple[int, int]:
            found = client.getattr(client.walk(root, name))
            return found.uid, found.gid

        assert shown(b"roots") == (NOBODY, NOBODY)
        assert shown(b"mapped") == (1003, 1004)
        assert shown(b"beyond") == (NOBODY, NOBODY)
        client.lcreate(client.walk(alice), b"made", os.O_WRONLY, 0o600, 1000)
        client.mkdir(alice, b"folder", 0o700, 1000)
        assert shown(b"made") == (1000, 1000)
        made = (export / "made").stat()
        assert (made.st_uid, made.st_gid) == (101000, 201000)
        # The guest's root is nobody in particular here.
        for attempt in (
            lambda: client.lopen(client.walk(root, b"roots"), os.O_WRONLY),
            lambda: client.lopen(client.walk(root, b"made")),
            lambda: client.walk(client.walk(root, b"folder"), b"x"),
        ):
            with refused(errno.EACCES):
                attempt()
        with refused(errno.EPERM):
            client.setattr(client.walk(root, b"mapped"), uid=0)
        # Who has no number may look at what everybody may, and make nothing.
        assert client.read_file(stranger, b"roots") == b"roots"
        for attempt in (
            lambda: client.lcreate(client.walk(stranger), b"x", os.O_WRONLY, 0o600, 1000),
            lambda: client.lcreate(client.walk(alice), b"x", os.O_WRONLY, 0o600, 5),
            lambda: client.mkdir(stranger, b"x"),
        ):
            with refused(errno.EOVERFLOW):
                attempt()
        fid = client.walk(alice, b"made")
        for given in ({"uid": 5}, {"gid": 5}):
            with refused(errno.EINVAL):
                client.setattr(fid, **given)
        client.setattr(fid, uid=1000, gid=1000)
    assert not (export / "x").exists()


def test_ranges_in_acls(export: Path, opener: Opener) -> None:
    def acl(user: int, group: int) -> bytes:
        entries = (
            (1, 6, 2**32 - 1),
            (2, 4, user),
            (4, 0, 2**32 - 1),
            (8, 4, group),
            (16, 4, 2**32 - 1),
            (32, 0, 2**32 - 1),
        )
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)

    (export / "f").write_text("content")
    os.chown(export / "f", 101000, 201000)
    (export / "f").chmod(0o600)
    name = b"system.posix_acl_access"
    with opener(export, Users(SHIFTED, checks=True)) as client:
        fid = client.walk(client.attach(n_uname=1000), b"f")
        try:
            put(client, fid, name, acl(1001, 1002))
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                pytest.skip("this file system has no ACLs")
            raise
        assert os.getxattr(export / "f", name) == acl(101001, 201002)
        assert get(client, fid, name) == acl(1001, 1002)
        assert client.read_file(client.attach(n_uname=1001), b"f") == b"content"
        with refused(errno.EACCES):
            client.read_file(client.attach(n_uname=1003), b"f")
        for bad in (acl(5, 1002), acl(1001, 5)):
            with refused(errno.EINVAL):
                put(client, fid, name, bad)
        os.setxattr(export / "f", name, acl(5, 6))
        assert get(client, fid, name) == acl(NOBODY, NOBODY)


@pytest.mark.parametrize("who", ["all", "root"])
def test_squash(export: Path, opener: Opener, who: str) -> None:
    export.chmod(0o777)
    (export / "roots").write_text("secret")
    (export / "roots").chmod(0o600)
    with opener(export, Users(Identity(who, BOB, STAFF), checks=True)) as client:
        root, alice = client.attach(n_uname=0), client.attach(n_uname=ALICE)
        client.lcreate(client.walk(root), b"by-root", os.O_WRONLY, 0o600, 0)
        client.lcreate(client.walk(alice), b"by-alice", os.O_WRONLY, 0o600, ALICE)
        with refused(errno.EACCES):
            client.read_file(root, b"roots")
        with refused(errno.EPERM):
            client.mknod(root, b"null", stat.S_IFCHR | 0o666, major=1, minor=3)
        found = client.getattr(client.walk(root, b"by-root"))
        assert (found.uid, found.gid) == (BOB, STAFF)  # the host's own numbers are shown
        with refused(errno.EPERM):
            client.setattr(client.walk(alice, b"roots"), uid=0)
    alices = (export / "by-alice").stat()
    assert (alices.st_uid, alices.st_gid) == ((BOB, STAFF) if who == "all" else (ALICE, ALICE))


def test_numbers_where_the_guest_checks(export: Path, opener: Opener) -> None:
    """Numbers are mapped, and nothing is checked: what the guest's kernel lets through, goes through."""
    (export / "roots").write_text("content")
    (export / "roots").chmod(0o600)
    with opener(export, Users(SHIFTED)) as client:
        alice = client.attach(n_uname=1000)
        assert client.read_file(alice, b"roots") == b"content"
        client.lcreate(client.walk(alice), b"made", os.O_WRONLY, 0o600, 1000)
        client.setattr(client.walk(alice, b"roots"), uid=1001, gid=1002)
        with refused(errno.EINVAL):
            client.setattr(client.walk(alice, b"roots"), uid=5)
        with refused(errno.EOVERFLOW):
            client.mkdir(client.attach(n_uname=5), b"x")
    made, roots = (export / "made").stat(), (export / "roots").stat()
    assert (made.st_uid, made.st_gid) == (101000, 201000)
    assert (roots.st_uid, roots.st_gid) == (101001, 201002)


@pytest.mark.parametrize("checks", [True, False])
def test_special_files(export: Path, opener: Opener, checks: bool) -> None:
    with opener(export, Users(checks=checks, special=False)) as client:
        root = client.attach(n_uname=0)
        for kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
            with refused(errno.EPERM):
                client.mknod(root, b"x", kind | 0o666, major=1, minor=3)
        client.mknod(root, b"plain", stat.S_IFREG | 0o600)
        client.mknod(root, b"plainer", 0o600)
    assert sorted(os.listdir(export)) == ["plain", "plainer"]


# Changing under a client.


def test_other_terms_while_it_serves(export: Path) -> None:
    (export / "f").write_text("content")
    (export / "f").chmod(0o600)
    export.chmod(0o777)
    with memory_session(export) as session:
        client, device = session.client, session.served.device
        alice = client.attach(n_uname=ALICE)
        fid = client.walk(alice, b"f")
        client.lopen(fid)
        client.mkdir(alice, b"before", gid=ALICE)
        for _ in range(3):
            device.set_users(CHECKED)
            assert client.read(fid, 0, 10) == b"content"  # what is open stays open
            with refused(errno.EACCES):
                client.read_file(alice, b"f")
            with refused(errno.EPERM):
                client.setattr(client.walk(alice, b"f"), mode=0o644)
            device.set_users(Users(SHIFTED, checks=True))
            client.lcreate(client.walk(alice), b"made", os.O_WRONLY, 0o600, ALICE)
            assert (export / "made").stat().st_uid == 101000
            with refused(errno.EPERM):
                client.mknod(alice, b"null", stat.S_IFCHR | 0o666, major=1, minor=3)
            device.set_users(Users())
            assert client.read_file(alice, b"f") == b"content"
            client.mknod(alice, b"null", stat.S_IFCHR | 0o666, major=1, minor=3)
            client.unlinkat(alice, b"null")
            client.unlinkat(alice, b"made")


def test_other_limits_while_it_serves(export: Path) -> None:
    with memory_session(export) as session:
        client = session.client
        fids = [client.walk(session.root) for _ in range(30)]
        session.served.device.set_limits(Limits(max_fids=20))
        with refused(errno.EMFILE):
            client.walk(session.root)
        client.getattr(fids[-1])  # what is there stays
        session.served.device.set_limits(Limits(max_fids=40))
        client.walk(session.root)


def test_who_may_not_act_as_others_says_so(export: Path) -> None:
    def work() -> str:
        lib.x9_drop_capabilities(0)
        try:
            DataPlane(os.open(export, os.O_RDONLY), False, users=CHECKED)
        except Xen9pError as error:
            return str(error)
        return "worked"

    with child(work) as (_, result):
        assert result() == "cannot act as the guest's users (run it as root, or with checks by the guest)"


def test_an_identity_that_was_not_taken_does_nothing(export: Path) -> None:
    """setfsuid(2) says nothing of failing: what follows would be done as root."""

    def work() -> str:
        device = DataPlane(os.open(export, os.O_RDONLY), False, users=CHECKED)
        lib.x9_keep_capabilities()
        lib.x9_drop_capabilities(sum(1 << n for name, n in sandbox.CAPABILITIES.items() if name != "setuid"))
        try:
            with device.acting(ALICE):
                status = Path("/proc/thread-self/status").read_text()
                return f"went on as {status.partition('Uid:')[2].split()[3]}"
        except PermissionError:
            return "refused"

    with child(work) as (_, result):
        assert result() == "refused"


def test_groups_in_the_hosts_numbers() -> None:
    table = {1000: [1000, 1001, 7], 1001: [7], 7: [1000], 0: [0]}
    assert listed(SHIFTED, table) == ((100000, (100000,)), (101000, (201000, 201001)))
    assert listed(Identity("all", 5, 6), table) == ((5, (6,)),)


def test_users_through_json() -> None:
    for users in (Users(), TREE, Users(SHIFTED, True, False, ((101000, (201000, 5)),)), Users(Identity("root", 5, 6))):
        assert from_plain(users.plain()) == users


def test_groups_that_are_malformed_are_refused(export: Path) -> None:
    device = DataPlane(os.open(export, os.O_RDONLY), False)
    for groups in (((5, ()),), ((5, (1,)), (5, (1,))), ((5, (1,)), (4, (1,))), ((5, tuple(range(2000))),)):
        with pytest.raises(Xen9pError, match="cannot take the guest's users"):
            device.set_users(Users(checks=True, groups=groups))
    assert device.users == Users()
    device.close()


def test_who_names_no_user_is_root(export: Path, opener: Opener) -> None:
    (export / "roots").write_text("secret")
    (export / "roots").chmod(0o600)
    with opener(export, CHECKED) as client:
        assert client.read_file(client.attach(n_uname=codec.NOFID), b"roots") == b"secret"
    with opener(export, Users(Identity("root", BOB, BOB), checks=True)) as client, refused(errno.EACCES):
        client.read_file(client.attach(n_uname=codec.NOFID), b"roots")
