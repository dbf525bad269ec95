"""Guides: Markdown with fenced blocks of commands that say where they run, so that a test can run what is printed.

A block begins with ```` ```console PLACE ```` and holds commands alone, as a student types them. PLACE is host, guest,
guest2 and so on, or controller for the machine that the lab was started from. `fails` after it says that the last
command is meant to fail. All blocks of a place run in one shell, in their order, as in a terminal that stays open.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from labkit.course import REPOSITORY
from labkit.errors import LabError, SpecError
from labkit.spec import CheckSpec, Lab
from labkit.transport import System

CONTROLLER: Final = "controller"
_FENCE: Final = re.compile(r"^```console(?:[ \t]+(.*))?$")
_PLACE: Final = re.compile(r"host|guest([2-9])?|controller")
_TITLES: Final = {"host": "host (dom0)", "guest": "guest", "controller": "your own machine"}
_SECONDS: Final = 180.0


@dataclass(frozen=True, slots=True)
class Block:
    """Commands; *line* is where they begin in the file."""

    place: str
    commands: str
    fails: bool
    line: int


def blocks(text: str, name: str) -> list[Block]:
    """All blocks of commands in a text. SpecError names the line of one that does not say where it runs."""
    found: list[Block] = []
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        match = _FENCE.match(lines[number])
        if match is None:
            number += 1
            continue
        begin = number + 1
        words = (match[1] or "").split()
        if not words or not _PLACE.fullmatch(words[0]) or words[1:] not in ([], ["fails"]):
            raise SpecError(
                f"{name}:{begin}: ```console needs a place: host, guest, guest2 or controller; then maybe fails"
            )
        try:
            end = lines.index("```", begin)
        except ValueError:
            raise SpecError(f"{name}:{begin}: this block has no end") from None
        found.append(Block(words[0], "\n".join(lines[begin:end]) + "\n", words[1:] == ["fails"], begin + 1))
        number = end + 1
    return found


@dataclass(frozen=True, slots=True)
class Ran:
    """How a block went."""

    block: Block
    ok: bool
    output: str
    seconds: float


class Terminal:
    """A shell at a place that stays open, as a student's does."""

    def __init__(self, command: list[str], place: str) -> None:
        self._place = place
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        # Over ssh the two are different streams, and what comes first is not seen first.
        assert self._process.stdin is not None
        self._process.stdin.write(b"exec 2>&1\n")

    def type(self, commands: str, seconds: float = _SECONDS) -> tuple[bool, bool, str]:
        """Runs commands; whether all of them and whether the last one worked, and what they printed."""
        token = secrets.token_hex(8)
        # Through a file, so that no command reads what comes after it; by `.`, so that variables stay. ERR tells of
        # any command that fails, the status of the last one.
        marker = f"_{token}"
        text = (
            f"_lab_file=$(mktemp); cat >\"$_lab_file\" <<'{marker}'\n{commands}{marker}\n"
            f"_lab_failed=0; trap '_lab_failed=1' ERR; . \"$_lab_file\" </dev/null; _lab_last=$?; trap - ERR\n"
            f'rm -f "$_lab_file"; echo; echo "{token} $_lab_failed $_lab_last"\n'
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise LabError(f"{self._place}: the shell has ended") from None
        out = self._until(token.encode(), time.monotonic() + seconds)
        before, _, after = out.decode(errors="replace").rpartition(token)
        failed, last = (after.split() + ["1", "1"])[:2]
        return failed == "0", last == "0", before.rstrip("\n")

    def _until(self, token: bytes, end: float) -> bytes:
        assert self._process.stdout is not None
        out = b""
        while not re.search(re.escape(token) + rb" \d+ \d+\n", out):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise LabError(f"{self._place}: no end in time; it said: {out[-200:].decode(errors='replace')!r}")
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                raise LabError(f"{self._place}: the shell has ended; it said: {out[-200:].decode(errors='replace')!r}")
            out += part
        return out

    def close(self) -> None:
        """Ends the shell."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGHUP)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def execute(text: str, name: str, system: System, environment: Mapping[str, str]) -> Iterator[Ran]:
    """Runs all blocks of a text as they are printed, and yields how each went.

    Args:
        environment: variables of the shell on the controller.
    """
    terminals: dict[str, Terminal] = {}
    try:
        for block in blocks(text, name):
            if block.place not in terminals:
                local = ["env", *(f"{k}={v}" for k, v in environment.items()), "bash"]
                command = local if block.place == CONTROLLER else system.shell(block.place)
                terminals[block.place] = Terminal(command, block.place)
            began = time.monotonic()
            everything, last, output = terminals[block.place].type(block.commands)
            ok = not last if block.fails else everything
            yield Ran(block, ok, output, time.monotonic() - began)
    finally:
        for terminal in terminals.values():
            terminal.close()


def follow(text: str, name: str, system: System, environment: Mapping[str, str], say: Callable[[Ran], None]) -> None:
    """Runs all blocks. LabError at the first one that does not go as printed."""
    for ran in execute(text, name, system, environment):
        say(ran)
        if not ran.ok:
            what = "was meant to fail and did not" if ran.block.fails else "failed"
            said = ran.output.strip().splitlines()[-3:]
            raise LabError(f"{name}:{ran.block.line}: on {ran.block.place} {what}: {' | '.join(said)}")


# The page of the site.


def page(lab: Lab) -> str:
    """The guide as a page of the site: what lab.yml says around what guide.md says. Its solution is in neither."""
    body = re.sub(r"(?m)^```console[ \t]+(\S+)[^\n]*$", _titled, lab.read("guide.md"))
    head = [
        f"# {lab.number}. {lab.title}\n",
        f"{lab.summary}\n",
        f"*{lab.minutes} minutes; {_guests(lab.guests)}.*\n",
        "Afterwards you can\n",
        *(f"- {objective}" for objective in lab.objectives),
        "",
        "```sh\n" + f"./lab start {lab.name}\n" + "```\n",
    ]
    return "\n".join([*head, *_values(lab), body.strip(), "", *_rubric(lab)])


def _guests(count: int) -> str:
    return "no guest" if count == 0 else "one guest" if count == 1 else f"{count} guests"


def _titled(match: re.Match[str]) -> str:
    place = match[1]
    return f'```sh title="{_TITLES.get(place, place)}"'


def _values(lab: Lab) -> list[str]:
    shown = [value for value in lab.values if not value.hidden]
    if not shown:
        return []
    lines = [
        "## Values of your own\n",
        f"`. lab-values {lab.name}`, on host or guest, sets these variables and goes to your folder. They are "
        "not the same for anybody else.\n",
        "| variable | what it is |",
        "| --- | --- |",
    ]
    return [*lines, *(f"| `${value.name}` | {value.about} |" for value in shown), ""]


def _rubric(lab: Lab) -> list[str]:
    lines = [
        "## What is checked\n",
        f"`./lab check {lab.name}` at any time; `./lab hint {lab.name} CHECK` where you are stuck.\n",
        "| check | what is wanted | points | after | hints |",
        "| --- | --- | --- | --- | --- |",
    ]
    for check in lab.checks:
        needs = ", ".join(f"`{name}`" for name in check.needs)
        lines.append(
            f"| `{check.name}` | {check.title}{_lasting(check)} | {check.points} | {needs} | {_costs(check)} |"
        )
    return [*lines, ""]


def _lasting(check: CheckSpec) -> str:
    return " (once is enough)" if check.counts == "once" else ""


def _costs(check: CheckSpec) -> str:
    return ", ".join("free" if hint.cost == 0 else f"-{hint.cost}" for hint in check.hints)
