"""Wait until the host answers by ssh, and say what it is doing meanwhile."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

from .errors import TestbedError
from .progress import Progress
from .vm import Vm

BANNER_TIMEOUT = 3.0  # QEMU accepts connections long before the host does: ask again rather than wait long
SSH_TIMEOUT = 30.0


def wait_for_ssh(vm: Vm, port: int, timeout: float, progress: Progress) -> float:
    """Return the seconds until `ssh host true` worked. Raises TestbedError at *timeout*, or when QEMU dies."""
    began = time.monotonic()
    problem = "no answer"
    while True:
        waited = time.monotonic() - began
        progress.show(f"host: waiting for ssh, {waited:.0f} s: {vm.last_console_line()}")
        if vm.pid() is None:
            raise TestbedError(f"QEMU ended while the host booted; its last words: {vm.last_console_line()!r}")
        if vm.status() == "internal-error":
            raise TestbedError("KVM gave up on the machine: set testbed_accelerator to tcg")
        if sshd_greets(port):
            problem = _login_problem(vm)
            if not problem:
                progress.done()
                return time.monotonic() - began
        if "Permission denied" in problem or "verification failed" in problem:
            raise TestbedError("the host does not know this lab's key: run `make reset` for fresh disks")
        if waited > timeout:
            raise TestbedError(
                f"the host did not answer by ssh within {timeout:.0f} s ({problem}): "
                f"look at {_console(vm)}, or raise testbed_boot_timeout"
            )
        time.sleep(0.5)


def sshd_greets(port: int) -> bool:
    """Tell whether what listens on *port* of 127.0.0.1 introduces itself as an ssh server."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=BANNER_TIMEOUT) as connection:
            connection.settimeout(BANNER_TIMEOUT)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def _login_problem(vm: Vm) -> str:
    """Log in once; return why that failed, "" if it did not."""
    command = ["ssh", "-F", str(vm.dir / "ssh_config"), "-o", "BatchMode=yes", "host", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SSH_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"logging in took more than {SSH_TIMEOUT:.0f} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["ssh failed"])[-1]


def _console(vm: Vm) -> Path:
    """Return the path of the console's log, relative to the working directory where that is shorter."""
    try:
        return vm.console.relative_to(Path.cwd())
    except ValueError:
        return vm.console
