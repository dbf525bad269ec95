"""Hypercalls, as Xen itself traces them: xentrace records, xenalyze tells, marks of the guest say from when to when.

Sources: xentrace(8), xen/include/public/trace.h. Both programs are Debian's (xen-utils-4.17, xen-utils-common).
A mark is MARK times the hypercall xen_version by the guest, one after the other; the agent makes it by reading
/sys/hypervisor/version/major. Linux makes that hypercall by itself too, but never so many in so short a time.
"""

from __future__ import annotations

import re
import select
import signal
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# TRC_SCHED_MIN says which domain runs where, TRC_PV_ENTRY has each entry into Xen. Parts of a multicall are none.
EVENTS = 0x00221000
# Pages a processor. Xen keeps the size of the first trace after its boot.
BUFFER = 256
# Seconds between two looks into a buffer that is not half full, and after which xentrace ends whatever happens.
POLL, LIMIT = 2, 900
MARK = 64
"""How many hypercalls a mark has."""
_NEAR, _FEW = 12, 16
"""Hypercalls of the guest between two of a mark at the most; fewer together than so many are no part of a mark."""

_CALL = re.compile(r"^\s*(\d+\.\d+) \S+ d(\d+)v\d+ hypercall +[0-9a-f]+ \((\w+)\) ?(.*)$")
_GRANTS = re.compile(r"^(\w+) (\d+) ops")


class XenTraceError(Exception):
    """One line: why Xen's trace cannot be used."""


@dataclass(frozen=True)
class Call:
    """A hypercall: seconds since the trace began, whose it is, what it is, and more of it ("copy 2 ops")."""

    time: float
    domain: int
    name: str
    detail: str


@contextmanager
def recording(file: Path) -> Iterator[None]:
    """Trace into *file*.

    Raises:
        XenTraceError: xentrace cannot.
    """
    options = ["-D", "-e", f"{EVENTS:#x}", "-S", str(BUFFER), "-s", str(POLL * 1000), "-T", str(LIMIT)]
    try:
        process = subprocess.Popen(
            ["xentrace", *options, str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError as error:
        raise XenTraceError("xentrace is not installed: it belongs to Debian's xen-utils") from error
    with process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline() if select.select([process.stdout], [], [], 20)[0] else ""
            # It says so when it has told Xen which events are wanted: what comes after it is traced.
            if "change evtmask" not in said:
                raise XenTraceError(f"xentrace: {said.strip() or 'does not begin'}")
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def calls(lines: Iterable[str]) -> list[Call]:
    """The hypercalls in what xenalyze --dump-all prints.

    Raises:
        XenTraceError: Xen had no room for some.
    """
    found = []
    for line in lines:
        if "lost_records" in line:
            raise XenTraceError("Xen's trace buffers were full: some hypercalls are missing")
        if "hypercall" in line and (match := _CALL.match(line)):
            found.append(Call(float(match[1]), int(match[2]), match[3], match[4].strip()))
    return found


def analysed(file: Path) -> list[Call]:
    """The hypercalls of a trace.

    Raises:
        XenTraceError: xenalyze cannot read it.
    """
    command = ["xenalyze", "--dump-all", str(file)]
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            found = calls(process.stdout)
    except FileNotFoundError as error:
        raise XenTraceError("xenalyze is not installed: it belongs to Debian's xen-utils-common") from error
    if process.returncode != 0:
        raise XenTraceError(f"xenalyze ended with exit status {process.returncode}")
    return found


def between_marks(found: Sequence[Call], guest: int) -> list[Call]:
    """The hypercalls of all domains between the guest's two marks.

    Raises:
        XenTraceError: there are not two marks.
    """
    own = [call for call in found if call.domain == guest]
    marks = _marks([index for index, call in enumerate(own) if call.name == "xen_version"])
    if not -_FEW <= len(marks) - 2 * MARK <= _FEW:
        raise XenTraceError(f"the marks in Xen's trace have {len(marks)} hypercalls instead of {2 * MARK}")
    first, last = MARK - 1, len(marks) - MARK
    if last <= first:
        # Some hypercalls of a mark were too far from the others to be taken for it: the work is the widest gap.
        places = range(max(1, last - _FEW), min(len(marks), MARK + _FEW))
        last = max(places, key=lambda place: (marks[place] - marks[place - 1], -abs(place - MARK)))
        first = last - 1
    begin, end = own[marks[first]].time, own[marks[last]].time
    return [call for call in found if begin < call.time < end]


def _marks(indices: Sequence[int]) -> list[int]:
    """Those of the guest's xen_version hypercalls that are close to many others."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and index - groups[-1][-1] <= _NEAR:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [index for group in groups if len(group) >= _FEW for index in group]


def by_name(found: Iterable[Call], domain: int) -> dict[str, int]:
    """Name -> how many of a domain's hypercalls, most first."""
    return dict(Counter(call.name for call in found if call.domain == domain).most_common())


def grants(found: Iterable[Call], domain: int) -> dict[str, int]:
    """What a domain did with grants (copy, map_grant_ref, unmap_grant_ref) -> with how many."""
    counted: Counter[str] = Counter()
    for call in found:
        if call.domain == domain and call.name == "grant_table_op" and (match := _GRANTS.match(call.detail)):
            counted[match[1]] += int(match[2])
    return dict(counted)
