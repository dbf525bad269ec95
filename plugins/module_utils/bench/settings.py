"""The names and paths of one benchmark run, from the variables of roles/bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Guests of our own: the one with its root on 9P, its twin on a block device, and those that work with files.
NINEP, BLOCK, FILES, FULL = "bench-9p", "bench-blk", "bench-io", "bench-full"


@dataclass(frozen=True)
class Settings:
    """*memory* is in MiB, *image_size* in MiB, *timeout* in seconds; *msize* and *root_msize* in bytes.

    *root_cache* is what the policy says of caching for the root.

    Of the full benchmark: *caching* is v9fs's cache mode of the caching side, *file_mib* the size of a file that is
    read, *section_seconds* the most that one of fio's sections may take, *small_files* how many are created;
    *sides* and *groups* what is measured, no groups for all. *client* is where xen9p is installed on the host,
    *source* the folder with its C.
    """

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
    root_cache: dict[str, bool]
    msize: int
    cache: str
    timeout: int
    policy: str
    client: str
    source: str
    caching: str
    file_mib: int
    section_seconds: float
    small_files: int
    sides: list[str]
    groups: list[str]

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
    def content(self) -> Path:
        """What every side of the full benchmark begins with: a subvolume, and an image of it."""
        return self.area / "content"

    def disk(self, side: str) -> Path:
        """The disk of a side that has one: an ext4 file system with that content."""
        return self.area / f"{side}.img"

    @property
    def key(self) -> Path:
        """The ssh key from dom0 to the guests."""
        return self.run / "id_ed25519"

    @property
    def mac(self) -> str:
        """The MAC that belongs to the address."""
        return "00:16:3e:" + ":".join(f"{int(part):02x}" for part in self.address.split(".")[1:])
