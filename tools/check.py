"""Run the checks of this repository side by side, and print what failed and how long each took.

With `--molecule`, go on with the tests on nested Xen when all checks passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
HEARTBEAT = 10.0
FUZZ_SECONDS = "5"
PACKAGE = "xen9p-src/tests"
# Whole runs on this machine: labs, small benchmarks, tortured mounts, stores that are killed. Longer than a quick check
# may take; make test has them.
LONG = [
    *(f"tests/unit/test_lab_{n}.py" for n in ("engine", "server", "policy", "caching", "scripts")),
    *(f"tests/unit/test_bench_{n}.py" for n in ("cache", "dedup", "full", "snapshot", "translations")),
    *(f"{PACKAGE}/test_{n}.py" for n in ("dedup", "fuse_coherent", "restore", "snapshot", "torture")),
]
# Those that make filesystems and mounts: half of the package's time, so they run beside the others.
STORE = [
    f"{PACKAGE}/test_{n}.py"
    for n in (
        "cache_commands", "caching_worker", "fuse", "origin", "path", "prefetch", "snapshot_commands", "streams",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One check: a command, run in *folder*."""

    name: str
    command: Sequence[str]
    folder: Path = ROOT


@dataclass(frozen=True)
class Outcome:
    """How a step went; *seconds* is wall-clock time."""

    step: Step
    code: int
    output: str
    seconds: float


def build() -> Step:
    """Return the step that compiles the data plane: types, documentation and unit tests import it."""
    return Step("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], ROOT / "xen9p-src")


def checks() -> list[Step]:
    """Return the checks, the slowest first."""
    scripts = [str(path) for path in _tracked() if _is_shell(path)]
    pytest = (tool("pytest"), "-q")
    return [
        # Apart, so that they share the processors.
        Step("package tests", [*pytest, "--junit-xml=junit-package.xml", PACKAGE, *_without(*STORE, *LONG)]),
        Step("store tests", [*pytest, "--junit-xml=junit-store.xml", *STORE]),
        Step("unit tests", [*pytest, "--junit-xml=junit-unit.xml", "tests/unit", *_without(*LONG)]),
        Step("fuzz", [sys.executable, str(ROOT / "tools" / "fuzzing.py"), "--seconds", FUZZ_SECONDS]),
        Step("ansible-lint", [tool("ansible-lint"), "-q", "--offline"]),
        Step("mypy", [tool("mypy")]),
        Step("mypy xen9p", [tool("mypy")], ROOT / "xen9p-src"),
        Step("mkdocs", [tool("mkdocs"), "build", "--strict", "--quiet"]),
        Step("yamllint", [tool("yamllint"), "--strict", "."]),
        Step("shellcheck", ["shellcheck", *scripts]),
        Step("ruff check", [tool("ruff"), "check", "--quiet", "."]),
        Step("ruff format", [tool("ruff"), "format", "--check", "--quiet", "."]),
    ]


def long() -> Step:
    """Return the step that tests what takes long: labs, benchmarks and whole stores."""
    return Step("long tests", [tool("pytest"), "-q", "--junit-xml=junit-long.xml", *LONG])


def sanitized(kind: str, *more: str) -> Step:
    """Return the step that runs unit tests on the data plane built with a sanitizer."""
    return Step(f"{kind} sanitizer", [sys.executable, str(ROOT / "tools" / "sanitize.py"), "--kind", kind, *more])


def tool(name: str) -> str:
    """Return the path of a command of the virtual environment."""
    return str(BIN / name)


def run(step: Step) -> Outcome:
    """Run a step to its end, and keep what it said."""
    began = time.monotonic()
    env = {**os.environ, "PATH": f"{BIN}:{os.environ.get('PATH', '')}", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            step.command,
            cwd=step.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        code, output = done.returncode, done.stdout
    except FileNotFoundError:
        code, output = 127, f"{step.command[0]} is not installed: run tools/bootstrap check"
    return Outcome(step, code, output, time.monotonic() - began)


def run_all(steps: Sequence[Step], workers: int) -> list[Outcome]:
    """Run *steps*, *workers* at a time, and report each as it ends."""
    outcomes: list[Outcome] = []
    over = threading.Event()
    running: set[str] = set()

    def tracked(step: Step) -> Outcome:
        running.add(step.name)
        outcome = run(step)
        running.discard(step.name)
        return outcome

    def heartbeat() -> None:
        while not over.wait(HEARTBEAT):
            print(f"    ... still at it: {', '.join(sorted(running.copy()))}", flush=True)

    threading.Thread(target=heartbeat, daemon=True).start()
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[Outcome]] = [pool.submit(tracked, step) for step in steps]
        for future in as_completed(futures):
            outcome = future.result()
            outcomes.append(outcome)
            report(outcome)
    over.set()
    return outcomes


def report(outcome: Outcome) -> None:
    """Print one line, and for a failure what the tool said."""
    word = "ok" if outcome.code == 0 else "FAILED"
    print(f"{outcome.step.name}: {word} ({outcome.seconds:.1f} s)", flush=True)
    if outcome.code != 0:
        print(outcome.output.rstrip(), flush=True)


def molecule() -> Outcome:
    """Run the tests on nested Xen, with their output as it comes."""
    began = time.monotonic()
    env = {**os.environ, "PATH": f"{BIN}:{os.environ.get('PATH', '')}", "PYTHONUNBUFFERED": "1"}
    step = Step("molecule", [tool("molecule"), "test"])
    code = subprocess.run(step.command, cwd=ROOT, env=env, check=False).returncode
    return Outcome(step, code, "", time.monotonic() - began)


def table(outcomes: Sequence[Outcome], took: float) -> str:
    """Return the times of all steps, the longest first."""
    rows = sorted(outcomes, key=lambda outcome: outcome.seconds, reverse=True)
    lines = [f"  {o.seconds:7.1f} s  {o.step.name}{'' if o.code == 0 else '  FAILED'}" for o in rows]
    return "\n".join(["", "TIME", *lines, f"  {took:7.1f} s  together"])


def main() -> int:
    """Run what the command line asks for; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--molecule", action="store_true", help="go on with the tests on nested Xen")
    # One more than processors: tests wait for clocks and children, too.
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 2) + 1, help="how many at a time")
    options = parser.parse_args()
    began = time.monotonic()
    for stale in ROOT.glob("junit-*.xml"):
        stale.unlink()
    outcomes = run_all([build()], 1)
    if outcomes[0].code == 0:
        outcomes += run_all(checks(), options.jobs)
    if options.molecule and all(outcome.code == 0 for outcome in outcomes):
        outcomes += run_all([long(), sanitized("address", "--quick"), sanitized("thread", "--quick")], 1)
        outcomes.append(molecule())
    print(table(outcomes, time.monotonic() - began))
    failed = [outcome.step.name for outcome in outcomes if outcome.code != 0]
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _tracked() -> list[Path]:
    """Return the files that git knows or would take up, so that caches and builds are left out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def _without(*files: str) -> list[str]:
    return [f"--ignore={file}" for file in files]


def _is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(80)
    return first.startswith(b"#!") and (b"bash" in first or first.rstrip().endswith(b"sh"))


if __name__ == "__main__":
    sys.exit(main())
