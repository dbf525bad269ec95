"""Fixtures of the tests of a standing lab."""

from __future__ import annotations

import pytest

from lab import STATE, Dom0


@pytest.fixture(scope="session")
def dom0() -> Dom0:
    """The Xen host."""
    assert (STATE / "ssh_config").exists(), f"no lab stands in {STATE}; make one with: make lab"
    return Dom0()
