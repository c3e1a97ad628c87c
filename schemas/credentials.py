"""Scopes of credentials, and API keys as stored, with hashed secrets."""

from enum import StrEnum
from typing import Final

from pydantic import Field

from schemas.documents import Groups, TenantId
from schemas.models import Message

MAX_SECRETS: Final = 2
"""Valid secrets per key: the current one, and during a rotation the previous one."""


class Scope(StrEnum):
    """Scope of a credential. Scopes do not imply each other."""

    QUERY = "query"
    INGEST = "ingest"
    ADMIN = "admin"


class KeySecret(Message):
    """Hash of a secret of an API key."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    until_ms: float | None = Field(
        default=None, description="Epoch milliseconds at which it expires; set by a rotation."
    )


class ApiKey(Message):
    """An API key. Never deleted, so that key ids in the audit log stay resolvable."""

    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    label: str = Field(max_length=200, description="Holder of the key.")
    tenant: TenantId
    groups: Groups = ()
    scopes: tuple[Scope, ...] = Field(min_length=1)
    secrets: tuple[KeySecret, ...] = Field(min_length=1, max_length=MAX_SECRETS)
    created_ms: float
    expires_ms: float | None = None
    revoked_ms: float | None = None
