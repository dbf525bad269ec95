"""9P2000.L over Xen rings, Unix and TCP sockets: server, client, supervisor."""

__version__ = "0.1.0"
