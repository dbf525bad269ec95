"""The FUSE mount on this machine's own kernel: compared with a local directory, and what a mount must survive."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

import differential
from serving import serve_unix
from test_serve import serving
from test_xattr import ACL, CAPABILITY
from xen9p import auth, codec
from xen9p.transport.stream_client import SocketTransport

SOURCE = Path(__file__).resolve().parents[1] / "src"
COMMAND = "import sys; from xen9p.cli import main; sys.exit(main())"


def python_with_pyfuse3() -> str | None:
    """Debian's pyfuse3 belongs to Debian's Python."""
    for python in dict.fromkeys((sys.executable, "/usr/bin/python3")):
        found = subprocess.run([python, "-c", "import pyfuse3"], capture_output=True, check=False)
        if found.returncode == 0:
            return python
    return None


def missing() -> str:
    """What this machine lacks for a mount; "" if nothing."""
    if os.geteuid() != 0:
        return "root, to mount"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse (modprobe fuse)"
    if PYTHON is None:
        return "pyfuse3 (apt-get install python3-pyfuse3)"
    return ""


PYTHON = python_with_pyfuse3()
pytestmark = pytest.mark.skipif(bool(missing()), reason=f"this machine lacks {missing()}")


STARTED: list[tuple[subprocess.Popen[bytes], Path]] = []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A test that fails leaves no mount behind."""
    yield
    for process, directory in STARTED:
        if process.poll() is None:
            process.kill()
            process.communicate()
        if os.path.ismount(directory):
            subprocess.run(["umount", "-l", directory], check=False)
    STARTED.clear()


def start(server: Path, directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """Mounts in the foreground; returns when it is mounted, or has ended."""
    directory.mkdir(exist_ok=True)
    assert PYTHON is not None
    command = [PYTHON, "-c", COMMAND, "mount", "-f", "--unix", str(server), str(directory), *options]
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE)
    STARTED.append((process, directory))
    deadline = time.monotonic() + 20
    while not os.path.ismount(directory) and process.poll() is None:
        assert time.monotonic() < deadline, "not mounted within 20 s"
        time.sleep(0.01)
    return process


def end(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> tuple[int, str]:
    """Ends a mount; (exit code, what it said)."""
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    return process.returncode, said.decode()


@contextmanager
def mounted(export: Path, tmp_path: Path, *options: str) -> Iterator[Path]:
    """The export through FUSE."""
    with serve_unix(export, tmp_path / "socket") as server:
        process = start(server, tmp_path / "mnt", *options)
        try:
            assert process.poll() is None, process.communicate()[1].decode()
            yield tmp_path / "mnt"
        finally:
            if process.poll() is None:
                code, said = end(process)
                assert code == 0, said
        assert not os.path.ismount(tmp_path / "mnt")


@pytest.mark.parametrize(
    ("cache", "seed"), [("none", 1), ("none", 2), ("timed", 3), ("timed", 4), ("coherent", 5), ("coherent", 6)]
)
def test_random_operations_as_in_a_local_directory(export: Path, tmp_path: Path, cache: str, seed: int) -> None:
    old = os.umask(0o022)
    try:
        with mounted(export, tmp_path, "--cache", cache) as here:
            local = tmp_path / "local"
            local.mkdir()
            assert "no difference" in differential.compare(here, local, 600, seed)
            assert differential.whole_tree(str(export)) == differential.whole_tree(str(local))
    finally:
        os.umask(old)


def test_a_mount_with_a_key(export: Path, tmp_path: Path) -> None:
    keys, none = tmp_path / "keys", tmp_path / "none"
    auth.make(keys, "alice")
    auth.make(none, "alice")
    (export / "f").write_text("hello")
    with serving(export, "--unix", str(tmp_path / "socket"), "--keys", str(keys)):
        process = start(tmp_path / "socket", tmp_path / "mnt", "--key", str(keys))
        assert process.poll() is None, process.communicate()[1].decode()
        assert (tmp_path / "mnt" / "f").read_text() == "hello"
        assert end(process)[0] == 0
        for options, says in (([], "the server wants a key"), (["--key", str(none)], "refuses the key 'alice'")):
            process = start(tmp_path / "socket", tmp_path / "mnt", *options)
            _, said = process.communicate(timeout=10)
            assert process.returncode == 1
            assert says in said.decode()
            assert "Traceback" not in said.decode()


def test_files_of_every_kind(export: Path, tmp_path: Path) -> None:
    with mounted(export, tmp_path) as here:
        assert here.stat().st_ino == 1
        os.mkfifo(here / "fifo")
        os.mknod(here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(here / "sock"))
        kinds = {name: stat.S_IFMT((export / name).lstat().st_mode) for name in os.listdir(here)}
        assert kinds == {"fifo": stat.S_IFIFO, "null": stat.S_IFCHR, "sock": stat.S_IFSOCK}
        assert (here / "null").stat().st_rdev == os.makedev(1, 3)


def test_an_unlinked_file_that_is_open_lives_on(export: Path, tmp_path: Path) -> None:
    with mounted(export, tmp_path) as here, open(here / "f", "w+b", buffering=0) as file:
        file.write(b"before")
        os.unlink(here / "f")
        (here / "f").write_bytes(b"another")
        file.write(b" after")
        os.ftruncate(file.fileno(), 9)
        assert os.pread(file.fileno(), 100, 0) == b"before af"
        assert os.fstat(file.fileno()).st_nlink == 0
        assert (here / "f").read_bytes() == b"another"


def test_many_entries_and_a_directory_that_changes(export: Path, tmp_path: Path) -> None:
    names = {f"name-{n:05}" for n in range(700)}
    for name in names:
        (export / name).touch()
    with mounted(export, tmp_path) as here:
        assert set(os.listdir(here)) == names
        seen = []
        with os.scandir(here) as entries:
            for entry in entries:
                seen.append(entry.name)
                assert entry.is_file(follow_symlinks=False)
                os.unlink(entry.path)
        assert set(seen) == names
        assert len(seen) == len(names)
        assert os.listdir(export) == []


def test_others_changes_are_seen(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"one")
    with mounted(export, tmp_path) as here:
        with open(here / "f", "rb", buffering=0) as file:
            assert file.read() == b"one"
            (export / "f").write_bytes(b"twotwo")
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            assert file.read() == b"twotwo"
        os.rename(export / "f", export / "g")
        assert not (here / "f").exists()
        assert (here / "g").stat().st_size == 6


def test_the_timed_cache_asks_again_when_it_is_time(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"one")
    with mounted(export, tmp_path, "--cache", "timed", "--cache-seconds", "0.5") as here:
        assert (here / "f").read_bytes() == b"one"
        (export / "f").write_bytes(b"twotwo")
        assert (here / "f").stat().st_size == 3
        time.sleep(0.6)
        assert (here / "f").read_bytes() == b"twotwo"
        with open(here / "f", "r+b") as file, mmap.mmap(file.fileno(), 6) as shared:
            shared[0:3] = b"new"
            shared.flush()
        assert (export / "f").read_bytes() == b"newtwo"


def test_a_link_count_after_a_name_that_the_cache_has_forgotten(export: Path, tmp_path: Path) -> None:
    """The kernel knows the name longer than the cache does: it asked again, and was answered from the cache."""
    (export / "f").touch()
    os.link(export / "f", export / "g")
    with mounted(export, tmp_path, "--cache", "timed") as here:
        assert (here / "f").stat().st_nlink == 2
        time.sleep(0.6)
        with pytest.raises(FileExistsError):
            os.open(here / "f", os.O_CREAT | os.O_EXCL)
        time.sleep(0.6)
        assert (here / "g").stat().st_nlink == 2
        (here / "f").unlink()
        assert (here / "g").stat().st_nlink == 1


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_RDWR | os.O_APPEND])
def test_the_timed_cache_knows_what_has_been_written(export: Path, tmp_path: Path, flags: int) -> None:
    content = bytearray(os.urandom(300_000))
    (export / "f").write_bytes(content)
    with mounted(export, tmp_path, "--cache", "timed", "--cache-seconds", "30") as here:
        fd = os.open(here / "f", flags)
        assert os.pread(fd, 400_000, 0) == content
        os.pwrite(fd, b"new", 140_000)
        if flags & os.O_APPEND:
            content += b"new"
        else:
            content[140_000:140_003] = b"new"
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # the kernel's pages are not what is asked here
        assert os.pread(fd, 400_000, 0) == content
        os.ftruncate(fd, 150_000)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, 400_000, 0) == content[:150_000]
        os.close(fd)


def refused(err: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=os.strerror(err))


@pytest.mark.parametrize("cache", ["none", "timed", "coherent"])
def test_extended_attributes(export: Path, tmp_path: Path, cache: str) -> None:
    (export / "f").touch()
    with mounted(export, tmp_path, "--cache", cache, "--cache-seconds", "30") as here:
        f, there = here / "f", export / "f"
        assert os.listxattr(f) == []
        os.setxattr(f, "user.a", b"one\0two", os.XATTR_CREATE)
        with refused(errno.EEXIST):
            os.setxattr(f, "user.a", b"three", os.XATTR_CREATE)
        with refused(errno.ENODATA):
            os.setxattr(f, "user.b", b"x", os.XATTR_REPLACE)
        assert os.getxattr(there, "user.a") == b"one\0two"
        os.setxattr(f, "user.a", b"", os.XATTR_REPLACE)  # through v9fs this removes; pyfuse3 does better
        os.setxattr(f, "user.b", b"b" * 2000)
        assert {name: os.getxattr(there, name) for name in os.listxattr(there)} == {
            "user.a": b"",
            "user.b": b"b" * 2000,
        }
        os.setxattr(there, "user.c", b"theirs")
        assert sorted(os.listxattr(f)) == ["user.a", "user.b", "user.c"]
        assert os.getxattr(f, "user.c") == b"theirs"
        os.removexattr(f, "user.a")
        for act in (os.getxattr, os.removexattr):
            with refused(errno.ENODATA):
                act(f, "user.a")
        assert sorted(os.listxattr(there)) == ["user.b", "user.c"]
        for name, err in (("trusted.x", errno.EOPNOTSUPP), ("user.xen9p.x", errno.EPERM)):
            with refused(err):
                os.setxattr(f, name, b"x")
        os.symlink("f", here / "l")
        with refused(errno.EPERM):
            os.setxattr(here / "l", "user.a", b"x", follow_symlinks=False)


def test_sizes_of_extended_attributes(export: Path, tmp_path: Path) -> None:
    """What getxattr(2) and listxattr(2) say to who asks how much room it takes, and to who has too little."""
    (export / "f").touch()
    libc = ctypes.CDLL(None, use_errno=True)
    with mounted(export, tmp_path) as here:
        path = os.fsencode(here / "f")
        os.setxattr(path, b"user.a", b"12345")
        room = ctypes.create_string_buffer(5)
        for size, wants in ((0, 5), (5, 5), (4, -1)):
            assert libc.getxattr(path, b"user.a", room, size) == wants
            assert wants > 0 or ctypes.get_errno() == errno.ERANGE
        assert room.raw == b"12345"
        assert libc.listxattr(path, None, 0) == len(b"user.a\0")
        assert libc.listxattr(path, room, 5) == -1
        assert ctypes.get_errno() == errno.ERANGE
        with refused(errno.E2BIG):
            os.setxattr(path, b"user.a", bytes(65537))
        # How much fits is for the server's filesystem to say, and its errno arrives: like there.
        outcomes = []
        for where in (path, os.fsencode(export / "f")):
            try:
                outcomes.append(str(os.setxattr(where, b"user.large", bytes(65536))))
            except OSError as error:
                outcomes.append(str(error.errno))
        assert outcomes[0] == outcomes[1]
        assert os.getxattr(path, b"user.a") == b"12345"


def test_a_cache_is_told_of_extended_attributes(export: Path, tmp_path: Path) -> None:
    """Setting one changes the file's ctime, an ACL its mode also: at once, whatever the kernel and the cache hold."""
    (export / "f").touch(0o640)
    with mounted(export, tmp_path, "--cache", "timed", "--cache-seconds", "30") as here:
        f = here / "f"
        for change in (
            lambda: os.setxattr(f, "user.a", b"x"),
            lambda: os.removexattr(f, "user.a"),
            lambda: os.setxattr(f, "system.posix_acl_access", ACL),
        ):
            before = f.stat()
            time.sleep(0.02)
            change()
            assert f.stat().st_ctime_ns > before.st_ctime_ns
            assert f.stat().st_mode == (export / "f").stat().st_mode
        assert stat.S_IMODE(f.stat().st_mode) == 0o740
        assert os.getxattr(export / "f", "system.posix_acl_access") == ACL


def test_capabilities_that_others_give_a_program(export: Path, tmp_path: Path) -> None:
    (export / "f").touch()
    with mounted(export, tmp_path) as here:
        (here / "f").write_bytes(b"x")  # the kernel asks before it writes
        with refused(errno.ENODATA):
            os.getxattr(here / "f", "security.capability")
        os.setxattr(export / "f", "security.capability", CAPABILITY)
        time.sleep(1.1)
        assert os.getxattr(here / "f", "security.capability") == CAPABILITY
        (here / "f").write_bytes(b"y")
        assert os.listxattr(export / "f") == []
        os.setxattr(here / "f", "security.capability", CAPABILITY)
        assert os.getxattr(here / "f", "security.capability") == CAPABILITY


def test_a_read_only_mount(export: Path, tmp_path: Path) -> None:
    with mounted(export, tmp_path, "--ro") as here, pytest.raises(OSError, match="Read-only"):
        (here / "f").touch()


def test_what_another_user_makes_is_theirs(export: Path, tmp_path: Path) -> None:
    export.chmod(0o777)
    with tempfile.TemporaryDirectory() as folder, mounted(export, Path(folder)) as here:
        Path(folder).chmod(0o755)  # where pytest makes directories nobody else may enter
        script = f"import os; os.chdir({str(here)!r}); open('f', 'w').close(); os.mkdir('d'); os.symlink('f', 'l')"
        done = subprocess.run([sys.executable, "-c", script], user=1234, group=1235, extra_groups=[], check=False)
        assert done.returncode == 0
        assert {(p.name, p.lstat().st_uid, p.lstat().st_gid) for p in export.iterdir()} == {
            (name, 1234, 1235) for name in "fdl"
        }


@contextmanager
def relay(server: Path, where: Path, hold: Callable[[codec.Message], float]) -> Iterator[Path]:
    """A server before the server that keeps some replies back for so many seconds."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where))
        listener.listen()
        threads: list[threading.Thread] = []
        ends: list[socket.socket] = []

        def pump(source: socket.socket, target: socket.socket, delays: bool) -> None:
            lock = threading.Lock()
            messages = SocketTransport(source.dup())
            target = target.dup()
            target.settimeout(10)

            def send(data: bytes) -> None:
                with lock:
                    target.sendall(data)

            with suppress(OSError, EOFError, ValueError), messages, target:
                while True:
                    data = messages.recv()
                    seconds = hold(codec.decode(data)[1]) if delays else 0
                    if seconds:
                        threading.Timer(seconds, send, [data]).start()
                    else:
                        send(data)

        def accept() -> None:
            client, upstream = listener.accept()[0], socket.socket(socket.AF_UNIX)
            upstream.connect(str(server))
            ends.extend((client, upstream))
            for args in ((client, upstream, False), (upstream, client, True)):
                threads.append(threading.Thread(target=pump, args=args, daemon=True))
                threads[-1].start()

        threads.append(threading.Thread(target=accept))
        threads[0].start()
        yield where
        for sock in ends:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(5)
        for sock in ends:
            sock.close()


def test_a_slow_request_holds_up_nobody(export: Path, tmp_path: Path) -> None:
    (export / "slow").write_bytes(b"slow")
    (export / "fast").write_bytes(b"fast")

    def hold(reply: codec.Message) -> float:
        return 0.8 if isinstance(reply, codec.Rread) and reply.data == b"slow" else 0

    with serve_unix(export, tmp_path / "behind") as server, relay(server, tmp_path / "socket", hold) as slowed:
        process = start(slowed, tmp_path / "mnt")
        took: list[float] = []

        def read_slow() -> None:
            began = time.monotonic()
            assert (tmp_path / "mnt" / "slow").read_bytes() == b"slow"
            took.append(time.monotonic() - began)

        thread = threading.Thread(target=read_slow)
        thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        for _ in range(20):
            assert (tmp_path / "mnt" / "fast").read_bytes() == b"fast"
        assert time.monotonic() - began < 0.6
        assert not took
        thread.join(5)
        assert took[0] >= 0.7
        assert end(process)[0] == 0


def test_a_mount_ends_even_if_the_server_never_answers(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"never")

    def hold(reply: codec.Message) -> float:
        return 30 if isinstance(reply, codec.Rread) and reply.data else 0

    with serve_unix(export, tmp_path / "behind") as server, relay(server, tmp_path / "socket", hold) as stuck:
        process = start(stuck, tmp_path / "mnt")
        reader = subprocess.Popen(["cat", tmp_path / "mnt" / "f"], stderr=subprocess.PIPE)
        time.sleep(0.3)
        began = time.monotonic()
        assert end(process)[0] == 0
        assert time.monotonic() - began < 6
        assert b"Input/output error" in reader.communicate(timeout=5)[1] or reader.returncode
        assert not os.path.ismount(tmp_path / "mnt")
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.cancel()


def test_a_lost_server_is_an_errno(export: Path, tmp_path: Path) -> None:
    with serve_unix(export, tmp_path / "socket") as server:
        process = start(server, tmp_path / "mnt")
    with pytest.raises(OSError, match="Input/output error"):
        os.listdir(tmp_path / "mnt")
    code, said = end(process)
    assert code == 0
    assert "connection lost" in said


def test_umount_ends_it(export: Path, tmp_path: Path) -> None:
    with serve_unix(export, tmp_path / "socket") as server:
        process = start(server, tmp_path / "mnt")
        subprocess.run(["umount", tmp_path / "mnt"], check=True)
        assert process.wait(timeout=5) == 0
        process.communicate()


def test_the_daemon_is_there_when_the_command_returns(export: Path, tmp_path: Path) -> None:
    (export / "f").write_bytes(b"x")
    mnt = tmp_path / "mnt"
    mnt.mkdir()
    assert PYTHON is not None
    command = [PYTHON, "-c", COMMAND, "mount", "--unix", str(tmp_path / "socket"), str(mnt)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    failed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("xen9p: error: cannot connect to")
    assert len(failed.stderr.splitlines()) == 1
    with serve_unix(export, tmp_path / "socket"):
        # It keeps no end of the pipes, or this would wait for ever.
        subprocess.run(command, env=environment, capture_output=True, check=True, timeout=20)
        assert (mnt / "f").read_bytes() == b"x"
        subprocess.run(["umount", mnt], check=True)


def test_a_cache_of_ones_own(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the documentation shows, and what a student's error costs: an errno, not the mount."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "homework.py").write_text(
        "from xen9p.cache import Cache\n"
        "class Whole(Cache):\n"
        "    def __init__(self, seconds):\n"
        "        super().__init__(seconds)\n"
        "        self.files = {}\n"
        "    def data(self, ino, offset, count):\n"
        "        whole = self.files.get(ino)\n"
        "        return None if whole is None else whole[offset : offset + count]\n"
        "    def put_data(self, ino, offset, data, at_end):\n"
        "        if data == b'bug':\n"
        "            raise ValueError('homework')\n"
        "        if offset == 0 and at_end:\n"
        "            self.files[ino] = data\n"
        "    def invalidate_data(self, ino, offset=0, count=None):\n"
        "        self.files.pop(ino, None)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "mine"))
    (export / "f").write_bytes(b"first")
    (export / "g").write_bytes(b"bug")
    with mounted(export, tmp_path, "--cache", "homework:Whole") as here:
        assert (here / "f").read_bytes() == b"first"
        (export / "f").write_bytes(b"other")
        assert (here / "f").read_bytes() == b"first"  # nobody told it
        (here / "f").write_bytes(b"third")
        assert (here / "f").read_bytes() == b"third"
        with pytest.raises(OSError, match="Input/output error"):
            (here / "g").read_bytes()
        assert (here / "f").read_bytes() == b"third"
