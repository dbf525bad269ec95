"""Fuzzers: hostile conversations against the whole server, and hostile frontends against the life of a device."""
