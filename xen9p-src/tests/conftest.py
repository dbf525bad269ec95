"""A served export and a client on it, over each transport that needs no Xen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from serving import OPENERS, Session
from xen9p import worker

worker.prepare_process()

# A busy machine is no reason to fail.
settings.register_profile("xen9p", deadline=None)
settings.load_profile("xen9p")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An empty export inside a directory that must never be reached from it."""
    (tmp_path / "outside").write_text("secret")
    path = tmp_path / "export"
    path.mkdir()
    return path


@pytest.fixture(params=sorted(OPENERS))
def session(request: pytest.FixtureRequest, export: Path) -> Iterator[Session]:
    """A read-write session on the export, over each transport."""
    with OPENERS[request.param](export) as opened:  # type: ignore[attr-defined]
        yield opened
