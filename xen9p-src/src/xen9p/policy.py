"""Which guest may have which export, under which tag, and how: the TOML policy, typed and checked.

version = 1
[exports.home]
path = "/srv/xen9p/home"
[[rules]]
guest = "g*"        # a name or shell pattern; or uuid = "..."
export = "home"
tag = "home"        # default: the export's name
access = "ro"       # or "rw"; default "ro"
attach = "auto"     # or "manual"; default "auto"
frontend = "kernel" # or "user": for xen9p in the guest, not for its kernel; default "kernel"
"""

from __future__ import annotations

import difflib
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from xen9p.errors import PolicyError

DEFAULT_PATH: Final = Path("/etc/xen9p/policy.toml")
VERSION: Final = 1

# Tags and export names end up in XenStore, in mount tables, in log lines and in file names.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")
_GUEST: Final = re.compile(r"[A-Za-z0-9._*?\[\]!:+@-]{1,255}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME_HELP: Final = "use 1 to 31 letters, digits, '.', '_' or '-', beginning with a letter or digit"


@dataclass(frozen=True, slots=True)
class Export:
    """A directory tree with a name."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Rule:
    """One [[rules]] table. Exactly one of guest (name or shell pattern) and uuid (lower case) is set."""

    guest: str | None
    uuid: str | None
    export: str
    tag: str
    readonly: bool
    auto: bool
    frontend: str = "kernel"

    def matches(self, guest_name: str, uuid: str) -> bool:
        """Whether the rule speaks of this guest."""
        if self.uuid is not None:
            return self.uuid == uuid.lower()
        return self.guest is not None and fnmatchcase(guest_name, self.guest)

    @property
    def subject(self) -> str:
        """Whom the rule is about, for messages."""
        return f'guest "{self.guest}"' if self.guest is not None else f"uuid {self.uuid}"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a rule gives to one guest."""

    export: str
    path: Path
    tag: str
    readonly: bool
    auto: bool
    frontend: str = "kernel"
    """Who serves the guest's end: "kernel" (v9fs) or "user" (our own client)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy file that passed every check."""

    exports: Mapping[str, Export] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    source: str = ""

    def resolve(self, guest_name: str, uuid: str) -> list[Grant]:
        """Every grant for a guest in the order of the rules; where tags repeat, the first rule wins."""
        grants: dict[str, Grant] = {}
        for rule in self.rules:
            if rule.matches(guest_name, uuid) and rule.tag not in grants:
                path = self.exports[rule.export].path
                grants[rule.tag] = Grant(rule.export, path, rule.tag, rule.readonly, rule.auto, rule.frontend)
        return list(grants.values())


def load(path: Path = DEFAULT_PATH, *, check_paths: bool) -> Policy:
    """The policy in a file. PolicyError carries one line for every problem found.

    Args:
        path: the TOML file.
        check_paths: whether a path that is missing makes the policy wrong. To its author it does (`xen9p policy
            check`); to the service it does not: one directory that is gone must cost its own guests and no others.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise PolicyError(f"{path} does not exist", "create it, or name another with --policy") from None
    except UnicodeDecodeError:
        raise PolicyError(f"{path} is not UTF-8", "save it as UTF-8 text") from None
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror}", "run as root") from None
    policy = parse(text, str(path))
    if check_paths:
        _raise(str(path), missing_paths(policy))
    return policy


def parse(text: str, source: str = "policy") -> Policy:
    """The policy in a string, without a look at the file system."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{source}: {_one_line(error)}", "see https://toml.io") from None
    return from_document(document, source)


def from_document(document: dict[str, Any], source: str = "policy") -> Policy:
    """The policy in a document that TOML, or something else, has been read into; no look at the file system."""
    parser = _Parser()
    policy = parser.policy(document, source)
    _raise(source, parser.problems)
    return policy


def missing_paths(policy: Policy) -> list[str]:
    """What is wrong with the exports' paths on this machine now, a line each."""
    return [problem for export in policy.exports.values() for problem in path_problems(export)]


def path_problems(export: Export) -> list[str]:
    """What is wrong with an export's path on this machine now; nothing when it can be served."""
    try:
        mode = export.path.stat().st_mode
    except FileNotFoundError:
        return [f"export {export.name}: {export.path} does not exist (create it or correct the path)"]
    except OSError as error:
        return [f"export {export.name}: {export.path}: {error.strerror} (correct the path)"]
    if not stat.S_ISDIR(mode):
        return [f"export {export.name}: {export.path} is not a directory (an export is a directory tree)"]
    return []


def _raise(source: str, problems: Iterable[str]) -> None:
    lines = [f"{source}: {' '.join(p.split())}" for p in problems]
    if lines:
        raise PolicyError("\n".join(lines))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Parser:
    """Collects every problem instead of stopping at the first."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def policy(self, document: dict[str, Any], source: str) -> Policy:
        self._known(document, "the file", ("version", "exports", "rules"))
        version = document.get("version")
        if version is None:
            self.problems.append(f"version is missing (begin the file with: version = {VERSION})")
        elif version != VERSION or isinstance(version, bool):
            self.problems.append(f"version is {version!r} (this xen9p reads version = {VERSION})")
        exports = self._exports(document.get("exports", {}))
        rules = self._rules(document.get("rules", []), exports)
        self._duplicates(rules)
        return Policy(exports, tuple(rules), source)

    def _exports(self, tables: object) -> dict[str, Export]:
        if not isinstance(tables, dict):
            self.problems.append("exports is not a table (write [exports.NAME] and below it path = ...)")
            return {}
        exports = {}
        for name, table in tables.items():
            where = f"export {name}"
            if not _NAME.fullmatch(name):
                self.problems.append(f"export {name!r}: bad name ({_NAME_HELP})")
                continue
            # An export that is wrong in itself stays known, so that its rules do not complain as well.
            exports[name] = Export(name, Path("/"))
            if not isinstance(table, dict):
                self.problems.append(f"{where} is not a table (write [exports.{name}])")
                continue
            self._known(table, where, ("path",))
            path = self._string(table, "path", where)
            if path is None:
                continue
            if not path.startswith("/"):
                self.problems.append(f'{where}: path "{path}" is relative (write it from / on)')
            elif ".." in path.split("/") or "\0" in path:
                self.problems.append(f'{where}: path "{path}" has a component ".." or NUL (write it plainly)')
            else:
                exports[name] = Export(name, Path(path))
        return exports

    def _rules(self, tables: object, exports: dict[str, Export]) -> list[Rule]:
        if not isinstance(tables, list):
            self.problems.append("rules is not a list of tables (write [[rules]] with two brackets)")
            return []
        rules = (self._rule(table, number, exports) for number, table in enumerate(tables, 1))
        return [rule for rule in rules if rule is not None]

    def _rule(self, table: object, number: int, exports: dict[str, Export]) -> Rule | None:
        where = f"rule {number}"
        if not isinstance(table, dict):
            self.problems.append(f"{where} is not a table (write [[rules]])")
            return None
        before = len(self.problems)
        self._known(table, where, ("guest", "uuid", "export", "tag", "access", "attach", "frontend"))
        guest, uuid = self._subject(table, where)
        export = self._string(table, "export", where)
        if export is not None and export not in exports:
            hint = _closest(export, exports) or f"add [exports.{export}] with its path"
            self.problems.append(f'{where}: unknown export "{export}" ({hint})')
        tag = self._string(table, "tag", where, default=export)
        if tag is not None and not _NAME.fullmatch(tag):
            self.problems.append(f'{where}: bad tag "{tag}" ({_NAME_HELP})')
        access = self._choice(table, "access", where, ("ro", "rw"))
        attach = self._choice(table, "attach", where, ("auto", "manual"))
        frontend = self._choice(table, "frontend", where, ("kernel", "user"))
        if len(self.problems) > before or export is None or tag is None:
            return None
        return Rule(guest, uuid, export, tag, access == "ro", attach == "auto", frontend)

    def _subject(self, table: dict[str, Any], where: str) -> tuple[str | None, str | None]:
        if ("guest" in table) == ("uuid" in table):
            said = "both guest and uuid" if "guest" in table else "neither guest nor uuid"
            self.problems.append(f"{where}: {said} (name exactly one of them)")
            return None, None
        if "guest" in table:
            guest = self._string(table, "guest", where)
            if guest is not None and not _GUEST.fullmatch(guest):
                self.problems.append(f'{where}: bad guest "{guest}" (write a name or shell pattern)')
            return guest, None
        uuid = self._string(table, "uuid", where)
        if uuid is None:
            return None, None
        if not _UUID.fullmatch(uuid.lower()):
            self.problems.append(f'{where}: bad uuid "{uuid}" (copy it from: xl list -v)')
            return None, None
        return None, uuid.lower()

    def _duplicates(self, rules: list[Rule]) -> None:
        """Two rules that give one guest the same tag. Two different patterns may overlap unseen."""
        for i, second in enumerate(rules):
            for first in rules[:i]:
                if first.tag == second.tag and _same_guest(first, second):
                    self.problems.append(
                        f'tag "{second.tag}" is given twice to {second.subject}: export {first.export} '
                        f"and export {second.export} (give each its own tag)"
                    )

    def _known(self, table: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
        for key in table:
            if key not in keys:
                hint = _closest(key, keys) or f"known here: {', '.join(keys)}"
                self.problems.append(f'{where}: unknown key "{key}" ({hint})')

    def _string(self, table: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str | None:
        value = table.get(key, default)
        if isinstance(value, str) and value:
            return value
        if key in table:
            self.problems.append(f"{where}: {key} is {value!r} (write a string that is not empty)")
        elif value is None and key != "tag":  # the tag's default is the export, complained about already
            self.problems.append(f"{where}: {key} is missing (add {key} = ...)")
        return None

    def _choice(self, table: Mapping[str, Any], key: str, where: str, choices: tuple[str, ...]) -> str:
        value = table.get(key, choices[0])
        if value not in choices or not isinstance(value, str):
            wanted = " or ".join(f'"{c}"' for c in choices)
            self.problems.append(f"{where}: {key} is {value!r} (write {wanted})")
            return choices[0]
        return value


def _same_guest(first: Rule, second: Rule) -> bool:
    if first.guest is None or second.guest is None:
        return first.uuid is not None and first.uuid == second.uuid
    return fnmatchcase(first.guest, second.guest) or fnmatchcase(second.guest, first.guest)


def _closest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f'did you mean "{close[0]}"?' if close else ""
