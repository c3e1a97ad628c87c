"""Port of credentials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.credentials import ApiKey, Scope
from schemas.search import Access


class CredentialRefused(Exception):
    """The credential is not valid. The message is for the log; clients do not receive it."""


class CredentialsUnavailable(Exception):
    """The credential cannot be verified now."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The authenticated sender of a request.

    Attributes:
        subject: name in the audit log: ``key:ID``, ``token:SUBJECT``, or ``installation``.
        access: tenant, and groups whose documents the sender may read.
        scopes: permitted kinds of requests.
    """

    subject: str
    access: Access
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class Verified:
    """A verified credential.

    Attributes:
        principal: its holder.
        until_s: ``time.monotonic()`` until which the verification is valid.
    """

    principal: Principal
    until_s: float


class KeyStore(Protocol):
    """Store of API keys, shared by all processes. Methods may raise ``CredentialsUnavailable``."""

    async def add(self, key: ApiKey) -> None:
        """Store a new key. After the call, ``keys`` includes it in every process."""
        ...

    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        """Replace a key by ``change(key)``, and return the new one; None if the key does not exist.

        Concurrent changes are not lost: ``change`` is called again after a conflict.
        """
        ...

    async def keys(self) -> Sequence[ApiKey]:
        """All keys, including revoked ones, by time of creation."""
        ...
