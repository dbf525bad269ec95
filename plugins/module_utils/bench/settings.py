"""The names and paths of one benchmark run, from the variables of roles/bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Guests of our own: the one with its root on 9P, its twin on a block device, and the one that works with files.
NINEP, BLOCK, FILES = "bench-9p", "bench-blk", "bench-io"


@dataclass(frozen=True)
class Settings:
    """*memory* is in MiB, *image_size* in MiB, *timeout* in seconds; *msize* and *root_msize* in bytes."""

    store: str
    boot: str
    golden: str
    address: str
    prefix: int
    gateway: str
    bridge: str
    memory: int
    image_size: int
    kernel_arguments: str
    root_options: str
    root_msize: int
    msize: int
    cache: str
    timeout: int
    policy: str

    @property
    def area(self) -> Path:
        """Everything on the store."""
        return Path(self.store) / "bench"

    @property
    def run(self) -> Path:
        """Everything that is not on the store."""
        return Path("/run/xen9p-bench")

    @property
    def seed(self) -> Path:
        """The tree that both roots are copies of."""
        return self.area / "seed"

    @property
    def root(self) -> Path:
        """The root that is served over 9P: a snapshot of the seed."""
        return self.area / "root"

    @property
    def image_seed(self) -> Path:
        """The seed as an ext4 file system in a file."""
        return self.area / "seed.img"

    @property
    def image(self) -> Path:
        """The block device of the twin: a copy of the image that shares its blocks."""
        return self.area / "twin.img"

    @property
    def key(self) -> Path:
        """The ssh key from dom0 to the guests."""
        return self.run / "id_ed25519"

    @property
    def mac(self) -> str:
        """The MAC that belongs to the address."""
        return "00:16:3e:" + ":".join(f"{int(part):02x}" for part in self.address.split(".")[1:])
