"""The nested host as a QEMU process: start, stop, reset and remove it. Its disks are overlays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import image
from .errors import TestbedError

QEMU = "qemu-system-x86_64"
RUNNING = frozenset({"running", ""})  # what status() says of a machine that is to be left alone
# AMD without SMAP and AVX: under emulation the only choice with which dom0 boots, data stay whole (QEMU 7.2
# miscomputes AVX) and Xen needs no Meltdown mitigation. svm and npt are for PVH and HVM guests.
TCG_CPU = "qemu64,+svm,+npt,+ssse3,+sse4.1,+sse4.2,+popcnt"
# What is paid for by every page and every path, and protects nothing in a lab: mitigations, clearing of pages that are
# written anyway, accounting of memory, AppArmor and TOMOYO without a policy. No commas: QEMU takes them for its own.
LEAN = "mitigations=off init_on_alloc=0 lsm=landlock"
KERNEL_ARGS = f"root=/dev/vda rw console=hvc0 {LEAN} quiet loglevel=4 systemd.show_status=0 net.ifnames=0"


@dataclass(frozen=True)
class VmSpec:
    """One machine. Sizes of memory are in MiB, of disks in GiB; *image* is a directory made by `image.build`.

    *boot* is "xen" when QEMU starts Xen itself, "disk" when the firmware starts what the image's disk has.
    """

    name: str
    image: str
    accelerator: str
    cpus: int
    memory: int
    dom0_memory: int
    store_size: int
    ssh_port: int
    boot: str = "xen"


class Vm:
    """The machine whose state lives in *state_dir*."""

    def __init__(self, state_dir: Path) -> None:
        self.dir = state_dir
        self.host_disk = state_dir / "host.qcow2"
        self.store_disk = state_dir / "store.qcow2"
        self.console = state_dir / "console.log"
        self._pid_file = state_dir / "qemu.pid"
        self._record = state_dir / "vm.json"

    def pid(self) -> int | None:
        """Return the pid of our QEMU, None when it does not run. A stale pid file counts for nothing."""
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except (OSError, ValueError):
            return None
        ours = Path(command[0]).name.startswith("qemu-system") and str(self._pid_file) in command
        return pid if ours else None

    def recorded(self) -> VmSpec | None:
        """Return what the disks and the running machine were made from, None when that is not known."""
        try:
            return VmSpec(**json.loads(self._record.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def start(self, spec: VmSpec) -> list[str]:
        """Make the machine run as *spec* says; return what had to be done, in words: nothing if it does already.

        Another image means a new disk for the host (the store keeps its own); other settings mean a restart.
        """
        done: list[str] = []
        old = self.recorded()
        if self.pid() is not None:
            status = self.status()
            if old == spec and status in RUNNING:
                return []
            # What QEMU has stopped does not hear the power button.
            self.stop(*([] if status in RUNNING else [0.0]))
            done.append("stopped: its settings changed" if old != spec else f"stopped: QEMU had it in state {status}")
        self.dir.mkdir(parents=True, exist_ok=True)
        # Without a record (a run was killed, or wrote another form of it) the disk itself has to tell.
        made_from = _backing(self.host_disk) if old is None else old.image
        if made_from != spec.image:
            self.host_disk.unlink(missing_ok=True)
        # First the record, then what it vouches for: a run that is killed in between repeats the rest.
        self._write_record(spec)
        done += self._make_disks(spec)
        self._launch(spec)
        return [*done, f"started with {spec.accelerator}"]

    def stop(self, timeout: float = 40.0) -> bool:
        """Shut the host down by its power button; kill what does not go within *timeout* seconds."""
        pid = self.pid()
        if pid is None:
            return False
        self._command("system_powerdown")
        if not _gone(pid, timeout):
            os.kill(pid, signal.SIGTERM)
            if not _gone(pid, 5.0):
                os.kill(pid, signal.SIGKILL)
                _gone(pid, 5.0)
        self._pid_file.unlink(missing_ok=True)
        return True

    def discard(self) -> bool:
        """Kill the machine and throw its disks away: the next start begins with the image."""
        existed = self.host_disk.exists() or self.store_disk.exists()
        running = self.stop(timeout=0.0)
        for path in (self.host_disk, self.store_disk, self._record, self.console):
            path.unlink(missing_ok=True)
        return existed or running

    def remove(self) -> bool:
        """Kill the machine and remove everything that it left, keys and inventory too."""
        existed = self.dir.exists()
        self.stop(timeout=0.0)
        if existed:
            shutil.rmtree(self.dir)
            # The folder of all labs goes with the last of them.
            if not any(self.dir.parent.iterdir()):
                self.dir.parent.rmdir()
        return existed

    def last_console_line(self) -> str:
        """Return the newest line that host or hypervisor printed, for progress and for error messages."""
        try:
            with self.console.open("rb") as file:
                file.seek(max(0, self.console.stat().st_size - 2048))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = ["".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()]
        return next((line for line in reversed(lines) if line), "")[:100]

    def _write_record(self, spec: VmSpec) -> None:
        partial = self._record.with_suffix(".part")
        partial.write_text(json.dumps(asdict(spec), indent=1) + "\n")
        partial.replace(self._record)

    def _make_disks(self, spec: VmSpec) -> list[str]:
        done = []
        base = Path(spec.image) / image.DISK
        if not self.host_disk.exists():
            _new_disk(self.host_disk, ["-F", "raw", "-b", str(base)], [])
            done.append("new host disk")
        if not self.store_disk.exists():
            _new_disk(self.store_disk, [], [f"{spec.store_size}G"])
            done.append("new store disk")
        return done

    def _launch(self, spec: VmSpec) -> None:
        self.console.unlink(missing_ok=True)
        # The absolute path of the pid file is how `pid` knows our process from another.
        command = [*qemu_command(spec), "-pidfile", str(self._pid_file), "-daemonize"]
        try:
            # The other files are named relative to the state directory: a Unix socket's path must stay short.
            done = subprocess.run(
                command, cwd=self.dir, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise TestbedError(f"{QEMU} is not installed: run `make lab`, or apt install qemu-system-x86") from error
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no output").splitlines()[-1]
            remedy = f"; free the port or set testbed_ssh_port (now {spec.ssh_port})" if "hostfwd" in reason else ""
            raise TestbedError(f"QEMU did not start: {reason}{remedy}")

    def status(self) -> str:
        """Return QEMU's word for the machine's state: "running", or say "internal-error"; "" when nobody can tell.

        A monitor that is slow to answer (QEMU under load) is no reason to kill a machine.
        """
        return str(self._command("query-status").get("status", ""))

    def _command(self, name: str) -> dict[str, Any]:
        """Give QEMU one command through its monitor (QMP) and return its answer; without a monitor it is empty."""
        try:
            here = os.open(self.dir, os.O_PATH | os.O_DIRECTORY)
        except OSError:
            return {}
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.settimeout(3.0)
                # A Unix socket's path has 107 bytes at most, and the state directory may lie deep.
                monitor.connect(f"/proc/self/fd/{here}/qmp.sock")
                with monitor.makefile("rw", encoding="utf-8") as lines:
                    lines.readline()  # the greeting
                    answer: dict[str, Any] = {}
                    for command in ("qmp_capabilities", name):
                        lines.write(json.dumps({"execute": command}) + "\n")
                        lines.flush()
                        answer = json.loads(lines.readline())
                        while "event" in answer:
                            answer = json.loads(lines.readline())
                    found = answer.get("return", {})
                    return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}
        finally:
            os.close(here)


def qemu_command(spec: VmSpec) -> list[str]:
    """Return QEMU's command line: Xen is started directly, with dom0's kernel and initramfs as its modules.

    With boot "disk" nothing is handed over: SeaBIOS finds the boot loader on the first disk.
    """
    xen = f"dom0_mem={spec.dom0_memory}M,max:{spec.dom0_memory}M console=com1 com1=115200,8n1 loglvl=warning"
    xen += " guest_loglvl=warning spec-ctrl=no xpti=no"
    command = [QEMU, "-name", f"xen9p-{spec.name}", *accelerated(spec.accelerator)]
    command += ["-smp", str(spec.cpus), "-m", str(spec.memory), "-display", "none", "-vga", "none"]
    command += booting(Path(spec.image), xen, KERNEL_ARGS) if spec.boot == "xen" else []
    command += _disk("host.qcow2", "qcow2", "host") + _disk("store.qcow2", "qcow2", "store")
    command += _disk("seed.tar", "raw", "seed,readonly=on")
    forward = f"user,id=net,hostfwd=tcp:127.0.0.1:{spec.ssh_port}-:22"
    command += ["-netdev", forward, "-device", "virtio-net-pci,netdev=net,romfile="]
    command += ["-serial", "file:console.log", "-qmp", "unix:qmp.sock,server=on,wait=off", "-monitor", "none"]
    return command


def accelerated(accelerator: str) -> list[str]:
    """Return QEMU's options for "kvm" or "tcg"."""
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi,tb-size=1024", "-cpu", TCG_CPU]


def booting(base: Path, xen: str, kernel: str) -> list[str]:
    """Return QEMU's options that start the Xen of the image in *base*; *xen* and *kernel* are their command lines."""
    return [
        *("-kernel", str(base / "xen"), "-append", xen),
        *("-initrd", f"{base / 'vmlinuz'} {kernel},{base / 'initrd.img'}"),
    ]


def _disk(file: str, form: str, serial: str) -> list[str]:
    name, _, options = serial.partition(",")
    drive = f"file={file},format={form},if=none,id={name},cache=unsafe,discard=unmap"
    return [
        "-drive",
        f"{drive},{options}".rstrip(","),
        "-device",
        f"virtio-blk-pci,drive={name},serial={name}",
    ]


def _gone(pid: int, timeout: float) -> bool:
    """Wait until the process is gone, at most *timeout* seconds; tell whether it is."""
    deadline = time.monotonic() + timeout
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
    return True


def _new_disk(path: Path, options: Sequence[str], size: Sequence[str]) -> None:
    """Make a qcow2 file under a temporary name: half of one is never taken for whole."""
    partial = path.with_suffix(".part")
    _qemu_img(["create", "-q", "-f", "qcow2", *options, str(partial), *size])
    partial.replace(path)


def _backing(path: Path) -> str | None:
    """Return the directory of the image that *path* is an overlay on, None when there is none or nobody can tell."""
    command = ["qemu-img", "info", "--force-share", "--output=json", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return str(Path(json.loads(done.stdout)["backing-filename"]).parent)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _qemu_img(arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise TestbedError("qemu-img is not installed: run `make lab`, or apt install qemu-utils") from error
    if done.returncode != 0:
        raise TestbedError(f"qemu-img {arguments[0]} failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
