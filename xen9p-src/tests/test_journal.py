"""Log lines with fields: what arrives at a socket such as the journal's, and what without one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from xen9p import journal


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.settimeout(5)
        yield sock


def record(text: str, level: int = logging.INFO, **fields: str) -> logging.LogRecord:
    made = logging.LogRecord("xen9pd", level, __file__, 1, text, None, None)
    if fields:
        made.fields = fields
    return made


def test_a_line_has_its_fields(listener: socket.socket, tmp_path: Path) -> None:
    handler = journal.Handler("xen9pd", journal=True, path=str(tmp_path / "journal"))
    handler.emit(record("guest=g1 closed", logging.WARNING, **journal.fields("g1", 3, 0, "home", "homes")))
    assert listener.recv(4096).decode().splitlines() == [
        "MESSAGE=warning: guest=g1 closed",
        "PRIORITY=4",
        "SYSLOG_IDENTIFIER=xen9pd",
        "GUEST=g1",
        "DOMID=3",
        "DEVICE=3/0",
        "TAG=home",
        "EXPORT=homes",
    ]
    handler.speak_for(journal.fields("g2", 4, 1, "root", "g2-root"))
    handler.emit(record("it broke"))
    lines = listener.recv(4096).decode().splitlines()
    assert lines[0] == "MESSAGE=info: guest=g2 device=4/1 tag=root it broke"
    assert "GUEST=g2" in lines
    assert "TAG=root" in lines
    handler.close()


def test_a_guests_text_makes_no_fields(listener: socket.socket, tmp_path: Path) -> None:
    handler = journal.Handler("x", journal=True, path=str(tmp_path / "journal"))
    handler.emit(record("odd\nGUEST=forged", TAG="a\nGUEST=forged"))
    data = listener.recv(4096)
    assert data.startswith(b"MESSAGE=info: odd GUEST=forged\n")
    assert data.endswith(b"TAG\n" + (14).to_bytes(8, "little") + b"a\nGUEST=forged\n")
    handler.close()


def test_without_a_journal_lines_go_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for handler in (
        journal.Handler("x", journal=False),
        journal.Handler("x", journal=True, path=str(tmp_path / "nobody")),
    ):
        handler.speak_for(journal.fields("g1", 3, 0, "home", "e"))
        handler.emit(record("hello", logging.ERROR))
        assert capsys.readouterr().err == "error: guest=g1 device=3/0 tag=home hello\n"
        handler.close()


def test_a_journal_that_is_restarted_or_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal"
    first = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    first.bind(str(path))
    handler = journal.Handler("x", journal=True, path=str(path))
    for _ in range(10_000):
        handler.emit(record("flood"))  # never waits
        if capsys.readouterr().err:
            break
    else:
        pytest.fail("a full journal takes all")
    first.close()
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(str(path))
        second.settimeout(5)
        handler.emit(record("in between"))
        assert "in between" in capsys.readouterr().err
        handler.emit(record("again"))
        assert second.recv(4096).startswith(b"MESSAGE=info: again\n")
    handler.close()


def test_after_a_fork_that_closes_everything(listener: socket.socket, tmp_path: Path) -> None:
    handler = journal.Handler("x", journal=True, path=str(tmp_path / "journal"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        pid = os.fork()
        if not pid:
            try:
                os.closerange(3, 200)
                wrong = os.open("/dev/null", os.O_RDONLY)  # takes the number that the socket had
                journal.after_fork()
                journal.speak_for(journal.fields("g1", 3))
                handler.emit(record(f"from the child {wrong}"))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert b"guest=g1 from the child" in listener.recv(4096)
    finally:
        root.removeHandler(handler)
        handler.close()
