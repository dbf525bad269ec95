"""Decide from a manifest of inputs whether a cached artefact may be used again, and if not, why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def digest(inputs: Mapping[str, Any]) -> str:
    """Return 12 hexadecimal digits that name this set of inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def read(directory: Path) -> dict[str, Any] | None:
    """Return the inputs that the artefact in *directory* was made from, None when it is not complete."""
    try:
        inputs = json.loads((directory / MANIFEST).read_text())["inputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return inputs if isinstance(inputs, dict) else None


def write(directory: Path, inputs: Mapping[str, Any], **extra: Any) -> None:
    """Write the manifest: the last thing to be written, so that it vouches for all the rest."""
    partial = directory / (MANIFEST + ".part")
    partial.write_text(json.dumps({"inputs": inputs, **extra}, indent=1, sort_keys=True) + "\n")
    partial.replace(directory / MANIFEST)


def newest(cache: Path, prefix: str) -> dict[str, Any] | None:
    """Return the inputs of the newest complete artefact in *cache* whose directory starts with *prefix*."""
    complete = [d for d in cache.glob(prefix + "*") if (d / MANIFEST).is_file()]
    complete.sort(key=lambda d: (d / MANIFEST).stat().st_mtime, reverse=True)
    return read(complete[0]) if complete else None


def changes(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> list[str]:
    """Say in words which inputs differ: `suite: bookworm -> trixie`, `packages: +fio -strace`."""
    if old is None:
        return ["nothing in the cache yet"]
    return [
        _difference(key, old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]


def _difference(key: str, old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        words = [f"+{item}" for item in new if item not in old] + [f"-{item}" for item in old if item not in new]
        return f"{key}: {' '.join(words) or 'other order'}"
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        return f"{key}: {' '.join(names)}"
    return f"{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
