"""What a credential may do, and API keys as they are kept: never the secret itself."""

from enum import StrEnum
from typing import Final

from pydantic import Field

from schemas.documents import Groups, TenantId
from schemas.models import Message

MAX_SECRETS: Final = 2
"""Secrets of one key that may be valid at a time: the present one, and while it is rotated the one before."""


class Scope(StrEnum):
    """A kind of request. None of them implies another."""

    QUERY = "query"
    INGEST = "ingest"
    ADMIN = "admin"


class KeySecret(Message):
    """A secret of an API key, as its hash."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    until_ms: float | None = Field(default=None, description="Epoch milliseconds at which it ends; set by a rotation.")


class ApiKey(Message):
    """An API key. It is never removed, so that the audit log's ids go on meaning somebody."""

    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    label: str = Field(max_length=200, description="Who has it, for people.")
    tenant: TenantId
    groups: Groups = ()
    scopes: tuple[Scope, ...] = Field(min_length=1)
    secrets: tuple[KeySecret, ...] = Field(min_length=1, max_length=MAX_SECRETS)
    created_ms: float
    expires_ms: float | None = None
    revoked_ms: float | None = None
