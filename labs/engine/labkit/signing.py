"""Signatures: HMAC-SHA256 over canonical JSON. Who has the key can check, and can sign."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import Any, Final

from labkit.errors import TamperedError

FIELD: Final = "signature"


def canonical(document: Mapping[str, Any]) -> bytes:
    """The bytes that are signed: the document without its signature, keys sorted, no spaces."""
    body = {key: value for key, value in document.items() if key != FIELD}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _digest(document: Mapping[str, Any], key: bytes) -> str:
    own = hmac.digest(key, b"signature", "sha256")
    return hmac.new(own, canonical(document), "sha256").hexdigest()


def sign(document: Mapping[str, Any], key: bytes) -> dict[str, Any]:
    """The document with its signature."""
    return {**document, FIELD: _digest(document, key)}


def verify(document: Mapping[str, Any], key: bytes, what: str) -> None:
    """TamperedError if the document is not as it was signed with that key."""
    said = document.get(FIELD)
    if not isinstance(said, str) or not hmac.compare_digest(said, _digest(document, key)):
        raise TamperedError(
            f"{what} is not what was signed", "it was changed by hand, or is of another course or student"
        )
