"""The roots of the benchmark's guests: one golden tree, once over 9P, once as ext4 in a file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from . import policy
from .host import BenchError, destroy, run
from .settings import BLOCK, FILES, FULL, NINEP, Settings
from .sides import DISK, chosen

ALL = (NINEP, BLOCK, FILES, FULL)
# The inode number of a btrfs subvolume's root.
SUBVOLUME = 256
MACHINE_ID = "9f" * 16


def golden(given: Settings) -> Path:
    """Return the golden tree: the named one, or else the newest."""
    folder = Path(given.store) / "golden"
    found = [path for path in folder.glob(given.golden or "*") if (Path(given.boot) / path.name / "vmlinuz").is_file()]
    if not found:
        what = f"no golden tree {given.golden}" if given.golden else "no golden tree"
        raise BenchError(f"{folder} has {what} with a kernel in {given.boot}: run site.yml first")
    return max(found, key=lambda path: (Path(given.boot) / path.name / "vmlinuz").stat().st_mtime)


def prepare(given: Settings, more: Callable[[Settings], None] = lambda _: None) -> str:
    """Make seed, image and policy; return the identity of the golden tree that they come from.

    *more* adds to the seed before there is an image of it.
    """
    clean(given)
    tree = golden(given)
    given.area.mkdir()
    given.run.mkdir(mode=0o700)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(given.key))
    run("btrfs", "--quiet", "subvolume", "snapshot", str(tree), str(given.seed))
    _identify(given)
    for side in ("theirs", *(side.name for side in chosen(given) if side.served == "xen9p")):
        (given.area / side).mkdir(exist_ok=True)
    more(given)
    _image(given)
    reset(given)
    for name in ALL:
        config(given, name).write_text(_config(given, name, Path(given.boot) / tree.name))
    policy.allow(given)
    return tree.name


def _image(given: Settings) -> None:
    """Make the seed's ext4 image."""
    run("truncate", f"--size={given.image_size}M", str(given.image_seed))
    # Nothing lazy: the kernel would go on formatting while the guest is timed.
    eager = "lazy_itable_init=0,lazy_journal_init=0"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", eager, "-d", str(given.seed), str(given.image_seed))


def reset(given: Settings) -> None:
    """Give both roots the seed's content again: whatever boots, boots for the first time."""
    if given.root.exists():
        run("btrfs", "--quiet", "subvolume", "delete", str(given.root))
    run("btrfs", "--quiet", "subvolume", "snapshot", str(given.seed), str(given.root))
    given.image.unlink(missing_ok=True)
    run("cp", "--reflink=always", str(given.image_seed), str(given.image))


def clean(given: Settings) -> bool:
    """Remove whatever this or an earlier run left; whether there was anything."""
    found = given.area.exists() or given.run.exists()
    for name in ALL:
        destroy(name)
    found |= policy.forbid(given)
    for path in given.area.glob("*"):
        if path.is_dir() and path.stat().st_ino == SUBVOLUME:
            run("btrfs", "--quiet", "subvolume", "delete", str(path))
    for folder in (given.area, given.run):
        if folder.exists():
            shutil.rmtree(folder)
    return found


def config(given: Settings, name: str) -> Path:
    """Return the path of a guest's configuration for xl."""
    return given.run / f"{name}.cfg"


def _identify(given: Settings) -> None:
    keys = Path("/root/.ssh/authorized_keys")
    known = keys.read_text() if keys.is_file() else ""
    network = (
        f"[Match]\nName=eth0\n[Network]\nAddress={given.address}/{given.prefix}\nGateway={given.gateway}\n"
        "LinkLocalAddressing=no\nIPv6AcceptRA=no\n"
    )
    files = {
        "etc/hostname": "bench\n",
        "etc/hosts": "127.0.0.1 localhost bench\n",
        "etc/fstab": "",
        "etc/machine-id": MACHINE_ID + "\n",
        "etc/systemd/network/10-eth0.network": network,
        "root/.ssh/authorized_keys": known + given.key.with_suffix(".pub").read_text(),
    }
    for name, text in files.items():
        path = given.seed / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
    (given.seed / "root/.ssh/authorized_keys").chmod(0o600)
    host_key = given.seed / "etc/ssh/ssh_host_ed25519_key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", str(host_key))


def _config(given: Settings, name: str, kernel: Path) -> str:
    if name == NINEP:
        flags = f"trans=xen,version=9p2000.L,msize={given.root_msize},{given.root_options}"
        root = f"root=root rootfstype=9p rootflags={flags}"
    else:
        root = "root=/dev/xvda rootfstype=ext4"
    lines = [
        f'name = "{name}"',
        'type = "pv"',
        f"memory = {given.memory}",
        "vcpus = 1",
        f'kernel = "{kernel}/vmlinuz"',
        f'ramdisk = "{kernel}/initrd.img"',
        f'extra = "console=hvc0 {root} {given.kernel_arguments}"',
        f'vif = ["bridge={given.bridge},mac={given.mac}"]',
        'on_poweroff = "destroy"',
        'on_reboot = "destroy"',
        'on_crash = "destroy"',
    ]
    disks = [f"format=raw,vdev=xvda,access=w,target={given.image}"] if name != NINEP else []
    if name == FULL:
        for side in chosen(given):
            if side.how == DISK:
                backend = "backendtype=qdisk," if side.served == "qemu" else ""
                disks.append(f"format=raw,vdev={side.device},access=w,{backend}target={given.disk(side.name)}")
    if disks:
        lines.append(f"disk = {json.dumps(disks)}")
    if name == FILES or (name == FULL and "theirs" in given.sides):
        lines.append(f'p9 = ["tag=theirs,security_model=none,path={given.area}/theirs"]')
    return "\n".join(lines) + "\n"
