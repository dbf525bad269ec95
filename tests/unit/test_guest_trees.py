"""A guest's tree may hold anything that the guest put there: dom0 never follows, waits or writes elsewhere."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import modules


@pytest.fixture(scope="module")
def trees() -> ModuleType:
    return modules.load("guest_trees")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty tree, with something of dom0's beside it."""
    (tmp_path / "dom0").mkdir()
    (tmp_path / "dom0" / "secret").write_text("dom0's own\n")
    (tmp_path / "tree").mkdir()
    return tmp_path / "tree"


def test_files_are_written_with_their_folders(trees: ModuleType, root: Path) -> None:
    beneath = trees.Beneath(root)
    assert beneath.same("/root/.ssh/authorized_keys", b"key\n", 0o600) is False
    beneath.write("/root/.ssh/authorized_keys", b"key\n", 0o600)
    assert beneath.same("/root/.ssh/authorized_keys", b"key\n", 0o600) is True
    assert beneath.same("/root/.ssh/authorized_keys", b"key\n", 0o644) is False
    assert beneath.same("/root/.ssh/authorized_keys", b"other", 0o600) is False
    assert [path.name for path in (root / "root/.ssh").iterdir()] == ["authorized_keys"]


@pytest.mark.parametrize("target", ["../dom0", "/etc"])
def test_a_folder_that_is_a_link_is_refused_in_one_line(trees: ModuleType, root: Path, target: str) -> None:
    (root / "etc").symlink_to(target)
    beneath = trees.Beneath(root)
    for step in (beneath.write, beneath.same):
        with pytest.raises(trees.TreeError, match="'etc' in /etc/secret is no directory") as caught:
            step("/etc/secret", b"x", 0o644)
        assert "\n" not in str(caught.value)
    assert (root.parent / "dom0" / "secret").read_text() == "dom0's own\n"


def test_a_file_that_is_a_link_is_replaced_not_followed(trees: ModuleType, root: Path) -> None:
    (root / "hostname").symlink_to("../dom0/secret")
    beneath = trees.Beneath(root)
    assert beneath.same("/hostname", b"dom0's own\n", 0o644) is False
    beneath.write("/hostname", b"g1\n", 0o644)
    assert not (root / "hostname").is_symlink()
    assert (root / "hostname").read_text() == "g1\n"
    assert (root.parent / "dom0" / "secret").read_text() == "dom0's own\n"


def test_a_fifo_stops_nobody(trees: ModuleType, root: Path) -> None:
    os.mkfifo(root / "hostname")
    beneath = trees.Beneath(root)
    assert beneath.same("/hostname", b"g1\n", 0o644) is False
    beneath.write("/hostname", b"g1\n", 0o644)
    assert stat.S_ISREG((root / "hostname").lstat().st_mode)


def test_a_fifo_as_a_folder_is_refused(trees: ModuleType, root: Path) -> None:
    os.mkfifo(root / "etc")
    with pytest.raises(trees.TreeError, match="is no directory"):
        trees.Beneath(root).write("/etc/hostname", b"g1\n", 0o644)


def test_a_directory_in_the_place_of_a_file_is_an_error_not_a_loop(trees: ModuleType, root: Path) -> None:
    (root / "hostname").mkdir()
    beneath = trees.Beneath(root)
    assert beneath.same("/hostname", b"g1\n", 0o644) is False
    with pytest.raises(OSError, match="hostname"):
        beneath.write("/hostname", b"g1\n", 0o644)


def given(folder: Path) -> dict[str, Any]:
    paths = {name: str(folder / name) for name in ("store", "boot", "state")}
    return {**paths, "golden": "0123456789ab", "authorized_keys": [], "host_authorized_keys": False}


@pytest.mark.parametrize("lost", ["ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"])
def test_half_a_host_key_is_made_anew(trees: ModuleType, tmp_path: Path, lost: str) -> None:
    first = trees.Trees(given(tmp_path), dry=False).host_key("g1")
    again = trees.Trees(given(tmp_path), dry=False)
    assert again.host_key("g1") == first
    assert again.actions == []
    (tmp_path / "state" / "g1" / lost).unlink()
    repaired = trees.Trees(given(tmp_path), dry=False)
    pair = repaired.host_key("g1")
    assert repaired.actions == ["ssh host key of g1"]
    key = tmp_path / "state" / "g1" / "ssh_host_ed25519_key"
    derived = subprocess.run(["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True).stdout
    assert pair["/etc/ssh/ssh_host_ed25519_key.pub"][0].split()[:2] == derived.split()[:2]


def test_a_guest_gets_the_hosts_xen9p(trees: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "opt/lib/python3.11/site-packages/xen9p"
    (package / "transport").mkdir(parents=True)
    (package / "__pycache__").mkdir()
    for name in ("cli.py", "_dataplane.abi3.so", "transport/memory.py", "__pycache__/cli.pyc"):
        (package / name).write_bytes(name.encode())
    root = tmp_path / "store" / "guests" / "g1"
    root.mkdir(parents=True)
    options = {**given(tmp_path), "client": str(tmp_path / "opt")}
    first = trees.Trees(options, dry=False)
    first.install_client("g1")
    assert first.actions == ["g1: xen9p (4 files)"]
    there = root / "usr/local/lib/python3.11/dist-packages/xen9p"
    assert (there / "transport" / "memory.py").read_bytes() == b"transport/memory.py"
    assert not (there / "__pycache__").exists()
    assert stat.S_IMODE((root / "usr/local/bin/xen9p").stat().st_mode) == 0o755
    (package / "cli.py").write_bytes(b"newer")
    again = trees.Trees(options, dry=False)
    again.install_client("g1")
    assert again.actions == ["g1: xen9p (1 files)"]
    assert (there / "cli.py").read_bytes() == b"newer"
    assert trees.Trees({**given(tmp_path), "client": str(tmp_path / "nowhere")}, dry=False).client == {}


@pytest.fixture
def outlived(tmp_path: Path) -> Path:
    """A store with golden tree and guest whose kernels are lost, and the bundle that has them."""
    for tree in ("golden/0123456789ab", "guests/g1"):
        (tmp_path / "store" / tree / "usr/lib/modules/6.1.0-1").mkdir(parents=True)
    (tmp_path / "store/golden/0123456789ab/old").touch()
    (tmp_path / "vmlinuz").write_text("kernel")
    (tmp_path / "root.tar.zst").write_text("not even an archive: nothing unpacks it")
    command = ["tar", "--create", f"--file={tmp_path}/bundle", f"--directory={tmp_path}", "vmlinuz", "root.tar.zst"]
    subprocess.run(command, check=True)
    return tmp_path


def test_a_store_that_outlived_its_host_gets_its_kernels_back(trees: ModuleType, outlived: Path) -> None:
    again = trees.Trees(given(outlived), dry=False)
    assert again.golden_missing()
    again.unpack(outlived / "bundle")
    assert not again.golden_missing()
    assert (outlived / "store/golden/0123456789ab/old").exists()
    again.clone("g1", rebuild=False)
    assert (outlived / "boot/g1/vmlinuz").read_text() == "kernel"
    assert again.actions == ["golden tree 0123456789ab", "give g1 its kernel back"]
    third = trees.Trees(given(outlived), dry=False)
    third.clone("g1", rebuild=False)
    assert third.actions == []


def test_a_tree_without_the_kernels_modules_is_refused_with_the_remedy(trees: ModuleType, outlived: Path) -> None:
    modules = outlived / "store/guests/g1/usr/lib/modules"
    (modules / "6.1.0-1").rename(modules / "5.10.0-9")
    again = trees.Trees(given(outlived), dry=False)
    again.unpack(outlived / "bundle")
    with pytest.raises(trees.TreeError, match=r"g1 has a tree, and its kernel is lost.*6\.1\.0-1.*guest_rebuild"):
        again.clone("g1", rebuild=False)
    assert not (outlived / "boot/g1").is_symlink()
