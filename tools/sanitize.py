"""Build the C data plane with a sanitizer of gcc, and run its unit tests (or a fuzzer) on it.

`address` is AddressSanitizer with LeakSanitizer and UndefinedBehaviorSanitizer, `thread` is ThreadSanitizer. CPython
itself is not instrumented: the sanitizer's library comes first by LD_PRELOAD. What it finds ends the run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "xen9p-src"
BUILD = SOURCE / "build"
SUPPRESSIONS = SOURCE / "sanitize"

FLAGS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
COVERAGE = "-fsanitize-coverage=trace-pc"
"""Has gcc call __sanitizer_cov_trace_pc() in each basic block; xen9p-src/fuzz/cover.c counts them."""
IN_C = (
    "ring", "ring_room", "server", "client", "limits", "races", "threats", "flush", "locks", "xattr", "users", "rates",
    "auth", "pause", "leases", "streams", "origin", "prefetch",
)  # fmt: skip
"""The tests that run C for the most part; the others are left out where time is short."""
BROKEN = ("LeakSanitizer has encountered a fatal error", "ThreadSanitizer failed to allocate")
"""What a sanitizer says when it has found nothing and broken down itself: its tracer met a thread that began or ended,
or addresses at random left no room for its shadow memory. Both are rare, and pass at the next try."""
TRIES = 3
WITH_PROCESSES = {"thread": "not two_processes and not confined"}
"""What of these ThreadSanitizer of gcc 12 does not stand: threads in the child of a process that has threads, and now
and then a second process (it finds no room for its shadow memory)."""
LIBRARY = {"address": "libasan.so", "thread": "libtsan.so"}


def build(kind: str, coverage: bool = False) -> Path:
    """Build the package with a sanitizer below build/, and return the folder to import it from.

    Raises:
        SystemExit: with the compiler's words, if it does not compile.
    """
    flags = [*FLAGS[kind], *([COVERAGE] if coverage else [])]
    base = BUILD / (f"{kind}-coverage" if coverage else kind)
    env = {
        **os.environ,
        "CFLAGS": " ".join([*flags, "-fno-omit-frame-pointer", "-g"]),
        "LDFLAGS": FLAGS[kind][0],
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(base), "--build-lib", str(base / "lib")]
    done = subprocess.run(command, cwd=SOURCE, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout + done.stderr, end="", file=sys.stderr)
        raise SystemExit(f"error: the data plane does not compile with {' '.join(flags)}: see above")
    return base / "lib"


def environment(kind: str, library: Path) -> dict[str, str]:
    """Return the environment in which Python runs with the sanitizer and imports the package from *library*."""
    name = LIBRARY[kind]
    preload = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = preload.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"error: gcc has no {name}: install gcc's sanitizers (Debian: libgcc-12-dev)")
    return {
        **os.environ,
        "LD_PRELOAD": path,
        "PYTHONPATH": str(library),
        # Each object by malloc, so that a write past its end is seen.
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=1:quarantine_size_mb=8:malloc_context_size=3:abort_on_error=0:exitcode=99",
        "LSAN_OPTIONS": f"suppressions={SUPPRESSIONS / 'lsan.supp'}:print_suppressions=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": f"suppressions={SUPPRESSIONS / 'tsan.supp'}:exitcode=99:report_signal_unsafe=0",
    }


def pytest_command(library: Path, tests: Sequence[str]) -> list[str]:
    """Return the command that runs the package's tests on the build in *library*; no *tests* means all of them."""
    paths = f"pythonpath={library} {SOURCE} {SOURCE / 'tests'}"
    # What a sanitizer says goes straight to stderr: pytest would keep it for a test that never ends.
    temporary = f"--basetemp={library.parent / 'tmp'}"  # the ordinary tests may run at the same time
    options = ["-q", temporary, "--capture=sys", "-c", str(SOURCE / "pyproject.toml"), "-o", paths]
    return [sys.executable, "-m", "pytest", *options, *(tests or [str(SOURCE / "tests")])]


def main() -> int:
    """Build, run the tests, and return their exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kind", choices=sorted(FLAGS), default="address", help="which sanitizer; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="only the tests that run C for the most part")
    options, rest = parser.parse_known_args()
    library = build(options.kind)
    tests = [str(SOURCE / "tests" / f"test_{name}.py") for name in IN_C] if options.quick else []
    chosen = ["-k", WITH_PROCESSES[options.kind]] if options.quick and options.kind in WITH_PROCESSES else []
    command = pytest_command(library, [*tests, *chosen, *rest])
    for left in reversed(range(TRIES)):
        code, broken = run(command, environment(options.kind, library))
        if not code or not broken or not left:
            break
        print(f"the {options.kind} sanitizer broke down itself: once more", flush=True)
    return code


def run(command: Sequence[str], env: Mapping[str, str]) -> tuple[int, bool]:
    """Run the tests and show what they say. Return their exit code, and whether the sanitizer itself broke down."""
    broken = False
    with subprocess.Popen(
        command, cwd=SOURCE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            broken |= any(words in line for words in BROKEN)
    return process.returncode, broken


if __name__ == "__main__":
    sys.exit(main())
