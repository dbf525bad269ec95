"""Find out whether KVM really runs Xen here: /dev/kvm can exist and QEMU still hang, abort or stop on it."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from . import vm
from .errors import TestbedError

# A boot sector that does one thing: write 0x21 to QEMU's debug-exit port, which makes QEMU exit with 0x43.
#   mov dx, 0x501; mov al, 0x21; out dx, al; hlt
_BOOT = bytes([0xBA, 0x01, 0x05, 0xB0, 0x21, 0xEE, 0xF4])
_EXIT = 0x21 << 1 | 1

# The first program of dom0 turns the machine off, and QEMU ends with 0.
_OFF = "mitigations=off quiet loglevel=4 rdinit=/bin/poweroff -- -f"


def kvm_works(qemu: str, timeout: float = 6.0, accelerator: str = "kvm") -> bool:
    """Boot a seven-byte program, and believe in the accelerator if it ran within *timeout* seconds."""
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with tempfile.TemporaryDirectory(prefix="xen9p-kvm-") as scratch:
        sector = Path(scratch) / "boot"
        sector.write_bytes(_BOOT.ljust(510, b"\0") + b"\x55\xaa")
        command = [qemu, *vm.accelerated(accelerator), "-m", "16", "-nodefaults", "-display", "none"]
        command += ["-drive", f"file={sector},format=raw,if=ide", "-no-reboot"]
        command += ["-device", "isa-debug-exit,iobase=0x501,iosize=1"]
        return _code(command, timeout) == _EXIT


def xen_boots(qemu: str, base: Path, timeout: float = 40.0, accelerator: str = "kvm") -> bool:
    """Boot Xen, dom0's kernel and the first program of its user space, which turns the machine off again.

    Some kinds of KVM run small programs and give up on Xen: this is the only way to know. *base* is the image's
    directory; its disk is not touched. Emulation takes 8 seconds.
    """
    command = [qemu, *vm.accelerated(accelerator), "-m", "1024", "-smp", "2", "-nodefaults", "-display", "none"]
    # One that crashes starts anew, and so never ends.
    command += vm.booting(base, "dom0_mem=512M,max:512M spec-ctrl=no xpti=no", _OFF)
    return _code(command, timeout) == 0


def choose(wanted: str, qemu: str, base: Path) -> str:
    """Return "kvm" or "tcg" for the wish "auto", "kvm" or "tcg"; *base* is the image's directory."""
    if wanted == "tcg":
        return "tcg"
    if kvm_works(qemu) and xen_boots(qemu, base):
        return "kvm"
    if wanted == "kvm":
        raise TestbedError("testbed_accelerator is kvm, but KVM does not run Xen here: set it to auto or tcg")
    return "tcg"


def _code(command: Sequence[str], timeout: float) -> int | None:
    """Run QEMU; its exit code, None if it does not end within *timeout* seconds or says that KVM gave up."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        except OSError:
            return None
        deadline = time.monotonic() + timeout
        try:
            while process.poll() is None and time.monotonic() < deadline:
                # QEMU stops the machine then, and waits for a debugger that never comes.
                if b"KVM internal error" in os.pread(said.fileno(), 4096, 0):
                    return None
                time.sleep(0.1)
            return process.returncode
        finally:
            process.kill()
            process.wait()
