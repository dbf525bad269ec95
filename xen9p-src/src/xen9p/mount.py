"""xen9p mount: from the command line to a mounted FUSE filesystem, in the foreground or as a daemon."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import logging.handlers
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from xen9p import cache as caches
from xen9p.async_client import AsyncClient
from xen9p.connect import Place
from xen9p.errors import Xen9pError

if TYPE_CHECKING:
    from xen9p.fuse import Filesystem

log = logging.getLogger("xen9p.mount")

MAX_TASKS: Final = 256  # requests of the kernel at a time
DRAIN: Final = 2.0  # seconds for what is under way when the mount ends
READY: Final = b"ok"


def run(args: argparse.Namespace) -> int:
    """Mounts; returns when it is mounted, or in the foreground when it has ended."""
    place = Place.named(args)
    if place.is_socket and args.what:
        raise Xen9pError(f"{args.what} {args.directory}: too much", hint="with --unix and --tcp there is no TAG")
    if not place.is_socket and not args.what:
        raise Xen9pError("no TAG", hint="write xen9p mount TAG DIR; which there are says: xen9p tags")
    args.tag = args.what.rstrip(":")
    directory = Path(args.directory).absolute()
    if not directory.is_dir():
        raise Xen9pError(f"{directory} is no directory", hint="make it, or name another", errno=errno.ENOTDIR)
    cache = caches.load(args.cache, args.cache_seconds)
    _check_fuse()
    if args.foreground:
        _log_to(logging.StreamHandler(), args.debug)
        return _serve(args, place, directory, cache, lambda: None)
    return _daemon(args, place, directory, cache)


def _check_fuse() -> None:
    try:
        import pyfuse3  # noqa: F401, PLC0415
    except ImportError as error:
        raise Xen9pError(f"cannot mount: {error}", hint="install it: apt-get install python3-pyfuse3") from None
    if not Path("/dev/fuse").exists() and os.geteuid() == 0:
        with suppress(OSError):
            subprocess.run(["modprobe", "-q", "fuse"], check=False)
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Xen9pError("/dev/fuse cannot be opened", hint="load it: modprobe fuse", errno=errno.ENODEV)


def _log_to(handler: logging.Handler, debug: bool) -> None:
    handler.setFormatter(logging.Formatter("xen9p: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    for noisy in ("pyfuse3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.INFO if debug else logging.ERROR)


def _daemon(args: argparse.Namespace, place: Place, directory: Path, cache: caches.Cache) -> int:
    """Mounts in a child; returns when that is ready, or says what it says."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork():
        os.close(write)
        with open(read, "rb") as told:
            word = told.read()
        if word == READY:
            return 0
        raise Xen9pError(word.decode(errors="replace") or "the mount's process died", hint="" if word else "try -f")
    os.close(read)
    os.setsid()
    code = 1
    try:
        syslog = "/dev/log"
        handler = logging.handlers.SysLogHandler(syslog) if Path(syslog).exists() else logging.NullHandler()
        _log_to(handler, args.debug)

        def ready() -> None:
            os.write(write, READY)
            os.close(write)
            os.chdir("/")
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)

        code = _serve(args, place, directory, cache, ready)
    except (Xen9pError, OSError, EOFError) as error:
        log.error("%s", error)
        with suppress(OSError):
            os.write(write, str(error).encode())
    except BaseException:
        log.exception("the mount has failed")
    finally:
        os._exit(code)  # what the parent has set up for its own end is not ours


def _serve(
    args: argparse.Namespace, place: Place, directory: Path, cache: caches.Cache, ready: Callable[[], None]
) -> int:
    import pyfuse3_asyncio  # noqa: PLC0415

    pyfuse3_asyncio.enable()
    return asyncio.run(_mount(args, place, directory, cache, ready))


def _options(args: argparse.Namespace, name: str) -> set[str]:
    options = {"default_permissions", f"fsname={name.replace(',', '_')}", "subtype=xen9p"}
    if args.allow_other or os.geteuid() == 0:
        options.add("allow_other")
    if args.ro:
        options.add("ro")
    return options


async def _mount(
    args: argparse.Namespace, place: Place, directory: Path, cache: caches.Cache, ready: Callable[[], None]
) -> int:
    import pyfuse3  # noqa: PLC0415

    from xen9p.fuse import Filesystem  # noqa: PLC0415

    loop = asyncio.get_running_loop()
    name = args.tag or args.unix or "{}:{}".format(*args.tcp)
    transport = place.transport(args.tag)
    client = AsyncClient(transport, lost=lambda error: log.error("%s: connection lost: %s", name, error))
    try:
        async with asyncio.timeout(args.timeout):
            await client.version()
            root = await client.enter(place.aname, os.getuid(), place.key)
            qid = (await client.getattr(root)).qid
        filesystem = Filesystem(client, root, qid, cache, os.getuid())
        try:
            pyfuse3.init(filesystem, str(directory), _options(args, name))
        except RuntimeError as error:
            raise Xen9pError(f"cannot mount on {directory}", hint="is it in use? are you root?") from error
        if cache.coherent:
            await _lease(filesystem, args.timeout, pyfuse3)
    except TimeoutError:
        client.close()
        raise Xen9pError(f"{name} does not answer", hint=f"waited {args.timeout:g} s", errno=errno.ETIMEDOUT) from None
    except BaseException:
        client.close()
        raise
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, _end, loop, client, pyfuse3)
    try:
        log.info("%s mounted on %s, msize %d", name, directory, client.msize)
        ready()
        await pyfuse3.main(max_tasks=MAX_TASKS)
    finally:
        await filesystem.drop()
        pyfuse3.close(unmount=True)
        await filesystem.close()
        client.close()
    log.info("%s unmounted from %s", name, directory)
    return 0


async def _lease(filesystem: Filesystem, timeout: float, pyfuse3: Any) -> None:
    """Has the server say what others change. What pyfuse3 has mounted is unmounted if it does not."""
    try:
        async with asyncio.timeout(timeout):
            await filesystem.lease()
    except BaseException:
        await filesystem.drop()
        pyfuse3.close(unmount=True)
        raise


def _end(loop: asyncio.AbstractEventLoop, client: AsyncClient, pyfuse3: Any) -> None:
    """Takes no more requests; what the server does not answer soon fails."""
    pyfuse3.terminate()
    loop.call_later(DRAIN, client.close)
