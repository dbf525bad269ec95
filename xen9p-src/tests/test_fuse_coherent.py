"""Two mounts of one export that keep names, attributes and data until the other changes them: nothing old is ever seen.

XEN9P_COHERENT says for how many seconds the long test runs; 3600 is an hour.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving import serve_unix
from test_fuse import STARTED, end, missing, nothing_stays, start
from test_serve import serving

__all__ = ["nothing_stays"]
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")
SECONDS = float(os.environ.get("XEN9P_COHERENT", "2"))
LEAST = 30  # steps, also on a machine that is busy
TERM = 1.0


@contextmanager
def two_mounts(export: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    with serving(export, "--unix", str(tmp_path / "socket"), "--leases", str(TERM)):
        here = tmp_path / "a", tmp_path / "b"
        for directory in here:
            process = start(tmp_path / "socket", directory, "--cache", "coherent")
            assert process.poll() is None, process.communicate()[1].decode()
        yield here
        for process, _ in STARTED:
            code, said = end(process)
            assert code == 0, said


class Model:
    """What is in the tree, as whoever changed it last knows it, and one step of the many that can be made."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.files: dict[str, bytearray] = {}

    def change(self, at: Path) -> None:
        rng, files = self.rng, self.files
        name = f"n{rng.randrange(6)}"
        what = rng.choice(("write", "append", "truncate", "replace", "remove", "link", "make", "mode"))
        if name not in files:
            files[name] = bytearray(os.urandom(rng.randrange(9000)))
            with (at / name).open("xb") as file:
                file.write(files[name])
        elif what == "write":
            data, where = os.urandom(rng.randrange(1, 5000)), rng.randrange(len(files[name]) + 1)
            with (at / name).open("r+b") as file:
                file.seek(where)
                file.write(data)
            files[name][where : where + len(data)] = data
        elif what == "append":
            data = os.urandom(100)
            with (at / name).open("ab") as file:
                file.write(data)
            files[name] += data
        elif what == "truncate":
            size = rng.randrange(6000)
            os.truncate(at / name, size)
            files[name] = files[name][:size].ljust(size, b"\0")
        elif what == "replace":
            files[name] = bytearray(os.urandom(rng.randrange(3000)))
            (at / ".new").write_bytes(files[name])
            os.rename(at / ".new", at / name)
        elif what == "remove":
            del files[name]
            os.unlink(at / name)
        elif what == "mode":
            os.chmod(at / name, rng.choice((0o600, 0o640, 0o644)))

    def check(self, at: Path) -> None:
        names = sorted(os.listdir(at))
        assert names == sorted(self.files)
        for name in (f"n{i}" for i in range(6)):
            if name not in self.files:
                assert not os.path.lexists(at / name), name
                continue
            assert os.stat(at / name).st_size == len(self.files[name]), name
            assert (at / name).read_bytes() == self.files[name], name


def test_in_turns(export: Path, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    model, steps = Model(random.Random(seed)), 0
    with two_mounts(export, tmp_path) as mounts:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until or steps < LEAST:
            model.change(model.rng.choice(mounts))
            steps += 1
            for at in mounts:
                try:
                    model.check(at)
                except AssertionError as error:
                    raise AssertionError(f"seed {seed}, step {steps}: {error}") from error


def test_a_descriptor_that_stays_open_sees_what_the_other_writes(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"0" * 20000)
    with two_mounts(export, tmp_path) as (a, b), (a / "f").open("rb", buffering=0) as file:
        for i in range(1, 30):
            data = b"%d" % (i % 10) * 20000
            with (b / "f").open("r+b") as other:
                other.write(data)
            assert os.pread(file.fileno(), 20000, 0) == data
            assert os.fstat(file.fileno()).st_mtime_ns == os.stat(b / "f").st_mtime_ns
        os.unlink(b / "f")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.pread(file.fileno(), 1, 0) == data[:1]
        assert not (a / "f").exists()


def test_both_write_one_file_and_one_name_at_once(export: Path, tmp_path: Path) -> None:
    """Each holds what the other needs; none may wait for the other for ever, and both end up with the same."""
    (export / "f").write_bytes(b"-" * 9000)
    with two_mounts(export, tmp_path) as mounts:

        def work(at: Path, seed: int) -> None:
            rng = random.Random(seed)
            for i in range(60):
                with (at / "f").open("r+b", buffering=0) as file:
                    file.seek(rng.randrange(8000))
                    file.write(b"%d" % (i % 10) * rng.randrange(1, 800))
                (at / f"own{seed}-{i}").touch()
                (at / f"own{seed}").write_bytes(b"x" * i)
                os.replace(at / f"own{seed}", at / "both")

        threads = [threading.Thread(target=work, args=(at, i)) for i, at in enumerate(mounts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        assert [(at / "f").read_bytes() for at in mounts] == [(export / "f").read_bytes()] * 2
        assert [(at / "both").read_bytes() for at in mounts] == [(export / "both").read_bytes()] * 2
        assert [sorted(os.listdir(at)) for at in mounts] == [sorted(os.listdir(export))] * 2


def test_a_mount_that_is_stopped_past_its_term_sees_nothing_old(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"old")
    (export / "d").mkdir()
    with two_mounts(export, tmp_path) as (a, b):
        first = next(process for process, directory in STARTED if directory == a)
        with (a / "f").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 3, 0) == b"old"
            assert not (a / "d" / "n").exists()
            first.send_signal(signal.SIGSTOP)
            try:
                (b / "f").write_bytes(b"new")  # waits until the term is over
                (b / "d" / "n").write_bytes(b"n")
                # While the mount cannot answer: the kernel does not go on by itself with what it has.
                said: list[int] = []
                asking = threading.Thread(target=lambda: said.append(os.stat(a / "d" / "n").st_size))
                asking.start()
                asking.join(0.5)
                assert asking.is_alive()
            finally:
                first.send_signal(signal.SIGCONT)
            assert os.pread(file.fileno(), 3, 0) == b"new"
            assert (a / "f").read_bytes() == b"new"
            asking.join(20)
            assert said == [1]


def test_a_mount_that_is_killed_holds_up_nobody_for_long(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two_mounts(export, tmp_path) as (a, b):
        assert (a / "f").read_bytes() == b"old"
        victim = STARTED.pop(0)[0]
        victim.kill()
        victim.communicate()
        (b / "f").write_bytes(b"new")
        assert (b / "f").read_bytes() == b"new"
        subprocess.run(["umount", "-l", a], check=False)


def test_umount_ends_the_process_and_its_session(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"old")
    with two_mounts(export, tmp_path) as (a, b):
        assert (a / "f").read_bytes() == b"old"
        process, _ = STARTED.pop(0)
        subprocess.run(["umount", a], check=True)
        process.communicate(timeout=20)
        assert process.returncode == 0
        (b / "f").write_bytes(b"new")
        assert (export / "f").read_bytes() == b"new"


def test_a_server_without_leases_is_named(export: Path, tmp_path: Path) -> None:
    with serving(export, "--unix", str(tmp_path / "socket")):
        process = start(tmp_path / "socket", tmp_path / "mnt", "--cache", "coherent")
        _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "the server gives no leases" in said.decode()
        assert "Traceback" not in said.decode()
        assert not os.path.ismount(tmp_path / "mnt")


def test_a_cache_of_ones_own_can_be_coherent(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "homework.py").write_text(
        "from xen9p.cache import Cache\n"
        "class Whole(Cache):\n"
        "    coherent = True\n"
        "    def __init__(self, seconds):\n"
        "        super().__init__(seconds)\n"
        "        self.files = {}\n"
        "    def data(self, ino, offset, count):\n"
        "        whole = self.files.get(ino)\n"
        "        return None if whole is None else whole[offset : offset + count]\n"
        "    def put_data(self, ino, offset, data, at_end):\n"
        "        if offset == 0 and at_end:\n"
        "            self.files[ino] = data\n"
        "    def invalidate_data(self, ino, offset=0, count=None):\n"
        "        self.files.pop(ino, None)\n"
    )
    (export / "f").write_bytes(b"old")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with serve_unix(export, tmp_path / "socket") as server:
        for name in ("a", "b"):
            start(server, tmp_path / name, "--cache", "homework:Whole")
        for i in range(20):
            (tmp_path / "ab"[i % 2] / "f").write_bytes(b"%03d" % i)
            assert [(tmp_path / n / "f").read_bytes() for n in ("a", "b")] == [b"%03d" % i] * 2
        for process, _ in STARTED:
            code, said = end(process)
            assert code == 0, said
