"""Build the disk of a Debian machine that boots by itself: partition table, GRUB for BIOS, plain Linux, no Xen.

The filesystem is made right into its partition, without a loop device. GRUB is put on the disk by Debian's own
`grub-install`, in one short boot of the machine itself, whose kernel QEMU starts.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import vm
from .errors import TestbedError
from .image import DISK, EPOCH, HASH_SEED, UUID, ImageSpec, _bootstrap, _run, die_with_parent, make_tree
from .manifest import write
from .progress import Progress

START = 1  # MiB: where the first partition begins, as Debian's installer has it; GRUB lives in the gap before it
LABEL = "root"  # of the filesystem, for /etc/fstab
TIMEOUT = 180.0  # seconds; emulation takes 30
DONE = "GRUB is on the disk"
SETUP = "/usr/local/sbin/grub-setup"
# The machine's first process, once. Debian's installer leaves networkd alone: ifupdown has the network.
SCRIPT = f"""#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive
grub-install /dev/vda && update-grub && systemctl --quiet disable systemd-networkd && rm {SETUP} && echo "{DONE}"
sync
poweroff -ff
"""


@dataclass(frozen=True)
class DiskSpec(ImageSpec):
    """What goes into the disk, as for `ImageSpec`; the packages need a kernel and grub-pc."""

    prefix: ClassVar[str] = "disk-"

    def inputs(self) -> dict[str, Any]:
        """Return everything that decides what is on the disk."""
        code = (
            "".join(inspect.getsource(part) for part in (_fill, make_tree, _make_disk, _install, _bootstrap)) + SCRIPT
        )
        return {**super().inputs(), "builder": hashlib.sha256(code.encode()).hexdigest()[:12]}

    def fill(self, work: Path, progress: Progress) -> None:
        """Make the disk in the directory *work*; the manifest comes last."""
        _fill(work, self, progress)


def _fill(work: Path, spec: DiskSpec, progress: Progress) -> None:
    tree = make_tree(work, spec, progress, "disk image")
    script = tree / SETUP.lstrip("/")
    script.write_text(SCRIPT)
    script.chmod(0o755)
    for name in ("vmlinuz", "initrd.img"):
        if not (tree / name).exists():
            raise TestbedError(f"the disk image has no /{name}: check the packages")
        shutil.copy(tree / name, work)
    progress.step("disk image: making the filesystem")
    _make_disk(work / DISK, tree, spec.size_mib)
    shutil.rmtree(tree)
    progress.step("disk image: installing GRUB")
    _install(work, progress)
    for name in ("vmlinuz", "initrd.img"):
        (work / name).unlink()
    write(work, spec.inputs(), steps=progress.steps)


def _make_disk(disk: Path, tree: Path, size_mib: int) -> None:
    """Make a disk with one bootable partition that holds *tree*; *size_mib* is the filesystem's size."""
    with disk.open("wb") as file:
        file.truncate((size_mib + START) << 20)
    table = f"label: dos\nlabel-id: 0x78656e39\nstart={START}MiB, type=83, bootable\n"
    try:
        subprocess.run(["sfdisk", "--quiet", disk], input=table, text=True, capture_output=True, check=True)
    except FileNotFoundError as error:
        raise TestbedError("sfdisk is not installed: run `make lab`, or install fdisk with apt") from error
    except subprocess.CalledProcessError as error:
        raise TestbedError(f"sfdisk failed: {error.stderr.strip()}") from error
    features = f"offset={START << 20},hash_seed={HASH_SEED},lazy_itable_init=1,lazy_journal_init=1"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", features, "-L", LABEL, "-m", "1"]
    _run([*command, "-d", str(tree), str(disk), f"{size_mib}M"])


def _install(work: Path, progress: Progress) -> None:
    """Boot the kernel in *work* with `SETUP` as its first process; emulated, because any KVM may give up."""
    kernel = f"root=LABEL={LABEL} rw console=ttyS0 quiet mitigations=off init={SETUP}"
    command = [vm.QEMU, *vm.accelerated("tcg"), "-m", "1024", "-smp", "2", "-nodefaults", "-display", "none"]
    command += ["-kernel", str(work / "vmlinuz"), "-initrd", str(work / "initrd.img"), "-append", kernel]
    command += ["-drive", f"file={work / DISK},format=raw,if=virtio,cache=unsafe", "-no-reboot", "-serial", "stdio"]
    said, began = b"", time.monotonic()
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        preexec_fn=die_with_parent,  # noqa: PLW1509 - a module of Ansible has one thread
    ) as process:
        assert process.stdout is not None
        while time.monotonic() - began < TIMEOUT:
            if select.select([process.stdout], [], [], 1.0)[0]:
                more = os.read(process.stdout.fileno(), 4096)
                if not more:
                    break
                said += more
            progress.show(f"disk image: installing GRUB, {time.monotonic() - began:.0f} s: {_last(said)}")
        process.kill()
    if DONE.encode() not in said:
        raise TestbedError(f"GRUB could not be installed on the disk image; the last words: {_last(said)!r}")


def _last(said: bytes) -> str:
    """Return the last line that says anything."""
    lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:90]
