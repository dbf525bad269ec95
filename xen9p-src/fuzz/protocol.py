"""Fuzzes the server: mutated conversations on rings in memory, driven by coverage of the C data plane."""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz.cover import Cover
from fuzz.mutate import Mutator
from fuzz.seeds import record_all
from fuzz.steps import Conversation, to_text
from fuzz.target import FindingError, Target

ROUND = 50  # conversations between two looks at what the process holds
FDS_SLACK, THREADS_SLACK = 2, 0
RSS_SLACK = 150 << 20  # bytes; a sanitizer's quarantine and the corpus grow in the beginning
REPORT = 10.0


@dataclass
class Totals:
    """What a run has done. Messages are those that the server took off its rings."""

    messages: int = 0
    conversations: int = 0
    ended: int = 0
    corpus: int = 0
    edges: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """One line for people."""
        rate = self.messages / self.seconds if self.seconds else 0
        return (
            f"{self.messages} messages in {self.conversations} conversations, {self.ended} of them ended by the server,"
            f" {self.edges} edges, corpus of {self.corpus}, {self.seconds:.0f} s, {rate:.0f} messages/s"
        )


@dataclass(frozen=True)
class Finding:
    """What a conversation brought to light."""

    what: str
    conversation: Conversation


class Held:
    """What the process holds: descriptors, threads, memory. It must not grow."""

    def __init__(self) -> None:
        self.fds, self.threads, self.rss = self._now()

    @staticmethod
    def _now() -> tuple[int, int, int]:
        fds = len(list(Path("/proc/self/fd").iterdir()))
        rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        return fds, threading.active_count(), rss

    def check(self) -> None:
        """Raises FindingError for what has grown."""
        fds, threads, rss = self._now()
        if fds > self.fds + FDS_SLACK:
            raise FindingError(f"{fds} descriptors are open, {self.fds} in the beginning")
        if threads > self.threads + THREADS_SLACK:
            raise FindingError(f"{threads} threads run, {self.threads} in the beginning")
        if rss > self.rss + RSS_SLACK:
            raise FindingError(f"{rss >> 20} MiB of memory, {self.rss >> 20} MiB in the beginning")


def fuzz(
    *, seed: int, messages: int, seconds: float, cover: Cover, say: Callable[[str], None] = lambda _: None
) -> tuple[Totals, Finding | None]:
    """Runs until so many messages or seconds are over, or something is found."""
    sys.setswitchinterval(0.0002)  # the server's Python threads and ours take turns all the time
    totals = Totals()
    target = Target(Path(tempfile.mkdtemp(prefix="xen9p-fuzz-")))
    corpus = record_all(target)
    mutator = Mutator(random.Random(seed), corpus)
    cover.take()
    began = said = time.monotonic()
    held: Held | None = None
    tried: list[Conversation] = list(corpus)
    finding = None
    try:
        while totals.messages < messages and totals.seconds < seconds:
            conversation = tried.pop() if tried else mutator.next()
            try:
                outcome = target.run(conversation)
                totals.messages += outcome.messages
                totals.conversations += 1
                totals.ended += outcome.verdict != 0
                if totals.conversations % ROUND == 0:
                    target.check_surroundings()
                    target.clean()
                    held = held or Held()
                    held.check()
            except FindingError as error:
                finding = Finding(str(error), conversation)
                break
            if cover.take():
                (mutator.short if outcome.verdict else corpus).append(conversation)
            totals.seconds = time.monotonic() - began
            totals.corpus, totals.edges = len(corpus) + len(mutator.short), cover.total()
            if time.monotonic() - said > REPORT:
                said = time.monotonic()
                say(totals.line())
        target.check_surroundings()
    finally:
        if finding is None:
            target.close()
    return totals, finding


def replay(conversation: Conversation) -> Finding | None:
    """Runs one conversation a few times, for what it brings to light may be a matter of timing."""
    target = Target(Path(tempfile.mkdtemp(prefix="xen9p-fuzz-")))
    try:
        for _ in range(20):
            target.clean()
            target.run(conversation)
            target.check_surroundings()
    except FindingError as error:
        return Finding(str(error), conversation)
    target.close()
    return None


def save(finding: Finding, folder: Path) -> Path:
    """Writes a finding down so that replay() can have it again; the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"finding-{int(time.time())}.txt"
    path.write_text(to_text(finding.conversation))
    print(f"error: {finding.what}", file=sys.stderr)
    return path
