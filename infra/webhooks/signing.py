"""Signatures of webhooks, after Standard Webhooks (https://www.standardwebhooks.com). Pure."""

import base64
import binascii
import hmac
from collections.abc import Mapping
from typing import Final

PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32

_SHORTEST_BYTES: Final = 24
_LONGEST_BYTES: Final = 64


def made_secret(random: bytes) -> str:
    """A secret of these bytes, ``SECRET_BYTES`` of them, as receivers write it."""
    return PREFIX + base64.b64encode(random).decode()


def key_of(secret: str) -> bytes:
    """The bytes of a secret.

    Raises:
        ValueError: it is none; the message says why, without it.
    """
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(PREFIX) or not _SHORTEST_BYTES <= len(key) <= _LONGEST_BYTES:
        raise ValueError(f"must be {PREFIX} and {_SHORTEST_BYTES} to {_LONGEST_BYTES} bytes in base64")
    return key


def signed(secret: str, message_id: str, sent_s: int, body: bytes) -> Mapping[str, str]:
    """The three headers of a message. The time is signed too, so that an old message cannot be sent again by others."""
    content = f"{message_id}.{sent_s}.".encode() + body
    signature = base64.b64encode(hmac.digest(key_of(secret), content, "sha256")).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(sent_s),
        "webhook-signature": f"v1,{signature}",
    }
