"""In-process table of all API keys, refreshed periodically, so that no request waits for the store."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from infra.credentials.api_keys import Token, valid_until_ms
from infra.credentials.port import CredentialRefused, CredentialsUnavailable, KeyStore, Principal, Verified
from schemas.credentials import ApiKey
from schemas.search import Access

RECHECK_S: Final = 1.0
"""Time for which a verified key is accepted without reading the table again."""

_log = structlog.get_logger(__name__)


class KeyTable:
    """The keys as of the last refresh.

    A revocation takes effect within ``refresh_s`` + ``RECHECK_S``. If the store is unavailable, the table remains valid
    for ``stale_s``; after that no key is accepted.

    Args:
        store: store of the keys.
        refresh_s: pause between refreshes.
        stale_s: maximum age of the table.
        monotonic_s: monotonic clock.
        now_ms: clock, in epoch milliseconds.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        refresh_s: float,
        stale_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_ms: Callable[[], float] = lambda: time.time() * 1_000,
    ) -> None:
        self._store = store
        self._refresh_s = refresh_s
        self._stale_s = stale_s
        self._monotonic_s = monotonic_s
        self._now_ms = now_ms
        self._keys: dict[str, ApiKey] = {}
        self._valid_until_s = -1.0

    async def run(self) -> None:
        """Refresh the table until cancelled."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_s)

    async def refresh(self) -> None:
        """Refresh the table. If the store is unavailable, the current table is kept."""
        began_s = self._monotonic_s()
        try:
            keys = await self._store.keys()
        except CredentialsUnavailable as error:
            _log.warning("keys_not_read", reason=str(error), valid_for_s=max(0.0, self._valid_until_s - began_s))
            return
        self._keys = {key.key_id: key for key in keys}
        self._valid_until_s = began_s + self._stale_s

    def verify(self, token: Token) -> Verified:
        """Verify a token.

        Raises:
            CredentialRefused: the token is not valid.
            CredentialsUnavailable: the table is too old.
        """
        monotonic_s, now_ms = self._monotonic_s(), self._now_ms()
        if monotonic_s >= self._valid_until_s:
            raise CredentialsUnavailable("the API keys cannot be read")
        key = self._keys.get(token.key_id)
        until_ms = valid_until_ms(key, token.secret, now_ms=now_ms) if key else None
        if key is None or until_ms is None:
            raise CredentialRefused(f"key {token.key_id} is unknown, revoked or expired, or the secret is wrong")
        principal = Principal(f"key:{key.key_id}", Access(key.tenant, key.groups), frozenset(key.scopes))
        until_s = min(monotonic_s + RECHECK_S, monotonic_s + (until_ms - now_ms) / 1_000, self._valid_until_s)
        return Verified(principal, until_s)
