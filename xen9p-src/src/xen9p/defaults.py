"""What options and files are when nobody says otherwise, apart from the modules that use it.

The command builds all of its options before it knows which of these modules it needs, and on an emulated host each
import is felt: the policy and the codec took half of the 2 s that `xen9p status` needed to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

POLICY: Final = Path("/etc/xen9p/policy.toml")
RUNTIME: Final = Path("/run/xen9p")
PROFILES: Final = Path("/var/lib/xen9p/cache")
UNITS: Final = Path("/etc/systemd/system")
KEY_NAME: Final = "key"
LEAST_TERM: Final = 0.5
MOST_TERM: Final = 60.0
"""Seconds of a lease session's term. Others wait as long for a client that is gone."""
