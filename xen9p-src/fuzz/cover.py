"""Which edges of the C data plane have run. Without a build that counts, nothing is ever new."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
VARIABLE = "XEN9P_FUZZ_COVER"
"""The environment variable that names the library made from cover.c."""


def build(folder: Path) -> Path:
    """Compiles cover.c into a folder; the library.

    Raises:
        subprocess.CalledProcessError: gcc said no.
    """
    library = folder / "libcover.so"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-O2", "-fPIC", "-shared", "-o", library, HERE / "cover.c"], check=True)
    return library


class Cover:
    """Loads the library, which must come before the data plane."""

    def __init__(self) -> None:
        path = os.environ.get(VARIABLE)
        self._library = ctypes.CDLL(path, ctypes.RTLD_GLOBAL) if path else None

    def take(self) -> int:
        """How many edges are new since the last call."""
        return int(self._library.cover_take()) if self._library else 0

    def total(self) -> int:
        """How many edges have run since the start."""
        return int(self._library.cover_total()) if self._library else 0
