"""sd_notify(3) in a few lines: tells systemd, if it asks, how the service is."""

from __future__ import annotations

import os
import socket
import time


def notify(*lines: str) -> None:
    """Sends lines such as READY=1 to NOTIFY_SOCKET; does nothing without one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            # systemd is gone or busy; the service goes on without it.
            return


def reloading() -> None:
    """The begin of a reload, for Type=notify-reload."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
