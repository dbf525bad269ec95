"""The lab server without Xen: what its checks say of the server as handed out, as solved, and as in the wrong turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab_parts import Bench, bench
from rings import MemoryLink, Ring
from xen9p import codec
from xen9p.errors import ProtocolError
from xen9p.transport.memory import OUT_PROD, MemoryRing, MemoryRingTransport

PROBED = ("walk", "data", "entries", "clunk", "safe")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return bench("server", tmp_path, monkeypatch)


def solve(server: Bench) -> None:
    """The solution's server, without the guest that comes after it."""
    text = server.lab.read("solution/steps.md")
    code = text.split("```console host\n", 1)[1].split("./serve.py", 1)[0]
    done = server.look.system.run("host", code)
    assert done.code == 0, done.said


def parts_of(server: Bench) -> dict[str, float]:
    return {name: round(server.check(name).part, 2) for name in PROBED}


def test_handed_out_it_answers_none_of_them(server: Bench) -> None:
    assert parts_of(server) == dict.fromkeys(PROBED, 0.0)
    assert "Operation not supported" in server.check("walk").found


def test_the_solution_has_all(server: Bench) -> None:
    solve(server)
    assert parts_of(server) == dict.fromkeys(PROBED, 1.0)


def test_a_server_that_follows_links_is_not_safe(server: Bench) -> None:
    solve(server)
    server.follow("wrong/follows.md")
    safe = server.check("safe")
    assert safe.part == 0
    assert safe.expected.startswith("link: ")


def test_a_server_that_keeps_descriptors_is_seen(server: Bench) -> None:
    solve(server)
    server.follow("wrong/keeps.md")
    clunk = server.check("clunk")
    assert round(clunk.part, 2) == 0.67
    assert "more" in clunk.found


@pytest.mark.parametrize(
    ("old", "new", "check", "said"),
    [
        ("raise failure(errno.EOPNOTSUPP)\n\n    def lopen", "while True: pass\n\n    def lopen", "walk", "it hangs"),
        ("import errno", "import nothing\nimport errno", "walk", "has ended"),
    ],
)
def test_a_server_that_is_broken_is_a_wrong_answer(server: Bench, old: str, new: str, check: str, said: str) -> None:
    """And no trouble of the check's own."""
    file = Path(server.look.out("host", 'echo "$LAB_WORK/server.py"').strip())
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    verdict = server.check(check)
    assert verdict.part == 0
    assert said in verdict.expected + verdict.found


def test_a_missing_server_is_named(server: Bench) -> None:
    server.look.run("host", 'rm "$LAB_WORK/server.py"')
    assert server.check("walk").found == "server.py: no such file"


# The ring that is handed out, against the one of the product.


def pair(start_at: int = 0) -> tuple[MemoryRing, Ring, MemoryRingTransport]:
    """A ring in memory whose indices begin somewhere, our end of it, and a client's."""
    memory = MemoryRing(1)
    memory.start_at(start_at)
    return memory, MemoryLink(memory).rings[0], MemoryRingTransport(memory, timeout=1.0)


@pytest.mark.parametrize("start_at", [0, 4090, (1 << 32) - 10])
def test_messages_go_round_the_ring_and_round_the_indices(start_at: int) -> None:
    _, ring, client = pair(start_at)
    for number in range(20):
        message = codec.encode(codec.Twalk(0, number, (b"n" * 200,)), number)
        client.send(message)
        assert ring.take(1000) == message
        ring.put(message)
        assert client.recv() == message
    assert ring.take(1000) is None


@pytest.mark.parametrize("size", [0, 6, 1001])
def test_a_size_out_of_range_ends_it(size: int) -> None:
    _, ring, client = pair()
    client.send(size.to_bytes(4, "little") + bytes(6))
    with pytest.raises(ProtocolError, match=f"a message of {size} bytes"):
        ring.take(1000)


def test_an_index_out_of_range_ends_it() -> None:
    memory, ring, _ = pair()
    memory.write_index(OUT_PROD, ring.half + 1)
    with pytest.raises(ProtocolError, match="further apart"):
        ring.take(1000)


def test_a_message_that_is_not_all_there_waits() -> None:
    memory, ring, client = pair()
    client.send(codec.encode(codec.Tclunk(7), 1))
    there = memory.index(OUT_PROD)
    memory.write_index(OUT_PROD, there - 1)
    assert ring.take(1000) is None
    memory.write_index(OUT_PROD, there)
    assert ring.take(1000) == codec.encode(codec.Tclunk(7), 1)


def test_a_reply_waits_for_room_and_never_fills_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ring, client = pair()
    whole = ring.half
    message = whole.to_bytes(4, "little") + bytes(whole - 4)
    monkeypatch.setattr("rings.PATIENCE", 0.05)
    with pytest.raises(TimeoutError):
        ring.put(message)
    ring.put((whole - 1).to_bytes(4, "little") + bytes(whole - 5))
    assert len(client.recv()) == whole - 1
