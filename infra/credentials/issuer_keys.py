"""Public keys of an OIDC issuer, cached in this process and refreshed when they change."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import structlog
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from infra.credentials.port import CredentialsUnavailable

REFRESH_S: Final = 600.0
"""Age at which the keys are refreshed. A key that the issuer withdraws is rejected after this time."""

STALE_S: Final = 86_400.0
"""Age at which the keys become invalid if the issuer does not respond."""

UNKNOWN_KEY_S: Final = 30.0
"""Minimum time between refreshes, so that tokens with unknown key ids do not cause a request each."""

_MAX_BYTES: Final = 1_000_000
_TIMEOUT_S: Final = 5.0
_DISCOVERY: Final = "/.well-known/openid-configuration"
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})

_log = structlog.get_logger(__name__)


class IssuerKeys:
    """Keys of one issuer.

    Args:
        issuer: URL of the issuer, as in the claim ``iss``.
        jwks_url: URL of the keys; default: found by OIDC discovery.
        monotonic_s: monotonic clock.

    Raises:
        ValueError: a URL is neither HTTPS nor a loopback address, so that its responses could be forged.
    """

    def __init__(
        self, issuer: str, jwks_url: str | None = None, *, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        for url in filter(None, (issuer, jwks_url)):
            _check_address(url)
        self._issuer = issuer
        self._jwks_url = jwks_url
        self._monotonic_s = monotonic_s
        self._keys: KeySet | None = None
        self._read_s = self._tried_s = float("-inf")
        self._reading = asyncio.Lock()
        self._http = httpx.AsyncClient(timeout=_TIMEOUT_S, follow_redirects=False)

    async def current(self, *, since: KeySet | None = None) -> KeySet:
        """The keys. If a token did not match ``since``, these keys are refreshed if permitted.

        Raises:
            CredentialsUnavailable: the keys cannot be read, and cached ones are too old.
        """
        if self._is_due(since):
            async with self._reading:
                if self._is_due(since):  # another caller may have refreshed them
                    await self._refresh()
        if self._keys is None or self._monotonic_s() - self._read_s > STALE_S:
            raise CredentialsUnavailable(f"the keys of {self._issuer} cannot be read")
        return self._keys

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _is_due(self, since: KeySet | None) -> bool:
        now_s = self._monotonic_s()
        is_outdated = now_s - self._read_s > REFRESH_S or (since is not None and since is self._keys)
        return is_outdated and now_s - self._tried_s > (UNKNOWN_KEY_S if self._keys is not None else 1.0)

    async def _refresh(self) -> None:
        self._tried_s = self._monotonic_s()
        try:
            url = self._jwks_url or await self._discovered()
            self._keys = KeySet.import_key_set(await self._get(url))  # type: ignore[arg-type]  # checked by joserfc
        except (httpx.HTTPError, JoseError, ValueError, TypeError, KeyError) as error:
            _log.warning("issuer_keys_not_read", issuer=self._issuer, reason=f"{type(error).__name__}: {error}")
            return
        self._read_s = self._tried_s

    async def _discovered(self) -> str:
        found = await self._get(self._issuer.rstrip("/") + _DISCOVERY)
        if found.get("issuer") != self._issuer:
            raise ValueError("the discovery document belongs to another issuer")
        url = str(found["jwks_uri"])
        _check_address(url)
        return url

    async def _get(self, url: str) -> Mapping[str, Any]:
        response = (await self._http.get(url)).raise_for_status()
        if len(response.content) > _MAX_BYTES:
            raise ValueError(f"the document exceeds {_MAX_BYTES:,} bytes")
        found = response.json()
        if not isinstance(found, dict):
            raise TypeError("the document is not a JSON object")
        return found


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(f"{url} must begin with https://, because its responses authorize requests")
