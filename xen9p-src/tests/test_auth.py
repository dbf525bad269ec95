"""Attaching by key: who has none, a wrong one or somebody else's gets nothing, and learns nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from hostile import SAMPLES
from serving import Served, serve_memory
from xen9p import auth, codec
from xen9p.async_client import AsyncClient
from xen9p.auth import CHALLENGE_SIZE, RESPONSE_SIZE, Authenticator, Key, respond
from xen9p.cli import main as run
from xen9p.client import Client
from xen9p.dataplane import DataPlane, Verdict
from xen9p.errors import AuthError, Xen9pError
from xen9p.transport.memory import MemoryRingTransport
from xen9p.transport.stream_client import SocketTransport

ALICE = Key("alice", bytes(range(32)))
BOB = Key("bob", b"b" * 32)
CAROL = Key("carol", b"c" * 32, uid=1000)
KEYS = {key.name: key for key in (ALICE, BOB, CAROL)}


@contextmanager
def guarded(export: Path, readonly: bool = False) -> Iterator[tuple[Client, DataPlane]]:
    """A client of a device that wants a key, its version agreed and nothing attached."""
    with serve_memory(export, readonly=readonly, authenticator=Authenticator(KEYS)) as (rings, served):
        client = Client(MemoryRingTransport(rings[0]))
        client.version()
        try:
            yield client, served.device
        finally:
            client.close()


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what counts
        yield
    assert caught.value.errno == number


def answered(client: Client, key: Key, uname: bytes = b"", aname: bytes = b"", n_uname: int = 0) -> int:
    """An afid with the response by a key, whether that is good or not."""
    afid = client.auth(uname or key.name.encode(), aname, n_uname)
    assert client.write(afid, 0, respond(key, client.read(afid, 0, 1000), aname, n_uname)) == RESPONSE_SIZE
    return afid


# Who gets in.


@pytest.mark.parametrize("readonly", [False, True])
def test_a_key_opens(export: Path, readonly: bool) -> None:
    (export / "f").write_text("hello")
    with guarded(export, readonly) as (client, device):
        root = client.enter(n_uname=1000, key=ALICE)
        assert client.read_file(root, b"f") == b"hello"
        assert device.stats()["fids"] == 1, "the afid is still there"
        assert client.read_file(client.enter(n_uname=1000, key=CAROL), b"f") == b"hello"


def test_a_key_opens_over_a_socket_for_asyncio(export: Path) -> None:
    (export / "f").write_text("hello")

    async def use(stream: socket.socket) -> None:
        client, root = await AsyncClient.connect(SocketTransport(stream), n_uname=1000, key=CAROL)
        fid = await client.walk(root, b"f")
        await client.lopen(fid)
        assert await client.read(fid, 0, 10) == b"hello"
        for wrong in (Key("alice", BOB.secret), None):
            with pytest.raises(AuthError):
                await client.enter(key=wrong)
        client.close()

    ours, theirs = socket.socketpair()
    served = Served(export, authenticator=Authenticator(KEYS))
    served.device.add_stream(theirs)
    served.start()
    asyncio.run(use(ours))
    assert served.join() == Verdict.HANGUP
    served.close()
    theirs.close()


def test_nothing_works_before(export: Path) -> None:
    """Not one message but Tversion, Tauth, Tflush: there is no fid that it could be about."""
    (export / "f").write_text("hello")
    with guarded(export) as (client, _):
        for message in SAMPLES:
            if isinstance(message, codec.Tversion | codec.Tauth | codec.Tflush):
                continue
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the numbers are what counts
                client.rpc(message)
            # Leases are about no fid; there are none here.
            leases = isinstance(message, codec.Tlease | codec.Trevoke)
            assert caught.value.errno in ((errno.EOPNOTSUPP,) if leases else (errno.EBADF, errno.ENOKEY)), message
    assert os.listdir(export) == ["f"]


def test_an_afid_is_no_file(export: Path) -> None:
    """Only Tread, Twrite, Tclunk and Tattach take it, with or without a response in it."""
    (export / "f").write_text("hello")
    with guarded(export) as (client, _):
        for afid in (client.auth(b"alice"), answered(client, ALICE)):
            for message in SAMPLES:
                if isinstance(message, codec.Tversion | codec.Tauth | codec.Tflush | codec.Tread | codec.Twrite):
                    continue
                if isinstance(message, codec.Tclunk | codec.Tremove | codec.Tattach | codec.Tlease | codec.Trevoke):
                    continue
                body = codec.encode(message, 1)
                onto = codec.decode(body[:7] + afid.to_bytes(4, "little") + body[11:])[1]
                with refused(errno.EBADF):
                    client.rpc(onto)
            with refused(errno.EINVAL):  # its number is taken
                client.rpc(codec.Tauth(afid, b"alice", b"", 0))
            with refused(errno.EBADF):  # Tremove clunks all the same
                client.remove(afid)
            with refused(errno.EBADF):
                client.rpc(codec.Tread(afid, 0, 10))


def test_a_readonly_device_takes_responses_only(export: Path) -> None:
    (export / "f").write_text("hello")
    with guarded(export, readonly=True) as (client, _):
        root = client.enter(key=ALICE)
        fid = client.walk(root, b"f")
        client.lopen(fid)
        for target in (fid, root, 999):
            with refused(errno.EROFS):
                client.rpc(codec.Twrite(target, 0, b"x"))


# Who does not.


def test_without_a_key(export: Path) -> None:
    with guarded(export) as (client, _):
        for aname in (b"", b"/", b"another"):
            with refused(errno.ENOKEY):
                client.attach(b"alice", aname)
        with pytest.raises(AuthError, match="wants a key"):
            client.enter()


@pytest.mark.parametrize(
    "key",
    [Key("alice", BOB.secret), Key("nobody", ALICE.secret), Key("alice", bytes(32)), Key("", ALICE.secret)],
    ids=["another's", "unknown name", "wrong", "no name"],
)
def test_a_wrong_key(export: Path, key: Key) -> None:
    """The same answer, whatever is wrong, also where the tree does not exist."""
    with guarded(export) as (client, device):
        for aname in (b"", b"another"):
            afid = answered(client, key, aname=aname)
            with refused(errno.EKEYREJECTED):
                client.attach(key.name.encode(), aname, afid=afid)
        with pytest.raises(AuthError, match="refuses the key"):
            client.enter(key=key)
        assert device.stats()["fids"] == 2
        with refused(errno.ENOENT):  # only a good key is told
            client.attach(b"alice", b"another", afid=answered(client, ALICE, aname=b"another"))


def test_forged_names(export: Path) -> None:
    """The response is for one user and one tree: no Tattach says others."""
    with guarded(export) as (client, _):
        for uname, aname, n_uname in ((b"bob", b"", 7), (b"alice", b"/", 7), (b"alice", b"", 0), (b"alice\0", b"", 7)):
            afid = answered(client, ALICE, n_uname=7)
            with refused(errno.EKEYREJECTED):
                client.attach(uname, aname, n_uname, afid)
            client.clunk(afid)
            client.attach(b"alice", b"", 7, answered(client, ALICE, n_uname=7))


def test_a_key_for_one_uid(export: Path) -> None:
    with guarded(export) as (client, _):
        for uid in (0, 1001, codec.NOFID):
            with pytest.raises(AuthError, match="refuses"):
                client.enter(n_uname=uid, key=CAROL)
        client.enter(n_uname=1000, key=CAROL)


def test_names_cannot_be_shifted(export: Path) -> None:
    """What the proof is about has lengths in it: a byte moved from one name to the next makes another."""
    shifted = auth._proof(ALICE.secret, b"", b"ab", b"c", 0)
    assert shifted != auth._proof(ALICE.secret, b"", b"a", b"bc", 0)
    assert shifted != auth._proof(ALICE.secret, b"", b"abc", b"", 0)


def test_replay(export: Path) -> None:
    """A response that was seen on the way is of no use: not to another afid, not to the same one again."""
    with guarded(export) as (client, _):
        afid = client.auth(b"alice")
        seen = respond(ALICE, client.read(afid, 0, 100), b"", 0)
        client.write(afid, 0, seen)
        client.attach(b"alice", afid=afid)
        for _ in range(2):
            again = client.auth(b"alice")
            client.write(again, 0, seen)
            with refused(errno.EKEYREJECTED):
                client.attach(b"alice", afid=again)
        with refused(errno.EINVAL):
            client.write(afid, 0, seen)


def test_challenges_differ(export: Path) -> None:
    with guarded(export) as (client, _):
        challenges = [client.read(client.auth(b"alice"), 0, 100) for _ in range(10)]
        assert len(set(challenges)) == 10
        assert {len(challenge) for challenge in challenges} == {CHALLENGE_SIZE}
        assert len({respond(ALICE, challenges[0], b"", 0) for _ in range(10)}) == 10


def test_an_afid_is_good_once(export: Path) -> None:
    """Also where the first attempt fails."""
    with guarded(export) as (client, _):
        afid = answered(client, ALICE)
        client.attach(b"alice", afid=afid)
        with refused(errno.EKEYREJECTED):
            client.attach(b"alice", afid=afid)
        afid = answered(client, BOB)
        with refused(errno.EKEYREJECTED):
            client.attach(b"alice", afid=afid)
        with refused(errno.EKEYREJECTED):
            client.attach(b"bob", afid=afid)
        client.enter(key=BOB)


def test_two_attaches_at_once_with_one_afid(export: Path) -> None:
    """Two Python threads answer them: one gets in, whichever."""
    for _ in range(20):
        with guarded(export) as (client, _):
            afid = answered(client, ALICE)
            pending = [
                client.submit(codec.Tattach(client.new_fid(), afid, b"alice", b"", 0), codec.Rattach) for _ in range(2)
            ]
            outcomes = []
            for one in pending:
                try:
                    one.result()
                    outcomes.append(0)
                except OSError as error:
                    outcomes.append(error.errno or -1)
            assert sorted(outcomes) == [0, errno.EKEYREJECTED]


def test_another_devices_afid(export: Path) -> None:
    """The number of an afid means nothing on another connection, and neither does its response."""
    with guarded(export) as (first, _), guarded(export) as (second, _):
        afid = first.auth(b"alice")
        response = respond(ALICE, first.read(afid, 0, 100), b"", 0)
        first.write(afid, 0, response)
        with refused(errno.EBADF):
            second.attach(b"alice", afid=afid)
        other = second.auth(b"alice")
        second.write(other, 0, response)
        with refused(errno.EKEYREJECTED):
            second.attach(b"alice", afid=other)


def test_a_files_fid_is_no_afid(export: Path) -> None:
    with guarded(export) as (client, _):
        root = client.enter(key=ALICE)
        for afid in (root, 999):
            with refused(errno.EBADF):
                client.attach(b"alice", afid=afid)


def test_half_a_response(export: Path) -> None:
    with guarded(export) as (client, _):
        for part in (0, 1, RESPONSE_SIZE - 1):
            afid = client.auth(b"alice")
            response = respond(ALICE, client.read(afid, 0, 100), b"", 0)
            client.write(afid, 0, response[:part])
            with refused(errno.EKEYREJECTED):
                client.attach(b"alice", afid=afid)
            with refused(errno.EINVAL):  # the rest comes too late
                client.write(afid, part, response[part:])


def test_reads_and_writes_beyond(export: Path) -> None:
    with guarded(export) as (client, _):
        afid = client.auth(b"alice")
        challenge = client.read(afid, 0, 1 << 20)
        assert client.read(afid, 5, 10) == challenge[5:15]
        for offset in (CHALLENGE_SIZE, 1 << 32, (1 << 64) - 1):
            assert client.read(afid, offset, 100) == b""
        for data in (bytes(RESPONSE_SIZE + 1), bytes(30_000)):
            with refused(errno.ENOSPC):
                client.write(afid, 0, data)
        for offset in (1, RESPONSE_SIZE, 1 << 32, (1 << 64) - 1):
            with refused(errno.EINVAL):
                client.write(afid, offset, b"x")
        response = respond(ALICE, challenge, b"", 0)
        client.write(afid, 0, response[:20])
        with refused(errno.EINVAL):  # no byte of it twice
            client.write(afid, 0, response)
        with refused(errno.ENOSPC):
            client.write(afid, 20, response)
        client.write(afid, 20, response[20:])
        with refused(errno.ENOSPC):
            client.write(afid, RESPONSE_SIZE, b"x")
        client.attach(b"alice", afid=afid)


def test_afids_are_bounded_and_given_back(export: Path) -> None:
    with guarded(export) as (client, device):
        for _ in range(3):
            afids = [client.auth(b"alice") for _ in range(16)]
            with refused(errno.EMFILE):
                client.auth(b"alice")
            for afid in afids:
                client.clunk(afid)
        for _ in range(16):
            client.auth(b"alice")
        client.version()  # a new session: nothing of the old one is left
        assert device.stats()["fids"] == 0
        for _ in range(5):
            with refused(errno.EINVAL):  # what fails takes no place either
                client.rpc(codec.Tauth(codec.NOFID, b"alice", b"", 0))
        assert len([client.auth(b"alice") for _ in range(16)]) == 16


def test_a_clunk_in_the_middle(export: Path) -> None:
    with guarded(export) as (client, device):
        for work in (lambda afid: None, lambda afid: client.write(afid, 0, b"half of it")):
            afid = client.auth(b"alice")
            work(afid)
            client.clunk(afid)
            with refused(errno.EBADF):
                client.rpc(codec.Twrite(afid, 0, bytes(RESPONSE_SIZE)))
            with refused(errno.EBADF):
                client.rpc(codec.Tattach(77, afid, b"alice", b"", 0))
        assert device.stats()["fids"] == 0
        client.enter(key=ALICE)


def test_attempts_are_limited(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this peer; what another does is not its business."""
    with guarded(export) as (client, _), guarded(export) as (other, _):
        wrong = Key("alice", BOB.secret)
        waiting = [answered(client, ALICE), answered(client, wrong)]
        for _ in range(auth.ATTEMPTS):
            with pytest.raises(AuthError, match="refuses the key"):
                client.enter(key=wrong)
        for key in (wrong, ALICE):
            with pytest.raises(AuthError, match="too often"):
                client.enter(key=key)
        for afid in waiting:  # nor do challenges help that were given out before
            with pytest.raises(AuthError, match="too often"), auth.explained(ALICE):
                client.attach(b"alice", afid=afid)
        other.enter(key=ALICE)
        for times in (1, 2):  # one refusal each time that the pause is over
            later = time.monotonic() + times * (auth.PAUSE + 0.1)
            monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda later=later: later))
            client.enter(key=ALICE)
            with pytest.raises(AuthError, match="refuses the key"):
                client.enter(key=wrong)
            with pytest.raises(AuthError, match="too often"):
                client.enter(key=ALICE)


def test_anything_on_afids_from_two_rings_at_once(export: Path) -> None:
    """Four fids that are made, read, written, attached with, clunked at once: nobody gets in, nothing stays."""
    keys = Authenticator(KEYS)
    with serve_memory(export, rings=2, authenticator=keys) as (rings, served):
        clients = [Client(MemoryRingTransport(ring), msize=8192) for ring in rings]
        clients[1]._next_tag = 30_000  # tags are the device's, not the ring's
        clients[0].version()
        got: list[set[int]] = [set(), set()]

        def work(ring: int) -> None:
            draw = random.Random(ring)
            for _ in range(1500):
                afid, length = draw.randrange(4), draw.choice((0, 1, 32, RESPONSE_SIZE, 100))
                message = draw.choice(
                    (
                        codec.Tauth(afid, b"alice", b"", 0),
                        codec.Tread(afid, draw.choice((0, 30, 2**63)), 100),
                        codec.Twrite(afid, draw.choice((0, 32)), bytes(length)),
                        codec.Tattach(draw.randrange(4, 8), afid, b"alice", b"", 0),
                        codec.Twalk(afid, 9, ()),
                        codec.Tclunk(afid),
                        codec.Tremove(afid),
                    )
                )
                try:
                    assert not isinstance(clients[ring].rpc(message), codec.Rattach | codec.Rwalk | codec.Rremove)
                except OSError as error:
                    got[ring].add(error.errno or -1)
                    if error.errno == errno.ETIMEDOUT:
                        return

        threads = [threading.Thread(target=work, args=(ring,)) for ring in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        expected = {errno.EBADF, errno.EINVAL, errno.ENOSPC, errno.EKEYREJECTED, errno.EAGAIN}
        assert got[0] | got[1] <= expected
        clients[0].version()
        assert served.device.stats()["fids"] == 0
        for client in clients:
            client.close()


def test_a_server_without_keys_says_so(export: Path) -> None:
    with serve_memory(export) as (rings, _):
        client, root = Client.connect(MemoryRingTransport(rings[0]))
        with pytest.raises(AuthError, match="wants no key"):
            client.enter(key=ALICE)
        with refused(errno.EINVAL):
            client.attach(afid=root)
        client.close()


@pytest.mark.parametrize("challenge", [b"", b"xen9p-1\n", b"xen9p-2\n" + bytes(32), bytes(CHALLENGE_SIZE), bytes(1000)])
def test_a_challenge_that_is_none(challenge: bytes) -> None:
    with pytest.raises(AuthError, match="another kind"):
        respond(ALICE, challenge, b"", 0)


# Files of keys.


def test_making_and_reading_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    os.umask(0o022)
    try:
        assert run(["key", "make", str(path)]) == 0
        assert run(["key", "make", str(path), "--name", "alice.x", "--uid", "1000"]) == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(0)
    said = capsys.readouterr()
    keys = auth.load(path)
    assert list(keys) == ["key", "alice.x"]
    assert [(key.name, key.uid, len(key.secret)) for key in keys.values()] == [("key", None, 32), ("alice.x", 1000, 32)]
    assert keys["key"].secret != keys["alice.x"].secret
    for key in keys.values():
        assert key.secret.hex() not in said.out + said.err
        assert key.secret.hex() not in repr(key)
    assert auth.choose(path, "key") == keys["key"]
    with pytest.raises(Xen9pError, match=r"has several keys .*key, alice\.x"):
        auth.choose(path, None)
    with pytest.raises(Xen9pError, match="has no key 'bob'"):
        auth.choose(path, "bob")
    before = path.read_text()
    assert run(["key", "make", str(path)]) == 1
    assert "has a key 'key' already" in capsys.readouterr().err
    assert path.read_text() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    auth.make(path)
    path.chmod(mode)
    for work in (lambda: auth.load(path), lambda: auth.make(path, "another")):
        with pytest.raises(Xen9pError, match=rf"mode {mode:04o}\) \(chmod 600"):
            work()


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away takes root")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    auth.make(path)
    os.chown(path, 1234, 0)
    with pytest.raises(Xen9pError, match="belongs to uid 1234"):
        auth.load(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no key"),
        ("[a]\n", r"\[a\] has no key"),
        ('a = "text"\n', r"\[a\] has no key"),
        ('[a]\nkey = "abcd"\n', "64 hexadecimal digits"),
        (f'[a]\nkey = "{"g" * 64}"\n', "64 hexadecimal digits"),
        (f'["a b"]\nkey = "{"a" * 64}"\n', "no name of a key"),
        (f'[a]\nkey = "{"a" * 64}"\nuid = -1\n', "uid is -1"),
        (f'[a]\nkey = "{"a" * 64}"\nuid = true\n', "uid is True"),
        (f'[a]\nkey = "{"a" * 64}"\ncolour = "red"\n', "has colour"),
        ("[a\n", "line 1"),
        ("\xff", "decode|Invalid"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(Xen9pError, match=says):
        auth.load(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path, says in (
        (tmp_path, "directory|regular"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "fifo", "regular"),
    ):
        with pytest.raises(Xen9pError, match=says):
            auth.load(path)
