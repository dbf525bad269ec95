#!/usr/bin/python
"""Ansible module: every guest has its own root tree, identity, kernel and xl configuration."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import subprocess
import uuid
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.guests import client

DOCUMENTATION = r"""
module: guest_trees
short_description: Give every guest its root tree, identity, kernel and xl configuration
description:
  - The root tree is a writable btrfs snapshot of the golden tree, made once and then the guest's own.
  - Identity (names, keys, network, mounts) is written from dom0, never by logging in. A guest's tree may hold
    anything that the guest put there, so no symbolic link in it is ever followed.
options:
  store: {type: path, required: true, description: [Mount point of the store.]}
  boot: {type: path, required: true, description: [Directory of kernels; one folder a golden tree.]}
  state: {type: path, required: true, description: [Directory of what belongs to guests and outlives trees.]}
  golden: {type: str, required: true, description: [Identity of the golden tree.]}
  unpack:
    type: path
    description:
      - The archive of that tree, as M(guest_golden) made it; removed after use. Without it
        the module only says in RV(golden_missing) whether it needs one.
  guests:
    type: list
    elements: dict
    required: true
    description: [The guests to have; others are left alone.]
    suboptions:
      name: {type: str, required: true, description: [Name of the domain.]}
      config: {type: str, required: true, description: [Text of its xl configuration.]}
      files: {type: dict, required: true, description: [Text files of its tree, by path.]}
      autostart: {type: bool, default: true, description: [Whether it starts with the host.]}
  authorized_keys:
    type: list
    elements: str
    default: []
    description: [Public keys that open root's account.]
  host_authorized_keys:
    type: bool
    default: true
    description: [Whether the keys of root in dom0 do so as well.]
  rebuild:
    type: list
    elements: str
    default: []
    description: [Guests whose trees are thrown away and cloned anew. They must be shut down.]
  client:
    type: path
    description: [The prefix of xen9p on this host. The guests get its package and a command C(xen9p).]
author: [xen9p]
"""
EXAMPLES = r"""
- name: One guest
  guest_trees:
    store: /srv/xen9p
    boot: /srv/xen9p/boot
    state: /var/lib/xen9p/guests
    golden: 0123456789ab
    guests: [{name: g1, config: 'name = "g1"', files: {/etc/hostname: g1}}]
"""
RETURN = r"""
golden_missing: {type: bool, returned: always, description: Whether the golden tree has to be brought.}
actions: {type: list, elements: str, returned: always, description: What was (in check mode, would be) done.}
host_keys: {type: dict, returned: always, description: Public ssh host key of each guest.}
"""

# Names a machine without disclosing the host's own id.
NAMESPACE = uuid.UUID("5b7d3d0e-9d5c-4a53-8f0e-6c1f0a2c9b9e")


class TreeError(Exception):
    """One line: what is wrong; what to do."""


def run(*command: str) -> str:
    """Run *command*; its output, or a TreeError that names it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise TreeError(f"`{' '.join(command)}` failed: {words[-1]}")
    return done.stdout


class Beneath:
    """Files below a directory whose content is not trusted: no link in a path is followed."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _parent(self, path: str, create: bool) -> tuple[int, str]:
        """Descriptor of the directory of *path* (the caller closes it) and the last name."""
        *folders, name = [part for part in path.split("/") if part]
        here = os.open(self.root, os.O_DIRECTORY | os.O_NOFOLLOW)
        for folder in folders:
            try:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, 0o755, dir_fd=here)
                below = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            except OSError as error:
                os.close(here)
                if isinstance(error, FileNotFoundError):
                    raise
                raise TreeError(
                    f"{self.root}: '{folder}' in {path} is no directory; the guest changed it, put it right or rebuild"
                ) from error
            os.close(here)
            here = below
        return here, name

    def same(self, path: str, content: bytes, mode: int) -> bool:
        """Whether *path* is a regular file with this content and mode."""
        try:
            parent, name = self._parent(path, create=False)
        except FileNotFoundError:
            return False
        try:
            # O_NONBLOCK: a FIFO that the guest put there must not stop us.
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
        except OSError:
            return False
        finally:
            os.close(parent)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or stat.S_IMODE(found.st_mode) != mode:
                return False
            return found.st_size == len(content) and os.read(handle, len(content) + 1) == content
        finally:
            os.close(handle)

    def names(self, path: str) -> set[str]:
        """Names in the directory *path*; none if there is no such directory."""
        try:
            folder, _ = self._parent(f"{path}/-", create=False)
        except FileNotFoundError:
            return set()
        try:
            return set(os.listdir(folder))
        finally:
            os.close(folder)

    def write(self, path: str, content: bytes, mode: int) -> None:
        """Replace whatever *path* is (but no directory) by a regular file of root's."""
        parent, name = self._parent(path, create=True)
        partial = f".{name}.{secrets.token_hex(8)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            handle = os.open(partial, flags, 0o600, dir_fd=parent)
            try:
                os.fchmod(handle, mode)
                os.write(handle, content)
            finally:
                os.close(handle)
            os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            os.close(parent)


class Trees:
    """Golden tree and clones in one store."""

    def __init__(self, given: dict[str, Any], dry: bool) -> None:
        self.store = Path(given["store"])
        self.boot = Path(given["boot"])
        self.state = Path(given["state"])
        self.identity: str = given["golden"]
        self.golden = self.store / "golden" / self.identity
        self.kernel = self.boot / self.identity
        self.keys = authorized_keys(given["authorized_keys"], given["host_authorized_keys"])
        self.client = client.files(Path(given["client"])) if given.get("client") else {}
        self.dry = dry
        self.actions: list[str] = []
        self.host_keys: dict[str, str] = {}

    def act(self, words: str) -> bool:
        """Note an action; True if it shall really be done."""
        self.actions.append(words)
        return not self.dry

    def golden_missing(self) -> bool:
        return not (self.golden.is_dir() and (self.kernel / "vmlinuz").is_file())

    def unpack(self, bundle: Path) -> None:
        """Make the golden tree read-only in one last step: what is half done is never taken for whole."""
        if self.golden_missing() and self.act(f"golden tree {self.identity}"):
            self.kernel.mkdir(parents=True, exist_ok=True)
            run("tar", "--extract", f"--file={bundle}", f"--directory={self.kernel}", "--no-same-owner")
            archive = self.kernel / "root.tar.zst"
            # A golden tree that is there stays, kernel lost or not: the guests share their blocks with it.
            if not self.golden.is_dir():
                self._grow(archive)
            archive.unlink()
        if not self.dry:
            bundle.unlink(missing_ok=True)

    def _grow(self, archive: Path) -> None:
        partial = self.golden.with_suffix(".part")
        if partial.is_dir():
            run("btrfs", "--quiet", "subvolume", "delete", str(partial))
        run("btrfs", "--quiet", "subvolume", "create", str(partial))
        kept = ("--numeric-owner", "--preserve-permissions")
        run("tar", "--extract", "--zstd", *kept, f"--file={archive}", f"--directory={partial}")
        run("btrfs", "property", "set", str(partial), "ro", "true")
        partial.rename(self.golden)

    def clone(self, name: str, rebuild: bool) -> None:
        tree = self.store / "guests" / name
        link = self.boot / name
        if rebuild and tree.exists() and self.act(f"throw away the tree of {name}"):
            run("btrfs", "--quiet", "subvolume", "delete", str(tree))
        if not tree.exists() and self.act(f"clone the golden tree for {name}"):
            partial = tree.with_suffix(".part")
            if partial.exists():
                run("btrfs", "--quiet", "subvolume", "delete", str(partial))
            run("btrfs", "--quiet", "subvolume", "snapshot", str(self.golden), str(partial))
            self._link(link)
            partial.rename(tree)
        elif not link.exists() and tree.exists():
            self._give_kernel(name, tree, link)

    def _give_kernel(self, name: str, tree: Path, link: Path) -> None:
        """A store that outlived its host's disk: the golden tree's kernel will do if the guest has its modules."""
        modules = Beneath(self.golden).names("/usr/lib/modules")
        if not modules & Beneath(tree).names("/usr/lib/modules"):
            again = f'run again with -e \'{{"guest_rebuild": ["{name}"]}}\' to clone it anew'
            raise TreeError(
                f"{name} has a tree, and its kernel is lost; it has no modules for the golden tree's "
                f"({', '.join(sorted(modules))}): {again}"
            )
        if self.act(f"give {name} its kernel back"):
            self._link(link)

    def _link(self, link: Path) -> None:
        """The guest keeps the kernel that its modules belong to, whatever comes after."""
        link.unlink(missing_ok=True)
        link.symlink_to(self.identity)

    def host_key(self, name: str) -> dict[str, tuple[str, int]]:
        """The guest's ssh host key, made once and kept outside the tree."""
        folder = self.state / name
        key = folder / "ssh_host_ed25519_key"
        # ssh-keygen writes the public half last: without it the pair may be half a pair.
        if not (key.is_file() and key.with_suffix(".pub").is_file()):
            if not self.act(f"ssh host key of {name}"):
                return {}
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for half in (key, key.with_suffix(".pub")):
                half.unlink(missing_ok=True)
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(key))
        public = key.with_suffix(".pub").read_text()
        self.host_keys[name] = public.strip()
        return {
            "/etc/ssh/ssh_host_ed25519_key": (key.read_text(), 0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": (public, 0o644),
        }

    def identify(self, name: str, files: dict[str, str]) -> None:
        host = Path("/etc/machine-id").read_text().strip()
        machine = uuid.uuid5(NAMESPACE, f"{host}/{name}").hex
        wanted = {path: (text, 0o644) for path, text in files.items()}
        wanted["/root/.ssh/authorized_keys"] = (self.keys, 0o600)
        wanted["/etc/machine-id"] = (machine + "\n", 0o444)
        wanted["/etc/resolv.conf"] = (resolver(), 0o644)
        wanted |= self.host_key(name)
        tree = Beneath(self.store / "guests" / name)
        for path, (text, mode) in wanted.items():
            if tree.root.is_dir() and tree.same(path, text.encode(), mode):
                continue
            if self.act(f"{name}: {path}"):
                tree.write(path, text.encode(), mode)

    def install_client(self, name: str) -> None:
        """Give the guest the host's xen9p: both are the same Debian, so the compiled part fits."""
        tree = Beneath(self.store / "guests" / name)
        missing = [
            path
            for path, (content, mode) in self.client.items()
            if not (tree.root.is_dir() and tree.same(path, content, mode))
        ]
        if missing and self.act(f"{name}: xen9p ({len(missing)} files)"):
            for path in missing:
                tree.write(path, *self.client[path])

    def configure(self, name: str, config: str, autostart: bool) -> None:
        path = Path("/etc/xen") / f"{name}.cfg"
        if not (path.is_file() and path.read_text() == config) and self.act(f"write {path}"):
            path.write_text(config)
            path.chmod(0o644)
        link = Path("/etc/xen/auto") / path.name
        right = link.is_symlink() and os.readlink(link) == f"../{path.name}"
        if autostart and not right and self.act(f"start {name} with the host"):
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(f"../{path.name}")
        if not autostart and link.is_symlink() and self.act(f"do not start {name} with the host"):
            link.unlink()


def resolver() -> str:
    """The host's own name servers, as a guest behind it can use them."""
    stub, real = Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")
    text = (real if real.is_file() else stub).read_text() if stub.exists() or real.is_file() else ""
    kept = [line for line in text.splitlines() if line.startswith(("nameserver", "search")) and " 127." not in line]
    return "".join(f"{line}\n" for line in kept)


def authorized_keys(given: list[str], with_hosts: bool) -> str:
    """Text of the guests' authorized_keys: the given keys, then those of root in dom0."""
    hosts = Path("/root/.ssh/authorized_keys")
    more = hosts.read_text().splitlines() if with_hosts and hosts.is_file() else []
    return "".join(f"{key}\n" for key in dict.fromkeys([*given, *more]) if key.strip())


def running() -> set[str]:
    return {line.split()[0] for line in run("xl", "list").splitlines()[1:]}


def main() -> None:
    """Run the module."""
    guest_options: dict[str, Any] = {
        "name": {"type": "str", "required": True},
        "config": {"type": "str", "required": True},
        "files": {"type": "dict", "required": True},
        "autostart": {"type": "bool", "default": True},
    }
    module = AnsibleModule(
        argument_spec={
            "store": {"type": "path", "required": True},
            "boot": {"type": "path", "required": True},
            "state": {"type": "path", "required": True},
            "golden": {"type": "str", "required": True},
            "unpack": {"type": "path"},
            "guests": {"type": "list", "elements": "dict", "required": True, "options": guest_options},
            "authorized_keys": {"type": "list", "elements": "str", "default": [], "no_log": False},
            "host_authorized_keys": {"type": "bool", "default": True, "no_log": False},
            "rebuild": {"type": "list", "elements": "str", "default": []},
            "client": {"type": "path"},
        },
        supports_check_mode=True,
    )
    given: dict[str, Any] = module.params
    trees = Trees(given, module.check_mode)
    missing = False
    try:
        if alive := sorted(set(given["rebuild"]) & running() if given["rebuild"] else set()):
            raise TreeError(f"{', '.join(alive)} runs and cannot be rebuilt; first: xl shutdown {alive[0]}")
        if given["unpack"]:
            trees.unpack(Path(given["unpack"]))
        missing = trees.golden_missing()
        if not missing:
            for guest in given["guests"]:
                trees.clone(guest["name"], guest["name"] in given["rebuild"])
                trees.identify(guest["name"], guest["files"])
                trees.install_client(guest["name"])
                trees.configure(guest["name"], guest["config"], guest["autostart"])
    except (TreeError, OSError) as error:
        module.fail_json(msg=f"guests: {error}", actions=trees.actions)
    module.exit_json(
        changed=bool(trees.actions),
        golden_missing=missing,
        actions=trees.actions,
        host_keys=trees.host_keys,
    )


if __name__ == "__main__":
    main()
