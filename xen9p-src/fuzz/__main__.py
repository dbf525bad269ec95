"""`python -m fuzz`: run a fuzzer for so many messages or seconds, or one conversation again. See tools/fuzzing.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fuzz.cover import Cover

COVER = Cover()  # before anything imports the data plane

from fuzz import lifecycle, protocol  # noqa: E402
from fuzz.steps import from_text  # noqa: E402
from fuzz.target import FindingError  # noqa: E402

FINDINGS = Path(__file__).resolve().parents[1] / "build" / "findings"


def main() -> int:
    """Returns 1 if something was found, and says what and where it is kept."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--messages", type=int, default=2**63, help="stop after so many messages to the server")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=1, help="where the decisions come from; default: %(default)s")
    parser.add_argument("--lives", type=int, default=2000, help="lives of devices, in the fuzzer of the state machine")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="only run this conversation again")
    options = parser.parse_args()
    if options.replay:
        try:
            finding = protocol.replay(from_text(options.replay.read_text()))
        except (OSError, ValueError) as error:
            parser.error(f"{options.replay}: {error}")
        print(finding.what if finding else "nothing is found")
        return 1 if finding else 0
    try:
        lives, events = lifecycle.fuzz(seed=options.seed, lives=options.lives)
    except FindingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"lives: {lives} devices, {events} events", flush=True)
    totals, finding = protocol.fuzz(
        seed=options.seed,
        messages=options.messages,
        seconds=options.seconds,
        cover=COVER,
        say=lambda line: print(f"    ... {line}", flush=True),
    )
    print(f"conversations: {totals.line()}")
    if finding is None:
        return 0
    print(f"kept in {protocol.save(finding, FINDINGS)}: run it again with --replay", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
