"""Which guest may have which export, under which tag, and how: the TOML policy, typed and checked.

version = 1
cache_policy = "xen9p.prefetch_policy:Learned" # or another MODULE:CLASS; see cache_policy.py
[exports.home]
path = "/srv/xen9p/home"
[[rules]]
guest = "g*"        # a name or shell pattern; or uuid = "..."
export = "home"
tag = "home"        # default: the export's name
access = "ro"       # or "rw"; default "ro"
attach = "auto"     # or "manual"; default "auto"
frontend = "kernel" # or "user": for xen9p in the guest, not for its kernel; default "kernel"
keys = "/etc/xen9p/home.keys" # with frontend "user": only to who has one of these keys
checks = "server"   # or "guest": who checks what a user may do; default "server"
identity = "as-is"  # or {squash = {uid = 1000, gid = 1000}}, {map = [[0, 100000, 65536]]}; default "as-is"
groups = "own"      # or "host", or {1000 = [1000, 100]}; default "own"
special = false     # whether device nodes, FIFOs and sockets may be made; default false
quota = {bytes = "2G", files = 100000}
leases = 3          # seconds that a client's lease session goes on without it; default 0: no leases
snapshots = true    # the export's snapshots, read-only, under the tag TAG-snapshots; or another tag; default false
cache = {prefetch = true, share = true, streams = "16M", weight = 100} # see Cache; streams = false: none
[rules.limits]
fids = 10000
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from xen9p import auth, defaults, quota, subvolumes, users
from xen9p.defaults import LEAST_TERM, MOST_TERM
from xen9p.errors import PolicyError, Xen9pError
from xen9p.quota import Quota
from xen9p.sizes import parse_size, size_text
from xen9p.users import MOST_ID, Identity, Range, Users

VERSION: Final = 1

# Tags and export names end up in XenStore, in mount tables, in log lines and in file names.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")
_GUEST: Final = re.compile(r"[A-Za-z0-9._*?\[\]!:+@-]{1,255}")
_POLICY: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,9}")
_RULE_KEYS: Final = (
    "guest", "uuid", "export", "tag", "access", "attach", "frontend", "keys",
    "checks", "identity", "groups", "special", "limits", "quota", "snapshots", "leases", "cache",
)  # fmt: skip
_NAME_HELP: Final = "use 1 to 31 letters, digits, '.', '_' or '-', beginning with a letter or digit"


@dataclass(frozen=True, slots=True)
class Export:
    """A directory tree with a name."""

    name: str
    path: Path


@dataclass(frozen=True, slots=True)
class Terms:
    """How a guest may use what it gets: what can change while it does."""

    checks: bool = True
    """Whether the host's kernel checks permissions; else the guest's does."""
    identity: Identity = field(default_factory=Identity)
    groups: str = "own"
    """Where the groups of users come from: "own", "host" or "table"."""
    table: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """The guest's users and their groups, in its numbers."""
    special: bool = False
    limits: tuple[tuple[str, int], ...] = ()
    """By the data plane's names; what is not there is as the data plane has it."""

    def users(self) -> Users:
        """For a worker; looks into the host's passwd and group if the groups come from there."""
        groups: users.Groups = ()
        if self.checks and self.groups == "host":
            groups = users.of_host(self.identity)
        elif self.checks:
            groups = users.listed(self.identity, dict(self.table))
        return Users(self.identity, self.checks, self.special, groups)


@dataclass(frozen=True, slots=True)
class Cache:
    """What the host does to have in memory what a guest will read. cache.streams is among Terms.limits.

    Attributes:
        prefetch: whether what guests of this image read at boot is learned, and read ahead of.
        share: whether files that a clone has unchanged are read through the tree that it was cloned from.
        weight: the guest's part of the host's page cache and disk, 100 for the usual one; 0: nobody keeps account.
        learn: seconds that a boot lasts at the most.
        policy: the class that decides, MODULE:CLASS; "" for the built-in one. For the whole file.
        options: for that class.
    """

    prefetch: bool = False
    share: bool = False
    weight: int = 0
    learn: int = 120
    policy: str = ""
    options: tuple[tuple[str, str | int | float | bool], ...] = ()


# What a rule calls a limit, and what the data plane does.
LIMITS: Final = {
    "fids": "max_fids",
    "requests": "max_queued",
    "bytes_in_flight": "max_bytes",
    "operations_per_second": "ops_per_second",
    "bytes_per_second": "bytes_per_second",
    "bytes_in_write": "max_write",
}
_LEAST: Final = {
    "fids": 16,
    "requests": 4,
    "bytes_in_flight": 1 << 20,
    "operations_per_second": 1,
    "bytes_per_second": 4096,
    "bytes_in_write": 4096,
}
_MOST: Final = {
    "fids": 1 << 18,
    "requests": 4096,
    "bytes_in_flight": 1 << 31,
    "operations_per_second": 10**9,
    "bytes_per_second": 1 << 40,
    "bytes_in_write": 1 << 20,
}


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
    terms: Terms = field(default_factory=Terms)
    quota: Quota = field(default_factory=Quota)
    keys: Path | None = None
    """A file of keys; who attaches has to prove that it has one of them."""
    leases: float = 0.0
    """Seconds that a lease session goes on without its client; 0: there are none."""
    snapshots: str = ""
    """The tag under which the guest has the export's snapshots, "" for none."""
    cache: Cache = field(default_factory=Cache)
    number: int = 0
    """Its place in the file, from 1."""

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
    terms: Terms = field(default_factory=Terms)
    keys: Path | None = None
    leases: float = 0.0
    of: Export | None = None
    """The export whose snapshots these are, if they are."""
    cache: Cache = field(default_factory=Cache)

    def later(self, now: Grant | None) -> str:
        """What of a device made by this grant another one changes at its next attach only, in words; "" for nothing."""
        if now is None:
            return "no rule gives it any more"
        changes = [
            f"{name} {there}"
            for name, here, there in (
                ("export", self.export, now.export),
                ("path", self.path, now.path),
                ("access", *("ro" if g.readonly else "rw" for g in (self, now))),
                ("frontend", self.frontend, now.frontend),
                ("keys", *(g.keys or "none" for g in (self, now))),
                ("leases", *(f"{g.leases:g} s" for g in (self, now))),
            )
            if here != there
        ]
        return ", ".join(changes)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy file that passed every check."""

    exports: Mapping[str, Export] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    source: str = ""

    def resolve(self, guest_name: str, uuid: str) -> list[Grant]:
        """Every grant for a guest in the order of the rules, then those of snapshots; of two with one tag the first."""
        rules = [rule for rule, winner in self.matching(guest_name, uuid) if rule is winner]
        grants = {rule.tag: self.grant(rule) for rule in rules}
        for rule in rules:
            if rule.snapshots and rule.snapshots not in grants:
                grants[rule.snapshots] = self.snapshots(rule)
        return list(grants.values())

    def matching(self, guest_name: str, uuid: str) -> list[tuple[Rule, Rule]]:
        """Every rule that speaks of a guest, and the one that has its tag: itself, or an earlier one."""
        winners: dict[str, Rule] = {}
        return [(rule, winners.setdefault(rule.tag, rule)) for rule in self.rules if rule.matches(guest_name, uuid)]

    def grant(self, rule: Rule) -> Grant:
        """What a rule gives."""
        path = self.exports[rule.export].path
        kind = rule.frontend, rule.terms, rule.keys
        return Grant(rule.export, path, rule.tag, rule.readonly, rule.auto, *kind, rule.leases, cache=rule.cache)

    def snapshots(self, rule: Rule) -> Grant:
        """What a rule gives of its export's snapshots."""
        export = self.exports[rule.export]
        try:
            path = subvolumes.place(export.name, export.path)
        except OSError:  # there is no export, so there are none
            path = export.path.parent / subvolumes.SNAPSHOTS / export.name
        name = f"{export.name}.snapshots"
        return Grant(name, path, rule.snapshots, True, rule.auto, rule.frontend, rule.terms, rule.keys, of=export)

    def quotas(self) -> dict[Path, Quota]:
        """How much each directory may hold, of those that have a quota."""
        return {self.exports[rule.export].path: rule.quota for rule in self.rules if rule.quota != Quota()}


def load(path: Path = defaults.POLICY, *, check_paths: bool) -> Policy:
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
        problems = missing_paths(policy)
        problems += [line for rule in policy.rules for line in key_problems(rule) + group_problems(rule)]
        _raise(str(path), problems or quota.problems(policy.quotas()))
    return policy


def parse(text: str, source: str = "policy") -> Policy:
    """The policy in a string, without a look at the file system."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of numbers without end and of lists in lists
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
    # Only at the top of a filesystem: elsewhere it is a directory that a guest has made.
    folder = export.path.resolve() / subvolumes.SNAPSHOTS / subvolumes.META
    if os.path.isdir(folder) and quota.mount_of(export.path).point == folder.parent.parent:
        return [f"export {export.name}: {export.path} has the snapshots of all exports (export a directory in it)"]
    return []


def key_problems(rule: Rule) -> list[str]:
    """What is wrong with a rule's file of keys on this machine now."""
    if rule.keys is None:
        return []
    try:
        auth.load(rule.keys)
    except Xen9pError as error:
        return [f"rule {rule.number}: keys: {error}"]
    return []


def group_problems(rule: Rule) -> list[str]:
    """What is wrong with the groups that a rule takes from this machine now."""
    try:
        rule.terms.users()
    except PolicyError as error:
        return [f"rule {rule.number}: groups: {error}"]
    return []


def is_uuid(text: str) -> bool:
    """Whether a text is written as a uuid is."""
    return _UUID.fullmatch(text.lower()) is not None


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
        self._cache_policy = ""

    def policy(self, document: dict[str, Any], source: str) -> Policy:
        self._known(document, "the file", ("version", "exports", "rules", "cache_policy"))
        version = document.get("version")
        if version is None:
            self.problems.append(f"version is missing (begin the file with: version = {VERSION})")
        elif version != VERSION or isinstance(version, bool):
            self.problems.append(f"version is {version!r} (this xen9p reads version = {VERSION})")
        exports = self._exports(document.get("exports", {}))
        self._cache_policy = self._named_class(document)
        rules = self._rules(document.get("rules", []), exports)
        self._duplicates(rules)
        self._quotas(rules, exports)
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
        self._known(table, where, _RULE_KEYS)
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
        keys = self._keys(table, where, frontend)
        terms = self._terms(table, where)
        most = self._quota(table, where)
        leases = self._leases(table, where, frontend)
        snapshots = self._snapshots(table.get("snapshots", False), tag, where)
        cache, streams = self._cache(table, where)
        terms = dataclasses.replace(terms, limits=terms.limits + streams)
        if len(self.problems) > before or export is None or tag is None:
            return None
        readonly, auto = access == "ro", attach == "auto"
        return Rule(
            guest, uuid, export, tag, readonly, auto, frontend, terms, most, keys, leases, snapshots, cache, number
        )

    def _leases(self, table: dict[str, Any], where: str, frontend: str) -> float:
        seconds = table.get("leases", 0)
        if type(seconds) not in (int, float) or not (seconds == 0 or LEAST_TERM <= seconds <= MOST_TERM):
            self.problems.append(
                f"{where}: leases is {seconds!r:.60} "
                f"(write 0 for none, or seconds from {LEAST_TERM:g} to {MOST_TERM:g})"
            )
            return 0.0
        if seconds and frontend != "user":
            self.problems.append(f'{where}: leases have no use with frontend = "kernel" (v9fs has none; write "user")')
        return float(seconds)

    def _keys(self, table: dict[str, Any], where: str, frontend: str) -> Path | None:
        path = self._string(table, "keys", where, default="")
        if not path:
            return None
        if not path.startswith("/"):
            self.problems.append(f'{where}: keys "{path}" is relative (write it from / on)')
        elif frontend != "user":
            self.problems.append(f'{where}: keys have no use with frontend = "kernel" (v9fs has none; write "user")')
        return Path(path)

    def _named_class(self, document: dict[str, Any]) -> str:
        name = self._string(document, "cache_policy", "the file", default="")
        if name and not _POLICY.fullmatch(name):
            self.problems.append(f'cache_policy is "{name:.80}" (write "module:Class", as Python names them)')
        return name or ""

    def _cache(self, table: dict[str, Any], where: str) -> tuple[Cache, tuple[tuple[str, int], ...]]:
        """What a rule says of caching; of streams, as a limit."""
        given = table.get("cache", {})
        if not isinstance(given, dict):
            self.problems.append(f"{where}: cache is {given!r:.60} (write {{prefetch = true}} or [rules.cache])")
            return Cache(policy=self._cache_policy), ()
        self._known(given, f"{where}: cache", ("prefetch", "share", "streams", "weight", "learn", "options"))
        switches = {}
        for name in ("prefetch", "share"):
            switches[name] = given.get(name, False)
            if not isinstance(switches[name], bool):
                self.problems.append(f"{where}: cache.{name} is {switches[name]!r:.60} (write true or false)")
        weight = self._integer(given["weight"], f"{where}: cache.weight", 1, 10_000) if "weight" in given else 0
        learn = self._integer(given.get("learn", 120), f"{where}: cache.learn", 1, 3600)
        options = given.get("options", {})
        if not isinstance(options, dict) or not all(isinstance(v, str | int | float | bool) for v in options.values()):
            self.problems.append(f"{where}: cache.options is {options!r:.60} (write {{NAME = text or number}})")
            options = {}
        streams: tuple[tuple[str, int], ...] = ()
        if (value := given.get("streams", True)) is False:
            streams = (("stream_bytes", 0),)
        elif value is not True:
            streams = (("stream_bytes", self._size(value, f"{where}: cache.streams", 1 << 20, 1 << 40)),)
        found = Cache(
            switches["prefetch"] is True,
            switches["share"] is True,
            weight,
            learn,
            self._cache_policy,
            tuple(sorted(options.items())),
        )
        return found, streams

    def _snapshots(self, value: object, tag: str | None, where: str) -> str:
        if not isinstance(value, bool | str):
            self.problems.append(f"{where}: snapshots is {value!r:.60} (write true, false or a tag)")
            return ""
        wanted = f"{tag}-snapshots" if value is True else value or None
        if value is not False and (wanted is None or not _NAME.fullmatch(wanted)):
            self.problems.append(f'{where}: snapshots: bad tag "{wanted or ""}" ({_NAME_HELP})')
            return ""
        return wanted or ""

    # How it may be used.

    def _terms(self, table: dict[str, Any], where: str) -> Terms:
        checks = self._choice(table, "checks", where, ("server", "guest")) == "server"
        before = len(self.problems)
        identity = self._identity(table.get("identity", "as-is"), where)
        if len(self.problems) == before and checks and identity.squash == "all" and identity.uid == 0:
            self.problems.append(f"{where}: identity makes root of every user (name a uid that is not 0)")
        groups, listed = self._groups(table.get("groups", "own"), where)
        if groups != "own" and not checks:
            self.problems.append(f'{where}: groups have no use with checks = "guest" (leave one of them out)')
        special = table.get("special", False)
        if not isinstance(special, bool):
            self.problems.append(f"{where}: special is {special!r} (write true or false)")
        return Terms(checks, identity, groups, listed, special is True, self._limits(table, where))

    def _identity(self, value: object, where: str) -> Identity:
        if value == "as-is":
            return Identity()
        match value:
            case {"squash": dict(squash), **rest} if not rest:
                return self._squash(squash, f"{where}: identity.squash")
            case {"map": both, **rest} if not rest:
                ranges = self._ranges(both, f"{where}: identity.map")
                return Identity(uids=ranges, gids=ranges)
            case {"uids": uids, "gids": gids, **rest} if not rest:
                return Identity(
                    uids=self._ranges(uids, f"{where}: identity.uids"),
                    gids=self._ranges(gids, f"{where}: identity.gids"),
                )
        self.problems.append(
            f'{where}: identity is {value!r} (write "as-is", {{squash = {{uid = U, gid = G}}}}, '
            "{map = [[GUEST, HOST, COUNT]]} or {uids = [...], gids = [...]})"
        )
        return Identity()

    def _squash(self, table: dict[str, Any], where: str) -> Identity:
        for key in table:
            if key not in ("uid", "gid", "who"):
                self.problems.append(f'{where}: unknown key "{key}" (known here: uid, gid, who)')
        who = self._choice(table, "who", where, ("all", "root"))
        uid, gid = (self._integer(table.get(key), f"{where}.{key}", 0, MOST_ID) for key in ("uid", "gid"))
        return Identity(who, uid, gid)

    def _ranges(self, value: object, where: str) -> tuple[Range, ...]:
        form = "write lists of three numbers: [first in the guest, first on the host, how many]"
        if not isinstance(value, list) or not 1 <= len(value) <= users.MOST_RANGES:
            self.problems.append(f"{where} is {value!r:.60} ({form}, 1 to {users.MOST_RANGES} of them)")
            return ()
        ranges: list[Range] = []
        for one in value:
            if not isinstance(one, list) or len(one) != 3 or not all(type(n) is int for n in one):
                self.problems.append(f"{where} has {one!r:.60} ({form})")
                return ()
            guest, host, count = one
            if min(guest, host) < 0 or count < 1 or max(guest, host) + count - 1 > MOST_ID:
                self.problems.append(f"{where} has {one} (numbers are from 0 to {MOST_ID}, and at least one)")
                return ()
            for other in ranges:
                for side, name in ((0, "guest's"), (1, "host's")):
                    if one[side] < other[side] + other[2] and other[side] < one[side] + count:
                        self.problems.append(
                            f"{where}: {list(other)} and {one} share some of the {name} numbers (keep them apart)"
                        )
                        return ()
            ranges.append((guest, host, count))
        return tuple(ranges)

    def _groups(self, value: object, where: str) -> tuple[str, tuple[tuple[int, tuple[int, ...]], ...]]:
        if value in ("own", "host"):
            return str(value), ()
        if not isinstance(value, dict):
            self.problems.append(f'{where}: groups is {value!r} (write "own", "host" or {{UID = [GID, ...]}})')
            return "own", ()
        found: dict[int, tuple[int, ...]] = {}
        for user, gids in value.items():
            good = isinstance(gids, list) and all(type(n) is int and 0 <= n <= MOST_ID for n in gids)
            if not _NUMBER.fullmatch(user) or int(user) > MOST_ID:
                self.problems.append(
                    f'{where}: groups has a user "{user:.40}" (write the number that it has in the guest)'
                )
            elif not good or not 1 <= len(gids) <= users.MOST_GROUPS:
                self.problems.append(
                    f"{where}: groups of user {user} are {gids!r:.60} (write 1 to {users.MOST_GROUPS} numbers, its own "
                    "group first)"
                )
            else:
                found[int(user)] = tuple(gids)
        if sum(1 + len(gids) for gids in found.values()) > users.MOST_NUMBERS:
            self.problems.append(f"{where}: groups has too many numbers (list at most {users.MOST_NUMBERS})")
        return "table", tuple(sorted(found.items()))

    def _limits(self, table: dict[str, Any], where: str) -> tuple[tuple[str, int], ...]:
        limits = table.get("limits", {})
        if not isinstance(limits, dict):
            self.problems.append(f"{where}: limits is {limits!r} (write [rules.limits] and below it fids = ...)")
            return ()
        self._known(limits, f"{where}: limits", tuple(LIMITS))
        found = []
        for name, ours in LIMITS.items():
            if name in limits:
                value, least, most = limits[name], _LEAST[name], _MOST[name]
                if name.startswith("bytes"):
                    found.append((ours, self._size(value, f"{where}: limits.{name}", least, most)))
                else:
                    found.append((ours, self._integer(value, f"{where}: limits.{name}", least, most)))
        return tuple(found)

    def _quota(self, table: dict[str, Any], where: str) -> Quota:
        given = table.get("quota", {})
        if not isinstance(given, dict) or ("quota" in table and not given):
            self.problems.append(f'{where}: quota is {given!r} (write {{bytes = "2G"}} or {{files = 10000}} or both)')
            return Quota()
        self._known(given, f"{where}: quota", ("bytes", "files"))
        most = (1 << 63) - 1
        return Quota(
            self._size(given["bytes"], f"{where}: quota.bytes", 1 << 20, most) if "bytes" in given else 0,
            self._integer(given["files"], f"{where}: quota.files", 16, most) if "files" in given else 0,
        )

    def _quotas(self, rules: list[Rule], exports: dict[str, Export]) -> None:
        """A directory has one quota, by whichever rules it is given."""
        first: dict[Path, Rule] = {}
        for rule in rules:
            if rule.quota == Quota():
                continue
            before = first.setdefault(exports[rule.export].path, rule)
            if before.quota != rule.quota:
                self.problems.append(
                    f"rule {rule.number}: quota of {rule.quota} for {exports[rule.export].path}, of which rule "
                    f"{before.number} says {before.quota} (it is the directory's, for all its guests together: say the "
                    "same in both)"
                )

    def _integer(self, value: object, where: str, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            said = "missing" if value is None else repr(value)
            self.problems.append(f"{where} is {said} (write a number from {least} to {most})")
            return least
        return value

    def _size(self, value: object, where: str, least: int, most: int) -> int:
        size = parse_size(value)
        if size is None or not least <= size <= most:
            self.problems.append(
                f'{where} is {value!r} (write bytes as a number or like "2G", from {size_text(least)} to '
                f"{size_text(most)})"
            )
            return least
        return size

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
        tags = [(tag, rule) for rule in rules for tag in (rule.tag, rule.snapshots) if tag]
        for i, (tag, second) in enumerate(tags):
            for other, first in tags[:i]:
                if other == tag and _same_guest(first, second):
                    self.problems.append(
                        f'tag "{tag}" is given twice to {second.subject}: export {first.export} '
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
