"""API keys: format, issue, rotation, revocation and verification. Pure.

A token is ``fl_ID_SECRET``: the key id as 16 hexadecimal characters, and 256 random bits. Because the secret cannot be
guessed, SHA-256 protects it at rest; a slow password hash is unnecessary, and would cost time on each request.
"""

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from schemas.credentials import ApiKey, KeySecret, Scope

ID_BYTES: Final = 8
SECRET_BYTES: Final = 32

_TOKEN: Final = re.compile(r"fl_([0-9a-f]{16})_([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Token:
    """An API key as a client presents it."""

    key_id: str
    secret: str

    def __str__(self) -> str:
        return f"fl_{self.key_id}_{self.secret}"

    def __repr__(self) -> str:
        return f"Token({self.key_id})"

    @classmethod
    def parse(cls, text: str) -> "Token | None":
        """The token, or None if the text has another format."""
        match = _TOKEN.fullmatch(text)
        return cls(match[1], match[2]) if match else None


def issue(
    random: bytes,
    *,
    label: str,
    tenant: str,
    groups: Sequence[str],
    scopes: Sequence[Scope],
    now_ms: float,
    expires_ms: float | None,
) -> tuple[ApiKey, Token]:
    """Create a key and its token. The secret is contained only in the token.

    Args:
        random: ``ID_BYTES + SECRET_BYTES`` random bytes.
        label: holder of the key.
        tenant: tenant of the key.
        groups: groups whose documents the key may read, besides public documents.
        scopes: permitted kinds of requests.
        now_ms: epoch milliseconds.
        expires_ms: epoch milliseconds of the expiry; None for no expiry.
    """
    token = Token(random[:ID_BYTES].hex(), random[ID_BYTES:].hex())
    key = ApiKey(
        key_id=token.key_id,
        label=label,
        tenant=tenant,
        groups=tuple(groups),
        scopes=tuple(dict.fromkeys(scopes)),
        secrets=(_hashed(token.secret),),
        created_ms=now_ms,
        expires_ms=expires_ms,
    )
    return key, token


def rotated(key: ApiKey, random: bytes, *, now_ms: float, overlap_ms: float) -> tuple[ApiKey, Token]:
    """Replace the secret by ``SECRET_BYTES`` of ``random``. The current secret remains valid for ``overlap_ms``.

    A secret that an earlier rotation replaced becomes invalid immediately.
    """
    token = Token(key.key_id, random.hex())
    current = next(secret for secret in key.secrets if secret.until_ms is None)
    replaced = current.model_copy(update={"until_ms": now_ms + overlap_ms})
    return key.model_copy(update={"secrets": (_hashed(token.secret), replaced)}), token


def revoked(key: ApiKey, *, now_ms: float) -> ApiKey:
    """Revoke the key. A key that is revoked already keeps the time of its revocation."""
    return key if key.revoked_ms is not None else key.model_copy(update={"revoked_ms": now_ms})


def valid_until_ms(key: ApiKey, secret: str, *, now_ms: float) -> float | None:
    """Epoch milliseconds at which ``secret`` expires, infinity if never; None if it is not valid now."""
    presented = sha256(secret.encode()).hexdigest()
    # All secrets are compared, so that the response time does not reveal which one matched.
    matching = [one for one in key.secrets if hmac.compare_digest(one.sha256, presented)]
    if not matching or key.revoked_ms is not None:
        return None
    ends = [end for end in (key.expires_ms, matching[0].until_ms) if end is not None]
    until_ms = min(ends, default=float("inf"))
    return until_ms if now_ms < until_ms else None


def _hashed(secret: str) -> KeySecret:
    return KeySecret(sha256=sha256(secret.encode()).hexdigest())
