"""How a guest may use an export, as its worker is told."""

from __future__ import annotations

from typing import Final

TERMS: Final = ("users", "limits")
"""What of a worker's request may change while it serves."""
