"""Is this machine fit to run the testbed? Each thing that is missing is one line with its remedy."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

TOOLS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
    "zstd": "zstd",
}
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def problems(
    *, memory_mib: int, disk_gib: float, directories: Sequence[Path], port: int | None, needs_root: bool
) -> Iterator[str]:
    """Yield what stands in the way. *port* is None when our own machine holds it already.

    *memory_mib* MiB have to be available, *disk_gib* GiB free in each of *directories*.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        yield f"the testbed runs on Linux on amd64, not on {platform.system()} on {platform.machine()}"
        return
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{_SBIN}") is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        yield f"{', '.join(missing)} not found: run `make lab`, or `apt install {packages}`"
    if needs_root and os.geteuid() != 0 and shutil.which("sudo") is None:
        yield "building the images needs root: install sudo, or run as root"
    available = available_memory()
    if available is not None and available < memory_mib:
        yield (
            f"{available} MiB of memory are available, {memory_mib} are needed: "
            "end other programs, or lower testbed_memory"
        )
    for directory in directories:
        free = free_space(directory)
        if free < disk_gib:
            yield (
                f"{free:.1f} GiB are free in {directory}, {disk_gib:.0f} are needed: make room, "
                "or set testbed_cache_dir (XEN9P_CACHE) and testbed_state_dir to another disk"
            )
    if port is not None and not port_free(port):
        yield f"port {port} of 127.0.0.1 is in use: end what holds it, or set testbed_ssh_port to another"


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return MemAvailable in MiB, None when the kernel does not tell."""
    try:
        text = meminfo.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return None


def free_space(directory: Path) -> float:
    """Return the GiB that an ordinary user may still write in *directory*, which need not exist yet."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free / 2**30


def port_free(port: int) -> bool:
    """Tell whether a server could listen on *port* of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno not in {errno.EADDRINUSE, errno.EACCES}
    return True
