"""Build the root image of the nested Xen host: mmdebstrap makes the tree, mke2fs the filesystem.

No loop device, no boot loader, no partition table: QEMU starts Xen and hands it dom0's kernel. The image is
cached in a directory that a hash of its inputs names; a manifest in it says what the inputs were.
"""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import inspect
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from . import lock, manifest
from .errors import TestbedError
from .progress import Progress

PREFIX = "host-"
DISK = "disk.raw"
# Fixed, so that equal inputs give equal filesystems (mke2fs would draw them at random).
UUID = "9b5c7b0e-0000-4000-8000-000078656e39"
HASH_SEED = "9b5c7b0e-0000-4000-8000-000000000009"
EPOCH = "1700000000"


@dataclass(frozen=True)
class ImageSpec:
    """What goes into an image. *sources* are mirrors or lines for apt, none for mmdebstrap's own; size in MiB."""

    suite: str
    sources: Sequence[str]
    packages: Sequence[str]
    excludes: Sequence[str]
    masked: Sequence[str]
    files: Mapping[str, str]
    size_mib: int

    prefix: ClassVar[str] = PREFIX

    def inputs(self) -> dict[str, Any]:
        """Return everything that decides what is in the image: where it comes from does not, by intent."""
        code = "".join(inspect.getsource(part) for part in (_fill, make_tree, _bootstrap, _take_boot_files))
        return {
            "builder": hashlib.sha256(code.encode()).hexdigest()[:12],
            "excludes": list(self.excludes),
            "files": {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in self.files.items()},
            "masked": list(self.masked),
            "mmdebstrap": _version("mmdebstrap"),
            "packages": sorted(self.packages),
            "size_mib": self.size_mib,
            "suite": self.suite,
        }

    def fill(self, work: Path, progress: Progress) -> None:
        """Make the image in the directory *work*; the manifest comes last."""
        _fill(work, self, progress)


def location(cache: Path, spec: ImageSpec) -> Path:
    """Return the directory in which this image is, or will be."""
    return cache / f"{spec.prefix}{manifest.digest(spec.inputs())}"


def build(cache: Path, spec: ImageSpec, progress: Progress) -> Path:
    """Build the image into the cache and return its directory. Needs root. Raises TestbedError.

    What is half-finished lives under a temporary name and is swept away by the next build.
    """
    if os.geteuid() != 0:
        raise TestbedError("building the host image needs root: run it as root, or become root with sudo")
    target = location(cache, spec)
    with lock.exclusive(cache / "lock", lambda: progress.show("host image: waiting for another build to end")):
        if manifest.read(target) != spec.inputs():
            _build(cache, target, spec, progress)
    progress.done()
    return target


def _build(cache: Path, target: Path, spec: ImageSpec, progress: Progress) -> None:
    _sweep(cache, spec.prefix)
    work = Path(tempfile.mkdtemp(prefix=f"{spec.prefix}part-", dir=cache))
    try:
        spec.fill(work, progress)
        owner = cache.stat()
        for path in [work, *work.iterdir()]:
            os.chown(path, owner.st_uid, owner.st_gid)
        work.chmod(0o755)
        remove(target)
        work.rename(target)
    finally:
        if work.exists():
            remove(work)
    _prune(cache, spec.prefix, keep=target)


def _fill(work: Path, spec: ImageSpec, progress: Progress) -> None:
    tree = make_tree(work, spec, progress, "host image")
    _take_boot_files(tree, work)
    progress.step("host image: making the filesystem")
    disk = work / DISK
    with disk.open("wb") as file:
        file.truncate(spec.size_mib << 20)
    features = f"hash_seed={HASH_SEED},lazy_itable_init=1,lazy_journal_init=1"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", features, "-L", "host", "-m", "1"]
    _run([*command, "-d", str(tree), str(disk)])
    progress.step("host image: removing the tree")
    shutil.rmtree(tree)
    manifest.write(work, spec.inputs(), steps=progress.steps)


def make_tree(work: Path, spec: ImageSpec, progress: Progress, what: str) -> Path:
    """Make a machine's tree in the directory *work*, without what each machine has to have for itself; return it."""
    tree = work / "tree"
    progress.step(f"{what}: fetching packages")
    _bootstrap(tree, spec, progress)
    progress.step(f"{what}: tidying the tree")
    for path in [*tree.glob("etc/ssh/ssh_host_*"), tree / "etc/machine-id", tree / "var/lib/dbus/machine-id"]:
        path.unlink(missing_ok=True)
    # Empty rather than "uninitialized": an id is drawn at boot, but no first-boot presets are applied.
    (tree / "etc/machine-id").touch()
    return tree


def _bootstrap(tree: Path, spec: ImageSpec, progress: Progress) -> None:
    command = ["mmdebstrap", "--variant=minbase", "--mode=root", "--format=directory", "--verbose"]
    command += [f"--include={','.join(spec.packages)}"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in spec.excludes]
    command += ["--aptopt=Acquire::Languages none", "--aptopt=Acquire::Retries 3"]
    with tempfile.TemporaryDirectory(prefix="xen9p-files-") as overlay:
        for name, text in spec.files.items():
            path = Path(overlay) / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        Path(overlay).chmod(0o755)
        # Before the packages are configured, so that the initramfs is built once, and right.
        command += [f'--essential-hook=cp -r {overlay}/. "$1"/']
        masked = " ".join(spec.masked)
        command += [f'--customize-hook=chroot "$1" systemctl mask --quiet {masked}'] if masked else []
        command += ['--customize-hook=chroot "$1" systemctl enable --quiet systemd-networkd xen9p-seed']
        command += [spec.suite, str(tree), *spec.sources]
        _run(command, progress=progress, prefix="host image: ")


def _take_boot_files(tree: Path, work: Path) -> None:
    """Put Xen (unpacked: QEMU's multiboot loader takes no gzip), kernel and initramfs beside the disk."""
    xen = sorted((tree / "boot").glob("xen-*.gz"))
    kernel = sorted((tree / "boot").glob("vmlinuz-*"))
    initrd = sorted((tree / "boot").glob("initrd.img-*"))
    if not (xen and kernel and initrd):
        raise TestbedError("the host image has no Xen, kernel or initramfs in /boot: check testbed_packages")
    with gzip.open(xen[-1]) as source, (work / "xen").open("wb") as target:
        shutil.copyfileobj(source, target)
    shutil.copy(kernel[-1], work / "vmlinuz")
    shutil.copy(initrd[-1], work / "initrd.img")


_STEP = re.compile(r"(Get:\d+|Unpacking|Setting up|I:|update-initramfs)")


def _run(command: Sequence[str], progress: Progress | None = None, prefix: str = "") -> None:
    """Run *command*, showing its interesting lines as progress; what went wrong first is in the error."""
    env = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    first, last, shown = "", "no output", 0.0
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            text=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - a module of Ansible has one thread
        )
    except FileNotFoundError as error:
        raise TestbedError(f"{command[0]} is not installed: run `make lab`, or install it with apt") from error
    assert process.stdout is not None
    with process.stdout as lines:
        for raw in lines:
            line = raw.strip()
            last = line or last
            # Tools that call tools each complain in turn: the first complaint is the cause.
            if not first and line.startswith(("E: ", "Err:")):
                first = line
            if progress is not None and _STEP.match(line) and time.monotonic() - shown > 0.5:
                progress.show(prefix + line[:90])
                shown = time.monotonic()
    if process.wait() != 0:
        remedy = "; check testbed_mirror, testbed_suite and testbed_packages" if command[0] == "mmdebstrap" else ""
        raise TestbedError(f"{command[0]} failed: {first or last}{remedy}")


def die_with_parent() -> None:
    """Ask the kernel to end this process with its parent: a build that nobody waits for would be in the way."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _version(tool: str) -> str:
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "absent"
    return done.stdout.strip().partition("\n")[0]


def remove(path: Path) -> None:
    """Remove a tree, but first unmount what a build that was killed may have left mounted below it."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((m for m in mounted if m.startswith(f"{path}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], check=False)
    # What cannot go now, because a dying build still writes there, goes with the next sweep.
    shutil.rmtree(path, ignore_errors=True)


def _sweep(cache: Path, prefix: str) -> None:
    for path in cache.glob(f"{prefix}part-*"):
        remove(path)


def _prune(cache: Path, prefix: str, keep: Path, count: int = 2) -> None:
    """Keep the newest *count* images: a running machine may still have the one before as its base."""
    images = [d for d in cache.glob(f"{prefix}*") if d.is_dir() and d != keep]
    images.sort(key=lambda d: d.stat().st_mtime, reverse=True)
    for path in images[count - 1 :]:
        remove(path)
