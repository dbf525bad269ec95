"""Attaching by key: the challenge and response that go over the fid of a Tauth, and the files that keys are in.

The server's challenge is MAGIC and a nonce. The client's response is a nonce of its own and HMAC-SHA256, by a key that
both have, of both nonces and all that the Tattach will say of the user and the tree. Decision 0020 says why so.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import re
import secrets
import stat
import struct
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from xen9p.budget import Budget
from xen9p.defaults import KEY_NAME
from xen9p.errors import AuthError, Xen9pError

MAGIC: Final = b"xen9p-1\n"
KEY_SIZE: Final = 32
NONCE_SIZE: Final = 32
CHALLENGE_SIZE: Final = len(MAGIC) + NONCE_SIZE
RESPONSE_SIZE: Final = NONCE_SIZE + hashlib.sha256().digest_size
ATTEMPTS: Final = 5
"""Refusals that a peer may have one after the other; then one more each PAUSE seconds."""
PAUSE: Final = 10.0
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")
_FILE_MOST: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Key:
    """A shared secret of KEY_SIZE bytes. Its name is the uname that it is for; with a uid, it is for that one alone."""

    name: str
    secret: bytes
    uid: int | None = None

    def __repr__(self) -> str:
        return f"Key({self.name!r})"  # it may get into a log


def _proof(secret: bytes, nonces: bytes, uname: bytes, aname: bytes, n_uname: int) -> bytes:
    who = b"".join(struct.pack("<H", len(text)) + text for text in (uname, aname)) + struct.pack("<I", n_uname)
    return hmac.digest(secret, b"xen9p attach\0" + nonces + who, "sha256")


def respond(key: Key, challenge: bytes, aname: bytes, n_uname: int) -> bytes:
    """The client's response, for the tree aname and the user n_uname.

    Raises:
        AuthError: this is no challenge of a xen9p server.
    """
    if len(challenge) != CHALLENGE_SIZE or not challenge.startswith(MAGIC):
        raise AuthError("the server wants another kind of authentication", "xen9p knows keys of its own only")
    nonce = secrets.token_bytes(NONCE_SIZE)
    return nonce + _proof(key.secret, challenge + nonce, key.name.encode(), aname, n_uname)


class Authenticator:
    """Decides for one peer whether it may attach; callable from several threads.

    Args:
        keys: those that are good, by name.
    """

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._keys = {name.encode(): key for name, key in keys.items()}
        self._nobody = Key("", secrets.token_bytes(KEY_SIZE))
        self._lock = threading.Lock()
        self._budget = Budget(ATTEMPTS, 1 / PAUSE, time.monotonic())
        self._closed_until = 0.0

    def challenge(self) -> bytes:
        """A new one, for a single attempt.

        Raises:
            OSError: EAGAIN, after too many refusals.
        """
        self._check_open()
        return MAGIC + secrets.token_bytes(NONCE_SIZE)

    def check(self, challenge: bytes, response: bytes, uname: bytes, aname: bytes, n_uname: int) -> None:
        """Whether the response to a challenge of ours, which must not be used again, is that of a good key.

        An unknown name takes as long as a known one and gets the same answer.

        Raises:
            OSError: EKEYREJECTED, it is not; EAGAIN, after too many refusals.
        """
        self._check_open()
        key = self._keys.get(uname, self._nobody)
        nonce, proof = response[:NONCE_SIZE], response[NONCE_SIZE:]
        right = hmac.compare_digest(proof, _proof(key.secret, challenge + nonce, uname, aname, n_uname))
        if not right or key is self._nobody or key.uid not in (None, n_uname):
            self.refuse()

    def refuse(self) -> NoReturn:
        """Counts a refusal. Raises OSError, EKEYREJECTED."""
        with self._lock:
            now = time.monotonic()
            self._budget.take(1.0, now)
            self._closed_until = now + self._budget.wait(1.0, now)  # there is none but for the next one
        raise OSError(errno.EKEYREJECTED, os.strerror(errno.EKEYREJECTED))

    def _check_open(self) -> None:
        with self._lock:
            if time.monotonic() < self._closed_until:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@contextmanager
def explained(key: Key | None) -> Iterator[None]:
    """Turns the errnos with which a server answers a client's attach into words."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOKEY:
            raise AuthError("the server wants a key", "say which: --key FILE") from None
        if error.errno == errno.EKEYREJECTED:
            name = key.name if key else ""
            raise AuthError(
                f"the server refuses the key {name!r}", "is it in the server's file, and for this user?"
            ) from None
        if error.errno == errno.EAGAIN and key:
            raise AuthError("the server has refused too often", f"try again in {PAUSE:g} s") from None
        raise


@contextmanager
def asking(key: Key) -> Iterator[None]:
    """The same for a Tauth."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
            raise AuthError(f"the server wants no key, {key.name!r} proves nothing there", "leave it out") from None
        raise


# Files of keys.


def load(path: Path) -> dict[str, Key]:
    """The keys of a file, by name.

    Raises:
        Xen9pError: it cannot be read, others than its owner can read it, or it is not right.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            _check_mode(path, os.fstat(file.fileno()))
            text = file.read(_FILE_MOST)
    except OSError as error:
        raise Xen9pError(f"cannot read {path}: {error.strerror}", f"make one: xen9p key make {path}") from None
    try:
        entries = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Xen9pError(f"{path}: {error}", f"make keys with: xen9p key make {path}") from None
    keys = {name: _key(path, name, entry) for name, entry in entries.items()}
    if not keys:
        raise Xen9pError(f"{path} has no key", f"make one: xen9p key make {path}")
    return keys


def _check_mode(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise Xen9pError(f"{path} is no regular file", "name a file of keys")
    if found.st_mode & 0o077:
        raise Xen9pError(f"{path} is open to others (mode {found.st_mode & 0o7777:04o})", f"chmod 600 {path}")
    if found.st_uid not in (0, os.geteuid()):
        raise Xen9pError(f"{path} belongs to uid {found.st_uid}", "it must be yours or root's")


def _key(path: Path, name: str, entry: Any) -> Key:
    where = f"{path}: [{name}]"
    if not _NAME.fullmatch(name):
        raise Xen9pError(f"{where} is no name of a key", "up to 64 letters, digits, dots, dashes, underscores")
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or not _HEX.fullmatch(entry["key"]):
        raise Xen9pError(f"{where} has no key", 'key = "..." with 64 hexadecimal digits; see: xen9p key make')
    uid = entry.get("uid")
    if uid is not None and (type(uid) is not int or not 0 <= uid < 0xFFFFFFFF):
        raise Xen9pError(f"{where}: uid is {uid!r}", "it is a number from 0 to 4294967294")
    if unknown := set(entry) - {"key", "uid"}:
        raise Xen9pError(f"{where} has {', '.join(sorted(unknown))}", "it knows key and uid")
    return Key(name, bytes.fromhex(entry["key"]), uid)


def choose(path: Path, name: str | None) -> Key:
    """A client's key: the one with that name, or the only one of the file.

    Raises:
        Xen9pError: there is no such key, or there are several.
    """
    keys = load(path)
    names = ", ".join(keys)
    if name is None:
        if len(keys) > 1:
            raise Xen9pError(f"{path} has several keys", f"say which with --key-name: {names}")
        return next(iter(keys.values()))
    if name not in keys:
        raise Xen9pError(f"{path} has no key {name!r}", f"it has {names}")
    return keys[name]


def make(path: Path, name: str = KEY_NAME, uid: int | None = None) -> Key:
    """Makes a key and adds it to a file, which is made with mode 0600 if it is not there.

    Raises:
        Xen9pError: the file cannot be written or is not right, or has a key of that name.
    """
    key = Key(name, secrets.token_bytes(KEY_SIZE), uid)
    entry = f'["{name}"]\nkey = "{key.secret.hex()}"\n'
    entry += "" if uid is None else f"uid = {uid}\n"
    _key(path, name, {"key": key.secret.hex()} | ({} if uid is None else {"uid": uid}))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        if name in load(path):
            raise Xen9pError(f"{path} has a key {name!r} already", "take another --name") from None
        entry = "\n" + entry
        fd = _open_to_append(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        with open(fd, "wb") as file:
            file.write(entry.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(path, error) from None
    return key


def _open_to_append(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> Xen9pError:
    return Xen9pError(f"cannot write {path}: {error.strerror}", "choose another file", error.errno)
