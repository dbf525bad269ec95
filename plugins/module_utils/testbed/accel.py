"""Find out whether KVM really works here: /dev/kvm can exist and QEMU still hang or abort on it."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from .errors import TestbedError

# A boot sector that does one thing: write 0x21 to QEMU's debug-exit port, which makes QEMU exit with 0x43.
#   mov dx, 0x501; mov al, 0x21; out dx, al; hlt
_BOOT = bytes([0xBA, 0x01, 0x05, 0xB0, 0x21, 0xEE, 0xF4])
_EXIT = 0x21 << 1 | 1


def kvm_works(qemu: str, timeout: float = 6.0, accelerator: str = "kvm", cpu: str = "host") -> bool:
    """Boot a seven-byte program, and believe in the accelerator if it ran within *timeout* seconds."""
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    with tempfile.TemporaryDirectory(prefix="xen9p-kvm-") as scratch:
        sector = Path(scratch) / "boot"
        sector.write_bytes(_BOOT.ljust(510, b"\0") + b"\x55\xaa")
        command = [qemu, "-accel", accelerator, "-cpu", cpu, "-m", "16", "-nodefaults", "-display", "none"]
        command += ["-drive", f"file={sector},format=raw,if=ide", "-no-reboot"]
        command += ["-device", "isa-debug-exit,iobase=0x501,iosize=1"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
        except (subprocess.TimeoutExpired, OSError):
            return False
    return done.returncode == _EXIT


def choose(wanted: str, qemu: str) -> str:
    """Return "kvm" or "tcg" for the wish "auto", "kvm" or "tcg"."""
    if wanted == "tcg":
        return "tcg"
    if kvm_works(qemu):
        return "kvm"
    if wanted == "kvm":
        raise TestbedError("testbed_accelerator is kvm, but KVM does not run here: set it to auto or tcg")
    return "tcg"
