"""Build the data plane with sanitizers and coverage, and run the fuzzers of xen9p-src/fuzz on it.

Arguments go to the fuzzers: --messages N, --seconds S, --seed N, --lives N, --replay FILE.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from sanitize import BUILD, SOURCE, build, environment


def main(arguments: Sequence[str]) -> int:
    """Build, run, and return the fuzzers' exit code."""
    library = build("address", coverage=True)
    folder = BUILD / "address-coverage"
    sys.path.insert(0, str(SOURCE))
    from fuzz import cover

    env = environment("address", library)
    env["PYTHONPATH"] += f":{SOURCE}"
    env[cover.VARIABLE] = str(cover.build(folder))
    return subprocess.run([sys.executable, "-m", "fuzz", *arguments], cwd=SOURCE, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
