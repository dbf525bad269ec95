"""xen9p ls, cat, cp and so on against a server on a Unix socket: what they print, do, and say when it goes wrong."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving import serve_unix
from xen9p.cli import main

Run = Callable[..., int]


@pytest.fixture
def run(export: Path, tmp_path: Path) -> Iterator[Run]:
    """Runs one command against the export."""
    with serve_unix(export, tmp_path / "socket") as where:
        yield lambda command, *args: main([command, "--unix", str(where), *map(str, args)])


def fill(export: Path) -> None:
    (export / "dir" / "sub").mkdir(parents=True)
    (export / "a").write_bytes(b"hello\n")
    (export / "dir" / "deep").write_bytes(b"deep\n")
    (export / "dir" / "up").symlink_to("../a")
    (export / "dir" / "root").symlink_to("/a")
    (export / "loop").symlink_to("loop")
    (export / ".hidden").touch()
    (export / "a").chmod(0o644)


def test_ls(run: Run, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(export)
    assert run("ls", ":/") == 0
    assert capsys.readouterr().out.split() == ["a", "dir", "loop"]
    assert run("ls", "-la", "/") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == [".hidden", "a", "dir", "loop"]
    assert lines[1].startswith("-rw-r--r--   1 ")
    assert lines[1].split()[4] == "6"
    assert lines[3].endswith("loop -> loop")
    assert run("ls", "-R", ":dir") == 0
    assert capsys.readouterr().out == ":dir:\ndeep\nroot\nsub\nup\n\n:dir/sub:\n"


def test_a_long_listing_of_many(run: Run, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in range(300):
        (export / f"f{n:03}").write_bytes(bytes(n))
    assert run("ls", "-l", ":/") == 0
    sizes = [int(line.split()[4]) for line in capsys.readouterr().out.splitlines()]
    assert sizes == list(range(300))


def test_links_are_followed_by_the_client(run: Run, export: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    fill(export)
    (export / "short").symlink_to("dir")
    assert run("cat", ":/dir/up", ":/dir/root", ":/short/deep", ":/dir/sub/../../../a") == 0
    assert capfdbinary.readouterr().out == b"hello\nhello\ndeep\nhello\n"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nobody", "No such file or directory"),
        ("a/below", "Not a directory"),
        ("dir/deep/er", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("dir", "Is a directory"),
    ],
)
def test_one_line_for_each_path_that_fails(
    run: Run, export: Path, capfd: pytest.CaptureFixture[str], path: str, reason: str
) -> None:
    fill(export)
    assert run("cat", f":{path}", ":a") == 1
    out, err = capfd.readouterr()
    assert out == "hello\n"  # the next path is served
    assert err == f"xen9p: error: :{path}: {reason}\n"


def test_stat(run: Run, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(export)
    os.utime(export / "a", ns=(5, -1_500_000_000))
    assert run("stat", "--json", ":a", ":loop") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["size"] == 6
    assert (first["atime_ns"], first["mtime_ns"]) == (5, -1_500_000_000)
    assert first["ino"] == (export / "a").stat().st_ino
    assert stat.S_ISLNK(second["mode"])
    assert run("stat", ":a") == 0
    assert "0644 (-rw-r--r--)" in capsys.readouterr().out


def test_write(run: Run, export: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def given(data: bytes) -> None:
        (tmp_path / "in").write_bytes(data)
        monkeypatch.setattr(sys, "stdin", io.open(tmp_path / "in"))  # noqa: SIM115, UP020

    steps: list[tuple[bytes, tuple[str, ...], bytes]] = [
        (b"one", (), b"one"),
        (b"two", ("--append",), b"onetwo"),
        (b"X", ("--offset", "1"), b"oXetwo"),
        (b"y", (), b"y"),
    ]
    for data, options, content in steps:
        given(data)
        assert run("write", ":new", *options) == 0
        assert (export / "new").read_bytes() == content
        sys.stdin.close()


def test_directories_links_and_names(run: Run, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(export)
    assert run("mkdir", "-m", "700", ":d") == 0
    assert stat.S_IMODE((export / "d").stat().st_mode) == 0o700
    assert run("mkdir", ":d") == 1
    assert run("mkdir", "-p", ":d/e/f", ":d/e") == 0
    assert run("ln", ":a", ":d") == 0
    assert (export / "d" / "a").stat().st_nlink == 2
    assert run("ln", "-s", "any where", ":d/s") == 0
    capsys.readouterr()
    assert run("readlink", ":d/s") == 0
    assert capsys.readouterr().out == "any where\n"
    assert run("mv", ":d/a", ":d/e") == 0
    assert run("mv", ":d/e/a", ":d/b") == 0
    assert sorted(os.listdir(export / "d")) == ["b", "e", "s"]
    assert run("rm", ":d") == 1
    assert "(remove it with -r)" in capsys.readouterr().err
    assert run("rm", "-r", ":d", ":.hidden") == 0
    assert run("rm", ":gone") == 1
    assert run("rm", "-f", ":gone") == 0
    assert sorted(os.listdir(export)) == ["a", "dir", "loop"]


def test_df(run: Run, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("df", ":/") == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("  :/")


def same(first: Path, second: Path) -> bool:
    def tree(root: Path) -> list[tuple[object, ...]]:
        return sorted(
            (
                str(p.relative_to(root)),
                p.is_symlink() and os.readlink(p),
                stat.S_IMODE(p.lstat().st_mode),
                None if p.is_dir() or p.is_symlink() else (p.read_bytes(), p.stat().st_mtime_ns),
            )
            for p in root.rglob("*")
        )

    return tree(first) == tree(second)


def test_cp_takes_trees_both_ways(run: Run, export: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    fill(here)
    (here / "big").write_bytes(os.urandom(3_000_001))
    (here / "dir").chmod(0o555)
    (here / "big").chmod(0o640)
    assert run("cp", "-rp", here, ":/there") == 0
    assert same(here, export / "there")
    assert run("cp", "-rp", ":/there", tmp_path / "back") == 0
    assert same(here, tmp_path / "back")
    assert run("cp", "-rp", ":/there", ":/again") == 0
    assert same(here, export / "again")


def test_cp_of_files(run: Run, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(export)
    (tmp_path / "local").mkdir()
    assert run("cp", ":a", ":dir/deep", tmp_path / "local") == 0
    assert (tmp_path / "local" / "deep").read_bytes() == b"deep\n"
    assert run("cp", tmp_path / "local" / "a", ":dir") == 0
    assert (export / "dir" / "a").read_bytes() == b"hello\n"
    assert run("cp", ":dir", tmp_path) == 1
    assert capsys.readouterr().err == "xen9p: error: :dir: is a directory (copy it with -r)\n"
    assert run("cp", tmp_path / "nobody", ":x") == 1
    assert capsys.readouterr().err == f"xen9p: error: {tmp_path}/nobody: No such file or directory\n"
    assert run("cp", ":a", ":a", ":a") == 1
    os.mkfifo(export / "fifo")
    assert run("cp", ":fifo", tmp_path) == 1
    assert capsys.readouterr().err.endswith(":fifo: is no file, directory or link: not copied\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["ls", "tag:/"], "this is no Xen guest"),
        (["tags"], "this is no Xen guest"),
        (["ls", "/no/tag"], "names no tag"),
        (["ls", "--unix", "/nowhere/at/all", "/"], "cannot connect to /nowhere/at/all: No such file"),
        (["ls", "--tcp", "127.0.0.1:1", "/"], "cannot connect to 127.0.0.1:1: Connection refused"),
        (["mount", "/tmp"], "no TAG"),
        (["mount", "--unix", "/nowhere", "/nowhere"], "is no directory"),
        (["mount", "--unix", "/nowhere", "/tmp", "--cache", "fancy"], "no cache fancy"),
        (["mount", "--unix", "/nowhere", "/tmp", "--cache", "os:path"], "no class made from xen9p.cache.Cache"),
    ],
)
@pytest.mark.skipif(Path("/dev/xen/xenbus").exists(), reason="runs on a Xen guest, these are about other machines")
def test_what_cannot_work_is_one_line(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_a_server_that_goes_ends_the_command(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert main(["ls", "--unix", str(tmp_path / "socket"), ":a", ":b"]) == 1
        thread.join()
    assert len(capsys.readouterr().err.splitlines()) == 1
