"""The xen9pd command: one supervisor a host, from its options to its end."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path

from xen9p import __version__, journal, options, policy
from xen9p.control import ControlServer, socket_path
from xen9p.defaults import RUNTIME
from xen9p.errors import ControlError, PolicyError, Xen9pError, describe
from xen9p.loop import Loop
from xen9p.notify import notify, reloading
from xen9p.quotas import STATE

log = logging.getLogger("xen9pd")


def lock(runtime: Path) -> int:
    """Takes the lock that only one supervisor holds; the descriptor keeps it. Workers never inherit it."""
    fd = os.open(runtime / "xen9pd.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 20).decode().strip() or "?"
        os.close(fd)
        raise ControlError(
            f"xen9pd runs already for {runtime} (pid {pid})", "stop that one: systemctl stop xen9pd"
        ) from None
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def run(policy_path: Path, runtime: Path, state: Path) -> int:
    """The service, until it is told to end. Workers stay; the next supervisor takes them over."""
    # A missing path keeps its own grants back and not the service: after a reboot of the host, every guest's root
    # waits for this.
    rules = policy.load(policy_path, check_paths=False)
    try:
        runtime.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock(runtime)
    except OSError as error:
        raise ControlError(f"{runtime}: {error.strerror}", "run it as root") from None
    # Here, so that the options are known where pyxs is not installed.
    from xen9p.supervisor import Supervisor, xen_version  # noqa: PLC0415
    from xen9p.workers import Zygote  # noqa: PLC0415
    from xen9p.xenstore import XenStore  # noqa: PLC0415

    loop = Loop()
    # Before all else: the zygote must inherit nothing, and no thread may exist.
    zygote = Zygote(loop)
    store = XenStore()
    supervisor = Supervisor(loop, store, zygote, rules, runtime, state=state)
    supervisor.start()
    control = ControlServer(loop, socket_path(runtime), supervisor.handle, supervisor.blink.hung_up)

    def hangup() -> None:
        def reload() -> None:
            with contextlib.suppress(PolicyError):
                supervisor.reload()

        reloading()
        supervisor.guarded(reload)
        notify("READY=1", supervisor.summary())

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.on_signal(number, loop.stop)
    loop.on_signal(signal.SIGHUP, hangup)
    notify("READY=1", supervisor.summary())
    log.info("xen9pd %s ready: Xen %s, %d rules", __version__, xen_version(), len(rules.rules))
    for problem in policy.missing_paths(rules):
        log.warning("policy: %s", problem)
    loop.run()
    notify("STOPPING=1")
    control.close()
    store.close()
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The options of xen9pd; the reference in the documentation is generated from this."""
    parser = argparse.ArgumentParser(prog="xen9pd", description="Serve directories to Xen guests as the policy says.")
    options.policy_file(parser)
    parser.add_argument(
        "--runtime-dir", type=Path, default=RUNTIME, metavar="DIR", help="sockets; default: %(default)s"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=STATE,
        metavar="DIR",
        help="outlives a restart of the host; default: %(default)s",
    )
    parser.add_argument("--version", action="version", version=f"xen9pd {__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The xen9pd command."""
    args = build_parser().parse_args(argv)
    journal.set_up("xen9pd")
    try:
        return run(args.policy, args.runtime_dir, args.state_dir)
    except Xen9pError as error:
        for line in str(error).splitlines():
            print(f"xen9pd: error: {line}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        log.critical("xen9pd ends: %s", describe(error))
        return 1
