"""Whether a guest's sshd answers, seen from dom0."""

from __future__ import annotations

import socket


def answers(address: str, patience: float) -> bool:
    """Whether an ssh server sends its banner within *patience* seconds; a port that merely accepts is not enough."""
    try:
        with socket.create_connection((address, 22), timeout=1) as connection:
            connection.settimeout(patience)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
