"""How long a guest needs from `xl create` until its sshd answers: root on 9P, and root on a block device."""

from __future__ import annotations

import time
from typing import Any

from . import trees
from .host import BenchError, create, destroy, domains, drop_caches, run
from .settings import BLOCK, NINEP, Settings

# Seconds for dom0 to come to rest before a start is timed.
REST = 3.0


def measure(given: Settings, rounds: int) -> list[dict[str, Any]]:
    """Start both guests in turn, *rounds* times; a sample for each start, with seconds."""
    samples = []
    for number in range(rounds):
        for side, name in (("ours", NINEP), ("block", BLOCK)):
            trees.reset(given)
            drop_caches()
            time.sleep(REST)
            created, answered = create(name, trees.config(given, name), given.address, given.timeout)
            backend = backend_of(domains()[name])
            destroy(name)
            expected = "xen9p" if side == "ours" else "vbd phy"
            if backend != expected:
                raise BenchError(f"the root of {name} is served by {backend}, not by {expected}: see xenstore-ls")
            samples.append(
                {
                    "round": number,
                    "side": side,
                    "created": round(created, 2),
                    "seconds": round(answered, 2),
                    "backend": backend,
                }
            )
    return samples


def backend_of(domid: int) -> str:
    """Return what serves a guest's root: "xen9p", or "vbd" and the type of the block backend."""
    kinds = run("xenstore-list", "/local/domain/0/backend").split()
    for kind in ("vbd", "qdisk"):
        if kind in kinds and str(domid) in run("xenstore-list", f"/local/domain/0/backend/{kind}").split():
            node = f"/local/domain/0/backend/{kind}/{domid}"
            device = run("xenstore-list", node).split()[0]
            return f"{kind} {run('xenstore-read', f'{node}/{device}/type').strip()}"
    if "xen9p" in kinds and str(domid) in run("xenstore-list", "/local/domain/0/backend/xen9p").split():
        return "xen9p"
    return "nothing known"
