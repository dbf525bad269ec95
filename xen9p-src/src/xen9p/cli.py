"""The xen9p command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Final

from xen9p import (
    __version__,
    cache_options,
    control,
    dedup_options,
    defaults,
    file_options,
    options,
    snapshot_options,
)
from xen9p.errors import Xen9pError

EXIT_USAGE: Final = 2
_UNITS: Final = ("B", "K", "M", "G", "T")
# fmt: off
_HEAD: Final = (
    "DEVICE", "GUEST", "TAG", "EXPORT", "ACCESS", "STATE",
    "WORKER", "REQUESTS", "READ", "WRITTEN", "ERRORS", "FIDS",
)
# fmt: on


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and where help is."""

    def error(self, message: str) -> Any:
        print(f"xen9p: error: {message} (see: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)


def build_parser() -> argparse.ArgumentParser:
    """All commands and options; the reference in the documentation is generated from this."""
    top = _Parser(prog="xen9p", description="Files for Xen guests: see and change what xen9pd serves.")
    top.add_argument("--version", action="version", version=f"xen9p {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    status = commands.add_parser("status", help="host, guests and devices", description="Show what is served to whom.")
    status.add_argument("--json", action="store_true", help="as one JSON object")
    _runtime(status)

    attach = commands.add_parser(
        "attach",
        help="give a guest an export",
        description="Attach an export that a rule of the policy allows.",
    )
    attach.add_argument("guest", metavar="GUEST", help="name or uuid of a running guest")
    attach.add_argument("export", metavar="EXPORT", help="name of an export in the policy")
    attach.add_argument("--tag", default="", help="which rule, if several give this export")
    attach.add_argument("--ro", action="store_true", help="read-only even if the rule allows writing")
    _runtime(attach)

    detach = commands.add_parser(
        "detach",
        help="take a tag from a guest",
        description="Detach a device; unmount it in the guest before.",
    )
    detach.add_argument("guest", metavar="GUEST", help="name or uuid of a running guest")
    detach.add_argument("tag", metavar="TAG", help="tag of the device")
    _runtime(detach)

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

    snapshot_options.add(commands, _runtime)
    _observing(commands)

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
    _keys(commands)
    dedup_options.add(commands)
    cache_options.add(commands, _runtime)
    file_options.add(commands)
    return top


def _keys(commands: Any) -> None:
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


def _observing(commands: Any) -> None:
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
    _runtime(metrics)

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
    _runtime(top)

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
    trace.add_argument("--count", type=_count, metavar="N", help="end after so many requests")
    trace.add_argument("--data", type=int, default=64, metavar="BYTES", help="of file data; default: %(default)s")
    _runtime(trace)

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
    _runtime(path)


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


def _runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--runtime-dir",
        type=Path,
        default=defaults.RUNTIME,
        metavar="DIR",
        help="of xen9pd; default: %(default)s",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if all is well, 1 if it failed, 2 for wrong usage, 78 for a bad policy."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except Xen9pError as error:
        for line in str(error).splitlines():
            print(f"xen9p: error: {line}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"xen9p: error: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    match args.command:
        case "status":
            answer = control.ask(control.Status(), args.runtime_dir)
            del answer["ok"]
            print(json.dumps(answer, indent=2) if args.json else status_text(answer), flush=True)
        case "attach":
            request = control.Attach(args.guest, args.export, args.tag, args.ro)
            answer = control.ask(request, args.runtime_dir)
            device = f"{answer['domid']}/{answer['devid']}"
            print(f"attached {args.export} to {args.guest} as tag {answer['tag']}, device {device}")
        case "detach":
            control.ask(control.Detach(args.guest, args.tag), args.runtime_dir)
            print(f"detached {args.tag} from {args.guest}")
        case "policy":
            return _policy(args)
        case "metrics":
            return _metrics(args)
        case "top":
            return _top(args)
        case "trace" | "path":
            return _trace(args) if args.command == "trace" else _path(args)
        case "key":
            from xen9p import auth  # noqa: PLC0415

            auth.make(args.file, args.name, args.uid)
            print(f"added the key {args.name} to {args.file}")
        case "serve":
            return _serve(args)
        case "mount" | "snapshot" | "dedup" | "cache":
            return _elsewhere(args)
        case command if command in file_options.NAMES:
            from xen9p.file_commands import run as work_on_files  # noqa: PLC0415

            return work_on_files(args)
    return 0


def _policy(args: argparse.Namespace) -> int:
    if args.verb == "explain":
        return _explain(args)
    from xen9p import policy  # noqa: PLC0415

    rules = policy.load(args.file, check_paths=not args.no_paths)
    print(f"{args.file}: {len(rules.exports)} exports, {len(rules.rules)} rules, all well")
    return 0


def _elsewhere(args: argparse.Namespace) -> int:
    """What is imported only if it is wanted."""
    if args.command == "mount":
        from xen9p.mount import run as mount  # noqa: PLC0415

        return mount(args)
    if args.command == "cache":
        from xen9p.cache_commands import command as cache  # noqa: PLC0415

        return cache(args)
    if args.command == "dedup":
        from xen9p.dedup_commands import command as dedup  # noqa: PLC0415

        return dedup(args)
    from xen9p.snapshot_commands import run as work_on_snapshots  # noqa: PLC0415

    return work_on_snapshots(args)


def _explain(args: argparse.Namespace) -> int:
    from xen9p import explain, policy  # noqa: PLC0415

    if args.uuid and not policy.is_uuid(args.uuid):
        raise Xen9pError(f"{args.uuid!r} is no uuid", "copy it from: xl list -v")
    found = explain.explain(policy.load(args.policy, check_paths=False), args.guest, args.uuid.lower())
    print(json.dumps(found, indent=2) if args.json else explain.text(found), flush=True)
    return 0


def _serve(args: argparse.Namespace) -> int:
    # Only this command needs the C data plane.
    from xen9p.worker import serve_socket  # noqa: PLC0415

    where = args.unix or args.tcp
    if args.trace is None:
        return serve_socket(args.export, args.ro, where, keys=args.keys, term=args.leases)
    from xen9p.trace import format_of  # noqa: PLC0415
    from xen9p.tracer import Sink  # noqa: PLC0415

    sink = Sink(_output(args.trace), format_of(args.trace), lambda text: print(f"xen9p: {text}", file=sys.stderr))
    try:
        return serve_socket(args.export, args.ro, where, sink, keys=args.keys, term=args.leases)
    finally:
        sink.close()


def _metrics(args: argparse.Namespace) -> int:
    from xen9p import metrics  # noqa: PLC0415

    if args.listen:
        return metrics.serve(args.listen, args.runtime_dir)
    content = metrics.fetch(args.runtime_dir)
    if args.output:
        metrics.write_to(args.output, content)
    else:
        print(content, end="", flush=True)
    return 0


def _top(args: argparse.Namespace) -> int:
    from xen9p import top  # noqa: PLC0415

    if args.once or args.json:
        return top.batch(args.runtime_dir, args.interval, args.sort, args.json, 1 if args.once else None)
    return top.live(args.runtime_dir, args.interval, args.sort)


def _trace(args: argparse.Namespace) -> int:
    from xen9p import trace  # noqa: PLC0415
    from xen9p.pcap import Pcap  # noqa: PLC0415
    from xen9p.traceformat import JsonLines, Text  # noqa: PLC0415

    filters = [trace.parse_filter(text) for text in args.filter]
    form = Pcap() if args.pcap else JsonLines() if args.json else Text()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a capture file is ended in order
    with _output(args.pcap or "-") as out:
        trace.run(
            args.target,
            args.runtime_dir,
            form,
            out,
            filters,
            data=args.data,
            seconds=args.duration,
            count=args.count,
        )
    return 0


def _path(args: argparse.Namespace) -> int:
    from xen9p import disk_path, file_path, path  # noqa: PLC0415
    from xen9p.xenstore import XenStore  # noqa: PLC0415

    def ready() -> None:
        print(f"xen9p: waiting for a request for byte {args.offset} of it", file=sys.stderr, flush=True)

    target = file_path.parse_target(args.target)
    other = None if args.beside is None else path.load(args.beside)
    store = XenStore()
    if args.disk:
        if target.tag:
            raise Xen9pError("a file is below a tag or on a disk, not both", "write GUEST:/path with --disk")
        waiting = disk_path.Waiting(args.wait, ready) if args.wait else None
        way = disk_path.follow(target, args.disk, args.offset, store, wait=waiting)
    else:
        way = file_path.follow(target, args.offset, args.runtime_dir, store, wait=args.wait, ready=ready)
    if args.json:
        found = path.to_json(way)
        print(json.dumps(found if other is None else [found, path.to_json(other)], indent=2), flush=True)
    else:
        print(path.text(way), flush=True)
        if other is not None:
            print(f"\n{path.compare(way, other)}", flush=True)
    return 0


def _output(path: str) -> IO[bytes]:
    """A file to write to; - is standard output, which stays open."""
    if path == "-":
        return os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    try:
        return open(path, "wb")  # the caller closes it
    except OSError as error:
        raise Xen9pError(f"cannot write {path}: {error.strerror}", "choose another file") from None


def status_text(answer: dict[str, Any]) -> str:
    """What `xen9p status` prints: a line for the host, one a guest, one a device."""
    host = answer["host"]
    lines = [
        f"host    Xen {host['xen'] or '?'}, xen9pd {host['version']} (pid {host['pid']}), "
        f"policy {host['policy']} ({host['rules']} rules)"
    ]
    lines += [
        f"guest   {g['name']} (domain {g['domid']}): {', '.join(g['tags']) or 'no devices'}" for g in answer["guests"]
    ]
    if not answer["guests"]:
        lines.append("guest   none is running")
    rows = [_device_row(d) for d in answer["devices"]]
    if rows:
        lines += ["", *table([_HEAD, *rows], right=6)]
    lines += [f"failed  {d['guest']} {d['tag']}: {d['reason']}" for d in answer["devices"] if d["phase"] == "failed"]
    lines += [
        f"problem {d['guest']} {d['tag']}: keeps its terms: {d['problem']}"
        for d in answer["devices"]
        if d.get("problem")
    ]
    lines += [
        f"pending {d['guest']} {d['tag']}: at its next attach: {d['pending']}"
        for d in answer["devices"]
        if d.get("pending")
    ]
    return "\n".join(lines)


def _device_row(d: dict[str, Any]) -> list[str]:
    pid = d["pid"]
    numbers = ["-"] * 5
    if pid is not None:
        sizes = size(d["read_bytes"]), size(d["written_bytes"])
        numbers = [str(d["requests"]), *sizes, str(d["errors"]), str(d["fids"])]
    name = f"{d['domid']}/{d['devid']}"
    state = "failed" if d["phase"] == "failed" else d["state"]
    return [name, d["guest"], d["tag"], d["export"], d["access"], state, str(pid or "-"), *numbers]


def size(count: int) -> str:
    """Bytes for people: 1536 -> 1.5K."""
    value = float(count)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            return f"{value:.0f}{unit}" if unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    raise AssertionError


def table(rows: Sequence[Sequence[str]], right: int) -> list[str]:
    """Aligned columns, two spaces between them; from column right on they are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i >= right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
