"""A line on a terminal that says how far something is: if it takes long, not too often, and gone at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Final

AFTER: Final = 1.0  # seconds until it is shown
EVERY: Final = 0.2


class Meter:
    """Such a line, on standard error. A context; without a terminal, or if quiet, it shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.shows = not quiet and sys.stderr.isatty()
        self._began = time.monotonic()
        self._next = self._began + AFTER
        self._shown = False

    def show(self, text: Callable[[float], str]) -> None:
        """Shows text(seconds since the beginning), if it is time to."""
        now = time.monotonic()
        if self.shows and now >= self._next:
            self._next = now + EVERY
            self._shown = True
            print(f"\r\x1b[K{text(now - self._began)}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
