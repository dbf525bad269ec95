"""Turn the samples of a benchmark run into JSON with medians and ratios, a table, a page and charts.

Reads what roles/bench measured as JSON from standard input, writes RESULTS.json and the charts beside it, and prints
the table. With --docs, the page and charts of the documentation, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bench_full
import bench_translations
from bench_chart import chart, figure
from bench_stats import BOOT, SIDES, WORKLOADS, ReportError, Result, Spread, summarise

# Bars that the project has set itself.
FILES_BAR = 2.0
BOOT_BAR = 75.0


def table(found: Sequence[Result]) -> str:
    """Return the results as text in columns."""
    rows = [("", *(SIDES[side] for side in ("ours", "theirs")), "ratio", "in each round", SIDES["block"])]
    for item in found:
        if item.name != BOOT:
            rows.append((WORKLOADS[item.name], *(_seconds(item, side) for side in ("ours", "theirs")), *_ratio(item)))
    lines = _columns(rows) if len(rows) > 1 else []
    if boots := [item for item in found if item.name == BOOT]:
        lines += ["", *_columns([("xl create to ssh", "median", "lowest to highest")] + _boot_rows(boots[0]))]
    lines += ["", *verdicts(found)]
    return "\n".join(lines).strip("\n")


def verdicts(found: Sequence[Result]) -> list[str]:
    """Return a line for each bar: held, or by whom it is missed."""
    said = []
    files = [item for item in found if item.name != BOOT and "theirs" in item.ratio]
    if files:
        below = [f"{WORKLOADS[item.name]} ({item.ratio['theirs']:.2f})" for item in files if not _held(item)]
        held = f"missed by: {'; '.join(below)}" if below else "held by all"
        said.append(f"bar: at least {FILES_BAR:g} times as fast as QEMU's backend in each workload: {held}")
    for item in found:
        if item.name == BOOT:
            ours, twin = item.sides["ours"].median, item.sides["block"].median
            held = "held" if ours <= BOOT_BAR and ours < twin else "missed"
            said.append(f"bar: ssh within {BOOT_BAR:g} s, and sooner than the twin on blkback: {held}")
    return said


def page(run: Mapping[str, Any], found: Sequence[Result], name: str) -> str:
    """Return the page of the documentation, in Markdown."""
    machine, settings = run["machine"], run["settings"]
    lines = [
        "# Quick benchmark",
        "",
        "<!-- Written by tools/bench_report.py from a run of `make bench-quick`: changes are lost. -->",
        "",
        f"Measured {run['date']} on {_where(run)}. All figures are from this one run. Under emulation seconds say",
        "little: compare the sides.",
        "",
    ]
    if files := [item for item in found if item.name != BOOT]:
        lines += [
            "## Working with files",
            "",
            f"![Median seconds of the five workloads]({name}-files.svg)",
            "",
            "| workload | xen9p | QEMU's 9P | QEMU's ÷ xen9p | the same, round by round | blkback, ext4 |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for item in files:
            cells = (WORKLOADS[item.name], _seconds(item, "ours"), _seconds(item, "theirs"), *_ratio(item, strong=True))
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_how_files(run, files), ""]
    for item in found:
        if item.name == BOOT:
            lines += [
                "## From `xl create` to ssh",
                "",
                f"![Median seconds until sshd answers]({name}-boot.svg)",
                "",
                "| root | median | lowest to highest |",
                "| --- | ---: | ---: |",
                *(f"| {' | '.join(row)} |" for row in _boot_rows(item)),
                "",
                f"Both roots are copies of one golden tree with one kernel and initramfs, {settings['memory']} MiB and",
                "one processor; over 9P a btrfs snapshot, as a block device an ext4 image on the same btrfs through a",
                f"loop device and blkback. {item.sides['ours'].count} starts each, in turn, each from a fresh copy,",
                "dom0's page cache emptied. Timed in dom0 from the start of `xl create` to the banner of sshd.",
                *_how_learned(settings),
                "",
            ]
    lines += ["## Bars", "", *(f"- {_sentence(line)}" for line in verdicts(found)), "", "## Machine", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in _machine(run, machine)), ""]
    return "\n".join(lines)


def full_page(run: Mapping[str, Any], name: str) -> str:
    """Return the page of the full benchmark, in Markdown."""
    head = [
        f"Measured {run['date']} on {_where(run)}. All figures are from this one run. Under emulation times say",
        "little: compare the sides.",
        *_interruptions(run["full"].get("parts", [])),
        "",
    ]
    return _run_page(run, "Full benchmark", "make bench", head + bench_full.page_parts(run, name))


def _interruptions(parts: Sequence[str]) -> list[str]:
    """Say when a run that was cut off went on; *parts* are the times at which its parts began."""
    if len(parts) < 2:
        return []
    return [f"It was cut off between rounds, and went on: begun {', '.join(parts)}. Each round is whole."]


def translations_page(run: Mapping[str, Any], name: str) -> str:
    """Return the page of the count of translations, in Markdown."""
    head = [
        f"Counted {run['date']} on {_where(run)}. All figures are from this one run.",
        "",
        *([str(run["note"]), ""] if run.get("note") else []),
    ]
    parts = bench_translations.page_parts(run, name)
    return _run_page(run, "Translations, counted", "make translations", head + parts)


def _run_page(run: Mapping[str, Any], title: str, command: str, body: Sequence[str]) -> str:
    """A page with its title, who wrote it, and the machine at its end."""
    written = f"<!-- Written by tools/bench_report.py from a run of `{command}`: changes are lost. -->"
    lines = [f"# {title}", "", written, "", *body, "", "## Machine", "", "| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in _machine(run, run["machine"])), ""])


def _seconds(item: Result, side: str) -> str:
    return f"{figure(item.sides[side].median)} s" if side in item.sides else "-"


def _held(item: Result) -> bool:
    return item.ratio.get("theirs", 0.0) >= FILES_BAR


def _range(spread: Spread) -> str:
    return f"{spread.q1:.1f} to {spread.q3:.1f}"


def _ratio(item: Result, strong: bool = False) -> tuple[str, str, str]:
    if "theirs" not in item.ratio:
        return ("-", "-", _seconds(item, "block"))
    ratio = f"{item.ratio['theirs']:.2f}"
    return (f"**{ratio}**" if strong else ratio, _range(item.rounds["theirs"]), _seconds(item, "block"))


def _boot_rows(item: Result) -> list[tuple[str, str, str]]:
    names = {"ours": "9P through xen9p", "block": "ext4 on blkback"}
    return [
        (
            name,
            f"{figure(item.sides[side].median)} s",
            f"{figure(item.sides[side].low)} to {figure(item.sides[side].high)} s",
        )
        for side, name in names.items()
        if side in item.sides
    ]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _sentence(line: str) -> str:
    words = line.removeprefix("bar: ")
    return words[0].upper() + words[1:] + "."


def _where(run: Mapping[str, Any]) -> str:
    vm = run.get("virtual_machine") or {}
    if not vm:
        return "a host that is no machine of the testbed"
    how = "emulated (TCG, no KVM)" if vm.get("accelerator") == "tcg" else f"accelerated by {vm.get('accelerator')}"
    return f"a nested Xen host of {vm.get('cpus')} processors, {how}"


def _how_files(run: Mapping[str, Any], files: Sequence[Result]) -> list[str]:
    settings, memory = run["settings"], run["files"].get("pss_kib", {})
    said = [
        f"Medians of {files[0].sides['ours'].count} rounds in one guest; the sides take turns within each round, in",
        f"reverse every other round. Both 9P mounts: msize={settings['msize']}, cache={settings['cache']}, directories",
        "of the same btrfs, warm in dom0's page cache. *Round by round* is the middle half of the ratios within",
        "a round. The last column is for comparison: ext4 on a loop file through blkback, with the guest's own page",
        "cache, which the 9P mounts do without here.",
    ]
    if {"worker", "qemu"} <= set(memory):
        said += ["", f"Memory (proportional share): our worker {_mib(memory['worker'])}, QEMU {_mib(memory['qemu'])}"]
        said[-1] += (
            f"; the supervisor, one for all guests, {_mib(memory['supervisor'])}." if "supervisor" in memory else "."
        )
    return said


def _how_learned(settings: Mapping[str, Any]) -> list[str]:
    if not (settings.get("root_cache") or {}).get("prefetch"):
        return []
    return [
        "What the first start from 9P reads is learned, and read ahead of in the later ones, as for all guests that",
        "roles/guest makes (see [Caching](../caching.md#boots)).",
    ]


def _mib(kib: int) -> str:
    return f"{kib / 1024:.1f} MiB"


def _machine(run: Mapping[str, Any], machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    vm = run.get("virtual_machine") or {}
    rows = [
        ("Xen", machine.get("xen")),
        ("kernel of dom0", machine.get("kernel")),
        (
            "kernel of the guest",
            (run.get("full") or run.get("translations") or run.get("files", {})).get("guest_kernel"),
        ),
        ("QEMU behind the rival", machine.get("qemu")),
        ("xen9p", machine.get("xen9p")),
        ("physical processors that Xen sees", machine.get("processors")),
        ("accelerator of the testbed", vm.get("accelerator", "none")),
        ("memory of the guest", f"{machine.get('guest_memory_mib')} MiB"),
        ("store", machine.get("store")),
    ]
    return [(key, str(value)) for key, value in rows if value is not None]


def charts(found: Sequence[Result], name: str) -> dict[str, str]:
    """Return the charts as file name -> SVG."""
    drawn = {}
    if files := [(WORKLOADS[item.name], item) for item in found if item.name != BOOT]:
        drawn[f"{name}-files.svg"] = chart("Seconds, median; shorter is better", files)
    if boots := [("until sshd answers", item) for item in found if item.name == BOOT]:
        drawn[f"{name}-boot.svg"] = chart("Seconds from xl create, median; shorter is better", boots)
    return drawn


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


def main() -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", required=True, type=Path, metavar="FILE.json", help="where the results go")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write the documentation's page, too")
    given = parser.parse_args()
    try:
        run = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **json.load(sys.stdin)}
        name = given.results.stem
        if run.get("translations"):
            found, text = [], bench_translations.table(run)
            drawn, written = bench_translations.charts(run, name), translations_page(run, name)
        elif run.get("full"):
            found, text = bench_full.summarise(run), bench_full.table(run)
            drawn, written = bench_full.charts(run, name), full_page(run, name)
        else:
            found = summarise(run)
            text, drawn, written = table(found), charts(found, name), page(run, found, name)
        run["summary"] = [item.as_dict() for item in found]
        write(given.results.parent, {given.results.name: json.dumps(run, indent=1) + "\n", **drawn})
        if given.docs:
            write(given.docs, {f"{name}.md": written, **drawn})
            if run.get("translations"):
                bench_translations.write_example(given.docs.parent, run)
    except json.JSONDecodeError as error:
        print(f"bench_report: standard input is no JSON ({error}): give it what roles/bench measured", file=sys.stderr)
        return 1
    except (KeyError, TypeError) as error:
        print(f"bench_report: the samples lack {error}: give it what roles/bench measured", file=sys.stderr)
        return 1
    except (ReportError, OSError) as error:
        print(f"bench_report: {error}", file=sys.stderr)
        return 1
    print(text)
    print(f"\nall samples: {given.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
