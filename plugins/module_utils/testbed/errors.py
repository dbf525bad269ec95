"""The one exception of the testbed: a line for the user, with the remedy in it."""

from __future__ import annotations


class TestbedError(Exception):
    """Something the user can act on. The message is one line: what is wrong; then what to do."""

    __test__ = False  # the name starts with "Test", but pytest has nothing to collect here
