"""What a worker can no longer do once the door is shut, and that it serves all the same."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from confined import child, confine, confined_session, needs_admin
from serving import memory_session
from xen9p import auth, codec, sandbox, worker, zygote
from xen9p.client import Client
from xen9p.errors import Xen9pError
from xen9p.transport.stream_client import SocketTransport

LIBC = ctypes.CDLL(None, use_errno=True)
NUMBERS = {"ptrace": 101, "mount": 165, "setns": 308, "process_vm_readv": 310, "open_by_handle_at": 304, "bpf": 321}
NUMBERS |= {"unshare": 272, "pidfd_open": 434, "keyctl": 250, "init_module": 175, "chroot": 161, "move_mount": 429}
X86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of system calls are x86-64's")
MARK = "what no guest may see"


def call(name: str, *arguments: int) -> None:
    """A bare system call; OSError if it fails."""
    if LIBC.syscall(NUMBERS[name], *arguments) < 0:
        raise OSError(ctypes.get_errno(), name)


def errno_of(attempt: Callable[[], object]) -> str:
    """The name of the errno that an attempt ends with, or "worked"."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "none")
    return "worked"


def attempts(root: int, parent: int) -> dict[str, Callable[[], object]]:
    """What a worker that somebody has taken over would try."""
    buffer = ctypes.create_string_buffer(64)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
    where = ctypes.addressof(vector)
    # What succeeds closes what it has opened: outside, some of it does.
    return {
        "read a file of the host": lambda: Path("/etc/passwd").read_text(),
        "read above the export": lambda: os.open("../etc/passwd", os.O_RDONLY, dir_fd=root),
        "list above the export": lambda: os.close(os.open("..", os.O_RDONLY, dir_fd=root)),
        "make a file above the export": lambda: os.open("/new", os.O_RDWR | os.O_CREAT),
        "make a node above the export": lambda: os.mknod("/node", stat.S_IFCHR, os.makedev(1, 1)),
        "open gntdev": lambda: os.close(os.open("/dev/xen/gntdev", os.O_RDWR)),
        "read the parent's memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
        "read the parent's memory by call": lambda: call("process_vm_readv", parent, where, 1, where, 1, 0),
        "look at the parent": lambda: Path(f"/proc/{parent}/status").read_text(),
        "write its own code": lambda: os.close(os.open("/proc/self/mem", os.O_RDWR)),
        "read its own program": lambda: os.close(os.open("/proc/self/exe", os.O_RDONLY)),
        "trace the parent": lambda: call("ptrace", 16, parent, 0, 0),
        "kill the parent": lambda: os.kill(parent, 0),
        "kill everybody": lambda: os.kill(-1, 0),
        "get hold of the parent": lambda: call("pidfd_open", parent, 0),
        "make a process": os.fork,
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "run a program of the export's": lambda: os.execve(os.open("program", os.O_PATH, dir_fd=root), ["program"], {}),
        "make an internet socket": lambda: socket.socket(socket.AF_INET).close(),
        "make a Unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
        "mount": lambda: call("mount", 0, 0, 0, 0, 0),
        "move a mount": lambda: call("move_mount", -1, 0, -1, 0, 0),
        "change the root": lambda: call("chroot", 0),
        "enter a namespace": lambda: call("setns", root, 0),
        "make a user namespace": lambda: call("unshare", 0x10000000),
        "open by handle": lambda: call("open_by_handle_at", root, 0, 0),
        "load a module": lambda: call("init_module", 0, 0, 0),
        "load a program for the kernel": lambda: call("bpf", 0, 0, 0),
        "use the kernel's keys": lambda: call("keyctl", 0, 0, 0),
        "make memory that runs": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "type into a terminal": lambda: fcntl.ioctl(0, termios.TIOCSTI, b"x"),
    }


REFUSED = {"EPERM", "EACCES", "ENOENT", "EROFS"}


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outcome of each attempt in a confined child."""
    export = tmp_path_factory.mktemp("probe") / "export"
    export.mkdir()
    (export / "program").write_text("#!/bin/true\n")
    (export / "program").chmod(0o755)

    def probe() -> dict[str, str]:
        parent = os.getppid()
        root = confine(export)
        return {name: errno_of(attempt) for name, attempt in attempts(root, parent).items()}

    with child(probe) as (_, result):
        outcome: dict[str, str] = result()
    return outcome


@needs_admin
@X86
@pytest.mark.parametrize("attempt", attempts(0, 0))
def test_a_worker_can_no_longer(probed: dict[str, str], attempt: str) -> None:
    assert probed[attempt] in REFUSED


@X86
def test_all_of_that_works_outside(export: Path) -> None:
    """The attempts are worth something: without confinement each works, or fails for a reason of its own."""
    root = os.open(export, os.O_RDONLY)
    (export / "program").write_text("#!/bin/true\n")
    outside = {
        name: errno_of(attempt)
        for name, attempt in attempts(root, os.getpid()).items()
        if name in ("read a file of the host", "list above the export", "look at the parent", "kill the parent",
                    "make an internet socket", "make memory that runs", "read its own program", "write its own code")
    }  # fmt: skip
    os.close(root)
    assert set(outside.values()) == {"worked"}


@needs_admin
def test_what_the_kernel_says_about_a_worker(export: Path) -> None:
    """Seen from outside: capabilities, filter, no_new_privs, its mounts, its root."""

    def wait() -> None:
        confine(export)
        os.write(ready, b"!")
        time.sleep(30)

    told, ready = os.pipe()
    with child(wait) as (pid, _):
        assert os.read(told, 1) == b"!"
        fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        ours, theirs = (os.readlink(f"/proc/{who}/ns/mnt") for who in ("self", pid))
    os.close(told)
    os.close(ready)
    kept = sum(1 << number for number in sandbox.CAPABILITIES.values())
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert int(fields[name], 16) & ~kept == 0
    assert int(fields["CapInh"], 16) == int(fields["CapAmb"], 16) == 0
    assert fields["Seccomp"] == "2"
    assert fields["NoNewPrivs"] == "1"
    assert sorted(line.split()[4] for line in mounts) == ["/", "/export", "/proc"]
    assert all({"nosuid", "nodev", "noexec"} <= set(line.split()[5].split(",")) for line in mounts)
    assert ours != theirs


@needs_admin
def test_a_confined_worker_serves_everything(export: Path) -> None:
    (export / "d").mkdir()
    with confined_session(export) as (client, root):
        client.write_file(root, b"f", b"content" * 1000)
        assert client.read_file(root, b"f") == b"content" * 1000
        with client.walked(root, b"f") as file:
            client.setattr(file, mode=0o4711, uid=1234, gid=5678, size=100, mtime_ns=10**18)
            assert client.getattr(file).size == 100
        with client.walked(root, b"d") as folder:
            client.renameat(root, b"f", folder, b"moved")
            with client.walked(folder, b"moved") as file:
                client.link(root, file, b"hard")
                client.rename(file, root, b"back")
            client.mknod(folder, b"null", stat.S_IFCHR | 0o666, major=1, minor=3)
            client.mknod(folder, b"fifo", stat.S_IFIFO | 0o600)
            client.symlink(folder, b"s", b"/etc/passwd")
            client.mkdir(folder, b"sub", 0o6755)
        assert sorted(e.name for e in client.listdir(root, b"d")) == [b"fifo", b"null", b"s", b"sub"]
        fid = client.walk(root, b"hard")
        client.lopen(fid, os.O_RDWR)
        other = client.walk(root, b"hard")
        client.unlinkat(root, b"hard")
        client.unlinkat(root, b"back")
        client.write(fid, 0, b"still here")
        client.setattr(other, size=5)
        client.fsync(fid)
        client.lopen(other)  # unlinked, and opened after that
        assert client.read(other, 0, 100) == b"still"
        assert client.statfs(root).bsize
    found = (export / "d" / "sub").stat()
    assert stat.S_IMODE(found.st_mode) == 0o6755


@needs_admin
def test_a_read_only_export_is_so_for_the_kernel_too(export: Path) -> None:
    (export / "f").write_text("content")

    def write() -> str:
        root = confine(export, readonly=True)
        return errno_of(lambda: os.open("f", os.O_RDWR, dir_fd=root))

    with child(write) as (_, result):
        assert result() in ("EROFS", "EACCES")
    with confined_session(export, readonly=True) as (client, root):
        assert client.read_file(root, b"f") == b"content"


@needs_admin
def test_what_the_host_mounts_later_does_not_show(export: Path) -> None:
    (export / "d").mkdir()
    (export / "d" / "below").write_text("below")
    with confined_session(export) as (client, root):
        subprocess.run(["mount", "-t", "tmpfs", "none", export / "d"], check=True)
        try:
            (export / "d" / "above").write_text(MARK)
            assert [e.name for e in client.listdir(root, b"d")] == [b"below"]
        finally:
            subprocess.run(["umount", export / "d"], check=True)
        assert client.read_file(root, b"d/below") == b"below"


@needs_admin
def test_what_is_mounted_below_an_export_already_does_not_show_either(export: Path) -> None:
    (export / "d").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", export / "d"], check=True)
    try:
        (export / "d" / "above").write_text(MARK)
        with confined_session(export) as (client, root):
            assert client.listdir(root, b"d") == []
    finally:
        subprocess.run(["umount", export / "d"], check=True)


@needs_admin
def test_a_walk_enters_no_mount(export: Path) -> None:
    """The walk's own defence, without a mount namespace: xen9p serve has none."""
    (export / "d").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", export / "d"], check=True)
    try:
        (export / "d" / "above").write_text(MARK)
        with memory_session(export) as session, pytest.raises(PermissionError):
            session.client.walk(session.root, b"d", b"above")
        with memory_session(export) as session, pytest.raises(PermissionError):
            session.client.walk(session.root, b"d")
    finally:
        subprocess.run(["umount", export / "d"], check=True)


@needs_admin
def test_an_export_that_is_replaced_stays_what_it_was(export: Path) -> None:
    (export / "f").write_text("old")
    with confined_session(export) as (client, root):
        export.rename(export.parent / "moved")
        export.mkdir()
        (export / "f").write_text("new")
        assert client.read_file(root, b"f") == b"old"
        client.write_file(root, b"g", b"made")
        with client.walked(root, b"g") as file:
            client.rename(file, root, b"h")
        assert sorted(os.listdir(export.parent / "moved")) == ["f", "h"]
        assert os.listdir(export) == ["f"]


@needs_admin
@pytest.mark.parametrize("what", ["missing", "file"])
def test_an_export_that_is_no_directory(tmp_path: Path, what: str) -> None:
    path = tmp_path / "export"
    if what == "file":
        path.touch()

    def build() -> str:
        try:
            sandbox.cage(str(path), readonly=False)
        except Xen9pError as error:
            return str(error)
        return "worked"

    with child(build) as (_, result):
        assert result() == (
            f"cannot serve {path}: {os.strerror(errno.ENOENT if what == 'missing' else errno.ENOTDIR)} "
            "(an export is an existing directory)"
        )


@needs_admin
def test_a_worker_that_cannot_begin_says_why(tmp_path: Path) -> None:
    """The real worker, by the zygote's own function: its socket is there before it is shut in, and heard after."""
    path = tmp_path / "worker.sock"
    request = dict.fromkeys(worker.HELLO_FIELDS, "x") | {"domid": 1, "devid": 0, "path": str(tmp_path / "none")}
    request |= {"socket": str(path), "readonly": False}
    pid = zygote.spawn(request, worker.main)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        events = [json.loads(line) for line in sock.makefile("rb")]
    assert [e["event"] for e in events] == ["hello", "failed"]
    assert events[1]["reason"].startswith(f"cannot serve {tmp_path / 'none'}: No such file")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_worker_reads_its_keys_before_the_door_shuts(tmp_path: Path) -> None:
    """From where they are on the host; a file that it must not use ends it, and it says which that is."""
    path, keys = tmp_path / "worker.sock", tmp_path / "keys"
    auth.make(keys)
    keys.chmod(0o644)
    request: dict[str, Any] = dict.fromkeys(worker.HELLO_FIELDS, "x") | {"domid": 1, "devid": 0, "readonly": False}
    request |= {"socket": str(path), "path": str(tmp_path), "keys": str(keys)}
    pid = zygote.spawn(request, worker.main)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        events = [json.loads(line) for line in sock.makefile("rb")]
    assert events[-1]["reason"].startswith(f"{keys} is open to others")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_a_server_on_a_socket_confines_itself(export: Path, tmp_path: Path) -> None:
    """xen9p serve, as whoever runs the tests: filter, no_new_privs, Landlock; and it cleans its socket away."""
    path = tmp_path / "sock"
    (export / "f").write_text("content")
    (export / "d").mkdir()
    command = [sys.executable, "-m", "xen9p", "serve", "--export", str(export), "--unix", str(path)]
    code = "import sys; from xen9p.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *command[3:]]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("serving")
        fields: dict[str, Any] = {}
        for _ in range(100):
            status = Path(f"/proc/{process.pid}/status").read_text()
            fields = dict(line.split(":\t", 1) for line in status.splitlines())
            if fields["Seccomp"] == "2":
                break
            time.sleep(0.05)
        assert fields["Seccomp"] == "2"
        assert fields["NoNewPrivs"] == "1"
        assert int(fields["CapEff"], 16) & ~sum(1 << n for n in sandbox.CAPABILITIES.values()) == 0
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        client, root = Client.connect(SocketTransport(sock))
        assert client.read_file(root, b"f") == b"content"
        with client.walked(root, b"d") as folder:
            client.renameat(root, b"f", folder, b"f")
        assert client.rpc(codec.Tgetattr(root, codec.GETATTR_BASIC))
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert not path.exists()
