"""The benchmark's own rules: a marked block at the end of the host's policy, while the benchmark runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from .host import BenchError, run
from .settings import FILES, FULL, NINEP, Settings
from .sides import FUSE, chosen

BEGIN, END = "# BEGIN benchmark\n", "# END benchmark\n"


def block(given: Settings) -> str:
    """Return the rules: a root by itself, and directories that are attached by hand."""
    exports = {"bench-root": given.root, "bench-ours": given.area / "ours"}
    root = _rule(NINEP, "bench-root", "root", "auto") + 'checks = "guest"\nspecial = true\n'
    if given.root_cache:
        root += f"cache = {{{', '.join(f'{key} = {json.dumps(value)}' for key, value in given.root_cache.items())}}}\n"
    rules = [root, _rule(FILES, "bench-ours", "ours", "manual")]
    for side in chosen(given):
        if side.served == "xen9p":
            exports[f"bench-{side.name}"] = given.area / side.name
            more = 'frontend = "user"\n' if side.how == FUSE else ""
            rules.append(_rule(FULL, f"bench-{side.name}", side.name, "manual") + more)
    named = [f'[exports.{name}]\npath = "{path}"\n' for name, path in exports.items()]
    return BEGIN + "\n".join([*named, *rules]) + END


def _rule(guest: str, export: str, tag: str, attach: str) -> str:
    return f'''[[rules]]
guest = "{guest}"
export = "{export}"
tag = "{tag}"
access = "rw"
attach = "{attach}"
'''


def without_block(text: str) -> str:
    """Return a policy as it was before the benchmark."""
    before, mark, rest = text.partition(BEGIN)
    return before + rest.partition(END)[2] if mark else text


def allow(given: Settings) -> None:
    """Add the rules and have them in force."""
    path = Path(given.policy)
    if not path.is_file():
        raise BenchError(f"{path} is missing: run site.yml first, so that xen9pd runs on the host")
    _replace(path, without_block(path.read_text()) + block(given))
    run("systemctl", "reload", "xen9pd.service")


def forbid(given: Settings) -> bool:
    """Take the rules away again; whether there were any."""
    path = Path(given.policy)
    text = path.read_text() if path.is_file() else ""
    if BEGIN not in text:
        return False
    # What was learned of boots belongs to a tree that goes now, too.
    subprocess.run(["xen9p", "cache", "forget", "bench-root"], capture_output=True, check=False)
    _replace(path, without_block(text))
    run("systemctl", "try-reload-or-restart", "xen9pd.service")  # one that does not run needs no telling
    return True


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.bench")
    partial.write_text(text)
    partial.chmod(0o644)
    try:
        run("xen9p", "policy", "check", str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
