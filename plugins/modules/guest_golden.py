#!/usr/bin/python
"""Ansible module: build the golden tree of the guests with its kernel and initramfs, or find it in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testbed import image, lock, machine, manifest
from ansible.module_utils.testbed import mirror as archives
from ansible.module_utils.testbed.errors import TestbedError
from ansible.module_utils.testbed.progress import Progress

DOCUMENTATION = r"""
module: guest_golden
short_description: Build the golden root tree of the guests, or find it in the cache
description:
  - Runs mmdebstrap on the controller, with the hook C(customize.sh) of the given folder.
  - The result is a directory with C(golden.tar) (root.tar.zst, vmlinuz, initrd.img) and C(kernel-version), named
    by a hash of its inputs; a manifest beside them says what they were.
  - Building needs root, looking (check mode) does not; the result belongs to the owner of the cache.
  - On a miss, check mode fails if the controller lacks what a build needs.
options:
  cache_dir: {type: path, required: true, description: [Where golden trees are kept.]}
  files: {type: path, required: true, description: [The folder with customize.sh and what it uses.]}
  progress: {type: path, description: [A file that always holds the step under way.]}
  suite: {type: str, required: true, description: [The Debian release.]}
  mirror:
    type: str
    default: ""
    description: [The archive to use; empty for the controller's own.]
  packages: {type: list, elements: str, required: true, description: [What is installed.]}
  kernel_modules: {type: list, elements: str, required: true, description: [Kernel modules of the tree.]}
author: [xen9p]
"""
EXAMPLES = r"""
- name: Look into the cache
  guest_golden:
    cache_dir: /var/cache/xen9p
    files: "{{ role_path }}/files/golden"
    suite: bookworm
    packages: [systemd-sysv, openssh-server]
    kernel_modules: [9p, 9pnet_xen]
"""
RETURN = r"""
cached: {type: bool, returned: always, description: Whether it was there already.}
identity: {type: str, returned: always, description: Twelve hexadecimal digits that name the inputs.}
directory: {type: str, returned: always, description: Where the result is or will be.}
kernel: {type: str, returned: always, description: Version of the kernel, empty in check mode on a miss.}
note: {type: str, returned: always, description: Which inputs changed.}
"""

TOOLS = {"mmdebstrap": "mmdebstrap", "zstd": "zstd", "dpkg-deb": "dpkg", "apt-get": "apt"}
FREE_MIB = 2048
PREFIX = "golden-"
MERGED_USR = Path("/usr/share/mmdebstrap/hooks/merged-usr")
# Documentation and translations would double the tree; hwdb.d describes hardware no PV guest has.
EXCLUDED = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
    "/usr/share/bash-completion/*",
    "/usr/lib/udev/hwdb.d/*",
    "/lib/udev/hwdb.d/*",
)


def file_hashes(folder: Path) -> dict[str, str]:
    """Return path below *folder* -> digest of content and executable bit, for every file."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            executable = bool(path.stat().st_mode & 0o100)
            content = f"{executable}\n".encode() + path.read_bytes()
            hashes[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()[:16]
    return hashes


def search_path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def check_controller(cache: Path) -> None:
    """Refuse, before anything is changed, what would fail in the middle."""
    missing = sorted(package for tool, package in TOOLS.items() if not shutil.which(tool, path=search_path()))
    if missing:
        packages = " ".join(missing)
        raise TestbedError(f"the controller lacks {packages}; run: apt-get install {packages}")
    free = int(machine.free_space(cache) * 1024)
    if free < FREE_MIB:
        raise TestbedError(
            f"{cache} has {free} MiB free and the guests' tree needs {FREE_MIB}; make room or set XEN9P_CACHE"
        )


def mmdebstrap(inputs: dict[str, Any], sources: Sequence[str], files: Path, out: Path) -> list[str]:
    """Return the command that writes root.tar.zst into *out*; the hook writes the rest."""
    return [
        "mmdebstrap",
        "--mode=root",
        "--variant=apt",
        # Merged from the start, so that usr-is-merged can stand in for usrmerge and all its Perl.
        f"--hook-dir={MERGED_USR}",
        f"--include={','.join(inputs['packages'])}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED),
        '--aptopt=APT::Install-Recommends "false"',
        f'--customize-hook={files}/customize.sh "$1"',
        inputs["suite"],
        str(out / "root.tar.zst"),
        *sources,
    ]


def build(inputs: dict[str, Any], sources: Sequence[str], files: Path, out: Path, progress: Progress) -> None:
    """Run mmdebstrap into the empty directory *out*."""
    environment = os.environ | {
        "GOLDEN_FILES": str(files),
        "GOLDEN_OUT": str(out),
        "GOLDEN_MODULES": " ".join(inputs["kernel_modules"]),
        "PATH": search_path(),
        "TMPDIR": str(out),
        "LC_ALL": "C.UTF-8",
    }
    log = out.parent / "golden-build.log"
    began = time.monotonic()
    with (
        log.open("wb") as stream,
        subprocess.Popen(
            mmdebstrap(inputs, sources, files, out),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=image.die_with_parent,  # noqa: PLW1509 - a module of Ansible has one thread
        ) as process,
    ):
        while process.poll() is None:
            progress.show(f"guests' golden tree: {time.monotonic() - began:.0f} s, {last_line(log)}")
            time.sleep(1)
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        telling = [line for line in lines if line.startswith("E:") or "rror" in line] or lines or ["no output"]
        raise TestbedError(f"mmdebstrap failed: {telling[-1].strip()}; the whole log is in {log}")


def bundle(out: Path) -> None:
    """Put all parts into one file: each file that is copied to a host costs seconds."""
    parts = ["vmlinuz", "initrd.img", "root.tar.zst"]
    subprocess.run(["tar", "--create", f"--file={out}/golden.tar", f"--directory={out}", *parts], check=True)
    for part in parts:
        (out / part).unlink()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("I: ")]
    return lines[-1][3:].split(":")[0] if lines else "starting"


def sweep(cache: Path) -> None:
    """Remove what interrupted builds left behind: it is thrown away, never reused."""
    for leftover in cache.glob(f"{PREFIX}*"):
        if leftover.is_dir() and (leftover.suffix == ".part" or manifest.read(leftover) is None):
            image.remove(leftover)


def provide(target: Path, inputs: dict[str, Any], sources: Sequence[str], files: Path, progress: Progress) -> bool:
    """Build *target* unless it is complete; True when it was built. Two runs at once wait for each other."""
    cache = target.parent
    cache.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        raise TestbedError("building the guests' tree needs root (device nodes, owners): run it as root or with sudo")
    check_controller(cache)
    with lock.exclusive(cache / "golden.lock", lambda: progress.show("waiting for another build to end")):
        if manifest.read(target) is not None:
            return False
        sweep(cache)
        work = target.with_suffix(".part")
        work.mkdir()
        build(inputs, sources, files, work, progress)
        bundle(work)
        manifest.write(work, inputs)
        owner = cache.stat()
        for path in (work, *work.iterdir()):
            os.chown(path, owner.st_uid, owner.st_gid)
        work.rename(target)
        return True


def described(given: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides what is in the tree: where it comes from does not, by intent."""
    return {
        "format": 2,
        "suite": given["suite"],
        "packages": sorted(set(given["packages"])),
        "kernel_modules": sorted(set(given["kernel_modules"])),
        "files": file_hashes(Path(given["files"])),
    }


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "cache_dir": {"type": "path", "required": True},
            "files": {"type": "path", "required": True},
            "progress": {"type": "path"},
            "suite": {"type": "str", "required": True},
            "mirror": {"type": "str", "default": ""},
            "packages": {"type": "list", "elements": "str", "required": True},
            "kernel_modules": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    given = module.params
    cache, files = Path(given["cache_dir"]), Path(given["files"])
    inputs = described(given)
    identity = manifest.digest(inputs)
    target = cache / f"{PREFIX}{identity}"
    missing = manifest.read(target) is None
    note = ""
    built = missing
    progress = Progress(Path(given["progress"]) if given["progress"] else None)
    if missing:
        note = "; ".join(manifest.changes(manifest.newest(cache, PREFIX), inputs))
    if missing:
        try:
            if module.check_mode:
                check_controller(cache)
            else:
                progress.step("guests' golden tree")
                built = provide(target, inputs, archives.sources(given["suite"], given["mirror"]), files, progress)
        except (TestbedError, OSError) as error:
            module.fail_json(msg=f"{error}")
        finally:
            progress.done()
    version = target / "kernel-version"
    module.exit_json(
        changed=built,
        cached=not missing,
        identity=identity,
        directory=str(target),
        kernel=version.read_text().strip() if version.is_file() else "",
        note=note,
    )


if __name__ == "__main__":
    main()
