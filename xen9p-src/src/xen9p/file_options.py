"""Options of the commands that work on files: xen9p ls, cat, cp, ..., mount. What they do is in file_commands.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Final

from xen9p.defaults import LEAST_TERM, MOST_TERM
from xen9p.options import Subparsers

_PATH: Final = "TAG:PATH; with --unix or --tcp just :PATH"


def host_port(text: str) -> tuple[str, int]:
    """HOST:PORT as (host, port)."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


def _octal(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise argparse.ArgumentTypeError(f"{text!r} is not a mode such as 755")
    return mode


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")
    return int(text)


def lease_term(text: str) -> float:
    """Seconds of a lease session's term, as an argument."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not LEAST_TERM <= seconds <= MOST_TERM:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from {LEAST_TERM:g} to {MOST_TERM:g}")
    return seconds


def _tags(commands: Subparsers) -> None:
    tags = commands.add_parser(
        "tags",
        help="in a guest: devices for these commands",
        description="List the devices that this guest has for user space.",
    )
    tags.add_argument("--json", action="store_true", help="as one JSON object")


def _ls(commands: Subparsers) -> None:
    ls = _command(commands, "ls", "list files", "List directories or files.")
    ls.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)
    ls.add_argument("-l", dest="long", action="store_true", help="with mode, owner, size and time")
    ls.add_argument("-a", dest="all", action="store_true", help="also names that begin with a dot")
    ls.add_argument("-R", dest="recursive", action="store_true", help="also what is in directories beneath")


def _cat(commands: Subparsers) -> None:
    cat = _command(commands, "cat", "print files", "Write the content of files to standard output.")
    cat.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)


def _cp(commands: Subparsers) -> None:
    cp = _command(commands, "cp", "copy files", "Copy files from or to the host; a path without a colon is local.")
    cp.add_argument("sources", nargs="+", metavar="SOURCE", help="TAG:PATH, or a local path")
    cp.add_argument("target", metavar="TARGET", help="TAG:PATH, or a local path; a directory for several sources")
    cp.add_argument("-r", "-R", dest="recursive", action="store_true", help="copy directories with all in them")
    cp.add_argument("-p", dest="preserve", action="store_true", help="keep modes and times")
    cp.add_argument("-q", dest="quiet", action="store_true", help="show no progress")


def _stat(commands: Subparsers) -> None:
    stat = _command(commands, "stat", "show attributes", "Show a file's attributes; links are not followed.")
    stat.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)
    stat.add_argument("--json", action="store_true", help="as one JSON object a line")


def _write(commands: Subparsers) -> None:
    write = _command(commands, "write", "write standard input to a file", "Write standard input to a file.")
    write.add_argument("path", metavar="PATH", help=_PATH)
    where = write.add_mutually_exclusive_group()
    where.add_argument("--append", action="store_true", help="at its end")
    where.add_argument("--offset", type=_count, metavar="BYTES", help="from there on; the rest of the file stays")


def _mkdir(commands: Subparsers) -> None:
    mkdir = _command(commands, "mkdir", "make directories", "Make directories.")
    mkdir.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)
    mkdir.add_argument("-p", dest="parents", action="store_true", help="also those above; no error if it is there")
    mkdir.add_argument("-m", dest="mode", type=_octal, default=0o777, metavar="MODE", help="octal; default: 777")


def _rm(commands: Subparsers) -> None:
    rm = _command(commands, "rm", "remove files", "Remove files.")
    rm.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)
    rm.add_argument("-r", dest="recursive", action="store_true", help="remove directories with all in them")
    rm.add_argument("-f", dest="force", action="store_true", help="no error for what is not there")


def _mv(commands: Subparsers) -> None:
    mv = _command(commands, "mv", "move or rename", "Move or rename a file within one export.")
    mv.add_argument("source", metavar="SOURCE", help=_PATH)
    mv.add_argument("target", metavar="TARGET", help="new path, or a directory to move it into")


def _ln(commands: Subparsers) -> None:
    ln = _command(commands, "ln", "make links", "Make a hard link, or with -s a symbolic one.")
    ln.add_argument("target", metavar="TARGET", help="TAG:PATH; with -s any text")
    ln.add_argument("path", metavar="PATH", help=_PATH)
    ln.add_argument("-s", dest="symbolic", action="store_true", help="a symbolic link")


def _readlink(commands: Subparsers) -> None:
    readlink = _command(commands, "readlink", "show links' targets", "Print where symbolic links lead.")
    readlink.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)


def _df(commands: Subparsers) -> None:
    df = _command(commands, "df", "show free space", "Show how full the file system of an export is.")
    df.add_argument("paths", nargs="+", metavar="PATH", help=_PATH)


def _mount(commands: Subparsers) -> None:
    mount = _command(commands, "mount", "mount through FUSE", "Mount an export through FUSE; end it with umount DIR.")
    mount.add_argument("what", nargs="?", default="", metavar="TAG", help="tag; none with --unix and --tcp")
    mount.add_argument("directory", metavar="DIR", help="where to")
    mount.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground")
    mount.add_argument("--ro", action="store_true", help="read-only")
    mount.add_argument("--allow-other", action="store_true", help="for all users; root's mounts are so anyway")
    mount.add_argument(
        "--cache",
        default="none",
        metavar="CACHE",
        help="none, timed (for a while), coherent (until others change it), or MODULE:CLASS; default: %(default)s",
    )
    mount.add_argument(
        "--cache-seconds", type=float, default=1.0, metavar="SECONDS", help="what it may be old; default: %(default)g"
    )
    mount.add_argument("--debug", action="store_true", help="say what goes wrong inside, with traces")


def _command(commands: Subparsers, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    where = command.add_mutually_exclusive_group()
    where.add_argument("--unix", metavar="SOCKET", help="a server on a Unix socket, not the host of this guest")
    where.add_argument("--tcp", metavar="HOST:PORT", type=host_port, help="a server on TCP")
    command.add_argument(
        "--aname", default="", metavar="NAME", help="the tree to attach to, where a server has several"
    )
    command.add_argument("--key", type=Path, metavar="FILE", help="prove that you have the key in it")
    command.add_argument("--key-name", metavar="NAME", help="which, if the file has several")
    command.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="to connect; default: %(default)g"
    )
    command.add_argument(
        "--ring-order", type=int, choices=range(1, 10), metavar="N", help="share 2^N pages; default: 8, or what is left"
    )
    return command


ADD: Final[dict[str, Callable[[Subparsers], None]]] = {
    "tags": _tags,
    "ls": _ls,
    "cat": _cat,
    "cp": _cp,
    "stat": _stat,
    "write": _write,
    "mkdir": _mkdir,
    "rm": _rm,
    "mv": _mv,
    "ln": _ln,
    "readlink": _readlink,
    "df": _df,
    "mount": _mount,
}
"""What adds each command to the parser of xen9p."""
