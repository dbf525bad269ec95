"""The process that forks workers: all is imported here once, so that a worker starts in milliseconds.

The supervisor forks it first of all, while there is no thread and nothing is open, and speaks to it over a
SOCK_SEQPACKET pair, one JSON object a packet. It ends when the supervisor does; its workers live on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from xen9p import journal
from xen9p.errors import Xen9pError
from xen9p.jsonlines import listen

MAX_PACKET: Final = 1 << 17

Request = dict[str, Any]
WorkerMain = Callable[[Request, socket.socket], int]


def start() -> tuple[int, socket.socket]:
    """Forks the zygote; (its pid, our end of the pair). The caller must have no threads."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    try:
        keep = theirs.detach()
        os.closerange(3, keep)
        os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))
        journal.after_fork()
        status = _main(socket.socket(fileno=keep))
    except BaseException as error:  # a child of a fork must never return into its parent's code
        _complain("zygote", error)
    finally:
        os._exit(status)


def _main(sock: socket.socket) -> int:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    # A session of its own: what is typed at the supervisor's terminal does not reach the workers.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    _rename("xen9p-zygote")
    try:
        main: WorkerMain | None = importlib.import_module("xen9p.worker").main
        importlib.import_module("xen9p.dataplane").spin_us()  # measured here once, inherited by every worker
        problem = ""
    except (ImportError, OSError) as error:
        main, problem = None, f"the worker cannot be loaded: {error}"
    else:
        _prepare_walls()
    gc.collect()
    gc.freeze()
    while packet := sock.recv(MAX_PACKET):
        request = json.loads(packet)
        if main is None:
            answer: Request = {"ok": False, "reason": problem}
        else:
            try:
                answer = {"ok": True, "pid": spawn(request, main, sock)}
            except OSError as error:
                answer = {"ok": False, "reason": f"cannot start a worker: {error}"}
        sock.send(json.dumps(answer).encode())
    return 0


def _prepare_walls() -> None:
    """What all workers' confinement has in common and takes long; what fails here fails in the worker, where it counts.

    Workers have no business on the network: one empty namespace serves them all, and they cannot make sockets either.
    """
    sandbox = importlib.import_module("xen9p.sandbox")
    for work in (sandbox.prepare, sandbox.go_private):
        with contextlib.suppress(Xen9pError, OSError):
            work()


def spawn(request: Request, main: WorkerMain, inherited: socket.socket | None = None) -> int:
    """Binds the worker's socket, forks, and runs main(request, listener) in the child; its pid."""
    path = Path(request["socket"])
    listener = listen(path)
    try:
        pid = os.fork()
        if pid == 0:
            _child(request, main, listener, inherited)
    finally:
        listener.close()
    # The supervisor that comes after this one believes a worker's pid only if it stands here.
    path.with_suffix(".pid").write_text(f"{pid}\n")
    return pid


def _child(request: Request, main: WorkerMain, listener: socket.socket, inherited: Any) -> None:
    status = 1
    try:
        if inherited is not None:
            inherited.close()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        status = main(request, listener)
    except BaseException as error:
        _complain(f"worker {request.get('domid')}/{request.get('devid')} of {request.get('guest')}", error)
    finally:
        os._exit(status)


def _rename(name: str) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name[:15])


def _complain(who: str, error: BaseException) -> None:
    where = ""
    if error.__traceback__ is not None:
        last = error.__traceback__
        while last.tb_next is not None:
            last = last.tb_next
        where = f" at {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}"
    with contextlib.suppress(OSError):
        os.write(2, f"xen9p: {who}: {type(error).__name__}: {error}{where}\n".encode())
