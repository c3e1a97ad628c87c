"""Webhook signatures according to Standard Webhooks (https://www.standardwebhooks.com). Pure."""

import base64
import binascii
import hmac
from collections.abc import Mapping
from typing import Final

PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32

_MIN_BYTES: Final = 24
_MAX_BYTES: Final = 64


def made_secret(random: bytes) -> str:
    """The text form of a secret of ``SECRET_BYTES`` random bytes."""
    return PREFIX + base64.b64encode(random).decode()


def key_of(secret: str) -> bytes:
    """The bytes of a secret.

    Raises:
        ValueError: the text is not a valid secret. The message does not contain it.
    """
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(PREFIX) or not _MIN_BYTES <= len(key) <= _MAX_BYTES:
        raise ValueError(f"must be {PREFIX} and {_MIN_BYTES} to {_MAX_BYTES} bytes in base64")
    return key


def signed(secret: str, message_id: str, sent_s: int, body: bytes) -> Mapping[str, str]:
    """Signature headers of a message. The time is signed too, which prevents replay attacks."""
    content = f"{message_id}.{sent_s}.".encode() + body
    signature = base64.b64encode(hmac.digest(key_of(secret), content, "sha256")).decode()
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(sent_s),
        "webhook-signature": f"v1,{signature}",
    }
