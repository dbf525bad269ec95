"""Every lab on the host that stands: untouched it scores 0, solved 100, and each wrong turn what lab.yml says.

Its guide runs as it is printed, and a reset brings the start back. Which labs: XEN9P_LABS_TRIED, names with commas
between; all of them by default. The student is the test's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from lab import GUESTS, STATE, Dom0
from labkit import course, grade, guide, setup, spec, state, transport
from labkit.grade import Graded

pytestmark = pytest.mark.long
LABS = [name for name in os.environ.get("XEN9P_LABS_TRIED", "").split(",") if name] or spec.names()
COURSE = course.from_document(
    {
        "course": "tests",
        "seed": "7e" * 32,
        "hosts": {"host": {"ssh_config": str(STATE / "ssh_config")}},
        "students": [{"name": "tester", "host": "host", "guests": list(GUESTS)}],
    }
)
STUDENT = COURSE.student(None)
WHOLE = "from 0 to 100"
# One lab after the other: they share guests, which have little memory for devices.
CASES = [(name, case) for name in LABS for case in (WHOLE, "guide", *(wrong.name for wrong in spec.load(name).wrong))]


class Tried:
    """A lab on the host."""

    def __init__(self, name: str) -> None:
        self.lab = spec.load(name)
        self.system = transport.connect(STUDENT)
        self.setup = setup.Setup(self.lab, STUDENT, self.system, print)

    def fresh(self) -> None:
        """At its start, with nothing remembered: what is there of it is cleared."""
        state.forget(self.system, STUDENT, self.lab.name)
        began = time.monotonic()
        self.setup.start()
        print(f"started in {time.monotonic() - began:.1f} s")

    def follow(self, path: str) -> None:
        """Runs the commands of one of its texts."""
        environment = {"student": STUDENT.name, "lab": self.lab.name}
        guide.follow(self.lab.read(path), f"{self.lab.name}/{path}", self.system, environment, self._ran)

    def _ran(self, ran: guide.Ran) -> None:
        print(f"{ran.seconds:6.1f} s  {ran.block.place}: {ran.block.commands.splitlines()[0]}")

    def grade(self) -> Graded:
        """How it stands. What could not be looked at fails the test: every machine is on."""
        began = time.monotonic()
        done = grade.grade(self.lab, STUDENT, self.system, course=COURSE)
        print(f"graded in {time.monotonic() - began:.1f} s: {done.score:g}")
        for outcome in done.outcomes:
            print(f"  {outcome.seconds:5.1f} s  {outcome.name}: {outcome.status}", outcome.expected, "/", outcome.found)
        assert done.undecided == 0, [(o.name, o.status, o.found, o.trouble) for o in done.outcomes]
        assert done.notes == []
        return done


@pytest.fixture(scope="module")
def begun(dom0: Dom0) -> Iterator[dict[str, Tried]]:
    """The lab that is on the host; none of them afterwards."""
    found: dict[str, Tried] = {}
    yield found
    for one in found.values():
        one.setup.end()


@pytest.fixture
def tried(request: pytest.FixtureRequest, begun: dict[str, Tried]) -> Tried:
    """A lab at its start, and no other."""
    for name in [name for name in begun if name != request.param]:
        begun.pop(name).setup.end()
    one = begun.setdefault(request.param, Tried(request.param))
    one.fresh()
    return one


@pytest.mark.parametrize(
    ("tried", "case"),
    [pytest.param(n, case, marks=[pytest.mark.whole_lab] * (case == WHOLE), id=f"{n}-{case}") for n, case in CASES],
    indirect=["tried"],
)
def test_a_lab(tried: Tried, case: str) -> None:
    if case == WHOLE:
        _solve(tried)
    elif case == "guide":
        tried.follow("guide.md")
    else:
        wrong = next(one for one in tried.lab.wrong if one.name == case)
        if wrong.after == "solution":
            tried.follow("solution/steps.md")
        tried.follow(f"wrong/{wrong.name}.md")
        assert tried.grade().score == wrong.score


def test_labs_beside_each_other(begun: dict[str, Tried], dom0: Dom0) -> None:
    """Another lab that is started or ended is nothing that a reset has to bring back."""
    for name in list(begun):
        begun.pop(name).setup.end()
    first, second = (begun.setdefault(name, Tried(name)) for name in ("tour", "snapshots"))
    first.fresh()
    second.fresh()
    first.setup.reset()
    begun.pop("snapshots").setup.end()
    first.setup.reset()


def _solve(tried: Tried) -> None:
    """Untouched it scores 0, solved 100, and a reset takes the one back to the other."""
    assert tried.grade().score == 0
    tried.follow("solution/steps.md")
    assert tried.grade().score == 100
    print(f"reset in {tried.setup.reset():.1f} s")  # which fails if anything of the solution is left
    again = tried.grade()
    assert sum(outcome.points for outcome in again.outcomes) == 0
    assert all(o.achieved == o.possible for o in again.outcomes), "what was once achieved is remembered"
