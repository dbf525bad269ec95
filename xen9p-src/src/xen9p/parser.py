"""Commands and options of xen9p. What they do is elsewhere, and loaded only if it is wanted: see cli.py."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from xen9p import __version__, defaults, options
from xen9p.options import Subparsers

EXIT_USAGE: Final = 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where help is."""

    def error(self, message: str) -> Any:
        print(f"xen9p: error: {message} (see: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def build_parser(only: str = "") -> argparse.ArgumentParser:
    """All commands and options; the reference in the documentation is generated from this.

    Args:
        only: the command that is to be parsed, if it is known: the options of all of them take longer to build than
            most commands run.
    """
    top = _Parser(prog="xen9p", description="Files for Xen guests: see and change what xen9pd serves.")
    top.add_argument("--version", action="version", version=f"xen9p {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    adders = _OWN if only in _OWN else _adders()
    for add in [adders[only]] if only in adders else adders.values():
        add(commands)
    return top


def _status(commands: Subparsers) -> None:
    status = commands.add_parser("status", help="host, guests and devices", description="Show what is served to whom.")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    options.runtime_dir(status)


def _attach(commands: Subparsers) -> None:
    attach = commands.add_parser(
        "attach",
        help="give a guest an export",
        description="Attach an export that a rule of the policy allows.",
    )
    attach.add_argument("guest", metavar="GUEST", help="name or uuid of a running guest")
    attach.add_argument("export", metavar="EXPORT", help="name of an export in the policy")
    attach.add_argument("--tag", default="", help="which rule, if several give this export")
    attach.add_argument("--ro", action="store_true", help="read-only even if the rule allows writing")
    options.runtime_dir(attach)


def _detach(commands: Subparsers) -> None:
    detach = commands.add_parser(
        "detach",
        help="take a tag from a guest",
        description="Detach a device; unmount it in the guest before.",
    )
    detach.add_argument("guest", metavar="GUEST", help="name or uuid of a running guest")
    detach.add_argument("tag", metavar="TAG", help="tag of the device")
    options.runtime_dir(detach)


def _policy(commands: Subparsers) -> None:
    rules = commands.add_parser("policy", help="about the policy file", description="Work with the policy file.")
    verbs = rules.add_subparsers(dest="verb", metavar="VERB", required=True)
    check = verbs.add_parser("check", help="say what is wrong with it", description="Check a policy file.")
    check.add_argument("file", nargs="?", type=Path, default=defaults.POLICY, metavar="FILE", help="%(default)s")
    check.add_argument("--no-paths", action="store_true", help="do not look whether the exports' paths exist")

    explain = verbs.add_parser(
        "explain",
        help="say what a guest gets and why",
        description="Go through the policy for one guest, whether it runs or not.",
    )
    explain.add_argument("guest", metavar="GUEST", help="its name")
    explain.add_argument("--uuid", default="", metavar="UUID", help="for the rules that name one")
    options.policy_file(explain)
    explain.add_argument("--json", action="store_true", help="as one JSON object")


def _metrics(commands: Subparsers) -> None:
    metrics = commands.add_parser(
        "metrics",
        help="counters and latencies for Prometheus",
        description="Print what is counted in Prometheus' text format, or offer it to be fetched.",
    )
    where = metrics.add_mutually_exclusive_group()
    where.add_argument(
        "--listen", metavar="ADDRESS", help="answer GET /metrics at HOST:PORT or at a Unix socket (a path)"
    )
    where.add_argument(
        "--output", type=Path, metavar="FILE", help="replace a file: for node_exporter's textfile collector"
    )
    options.runtime_dir(metrics)


def _top(commands: Subparsers) -> None:
    top = commands.add_parser(
        "top", help="live: what each device does", description="Show each device's rates and latencies, live."
    )
    top.add_argument(
        "--sort",
        choices=("ops", "read", "written", "errors", "latency", "fids", "name"),
        default="ops",
        help="order of the devices; default: %(default)s",
    )
    top.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="seconds; default: %(default)g")
    top.add_argument("--once", action="store_true", help="print one table after one interval, and end")
    top.add_argument("--json", action="store_true", help="print a JSON object an interval")
    options.runtime_dir(top)


def _trace(commands: Subparsers) -> None:
    trace = commands.add_parser(
        "trace",
        help="each request with its reply and its times",
        description="Show what guests ask and get, request by request, until Ctrl-C.",
    )
    trace.add_argument("target", nargs="?", default="", metavar="GUEST[:TAG]", help="default: every device")
    form = trace.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON object a line")
    form.add_argument("--pcap", metavar="FILE", help="write a capture file for Wireshark; - is standard output")
    trace.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="type=Tread,Twrite; path=GLOB; errno=ENOENT,... or any; slower=MS; all that are given must hold",
    )
    trace.add_argument("--duration", type=_seconds, metavar="S", help="end after so many seconds")
    trace.add_argument(
        "--wait", type=_seconds, metavar="S", help="for a device that is not there yet, so long: as for a guest's boot"
    )
    trace.add_argument("--count", type=_count, metavar="N", help="end after so many requests")
    trace.add_argument("--data", type=int, default=64, metavar="BYTES", help="of file data; default: %(default)s")
    options.runtime_dir(trace)


def _path(commands: Subparsers) -> None:
    path = commands.add_parser(
        "path",
        help="every translation between a guest's file and the device",
        description="Follow a byte of a guest's file through every translation on its way, with the real values, and "
        "count them: over 9P from a path in the mount of a tag, or with --disk from a path on the ext4 of a disk.",
    )
    path.add_argument(
        "target",
        metavar="GUEST[:TAG]:/PATH",
        help="as from the root of the mount, or of the disk; default of TAG: root",
    )
    path.add_argument("--offset", type=_offset, default=0, metavar="N", help="which byte of it; default: %(default)s")
    path.add_argument("--disk", default="", metavar="NAME", help="follow it on this disk of the guest, as xvda")
    path.add_argument(
        "--wait",
        type=_seconds,
        metavar="S",
        help="wait so many seconds for a real request for that byte, and show its values",
    )
    path.add_argument(
        "--beside", type=Path, metavar="FILE", help="compare it with another one, which --json wrote into this file"
    )
    path.add_argument("--json", action="store_true", help="as one JSON object; with --beside an array of both")
    options.runtime_dir(path)


def _serve(commands: Subparsers) -> None:
    from xen9p import file_options  # noqa: PLC0415

    serve = commands.add_parser(
        "serve",
        help="serve a directory on a socket",
        description="Serve a directory by 9P2000.L without Xen.",
    )
    serve.add_argument("--export", required=True, metavar="PATH", help="the directory")
    serve.add_argument("--ro", action="store_true", help="read-only")
    serve.add_argument(
        "--trace",
        metavar="FILE",
        help="write every request of every client; .pcap and .json ask for these formats, - is standard output",
    )
    serve.add_argument(
        "--keys", type=Path, metavar="FILE", help="only to clients that have one of its keys; see: xen9p key make"
    )
    serve.add_argument(
        "--leases",
        type=file_options.lease_term,
        default=0.0,
        metavar="SECONDS",
        help="give leases, for xen9p mount --cache coherent; others wait so long for a client that is gone",
    )
    where = serve.add_mutually_exclusive_group(required=True)
    where.add_argument("--unix", metavar="PATH", help="listen on a Unix socket")
    where.add_argument("--tcp", metavar="HOST:PORT", type=file_options.host_port, help="listen on a TCP port")


def _keys(commands: Subparsers) -> None:
    keys = commands.add_parser("key", help="about keys to attach with", description="Work with files of keys.")
    verbs = keys.add_subparsers(dest="verb", metavar="VERB", required=True)
    make = verbs.add_parser(
        "make",
        help="make a key",
        description="Make a key and add it to a file, for xen9p serve --keys FILE. The client needs the same key "
        "in a file of its own, for --key FILE.",
    )
    make.add_argument("file", type=Path, metavar="FILE", help="made with mode 0600 if it is not there")
    make.add_argument("--name", default=defaults.KEY_NAME, metavar="N", help="the user it is for; default: %(default)s")
    make.add_argument("--uid", type=_uid, metavar="UID", help="good for this uid of the client's alone")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 86400")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _offset(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes")
    return int(text)


def _uid(text: str) -> int:
    if not text.isdigit() or int(text) >= 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a uid")
    return int(text)


def _of(module: str, commands: Subparsers) -> None:
    """The options of a command that has a module for them."""
    importlib.import_module(module).add(commands)


_OWN: Final[dict[str, Callable[[Subparsers], None]]] = {
    "status": _status,
    "attach": _attach,
    "detach": _detach,
    "policy": _policy,
    "snapshot": partial(_of, "xen9p.snapshot_options"),
    "metrics": _metrics,
    "top": _top,
    "trace": _trace,
    "path": _path,
    "serve": _serve,
    "key": _keys,
    "dedup": partial(_of, "xen9p.dedup_options"),
    "cache": partial(_of, "xen9p.cache_options"),
}
"""What adds each command, but for those that work on files."""


def _adders() -> dict[str, Callable[[Subparsers], None]]:
    """What adds each command, in the order of the help."""
    from xen9p import file_options  # noqa: PLC0415

    return {**_OWN, **file_options.ADD}


def names() -> tuple[str, ...]:
    """Every command, in the order of the help."""
    return tuple(_adders())
