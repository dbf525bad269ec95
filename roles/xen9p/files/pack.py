#!/usr/bin/env python3
"""Pack a source tree into one archive that depends on its content alone.

Usage: ``pack.py DIRECTORY``. Prints ``{"digest", "archive"}``; the archive lies in the cache of the
controller, under its digest. Exit status 1 with one line on stderr when there is nothing to pack.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

SKIPPED_FOLDERS = {"__pycache__", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", "build", "dist"}
NOT_INSTALLED = {"tests", "floor"}
SKIPPED_ENDINGS = (".pyc", ".so", ".o", ".egg-info")


def wanted(root: Path) -> list[Path]:
    """Return the files of the package, sorted; what is built or belongs to tests' caches is left out."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_FOLDERS and not f.endswith(SKIPPED_ENDINGS))
        if Path(folder) == root:
            folders[:] = [f for f in folders if f not in NOT_INSTALLED]
        found += [Path(folder) / name for name in sorted(names) if not name.endswith(SKIPPED_ENDINGS)]
    return found


def archive(root: Path) -> bytes:
    """Return an uncompressed tar with owners, times and modes that do not vary."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in wanted(root):
            entry = tarfile.TarInfo(str(path.relative_to(root)))
            content = path.read_bytes()
            entry.size = len(content)
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def main() -> int:
    root = Path(sys.argv[1])
    if not (root / "pyproject.toml").is_file():
        print(f"{root} has no pyproject.toml; set xen9p_source to the folder of the package", file=sys.stderr)
        return 1
    packed = archive(root)
    digest = hashlib.sha256(packed).hexdigest()
    cache = Path(os.environ.get("XEN9P_CACHE") or Path.home() / ".cache" / "xen9p")
    target = cache / f"source-{digest[:12]}.tar.gz"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob("source-*.tar.gz"):
            old.unlink(missing_ok=True)
        partial = target.with_suffix(".part")
        partial.write_bytes(gzip.compress(packed, mtime=0))
        partial.replace(target)
    print(json.dumps({"digest": digest, "archive": str(target)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
