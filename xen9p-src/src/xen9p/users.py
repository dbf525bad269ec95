"""What the users of a guest are on the host, and who checks what they may: told to a worker, carried out in users.c."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from xen9p.errors import PolicyError

NOBODY: Final = 65534
"""As whom user namespaces show what is not mapped: here too, and who is not mapped acts with these numbers."""
MOST_ID: Final = (1 << 32) - 2  # the last one says "none"
MOST_RANGES: Final = 340  # as in user namespaces
MOST_GROUPS: Final = 64  # of a user
MOST_NUMBERS: Final = 4096  # of users and groups that a worker is told: all of it goes into one packet

Range = tuple[int, int, int]
"""First number in the guest, first on the host, how many."""
Groups = tuple[tuple[int, tuple[int, ...]], ...]
"""Users with their groups, of which the first is their own; ascending."""


@dataclass(frozen=True, slots=True)
class Identity:
    """How the guest's numbers become the host's: squashed, through ranges, or as they are."""

    squash: str = ""
    """"all": every user is uid and gid; "root": 0 is; "": nobody."""
    uid: int = 0
    gid: int = 0
    uids: tuple[Range, ...] = ()
    gids: tuple[Range, ...] = ()
    """Both or neither. What is in no range has no number on the host."""

    def host_uid(self, uid: int) -> int | None:
        """The host's number of a guest's user."""
        return self._here(uid, self.uid, self.uids)

    def host_gid(self, gid: int) -> int | None:
        """The host's number of a guest's group."""
        return self._here(gid, self.gid, self.gids)

    def _here(self, number: int, squashed: int, ranges: tuple[Range, ...]) -> int | None:
        if self.squash == "all" or (self.squash == "root" and number == 0):
            return squashed
        if not self.uids:
            return number
        return next((host + number - guest for guest, host, count in ranges if guest <= number < guest + count), None)

    def covers(self, host_uid: int) -> bool:
        """Whether some user of the guest may be this one of the host's."""
        if self.squash == "all":
            return host_uid == self.uid
        return not self.uids or any(host <= host_uid < host + count for _, host, count in self.uids)

    def __str__(self) -> str:
        if self.squash:
            who = "every user" if self.squash == "all" else "root"
            return f"{who} is uid {self.uid}, gid {self.gid}" + ("" if self.squash == "all" else ", others as they are")
        if not self.uids:
            return "as is"
        if self.uids == self.gids:
            return "uids and gids " + _ranges(self.uids)
        return f"uids {_ranges(self.uids)}; gids {_ranges(self.gids)}"


def _ranges(ranges: tuple[Range, ...]) -> str:
    return ", ".join(f"{g} -> {h}" if n == 1 else f"{g}..{g + n - 1} -> {h}..{h + n - 1}" for g, h, n in ranges)


@dataclass(frozen=True, slots=True)
class Users:
    """All that a worker has to know about its guest's users."""

    identity: Identity = field(default_factory=Identity)
    checks: bool = False
    """Whether the host's kernel checks what they may; else the guest's has."""
    special: bool = True
    """Whether they may make device nodes, FIFOs and sockets."""
    groups: Groups = ()
    """The host's numbers. Who is not listed has one group: the guest's that is called as the user is."""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        who = self.identity
        return {
            "squash": who.squash,
            "uid": who.uid,
            "gid": who.gid,
            "uids": [list(r) for r in who.uids],
            "gids": [list(r) for r in who.gids],
            "checks": self.checks,
            "special": self.special,
            "groups": [[uid, list(gids)] for uid, gids in self.groups],
        }


def from_plain(value: Mapping[str, Any]) -> Users:
    """What plain() gave, after JSON."""

    def ranges(key: str) -> tuple[Range, ...]:
        return tuple((int(g), int(h), int(n)) for g, h, n in value[key])

    identity = Identity(str(value["squash"]), int(value["uid"]), int(value["gid"]), ranges("uids"), ranges("gids"))
    groups = tuple((int(uid), tuple(int(gid) for gid in gids)) for uid, gids in value["groups"])
    return Users(identity, bool(value["checks"]), bool(value["special"]), groups)


def listed(identity: Identity, table: Mapping[int, Iterable[int]]) -> Groups:
    """A table of the guest's users and groups in the host's numbers; what is not mapped is left out."""
    found: dict[int, tuple[int, ...]] = {}
    for user, groups in table.items():
        uid = identity.host_uid(user)
        gids = tuple(gid for gid in map(identity.host_gid, groups) if gid is not None)
        if uid is not None and gids:
            found[uid] = tuple(dict.fromkeys(found.get(uid, ()) + gids))
    return tuple(sorted(found.items()))


def of_host(identity: Identity) -> Groups:
    """The groups of the host's users whom the guest's may be, from passwd and group; root needs none.

    Raises:
        PolicyError: there are too many.
    """
    found = {}
    for user in pwd.getpwall():
        if user.pw_uid and user.pw_uid not in found and identity.covers(user.pw_uid):
            more = sorted(set(os.getgrouplist(user.pw_name, user.pw_gid)) - {user.pw_gid})
            found[user.pw_uid] = (user.pw_gid, *more)[:MOST_GROUPS]
    if sum(1 + len(gids) for gids in found.values()) > MOST_NUMBERS:
        raise PolicyError(f"the host has more than {MOST_NUMBERS} users and groups", "list groups in the policy")
    return tuple(sorted(found.items()))
