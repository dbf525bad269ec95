"""Keys, seed disk, ssh config and inventory: what lets people and tools into the host and its guests."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import TestbedError

KEY = "id_ed25519"
HOST_KEY = "host_ed25519"


def make_keys(state_dir: Path) -> bool:
    """Make the lab's own key pair and the host's key if they are missing; tell whether any was made."""
    made = False
    state_dir.mkdir(parents=True, exist_ok=True)
    for name in (KEY, HOST_KEY):
        path = state_dir / name
        if path.exists() and path.with_suffix(".pub").exists():
            continue
        path.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "xen9p-lab", "-f", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise TestbedError("ssh-keygen is not installed: run `make lab`, or apt install openssh-client") from error
        if done.returncode != 0:
            raise TestbedError(f"ssh-keygen failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
        made = True
    return made


def make_seed(state_dir: Path) -> bytes:
    """Return the tar archive that the host unpacks at boot: its own key, and whom it lets in.

    Padded to 1 MiB: a disk must not end within the archive's last record.
    """
    files = {
        "etc/ssh/ssh_host_ed25519_key": (state_dir / HOST_KEY).read_bytes(),
        "etc/ssh/ssh_host_ed25519_key.pub": (state_dir / f"{HOST_KEY}.pub").read_bytes(),
        "root/.ssh/authorized_keys": (state_dir / f"{KEY}.pub").read_bytes(),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("root/.ssh")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o700
        archive.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644 if name.endswith(".pub") else 0o600
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue().ljust(1 << 20, b"\0")


def write_all(state_dir: Path, port: int, guests: Sequence[Mapping[str, str]]) -> bool:
    """Bring every file by which the lab is reached up to date; tell whether any changed."""
    changed = make_keys(state_dir)
    files: dict[str, bytes] = {
        "seed.tar": make_seed(state_dir),
        "known_hosts": known_hosts(state_dir, port).encode(),
        "ssh_config": ssh_config(state_dir, port, guests).encode(),
        "inventory/hosts.yml": inventory(state_dir, guests).encode(),
    }
    for name, content in files.items():
        changed |= write_if_changed(state_dir / name, content)
    return changed


def known_hosts(state_dir: Path, port: int) -> str:
    """Return the line by which ssh knows the host, so that nobody has to trust it at first sight."""
    algorithm, key = (state_dir / f"{HOST_KEY}.pub").read_text().split()[:2]
    return f"[127.0.0.1]:{port} {algorithm} {key}\n"


def ssh_config(state_dir: Path, port: int, guests: Sequence[Mapping[str, str]]) -> str:
    """Return an ssh config in which `host` and every guest's name just work."""
    common = [
        "User root",
        f"IdentityFile {state_dir / KEY}",
        "IdentitiesOnly yes",
        "PreferredAuthentications publickey",
        # The default key exchange takes seconds under emulation.
        "KexAlgorithms curve25519-sha256",
        "GSSAPIAuthentication no",
        "ServerAliveInterval 15",
        "ServerAliveCountMax 8",
        "ConnectTimeout 30",
        "LogLevel ERROR",
    ]
    host = ["HostName 127.0.0.1", f"Port {port}", f"UserKnownHostsFile {state_dir / 'known_hosts'}"]
    blocks = [_block("host", [*host, "StrictHostKeyChecking yes", *common])]
    for guest in guests:
        # A guest is a fresh clone each time, on a network inside the host: its key says nothing.
        lines = [f"HostName {guest['address']}", "ProxyJump host", "UserKnownHostsFile /dev/null"]
        blocks.append(_block(guest["name"], [*lines, "StrictHostKeyChecking no", *common]))
    return "\n".join(blocks)


def inventory(state_dir: Path, guests: Sequence[Mapping[str, str]]) -> str:
    """Return an inventory with literal values only: some tools read it without rendering templates."""
    arguments = f"ansible_ssh_common_args: '-F {state_dir / 'ssh_config'}'"
    lines = ["---", "# Written by roles/testbed: changes are lost.", "all:", "  children:"]
    lines += ["    xen_hosts:", "      hosts:", "        host:", f"          {arguments}"]
    lines += ["          ansible_python_interpreter: /usr/bin/python3"]
    if guests:
        lines += ["    guests:", "      hosts:"]
        for guest in guests:
            lines += [f"        {guest['name']}:", f"          {arguments}"]
            lines += ["          ansible_python_interpreter: /usr/bin/python3"]
    return "\n".join(lines) + "\n"


def write_if_changed(path: Path, content: bytes, mode: int = 0o600) -> bool:
    """Write *content* to *path* unless that is what it holds; tell whether it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_bytes() == content:
        return False
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(content)
    partial.chmod(mode)
    partial.replace(path)
    return True


def _block(name: str, lines: Sequence[str]) -> str:
    return f"Host {name}\n" + "".join(f"    {line}\n" for line in lines)
