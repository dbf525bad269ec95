"""What a guest may write about its rings, and how access to XenStore fails. XenStore itself needs Xen: tests/lab."""

from __future__ import annotations

import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen9p.device import Ring, XenbusState
from xen9p.errors import XenStoreError
from xen9p.jsonlines import listen
from xen9p.xenbus import ViolationError, parse_rings
from xen9p.xenstore import XenStore

GOOD = {
    "version": "1",
    "num-rings": "2",
    "ring-ref0": "8",
    "event-channel-0": "12",
    "ring-ref1": "4294967295",
    "event-channel-1": "13",
}


def test_rings_as_linux_publishes_them() -> None:
    assert parse_rings(GOOD.get) == (Ring(8, 12), Ring(4294967295, 13))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("version", None, "version is missing, not 1"),
        ("version", "2", "version is '2', not 1"),
        ("num-rings", "0", "num-rings is 0, not within 1..4"),
        ("num-rings", "5", "num-rings is 5"),
        ("num-rings", "-1", "num-rings is '-1', not a number"),
        ("num-rings", "3", "ring-ref2 is missing"),
        ("ring-ref0", "4294967296", "not a number of 32 bits"),
        ("ring-ref0", "8 ", "not a number of 32 bits"),
        ("ring-ref1", "8", "two rings share"),
        ("event-channel-1", "12", "two rings share"),
        ("event-channel-0", "", "event-channel-0 is ''"),
        ("event-channel-0", "9" * 4000, "event-channel-0 is '9999"),
    ],
)
def test_rings_that_are_wrong(key: str, value: str | None, reason: str) -> None:
    nodes: dict[str, str | None] = {**GOOD, key: value}
    with pytest.raises(ViolationError, match=reason) as caught:
        parse_rings(nodes.get)
    assert len(str(caught.value)) < 120


@given(st.dictionaries(st.sampled_from(list(GOOD)), st.text(max_size=12)))
def test_any_directory_gives_rings_or_a_violation(nodes: dict[str, str]) -> None:
    try:
        rings = parse_rings({**GOOD, **nodes}.get)
    except ViolationError:
        return
    assert all(0 <= n < 1 << 32 for r in rings for n in (r.ref, r.port))


def test_state_names() -> None:
    assert XenbusState.named(2) == "InitWait"
    assert XenbusState.named(None) == "none"


def test_no_xenstore(tmp_path: Path) -> None:
    with pytest.raises(XenStoreError, match=r"does not answer at .*is this dom0"):
        XenStore(str(tmp_path / "socket")).read("/local")


def test_a_silent_xenstore_ends_at_the_deadline(tmp_path: Path) -> None:
    with listen(tmp_path / "socket"):
        store = XenStore(str(tmp_path / "socket"), timeout=0.2)
        start = time.monotonic()
        with pytest.raises(XenStoreError, match=r"no answer within 0.2 s"):
            store.read("/local/domain/0/name")
        assert time.monotonic() - start < 5
        assert not store.connected


@pytest.mark.parametrize("answer", [b"", b"x" * 7, b"\xff" * 64])
def test_a_xenstore_that_talks_nonsense_or_hangs_up(tmp_path: Path, answer: bytes) -> None:
    with listen(tmp_path / "socket") as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)
                client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        store = XenStore(str(tmp_path / "socket"), timeout=2)
        with pytest.raises(XenStoreError, match="broke"):
            store.read("/local/domain/0/name")
        thread.join()
        assert not store.connected


@pytest.mark.parametrize("path", ["", "relative//x", "/a/", "/a b", "/a\0b", "/ä", "/" + "x" * 4000])
def test_bad_paths_are_not_sent(path: str) -> None:
    with pytest.raises(XenStoreError, match="bad XenStore path"):
        XenStore("/nonexistent").read(path)


def test_an_event_before_an_answer_is_kept(tmp_path: Path) -> None:
    """The framing only: one read, answered after a watch event and in two pieces."""
    header = struct.Struct("<IIII")
    with listen(tmp_path / "socket") as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                op, request, transaction, size = header.unpack(client.recv(16, socket.MSG_WAITALL))
                assert client.recv(size, socket.MSG_WAITALL) == b"/local/domain/0/name\0"
                event = b"/local/domain/1\0token\0"
                client.sendall((header.pack(15, 0, 0, len(event)) + event) * 2)
                answer = header.pack(op, request, transaction, 8) + b"Domain-0"
                client.sendall(answer[:20])
                time.sleep(0.05)
                client.sendall(answer[20:])
                client.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        store = XenStore(str(tmp_path / "socket"), timeout=2)
        assert store.read("/local/domain/0/name") == "Domain-0"
        assert store.pending
        assert store.events() == [("/local/domain/1", "token")]
        assert not store.pending
        store.close()
        thread.join()
