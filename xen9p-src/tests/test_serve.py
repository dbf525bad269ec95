"""`xen9p serve` as a process of its own, over Unix and TCP sockets."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xen9p import auth
from xen9p.cli import main as run
from xen9p.client import Client
from xen9p.transport.stream_client import SocketTransport

COMMAND = [sys.executable, "-c", "import sys; from xen9p.cli import main; sys.exit(main())", "serve"]


@contextmanager
def serving(export: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it listens, and the line in which it says where."""
    command = [*COMMAND, "--export", str(export), *options]
    # The package under test, however this interpreter found it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            yield process, process.stderr.readline()
        finally:
            process.kill()


def connect(where: list[str], line: str) -> SocketTransport:
    if where[0] == "--unix":
        return SocketTransport.unix(where[1], timeout=10)
    port = re.search(r"127\.0\.0\.1', (\d+)\)", line)
    assert port, line
    return SocketTransport.tcp("127.0.0.1", int(port[1]), timeout=10)


@pytest.fixture(params=["unix", "tcp"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    return ["--unix", str(tmp_path / "socket")] if request.param == "unix" else ["--tcp", "127.0.0.1:0"]


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_directory_is_served_until_a_signal(export: Path, where: list[str], ending: signal.Signals) -> None:
    data = os.urandom(300_000)
    with serving(export, *where) as (process, line):
        assert line.startswith(f"serving {export} on ")
        first, root = Client.connect(connect(where, line))
        first.write_file(root, b"f", data)
        assert (export / "f").read_bytes() == data
        second, other = Client.connect(connect(where, line))
        assert second.read_file(other, b"f") == data
        first.close()
        process.send_signal(ending)
        assert process.wait(10) == 0, "it ends while a client is still there"
        second.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not (export.parent / "socket").exists()


def test_read_only_is_read_only(export: Path, where: list[str]) -> None:
    (export / "f").write_text("content")
    with serving(export, *where, "--ro") as (_, line):
        client, root = Client.connect(connect(where, line))
        assert client.read_file(root, b"f") == b"content"
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            client.write_file(root, b"f", b"changed")
        client.close()
    assert (export / "f").read_text() == "content"


def test_an_export_that_is_replaced_stays_what_it_was(export: Path, where: list[str]) -> None:
    """Even by a link to somewhere else: the server began with a directory and not with a name."""
    (export / "f").write_text("old")
    with serving(export, *where) as (_, line):
        export.rename(export.parent / "moved")
        export.symlink_to("/etc")
        client, root = Client.connect(connect(where, line))
        client.write_file(root, b"g", b"new")
        assert client.read_file(root, b"f") == b"old"
        client.close()
        assert sorted(os.listdir(export.parent / "moved")) == ["f", "g"]


@pytest.mark.parametrize("options", [["--tcp", "192.0.2.1:1"], ["--unix", "/nowhere/at/all"]])
def test_an_address_that_cannot_be_used(export: Path, options: list[str]) -> None:
    command = [*COMMAND, "--export", str(export), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("xen9p: error: cannot listen on ")
    assert done.stderr.count("\n") == 1


def test_serving_with_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export, place = tmp_path / "export", str(tmp_path / "sock")
    export.mkdir()
    (export / "f").write_text("hello\n")
    theirs, ours, wrong = (tmp_path / name for name in ("theirs", "ours", "wrong"))
    for name in ("alice", "bob"):
        auth.make(theirs, name)
    ours.write_text(theirs.read_text().split("\n\n")[0])
    ours.chmod(0o600)
    auth.make(wrong, "alice")
    with serving(export, "--unix", place, "--keys", str(theirs)) as (process, line):
        assert "serving" in line
        for options, code, out, err in (
            (["--key", str(ours)], 0, "hello\n", ""),
            (["--key", str(theirs), "--key-name", "bob"], 0, "hello\n", ""),
            ([], 1, "", "xen9p: error: the server wants a key (say which: --key FILE)\n"),
            (["--key", str(wrong)], 1, "", "xen9p: error: the server refuses the key 'alice' (is it "),
            (["--key-name", "bob"], 1, "", "xen9p: error: --key-name without --key"),
            (["--key", str(theirs)], 1, "", f"xen9p: error: {theirs} has several keys"),
        ):
            assert run(["cat", "--unix", place, *options, ":/f"]) == code
            said = capsys.readouterr()
            assert said.out == out
            assert said.err.startswith(err)
            assert said.err.count("\n") == bool(err)
        process.terminate()
        assert process.wait(10) == 0


def test_serving_refuses_an_open_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    auth.make(keys)
    keys.chmod(0o644)
    place = str(tmp_path / "sock")
    assert run(["serve", "--export", str(tmp_path), "--unix", place, "--keys", str(keys)]) == 1
    assert capsys.readouterr().err == f"xen9p: error: {keys} is open to others (mode 0644) (chmod 600 {keys})\n"
    assert not Path(place).exists()
