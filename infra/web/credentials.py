"""From a request's credential to what its sender may see and change (I7)."""

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

REMEMBERED: Final = 10_000
"""Credentials that need no second verification for a while."""

MAX_CREDENTIAL_CHARS: Final = 8_192
"""Tokens with many claims fit."""

AccessOf = Callable[[Request], Awaitable[Access]]
"""A FastAPI dependency that gives the access of a request, or ends it."""

_KEY_SETTING: Final = "FRESHLINE_TENANT__API_KEY"
_ISSUER_SETTING: Final = "FRESHLINE_JWT__ISSUER"
_INSTALLATION: Final = "installation"

_log = structlog.get_logger(__name__)


class UnsafeBind(ValueError):
    """A service that asks for no credential must not be reachable from other machines."""


class Credentials:
    """Who a request speaks for; the one place that makes an ``Access`` from a request.

    A credential comes as ``Authorization: Bearer CREDENTIAL`` or ``X-API-Key: CREDENTIAL``. It is the installation's
    own key, an API key of the table, or a token of the issuer. Where neither that key nor an issuer is set, a request
    without one is served as the default tenant, but from this machine only: the service then binds loopback
    (``require_safe_bind``) and answers only requests that name it as such, so that a web page whose host name was
    pointed at loopback gets nothing.

    Args:
        settings: the default tenant, the installation's key, and whether requests without a credential are served.
        keys: the API keys.
        tokens: verifies the issuer's tokens.
        monotonic_s: a clock that only goes forward.
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
        """A FastAPI dependency: the access of a request whose sender has ``scope``."""

        async def access_of(request: Request) -> Access:
            principal = await self.identify(request.headers)
            request.state.principal, request.state.scope = principal, scope  # for the audit log
            if scope not in principal.scopes:
                raise ProblemRaised(ProblemType.FORBIDDEN, f"the credential lacks the scope {scope!r}")
            return principal.access

        return access_of

    async def identify(self, headers: Mapping[str, str]) -> Principal:
        """Whom a request with these headers (names in lower case, or any) speaks for.

        Raises:
            ProblemRaised: no valid credential, or an open service addressed by a foreign name.
            CredentialsUnavailable: whether the credential is valid cannot be told now.
        """
        presented = _presented(headers)
        if presented is None:
            return self._unnamed(headers.get("host", ""))
        known = self.known(presented)
        if known is not None:
            return known
        try:
            verified = await self._verify(presented)
        except CredentialRefused as error:
            _log.info("credential_refused", reason=str(error))
            raise _unauthenticated() from error
        self._remember(presented, verified)
        return verified.principal

    def identify_cached(self, headers: Mapping[str, str]) -> Principal | None:
        """As ``identify``, for whoever can be told without waiting; None for all others, be they valid or not."""
        presented = _presented(headers)
        if presented is not None:
            return self.known(presented)
        try:
            return self._unnamed(headers.get("host", ""))
        except ProblemRaised:
            return None

    def known(self, presented: str) -> Principal | None:
        """Whom a credential speaks for that was verified a moment ago: one look, and nothing to wait for."""
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
        raise CredentialRefused("not the key of this installation, nor of a form that is known")

    def _remember(self, presented: str, verified: Verified) -> None:
        self._verified[presented] = verified
        self._verified.move_to_end(presented)
        if len(self._verified) > REMEMBERED:
            self._verified.popitem(last=False)

    def _unnamed(self, host: str) -> Principal:
        if not self._is_open:
            raise _unauthenticated()
        if not is_loopback(_host_name(host)):
            detail = f"without an API key only requests to localhost are served; set {_KEY_SETTING} for others"
            raise ProblemRaised(ProblemType.FORBIDDEN, detail)
        return self._installation


def require_safe_bind(host: str, settings: Settings) -> None:
    """Refuse to listen where others can reach a service that asks for no credential.

    Raises:
        UnsafeBind: ``host`` is not loopback and no credential is demanded.
    """
    if not settings.demands_credential and not is_loopback(host):
        raise UnsafeBind(
            f"cannot listen on {host} without an API key: set {_KEY_SETTING} or {_ISSUER_SETTING}, or "
            "FRESHLINE_CREDENTIALS__ANONYMOUS=rejected where all have keys of their own, or bind 127.0.0.1"
        )


@lru_cache(256)
def is_loopback(host: str) -> bool:
    """True for ``localhost`` and loopback addresses; a name that would have to be resolved is not."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _presented(headers: Mapping[str, str]) -> str | None:
    """The credential of a request; None where it has none, empty where it has one of another kind."""
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
