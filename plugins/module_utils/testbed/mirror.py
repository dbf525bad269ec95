"""Where the controller itself gets Debian from: its own apt sources, one-line or deb822."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def sources(suite: str, given: str = "") -> list[str]:
    """Return what mmdebstrap takes as the source of *suite*: *given*, or what the controller itself is set up with.

    Empty (mmdebstrap's own choice) when the controller is not Debian.
    """
    if given:
        return [given]
    archive = debian_mirror(suite)
    return debian_sources(suite) or ([archive] if archive else [])


def debian_mirror(
    suite: str, apt_dir: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")
) -> str | None:
    """Return the URI of the main archive that a Debian controller uses, or None when it is not Debian.

    A source that lists *suite* itself is preferred; else the first one whose suite is no security archive.
    """
    if "debian" not in _os_ids(os_release):
        return None
    found: list[tuple[str, str]] = []
    for uri, name, components in _sources(apt_dir):
        security = "security" in name or "security" in uri
        if "main" not in components or security or not uri.startswith(("http://", "https://", "file:")):
            continue
        if name == suite:
            return uri
        if name.startswith(suite) or _is_debian_archive(uri):
            found.append((uri, name))
    return found[0][0] if found else None


def debian_sources(
    suite: str, apt_dir: Path = Path("/etc/apt"), os_release: Path = Path("/etc/os-release")
) -> list[str]:
    """Return apt's lines for *suite* with the updates and security fixes that the controller itself uses.

    Empty when the controller is not Debian, or gets another release: then the tool's own choice is better.
    """
    if "debian" not in _os_ids(os_release):
        return []
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    found = {name: uri for uri, name, components in _sources(apt_dir) if name in wanted and "main" in components}
    return [f"deb {found[name]} {name} main" for name in wanted if name in found] if suite in found else []


def _is_debian_archive(uri: str) -> bool:
    """Tell the distribution's own archive from a vendor's, which also may have a component `main`."""
    return uri.rstrip("/").endswith("/debian")


def _os_ids(os_release: Path) -> set[str]:
    try:
        text = os_release.read_text()
    except OSError:
        return set()
    return {line.partition("=")[2].strip().strip('"') for line in text.splitlines() if line.startswith("ID=")}


def _sources(apt_dir: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (uri, suite, components) of every enabled binary source."""
    one_line = [apt_dir / "sources.list", *sorted(apt_dir.glob("sources.list.d/*.list"))]
    for path in one_line:
        if path.is_file():
            yield from _parse_one_line(path.read_text(errors="replace"))
    for path in sorted(apt_dir.glob("sources.list.d/*.sources")):
        yield from _parse_deb822(path.read_text(errors="replace"))


def _parse_one_line(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for raw in text.splitlines():
        words = raw.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        rest = words[1:]
        if rest and rest[0].startswith("["):
            while rest and not rest[0].endswith("]"):
                rest.pop(0)
            rest = rest[1:]
        if len(rest) >= 3:
            yield rest[0].rstrip("/"), rest[1], rest[2:]


def _parse_deb822(text: str) -> Iterator[tuple[str, str, list[str]]]:
    for stanza in _stanzas(text):
        if "deb" not in stanza.get("types", "").split() or stanza.get("enabled", "yes").lower() == "no":
            continue
        for uri in stanza.get("uris", "").split():
            for suite in stanza.get("suites", "").split():
                yield uri.rstrip("/"), suite, stanza.get("components", "").split()


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    fields: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0].isspace() and last:
            fields[last] += " " + line.strip()
        else:
            name, _, value = line.partition(":")
            last = name.strip().lower()
            fields[last] = value.strip()
