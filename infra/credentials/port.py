"""What the services know of credentials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from schemas.credentials import ApiKey, Scope
from schemas.search import Access


class CredentialRefused(Exception):
    """The credential is not valid. The message is for the log: who presents it learns only that it is refused."""


class CredentialsUnavailable(Exception):
    """Whether the credential is valid cannot be told now."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a request speaks for.

    Attributes:
        subject: name in the audit log: ``key:ID``, ``token:SUBJECT``, or ``installation``.
        access: the tenant, and the groups whose documents it may find.
        scopes: kinds of request it may make.
    """

    subject: str
    access: Access
    scopes: frozenset[Scope]


@dataclass(frozen=True, slots=True)
class Verified:
    """A credential that was found valid.

    Attributes:
        principal: whom it speaks for.
        until_s: ``time.monotonic()`` at which it must be looked at again.
    """

    principal: Principal
    until_s: float


class KeyStore(Protocol):
    """Where API keys are kept, for all processes. Its failures are ``CredentialsUnavailable``."""

    async def add(self, key: ApiKey) -> None:
        """Keep a new key; when this returns, ``keys`` of every process has it."""
        ...

    async def change(self, key_id: str, change: Callable[[ApiKey], ApiKey]) -> ApiKey | None:
        """Put what ``change`` makes of a key in its place, and return it; None if there is no such key.

        ``change`` may be called several times: nothing that another process wrote meanwhile is lost.
        """
        ...

    async def keys(self) -> Sequence[ApiKey]:
        """All keys, revoked ones too, by time of creation."""
        ...
