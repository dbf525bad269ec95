#!/usr/bin/python
"""Ansible module: a mounted btrfs with its subvolumes, on a device or in a loop file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: btrfs_store
short_description: Have a btrfs with subvolumes mounted, on a device or in a loop file
description:
  - Formats only what holds no signature of any kind, unless O(force_format) says otherwise.
  - The mount is a systemd mount unit, so it comes back at boot.
options:
  device: {type: path, description: [Block device; exclusive with O(loop_file).]}
  loop_file: {type: path, description: [File that holds the filesystem; made sparse when it is missing.]}
  size: {type: int, default: 20, description: [Size of a new O(loop_file) in GiB.]}
  minimum: {type: int, default: 4, description: [A smaller device or file is refused, GiB.]}
  mount: {type: path, required: true, description: [Where it is mounted.]}
  options: {type: str, default: noatime, description: [Mount options.]}
  subvolumes: {type: list, elements: str, default: [], description: [Names right below the mount.]}
  trees:
    type: list
    elements: str
    default: []
    description:
      - Directories below the mount that later steps make. While any of them is missing, a mounted filesystem
        with less than O(room) free is refused.
  room: {type: int, default: 1024, description: [MiB that have to be free to make O(trees).]}
  checksum:
    type: str
    choices: [crc32c, xxhash, sha256, blake2]
    default: xxhash
    description: [Checksums of a new filesystem; one that is there keeps its own.]
  quotas:
    type: bool
    default: false
    description: [Turn quotas on. With false they are left as they are.]
  force_format:
    type: bool
    default: false
    description: [Format a device that holds something other than btrfs. What it holds is lost.]
author: [xen9p]
"""
EXAMPLES = r"""
- name: Exports live on a disk of their own
  btrfs_store: {device: /dev/vdb, mount: /srv/xen9p, subvolumes: [home]}
"""
RETURN = r"""
actions: {type: list, elements: str, returned: always, description: What was (in check mode, would be) done.}
"""

GIB = 2**30


class StoreError(Exception):
    """One line: what is wrong; what to do."""


def run(*command: str) -> str:
    """Run *command*; its output, or a StoreError that names it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StoreError(f"`{' '.join(command)}` failed: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return done.stdout


@dataclass
class Store:
    """The wanted state; ``converge`` brings it about."""

    source: Path
    is_file: bool
    size: int
    minimum: int
    mount: Path
    options: str
    subvolumes: list[str]
    force: bool
    dry: bool
    trees: list[str] = field(default_factory=list)
    room: int = 0
    checksum: str = "xxhash"
    quotas: bool = False
    actions: list[str] = field(default_factory=list)

    def act(self, words: str) -> bool:
        """Note an action; True if it shall really be done."""
        self.actions.append(words)
        return not self.dry

    def converge(self) -> None:
        mounted = self.mounted_type()
        if mounted not in ("", "btrfs"):
            raise StoreError(f"{self.mount} has a {mounted} mounted; unmount it or choose another store_mount")
        if mounted:
            self.check_mounted_source()
            self.check_room()
        else:
            self.have_source()
            self.have_filesystem()
        if self.dry and self.actions:
            return  # the rest cannot be looked at before the filesystem is there
        self.have_unit()
        if not mounted and self.act(f"mount {self.mount}"):
            self.announce()
            run("systemctl", "enable", "--now", self.unit_name())
            self.check_room()
        for name in self.subvolumes:
            self.have_subvolume(self.mount / name)
        if self.quotas:
            self.have_quotas()

    def mounted_type(self) -> str:
        """Type of what is mounted on the very mount point, "" if nothing is."""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, where, kind, *_ = line.split()
            if where == str(self.mount):
                return kind
        return ""

    def check_mounted_source(self) -> None:
        """Refuse when another filesystem than the configured one is mounted there."""
        if not self.is_file:
            wanted = os.path.realpath(self.source)
            actual = os.path.realpath(run("findmnt", "-no", "SOURCE", str(self.mount)).strip().split("[")[0])
            if wanted != actual:
                raise StoreError(
                    f"{self.mount} is already mounted from {actual}, not from {self.source};"
                    " correct store_device or unmount it"
                )

    def check_room(self) -> None:
        """Refuse a store too full for what is still to be made in it: half of a tree helps nobody."""
        missing = [tree for tree in self.trees if not (self.mount / tree).is_dir()]
        found = os.statvfs(self.mount)
        free = found.f_bavail * found.f_frsize >> 20
        if missing and free < self.room:
            raise StoreError(
                f"the store {self.mount} has {free} MiB free, {self.room} are needed for {', '.join(missing)}:"
                " remove files or take a larger store_device"
            )

    def have_source(self) -> None:
        if self.is_file:
            if not self.source.exists() and self.act(f"make {self.source}, {self.size} GiB, sparse"):
                self.source.parent.mkdir(parents=True, exist_ok=True)
                free = os.statvfs(self.source.parent)
                if free.f_bavail * free.f_frsize < self.minimum * GIB:
                    raise StoreError(
                        f"{self.source.parent} has less than {self.minimum} GiB free; make room or move store_loop_file"
                    )
                with self.source.open("xb") as stream:
                    stream.truncate(self.size * GIB)
                self.source.chmod(0o600)
        elif not self.source.exists():
            raise StoreError(f"{self.source} does not exist; set store_device to one of: {self.free_devices()}")
        elif not self.source.is_block_device():
            raise StoreError(f"{self.source} is no block device; use store_loop_file for a file")

    def free_devices(self) -> str:
        names = run("lsblk", "-dnpo", "NAME,MOUNTPOINTS").splitlines()
        return ", ".join(line.strip() for line in names if len(line.split()) == 1) or "(no free disk)"

    def source_size(self) -> int:
        if self.is_file:
            return self.source.stat().st_size
        return int(run("lsblk", "-bdno", "SIZE", str(self.source)).strip())

    def have_filesystem(self) -> None:
        if not self.source.exists():
            return  # check mode, a loop file that is not made yet
        size = self.source_size()
        if size < self.minimum * GIB:
            raise StoreError(
                f"{self.source} has {size / GIB:.1f} GiB, {self.minimum} are needed; take a larger one"
                " or lower store_minimum"
            )
        signatures = json.loads(run("wipefs", "--json", "--no-act", str(self.source)) or "{}").get("signatures", [])
        kinds = sorted({entry["type"] for entry in signatures})
        if kinds == ["btrfs"]:
            return
        if not self.is_file and (parts := run("lsblk", "-nro", "NAME", str(self.source)).split()[1:]):
            kinds.append(f"partitions {' '.join(parts)}")
        if kinds and not self.force:
            raise StoreError(
                f"{self.source} holds data ({', '.join(kinds)}) and is not touched; take an empty device,"
                " or set store_force_format: true to lose what is there"
            )
        if self.act(f"format {self.source} as btrfs"):
            force = ["--force"] if kinds else []
            run("mkfs.btrfs", "--quiet", "--label", "xen9p", "--csum", self.checksum, *force, str(self.source))

    def announce(self) -> None:
        """Let udev look at the device anew: the mount waits for the link by its UUID."""
        if not self.is_file and shutil.which("udevadm"):
            run("udevadm", "trigger", "--action=change", "--settle", str(self.source))

    def unit_name(self) -> str:
        return run("systemd-escape", "--path", "--suffix=mount", str(self.mount)).strip()

    def have_unit(self) -> None:
        """Write the mount unit; a device by its UUID, because names of disks move."""
        what, options = str(self.source), self.options
        if self.is_file:
            options += ",loop"
        else:
            uuid = run("blkid", "-o", "value", "-s", "UUID", str(self.source)).strip()
            what = f"/dev/disk/by-uuid/{uuid}"
        text = "\n".join(
            [
                "# Written by roles/store: changes are lost.",
                "[Unit]",
                "Description=Store of the xen9p exports",
                "Before=xen9pd.service xendomains.service",
                "",
                "[Mount]",
                f"What={what}",
                f"Where={self.mount}",
                "Type=btrfs",
                f"Options={options}",
                "",
                "[Install]",
                "WantedBy=multi-user.target",
                "",
            ]
        )
        unit = Path("/etc/systemd/system") / self.unit_name()
        if unit.is_file() and unit.read_text() == text:
            return
        if self.act(f"write {unit}"):
            self.mount.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
            unit.chmod(0o644)
            run("systemctl", "daemon-reload")
            run("systemctl", "--quiet", "enable", unit.name)

    def have_subvolume(self, path: Path) -> None:
        if path.is_dir():
            return
        if self.act(f"subvolume {path}"):
            run("btrfs", "--quiet", "subvolume", "create", str(path))

    def have_quotas(self) -> None:
        try:
            run("btrfs", "qgroup", "show", str(self.mount))
        except StoreError:
            if self.act(f"quotas on {self.mount}"):
                run("btrfs", "quota", "enable", str(self.mount))


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "device": {"type": "path"},
            "loop_file": {"type": "path"},
            "size": {"type": "int", "default": 20},
            "minimum": {"type": "int", "default": 4},
            "mount": {"type": "path", "required": True},
            "options": {"type": "str", "default": "noatime"},
            "subvolumes": {"type": "list", "elements": "str", "default": []},
            "trees": {"type": "list", "elements": "str", "default": []},
            "room": {"type": "int", "default": 1024},
            "checksum": {"choices": ["crc32c", "xxhash", "sha256", "blake2"], "default": "xxhash"},
            "quotas": {"type": "bool", "default": False},
            "force_format": {"type": "bool", "default": False},
        },
        mutually_exclusive=[["device", "loop_file"]],
        required_one_of=[["device", "loop_file"]],
        supports_check_mode=True,
    )
    given: dict[str, Any] = module.params
    store = Store(
        source=Path(given["device"] or given["loop_file"]),
        is_file=not given["device"],
        size=given["size"],
        minimum=given["minimum"],
        mount=Path(given["mount"]),
        options=given["options"],
        subvolumes=given["subvolumes"],
        force=given["force_format"],
        dry=module.check_mode,
        trees=given["trees"],
        room=given["room"],
        checksum=given["checksum"],
        quotas=given["quotas"],
    )
    try:
        store.converge()
    except (StoreError, OSError) as error:
        fail(module, str(error), store.actions)
    module.exit_json(changed=bool(store.actions), actions=store.actions)


def fail(module: AnsibleModule, message: str, actions: list[str]) -> NoReturn:
    module.fail_json(msg=f"store: {message}", actions=actions)
    raise SystemExit(1)  # fail_json does not return; this says so to the type checker


if __name__ == "__main__":
    main()
