"""From what the command line says to a connection: a tag of this guest, a Unix socket, or HOST:PORT."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

from xen9p.auth import Key, choose
from xen9p.client import Client
from xen9p.errors import Xen9pError
from xen9p.transport.link import Transport
from xen9p.transport.stream_client import SocketTransport


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is: at a socket if one is named, else at the other end of a device of this guest.

    key is what to prove there; timeout is in seconds, for connecting; ring_order None takes what the guest has.
    """

    unix: str | None = None
    tcp: tuple[str, int] | None = None
    aname: bytes = b""
    timeout: float = 30.0
    ring_order: int | None = None
    key: Key | None = None

    @classmethod
    def named(cls, args: argparse.Namespace) -> Place:
        """What a command's options say (file_options.py).

        Raises:
            Xen9pError: the key cannot be had.
        """
        if args.key_name is not None and args.key is None:
            raise Xen9pError("--key-name without --key", hint="say which file it is in: --key FILE")
        key = None if args.key is None else choose(args.key, args.key_name)
        return cls(args.unix, args.tcp, os.fsencode(args.aname), args.timeout, args.ring_order, key)

    @property
    def is_socket(self) -> bool:
        """Whether tags mean nothing."""
        return self.unix is not None or self.tcp is not None

    def transport(self, tag: str) -> Transport:
        """Connects; Xen9pError says what to do if that fails."""
        if self.unix is not None or self.tcp is not None:
            return self._socket()
        # Only this one needs XenStore and the C library.
        from xen9p.transport.xen_front import connect  # noqa: PLC0415

        return connect(tag, order=self.ring_order, timeout=self.timeout)

    def _socket(self) -> Transport:
        try:
            if self.unix is not None:
                transport = SocketTransport.unix(self.unix, self.timeout)
            else:
                assert self.tcp is not None
                transport = SocketTransport.tcp(*self.tcp, timeout=self.timeout)
        except OSError as error:
            where = self.unix or "{}:{}".format(*(self.tcp or ("", 0)))
            raise Xen9pError(
                f"cannot connect to {where}: {error.strerror or error}",
                hint="is a server there? start one: xen9p serve --export DIR ...",
                errno=error.errno,
            ) from None
        transport.set_timeout(None)  # a request may take as long as it takes
        return transport

    def client(self, tag: str) -> tuple[Client, int]:
        """A client and the root's fid, attached as the user who runs this."""
        return Client.connect(self.transport(tag), self.aname, n_uname=os.getuid(), key=self.key)
