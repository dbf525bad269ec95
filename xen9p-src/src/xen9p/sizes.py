"""Numbers of bytes as people write them."""

from __future__ import annotations

import re


def parse_size(value: object) -> int | None:
    """Bytes in 4096, "4096", "64K", "1.5G" and the like (powers of 1024); None for what is none."""
    if type(value) is int:
        return value
    found = re.fullmatch(r"(\d{1,19}(?:\.\d{1,6})?)([KMGTP]?)(?:i?B)?", value) if isinstance(value, str) else None
    return int(float(found[1]) * 1024 ** " KMGTP".index(found[2] or " ")) if found else None


def size_text(size: int) -> str:
    """Bytes as parse_size() takes them, exactly."""
    for power, unit in reversed(list(enumerate("KMGTP", 1))):
        if size >= 1024**power and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return str(size)
