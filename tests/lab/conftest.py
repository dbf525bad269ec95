"""Fixtures of the tests of a standing lab."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import CONTROL, LIVE, STATE, Dom0, drop_connection


@pytest.fixture(scope="session")
def dom0() -> Iterator[Dom0]:
    """The Xen host."""
    assert (STATE / "ssh_config").exists(), f"no lab stands in {STATE}; make one with: make lab"
    yield Dom0()
    for name in list(LIVE):
        drop_connection(name)
    CONTROL.rmdir()
