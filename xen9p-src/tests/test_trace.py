"""`xen9p trace`: from a guest's request to a line, a JSON object and a packet."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from observed import Host, host
from xen9p import cli, codec, trace
from xen9p.client import Client
from xen9p.errors import ControlError, ProtocolError, Xen9pError
from xen9p.escape import escape
from xen9p.pcap import MOST_PAYLOAD, Pcap
from xen9p.records import Exchange, half, unpack
from xen9p.traceformat import Format, JsonLines, Text, duration, open_flags
from xen9p.transport.stream_client import SocketTransport

HOSTILE = b"\x1b[2J\x1b]0;pwned\x07\xe2\x80\xae\xff"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Host]:
    with host(tmp_path, "g1:home", "g2:root") as made:
        yield made


def run(lab: Host, target: str, form: Format, *filters: str, work: Any, count: int = 1, data: int = 64) -> bytes:
    """What a trace writes while work() is done again and again."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.is_set():
            work()

    thread = threading.Thread(target=keep_on)
    out = io.BytesIO()
    thread.start()
    try:
        wanted = [trace.parse_filter(text) for text in filters]
        tally = trace.run(target, lab.runtime, form, out, wanted, data=data, seconds=10, count=count)
    finally:
        over.set()
        thread.join()
    assert tally.shown == count
    return out.getvalue()


def test_a_line_a_request(lab: Host) -> None:
    home = lab.devices[0].session
    line = run(
        lab,
        "g1:home",
        Text(),
        "type=Twrite",
        work=lambda: home.client.write_file(home.root, b"notes", b"hello trace\n"),
    )
    assert re.fullmatch(
        rb"\d\d:\d\d:\d\d\.\d{6} g1:home Twrite\(tag=\d+, fid=\d+</notes>, offset=0, "
        rb'data="hello trace\\n", count=12\) = Rwrite\(tag=\d+, count=12\)  ring=\S+ (queue=\S+ )?fs=\S+ total=\S+\n',
        line,
    )


def test_json_and_filters(lab: Host) -> None:
    home, root = lab.devices[0].session, lab.devices[1].session

    def work() -> None:
        home.client.write_file(home.root, b"a", b"x" * 100)
        root.client.getattr(root.root, 0)
        with pytest.raises(OSError, match="No such file"):
            home.client.walk(home.root, b"missing")

    lines = run(lab, "", JsonLines(), "errno=ENOENT", "path=/miss*", work=work, count=2, data=4).splitlines()
    value = json.loads(lines[0])
    assert (value["guest"], value["tag"], value["path"], value["errno"]) == ("g1", "home", "/missing", "ENOENT")
    assert value["request"]["wnames"] == ["missing"]
    assert value["reply"]["type"] == "Rlerror"
    assert set(value["seconds"]) == {"ring", "queue", "filesystem", "total"}
    assert abs(value["time"] - time.time()) < 60
    value = json.loads(run(lab, "", JsonLines(), "type=write", work=work, data=4))
    assert (value["request"]["data"], value["request"]["count"]) == ("xxxx", 100)
    value = json.loads(run(lab, "g2", JsonLines(), work=work))
    assert value["guest"] == "g2"
    run(lab, "", Text(), "slower=0.000001", "type=Tgetattr,walk", work=work)


def test_names_of_a_guest_cannot_speak_to_the_terminal(lab: Host) -> None:
    home = lab.devices[0].session
    for form in (Text(), JsonLines()):
        shown = run(
            lab,
            "g1",
            form,
            "type=Tlcreate,Twrite",
            work=lambda: home.client.write_file(home.root, HOSTILE, HOSTILE),
            count=2,
        )
        assert all(0x20 <= byte < 0x7F for byte in shown.replace(b"\n", b"")), shown
        assert b"x1b[2J" in shown


@given(st.binary())
def test_escaping_keeps_all_and_lets_nothing_through(data: bytes) -> None:
    text = escape(data)
    assert text.isprintable()
    assert "\u202e" not in text
    plain = re.sub(
        rb'\\(x[0-9a-f]{2}|[ntr\\"])',
        lambda m: (
            bytes.fromhex(m[1][1:].decode())
            if m[1][:1] == b"x"
            else {b"n": b"\n", b"t": b"\t", b"r": b"\r"}.get(m[1], m[1])
        ),
        text.encode(),
    )
    assert plain == data


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("frob=1", "no filter"),
        ("type", "no filter"),
        ("type=Tfrob", "no message 'tfrob'"),
        ("errno=EWHAT", "EWHAT"),
        ("slower=x", "milliseconds"),
    ],
)
def test_filters_that_are_none(text: str, word: str) -> None:
    with pytest.raises(Xen9pError, match=word):
        trace.parse_filter(text)


def test_who_cannot_be_traced(lab: Host, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ControlError, match=r"no device g3 is served .*g1:home, g2:root"):
        trace.find("g3", lab.runtime)
    first = trace.Source.open("g1:home", trace.find("g1", lab.runtime)[0][1], 0)
    with pytest.raises(ControlError, match=r"g1:home: somebody traces this device already"):
        trace.Source.open("g1:home", trace.find("g1", lab.runtime)[0][1], 0)
    first.sock.close()
    deadline = time.monotonic() + 5
    while True:  # the worker notices that the first one is gone
        try:
            trace.Source.open("g1:home", trace.find("g1", lab.runtime)[0][1], 0).sock.close()
            break
        except ControlError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert cli.main(["trace", "g3", "--runtime-dir", str(lab.runtime)]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("xen9p: error: no device g3")


def test_a_device_that_comes_is_waited_for(lab: Host) -> None:
    (root,) = [device for device in lab.devices if device.guest == "g2"]
    root.phase = "waiting"
    began = time.monotonic()
    with pytest.raises(ControlError, match="no device g2:root is served"):
        trace.open_all("g2:root", lab.runtime, 0, wait=0.3)
    assert time.monotonic() - began >= 0.3
    later = threading.Timer(0.3, setattr, (root, "phase", "connected"))
    later.start()
    (source,) = trace.open_all("g2:root", lab.runtime, 0, wait=30)
    later.join()
    assert source.name == "g2:root"
    # That somebody else has it is no reason to wait.
    began = time.monotonic()
    with pytest.raises(ControlError, match="somebody traces this device already"):
        trace.open_all("g2:root", lab.runtime, 0, wait=30)
    assert time.monotonic() - began < 10
    source.sock.close()


def test_a_reader_that_stops_reading_loses_records_and_holds_up_nobody(lab: Host) -> None:
    home = lab.devices[0].session
    source = trace.Source.open("g1:home", trace.find("g1", lab.runtime)[0][1], 16384)
    home.client.write_file(home.root, b"f", b"x" * 16000)
    fid = home.client.walk(home.root, b"f")
    home.client.lopen(fid, 0)
    deadline = time.monotonic() + 20
    while not home.served.device.trace_dropped and time.monotonic() < deadline:
        assert len(home.client.read(fid, 0, 16000)) == 16000
    assert home.served.device.trace_dropped
    shown = 0
    while not source.dropped and time.monotonic() < deadline:
        shown += len(source.read() or [])
    assert shown
    assert source.dropped, "and it is told"
    source.sock.close()


# Records.


def record(request: bytes, reply: bytes, path: bytes = b"") -> bytes:
    times = (10**18, 10**18 + 1000, 10**18 + 3000, 10**18 + 9000, 10**18 + 10_000)
    size = 56 + len(path) + len(request) + len(reply)
    return struct.pack("<IHHII5Q", size, 1, len(path), len(request), len(reply), *times) + path + request + reply


def exchange(request: codec.Message, reply: codec.Message, path: bytes = b"", cut: int = 1 << 20) -> Exchange:
    return next(iter(unpack(record(codec.encode(request, 7)[:cut], codec.encode(reply, 7)[:cut], path))))


def test_records_that_make_no_sense() -> None:
    whole = record(codec.encode(codec.Tclunk(1), 2), b"")
    assert next(unpack(whole)).reply is None
    for wrong in (whole[:20], whole[:-1], b"\xff" + whole[1:]):
        with pytest.raises(ProtocolError):
            list(unpack(wrong))


@given(st.binary(max_size=64))
def test_any_bytes_are_shown_somehow(raw: bytes) -> None:
    for found in unpack(record(raw, raw[::-1])):
        assert Text().one("g:t", found).endswith(b"\n")
        json.loads(JsonLines().one("g:t", found))
        Pcap().one("g:t", found)


def test_cut_data_keeps_its_real_count() -> None:
    part = half(codec.encode(codec.Twrite(1, 0, b"abcdefgh"), 3)[:27])
    assert part is not None
    assert part.message == codec.Twrite(1, 0, b"abcd")
    assert (part.data_size, part.size) == (8, 31)
    lie = bytearray(codec.encode(codec.Twrite(1, 0, b"abcdefgh"), 3)[:27])
    lie[19] = 200
    part = half(bytes(lie))
    assert part is not None
    assert part.message is None, "a count that its message does not hold"


def test_fields_for_people() -> None:
    line = Text().one(
        "g1:root",
        exchange(codec.Tlcreate(4, b"new", 0o102 | 0o2000, 0o644, 0), codec.Rlerror(13), b"/etc"),
    )
    assert b'Tlcreate(tag=7, fid=4</etc>, name="new", flags=O_RDWR|O_APPEND|O_CREAT, mode=0o644, gid=0)' in line
    assert line.endswith(b"= EACCES (Permission denied)  ring=1.0us queue=2.0us fs=6.0us total=10us\n")
    assert open_flags(0o1) == "O_WRONLY"
    assert [duration(n) for n in (None, 0, 999, 1234, 12_345, 1_500_000, 2 * 10**9)] == [
        "-", "0ns", "999ns", "1.2us", "12us", "1.5ms", "2.0s",
    ]  # fmt: skip


# Capture files.


def packets(data: bytes) -> list[tuple[int, int, bytes]]:
    """(time in ns, length on the wire, bytes that are there) of each packet."""
    magic, major, minor, _, _, snap, link = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 101)
    found, at = [], 24
    while at < len(data):
        seconds, ns, there, length = struct.unpack_from("<IIII", data, at)
        assert there <= min(length, snap)
        found.append((seconds * 10**9 + ns, length, data[at + 16 : at + 16 + there]))
        at += 16 + there
    assert at == len(data)
    return found


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_a_capture_is_a_tcp_conversation(lab: Host) -> None:
    home = lab.devices[0].session
    data = run(lab, "g1", Pcap(), work=lambda: home.client.write_file(home.root, b"f", b"hello trace"), count=30)
    streams: dict[bytes, bytes] = {}
    following: dict[bytes, int] = {}
    times = []
    for at, length, packet in packets(data):
        times.append(at)
        assert struct.unpack_from(">H", packet, 2)[0] == length == len(packet)
        assert checksum(packet[:20]) == 0xFFFF
        assert checksum(packet[12:20] + struct.pack(">HH", 6, length - 20) + packet[20:]) == 0xFFFF
        source, target, sequence, _, _, flags = struct.unpack_from(">HHIIBB", packet, 20)
        assert 564 in (source, target)
        side = packet[12:16]
        assert sequence == following.setdefault(side, 0)
        following[side] = sequence + len(packet) - 40 + (1 if flags & 2 else 0)
        streams[side] = streams.get(side, b"") + packet[40:]
    assert times == sorted(times)
    assert len(streams) == 2
    for stream in streams.values():
        at, kinds = 0, []
        while at < len(stream):
            size = int.from_bytes(stream[at : at + 4], "little")
            kinds.append(type(codec.decode(stream[at : at + size])[1]).__name__)
            at += size
        assert len(kinds) == 30
        assert "Twrite" in kinds or "Rwrite" in kinds


def test_cut_and_large_messages_in_a_capture() -> None:
    big = exchange(codec.Twrite(1, 0, b"z" * 200_000), codec.Rwrite(200_000), cut=23 + 100)
    form = Pcap()
    found = packets(form.start() + form.one("g:t", big) + form.end())[3:]
    assert [length - 40 for _, length, _ in found] == [MOST_PAYLOAD] * 3 + [200_023 - 3 * MOST_PAYLOAD, 11]
    assert [len(packet) - 40 for _, _, packet in found] == [123, 0, 0, 0, 11]
    sequences = [struct.unpack_from(">I", packet, 24)[0] for _, _, packet in found[:4]]
    assert sequences == [1 + i * MOST_PAYLOAD for i in range(4)]


# The commands.


def test_serve_writes_a_trace(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    address, file = str(tmp_path / "sock"), tmp_path / "all.json"
    command = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())"]
    process = subprocess.Popen(
        [*command, "serve", "--export", str(tmp_path / "export"), "--unix", address, "--trace", str(file)],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stderr
        assert b"serving" in process.stderr.readline()
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
        client, root = Client.connect(SocketTransport(sock))
        client.write_file(root, b"f", b"traced")
        client.close()
    finally:
        process.terminate()
        _, error = process.communicate(timeout=10)
    assert process.returncode == 0
    assert error == b""
    values = [json.loads(line) for line in file.read_text().splitlines()]
    assert values[0]["request"]["type"] == "Tversion"
    assert [v["request"]["data"] for v in values if v["request"]["type"] == "Twrite"] == ["traced"]


def test_the_command_ends_in_order(lab: Host) -> None:
    home = lab.devices[0].session
    file = lab.runtime / "out.pcap"
    process = subprocess.Popen(
        [
            sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())",
            "trace", "--pcap", str(file), "--runtime-dir", str(lab.runtime),
        ],
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stderr
    assert process.stderr.readline() == b"xen9p: tracing g1:home, g2:root; Ctrl-C ends it\n"
    home.client.write_file(home.root, b"f", b"traced")
    time.sleep(0.2)
    process.terminate()
    _, error = process.communicate(timeout=10)
    assert process.returncode == 0
    assert re.fullmatch(rb"xen9p: \d+ requests\n", error)
    assert b"traced" in file.read_bytes()
