"""Ways for whole 9P messages to travel: Xen rings, in-memory rings, sockets."""
