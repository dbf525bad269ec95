"""The exceptions of this package. At the command line each becomes one line, on the wire an errno."""

from __future__ import annotations

import errno as _errno
from pathlib import Path
from typing import ClassVar


class Xen9pError(Exception):
    """What went wrong, what to do about it, and the errno that a 9P client would get for it."""

    exit_code: ClassVar[int] = 1
    default_errno: ClassVar[int] = _errno.EIO

    def __init__(self, message: str, hint: str = "", errno: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.errno = self.default_errno if errno is None else errno

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ProtocolError(Xen9pError):
    """A peer broke 9P2000.L or the ring's rules. Never recoverable for the connection it came on."""

    default_errno = _errno.EPROTO


class UnknownMessageError(ProtocolError):
    """A well-formed header with a type that 9P2000.L does not have."""

    default_errno = _errno.EOPNOTSUPP

    def __init__(self, type_: int, tag: int) -> None:
        super().__init__(f"unknown message type {type_}")
        self.type = type_
        self.tag = tag


class PolicyError(Xen9pError):
    """The policy file is not usable; exits with EX_CONFIG."""

    exit_code = 78
    default_errno = _errno.EINVAL


class RefusedError(Xen9pError):
    """The policy does not allow what was asked."""

    default_errno = _errno.EACCES


class AuthError(Xen9pError):
    """A server wants a key, or refuses the one that it got."""

    default_errno = _errno.EACCES


class XenStoreError(Xen9pError):
    """XenStore is away, too slow, or said no."""


class ControlError(Xen9pError):
    """The supervisor cannot be reached, or refused a request."""


class NobodyError(ControlError):
    """There is no supervisor."""


def describe(error: BaseException) -> str:
    """An unforeseen exception as one line, with the place that it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
    return f"{type(error).__name__}: {error}{where}"
