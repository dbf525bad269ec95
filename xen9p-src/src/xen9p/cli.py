"""The xen9p command."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import IO, Any, Final

from xen9p.errors import Xen9pError
from xen9p.parser import build_parser

_UNITS: Final = ("B", "K", "M", "G", "T")
# fmt: off
_HEAD: Final = (
    "DEVICE", "GUEST", "TAG", "EXPORT", "ACCESS", "STATE",
    "WORKER", "REQUESTS", "READ", "WRITTEN", "ERRORS", "FIDS",
)
# fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 if all is well, 1 if it failed, 2 for wrong usage, 78 for a bad policy."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(words[0] if words else "").parse_args(words)
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
        case "status" | "attach" | "detach":
            _ask(args)
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
        case _:
            from xen9p.file_commands import run as work_on_files  # noqa: PLC0415

            return work_on_files(args)
    return 0


def _ask(args: argparse.Namespace) -> None:
    """What the supervisor does or knows."""
    from xen9p import control  # noqa: PLC0415

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
            wait=args.wait or 0.0,
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
