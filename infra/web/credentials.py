"""Authentication and authorization of requests (I7)."""

import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Final

import structlog
from fastapi import Request

from infra.credentials.api_keys import Token
from infra.credentials.key_table import KeyTable
from infra.credentials.port import CredentialRefused, Principal, Verified
from infra.credentials.tokens import TokenVerifier
from infra.settings import Settings
from infra.web.problems import ProblemRaised
from schemas.credentials import Scope
from schemas.problems import ProblemType
from schemas.search import Access

MAX_CACHED: Final = 10_000
"""Maximum number of verified credentials in the cache."""

MAX_CREDENTIAL_CHARS: Final = 8_192
"""Sufficient for tokens with many claims."""

AccessOf = Callable[[Request], Awaitable[Access]]
"""A FastAPI dependency that returns the access of a request, or rejects it."""

_KEY_SETTING: Final = "FRESHLINE_TENANT__API_KEY"
_ISSUER_SETTING: Final = "FRESHLINE_JWT__ISSUER"
_INSTALLATION: Final = "installation"

_log = structlog.get_logger(__name__)


class UnsafeBind(ValueError):
    """A service without authentication must not be reachable from other machines."""


class Credentials:
    """Authenticates requests. Every ``Access`` of a request is created here.

    A credential is sent as ``Authorization: Bearer CREDENTIAL`` or ``X-API-Key: CREDENTIAL``. It is the key of the
    installation, a stored API key, or a token of the issuer. Without a configured key or issuer, requests without a
    credential are served as the default tenant, from this machine only: the service binds loopback
    (``require_safe_bind``) and serves only requests with a loopback ``Host``, which prevents DNS rebinding.

    Args:
        settings: default tenant, key of the installation, and whether requests without a credential are served.
        keys: stored API keys.
        tokens: verifier of the issuer's tokens.
        monotonic_s: monotonic clock.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        keys: KeyTable | None = None,
        tokens: TokenVerifier | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        key = settings.tenant.api_key
        self._installation = Principal(_INSTALLATION, Access(settings.tenant.default), frozenset(Scope))
        self._key = key.get_secret_value().encode() if key else None
        self._is_open = not settings.demands_credential
        self._keys = keys
        self._tokens = tokens
        self._monotonic_s = monotonic_s
        self._verified: OrderedDict[str, Verified] = OrderedDict()

    def requiring(self, scope: Scope) -> AccessOf:
        """A FastAPI dependency that returns the access of a request, and requires ``scope``."""

        async def access_of(request: Request) -> Access:
            principal = await self.identify(request.headers)
            request.state.principal, request.state.scope = principal, scope  # for the audit log
            if scope not in principal.scopes:
                raise ProblemRaised(ProblemType.FORBIDDEN, f"the credential lacks the scope {scope!r}")
            return principal.access

        return access_of

    async def identify(self, headers: Mapping[str, str]) -> Principal:
        """Authenticate a request by its headers, a case-insensitive mapping or one with names in lower case.

        Raises:
            ProblemRaised: no valid credential; or, without authentication, a ``Host`` that is not loopback.
            CredentialsUnavailable: the credential cannot be verified now.
        """
        presented = _presented(headers)
        if presented is None:
            return self._anonymous(headers.get("host", ""))
        cached = self.cached(presented)
        if cached is not None:
            return cached
        try:
            verified = await self._verify(presented)
        except CredentialRefused as error:
            _log.info("credential_refused", reason=str(error))
            raise _unauthenticated() from error
        self._cache(presented, verified)
        return verified.principal

    def identify_cached(self, headers: Mapping[str, str]) -> Principal | None:
        """Like ``identify``, from the cache only; None if the request must be authenticated by ``identify``."""
        presented = _presented(headers)
        if presented is not None:
            return self.cached(presented)
        try:
            return self._anonymous(headers.get("host", ""))
        except ProblemRaised:
            return None

    def cached(self, presented: str) -> Principal | None:
        """The holder of a credential that was verified recently; None otherwise."""
        verified = self._verified.get(presented)
        if verified is None:
            return None
        if verified.until_s <= self._monotonic_s():
            del self._verified[presented]
            return None
        return verified.principal

    async def _verify(self, presented: str) -> Verified:
        if len(presented) > MAX_CREDENTIAL_CHARS:
            raise CredentialRefused(f"longer than {MAX_CREDENTIAL_CHARS} characters")
        if self._key is not None and secrets.compare_digest(presented.encode(), self._key):
            return Verified(self._installation, float("inf"))
        token = Token.parse(presented)
        if token is not None and self._keys is not None:
            return self._keys.verify(token)
        if self._tokens is not None:
            return await self._tokens.verify(presented)
        raise CredentialRefused("neither the key of this installation nor of a known format")

    def _cache(self, presented: str, verified: Verified) -> None:
        self._verified[presented] = verified
        self._verified.move_to_end(presented)
        if len(self._verified) > MAX_CACHED:
            self._verified.popitem(last=False)

    def _anonymous(self, host: str) -> Principal:
        if not self._is_open:
            raise _unauthenticated()
        if not is_loopback(_host_name(host)):
            detail = f"without an API key only requests to localhost are served; set {_KEY_SETTING} to permit others"
            raise ProblemRaised(ProblemType.FORBIDDEN, detail)
        return self._installation


def require_safe_bind(host: str, settings: Settings) -> None:
    """Check that a service without authentication listens on loopback only.

    Raises:
        UnsafeBind: ``host`` is not loopback and no credential is required.
    """
    if not settings.demands_credential and not is_loopback(host):
        raise UnsafeBind(
            f"cannot listen on {host} without an API key: set {_KEY_SETTING} or {_ISSUER_SETTING}, or "
            "FRESHLINE_CREDENTIALS__ANONYMOUS=rejected if all clients have stored API keys, or bind 127.0.0.1"
        )


@lru_cache(256)
def is_loopback(host: str) -> bool:
    """Whether ``host`` is ``localhost`` or a loopback address. Other names are not resolved."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _presented(headers: Mapping[str, str]) -> str | None:
    """The credential of a request; None without one, empty if it has another scheme."""
    authorization = headers.get("authorization")
    if authorization is None:
        return headers.get("x-api-key")
    scheme, _, credential = authorization.partition(" ")
    return credential.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _unauthenticated() -> ProblemRaised:
    detail = "send a valid API key or token as `Authorization: Bearer CREDENTIAL` or `X-API-Key: CREDENTIAL`"
    return ProblemRaised(ProblemType.UNAUTHENTICATED, detail)


def _host_name(header: str) -> str:
    """Host part of a ``Host`` header: ``[::1]:8080`` → ``::1``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
