"""A one-line progress file, which the playbook's callback shows while a long task runs."""

from __future__ import annotations

import time
from pathlib import Path


class Progress:
    """Writes the step that is under way to *path* (None: nowhere) and remembers how long each step took."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.steps: list[tuple[str, float]] = []
        self._step = ""
        self._began = time.monotonic()

    def step(self, text: str) -> None:
        """Begin a step: the one before it ends here."""
        self.done()
        self._step, self._began = text, time.monotonic()
        self.show(text)

    def show(self, text: str) -> None:
        """Replace the shown line without beginning a new step."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text + "\n")
        except OSError:
            self.path = None  # progress is a courtesy: never fail because of it

    def done(self) -> None:
        """End the step that is under way and clear the file."""
        if self._step:
            self.steps.append((self._step, round(time.monotonic() - self._began, 1)))
            self._step = ""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
