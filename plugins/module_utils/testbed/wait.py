"""Wait until the host answers by ssh, and say what it is doing meanwhile."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from .errors import TestbedError
from .progress import Progress
from .vm import Vm


def wait_for_ssh(vm: Vm, timeout: float, progress: Progress) -> float:
    """Return the seconds until `ssh host true` worked. Raises TestbedError at *timeout*, or when QEMU dies."""
    began = time.monotonic()
    command = ["ssh", "-F", str(vm.dir / "ssh_config"), "-o", "ConnectTimeout=10", "-o", "BatchMode=yes", "host", "true"]
    problem = ""
    while True:
        waited = time.monotonic() - began
        progress.show(f"host: waiting for ssh, {waited:.0f} s: {vm.last_console_line()}")
        if vm.pid() is None:
            raise TestbedError(f"QEMU ended while the host booted; its last words: {vm.last_console_line()!r}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            problem = done.stderr.strip()
            if done.returncode == 0:
                progress.done()
                return time.monotonic() - began
        except subprocess.TimeoutExpired:
            problem = "no answer yet"
        if "Permission denied" in problem or "verification failed" in problem:
            raise TestbedError("the host does not know this lab's key: run `make reset` for fresh disks")
        if waited > timeout:
            raise TestbedError(
                f"the host did not answer by ssh within {timeout:.0f} s ({problem or 'no answer'}): "
                f"look at {console(vm)}, or raise testbed_boot_timeout"
            )
        time.sleep(1.0)


def console(vm: Vm) -> Path:
    """Return the path of the console's log, relative to the working directory where that is shorter."""
    try:
        return vm.console.relative_to(Path.cwd())
    except ValueError:
        return vm.console
