"""API keys: how they look, and how they are issued, rotated and checked. Pure.

A token is ``fl_ID_SECRET``: sixteen hexadecimal characters that name the key, and 256 random bits that nobody can
guess. So a plain SHA-256 keeps the secret safe at rest; a slow hash is for passwords, and would be paid with each
request.
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
    """An API key as its holder presents it."""

    key_id: str
    secret: str

    def __str__(self) -> str:
        return f"fl_{self.key_id}_{self.secret}"

    def __repr__(self) -> str:
        return f"Token({self.key_id})"

    @classmethod
    def parse(cls, text: str) -> "Token | None":
        """The token, or None where the text is none."""
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
    """A new key and its token, which is nowhere but in what this returns.

    Args:
        random: ``ID_BYTES + SECRET_BYTES`` of it.
        label: who gets it.
        tenant: whose documents it is for.
        groups: whose documents it may find besides those without groups.
        scopes: what it may do.
        now_ms: epoch milliseconds.
        expires_ms: when it ends by itself.
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
    """The key with another secret, ``SECRET_BYTES`` of ``random``; the present one goes on for ``overlap_ms``.

    A secret that is on its way out from an earlier rotation ends at once.
    """
    token = Token(key.key_id, random.hex())
    present = next(secret for secret in key.secrets if secret.until_ms is None)
    ending = present.model_copy(update={"until_ms": now_ms + overlap_ms})
    return key.model_copy(update={"secrets": (_hashed(token.secret), ending)}), token


def revoked(key: ApiKey, *, now_ms: float) -> ApiKey:
    """The key, refused from now on; the first revocation stands."""
    return key if key.revoked_ms is not None else key.model_copy(update={"revoked_ms": now_ms})


def valid_until_ms(key: ApiKey, secret: str, *, now_ms: float) -> float | None:
    """When ``secret`` ends, infinity where it does not; None if it does not open the key now."""
    presented = sha256(secret.encode()).hexdigest()
    # Every secret is compared, so that time does not tell which one it was.
    fitting = [one for one in key.secrets if hmac.compare_digest(one.sha256, presented)]
    if not fitting or key.revoked_ms is not None:
        return None
    ends = [end for end in (key.expires_ms, fitting[0].until_ms) if end is not None]
    until_ms = min(ends, default=float("inf"))
    return until_ms if now_ms < until_ms else None


def _hashed(secret: str) -> KeySecret:
    return KeySecret(sha256=sha256(secret.encode()).hexdigest())
