"""Signed tokens (JWT) of an OIDC issuer: who they speak for."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from joserfc.jwt import JWTClaimsRegistry, Token, decode
from pydantic import TypeAdapter, ValidationError

from infra.credentials.issuer_keys import IssuerKeys
from infra.credentials.port import CredentialRefused, Principal, Verified
from infra.settings import JwtSettings
from schemas.credentials import Scope
from schemas.documents import Groups, TenantId
from schemas.search import Access

RECHECK_S: Final = 60.0
"""How long a token that was found valid is taken for so without looking at its signature again."""

_CLOCK_LEEWAY_S: Final = 30
"""Tolerated difference between the clocks of the issuer and of this machine."""

_TENANT: Final[TypeAdapter[str]] = TypeAdapter(TenantId)
_GROUPS: Final[TypeAdapter[tuple[str, ...]]] = TypeAdapter(Groups)


class TokenVerifier:
    """Verifies tokens of one issuer, made for one audience, signed with one algorithm.

    The algorithm is the settings', never the token's: a token must not choose how it is checked. The tenant and the
    groups are claims; scopes are those words of ``scope`` that are ours.

    Args:
        keys: of the issuer.
        settings: what must be in a token.
        monotonic_s: a clock that only goes forward.
        now_s: epoch seconds.
    """

    def __init__(
        self,
        keys: IssuerKeys,
        settings: JwtSettings,
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._settings = settings
        self._monotonic_s = monotonic_s
        self._now_s = now_s
        self._claims = JWTClaimsRegistry(
            now=lambda: int(now_s()),
            leeway=_CLOCK_LEEWAY_S,
            iss={"essential": True, "value": settings.issuer or ""},
            aud={"essential": True, "value": settings.audience or ""},
            exp={"essential": True},
            sub={"essential": True},
        )

    async def verify(self, text: str) -> Verified:
        """Whom the token speaks for.

        Raises:
            CredentialRefused: it is no valid token.
            CredentialsUnavailable: the issuer's keys are not to be had.
        """
        keys = await self._keys.current()
        try:
            token = await self._decoded(text, keys)
            self._claims.validate(token.claims)
        except (JoseError, ValueError) as error:
            raise CredentialRefused(f"token: {error}") from error
        claims = token.claims
        # A claim is from whoever signed it, but the time it ends is compared as a number here too.
        left_s = float(claims["exp"]) + _CLOCK_LEEWAY_S - self._now_s()
        return Verified(self._principal(claims), self._monotonic_s() + min(RECHECK_S, left_s))

    async def close(self) -> None:
        """Close the connections to the issuer."""
        await self._keys.close()

    async def _decoded(self, text: str, keys: KeySet) -> Token:
        try:
            return decode(text, keys, algorithms=[self._settings.algorithm])
        except InvalidKeyIdError:  # the issuer may have begun to sign with another key
            newer = await self._keys.current(since=keys)
            if newer is keys:
                raise
            return decode(text, newer, algorithms=[self._settings.algorithm])

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        named = self._settings
        try:
            tenant = _TENANT.validate_python(claims.get(named.tenant_claim))
            groups = _GROUPS.validate_python(claims.get(named.groups_claim, ()))
        except ValidationError as error:
            # Without the values: the log is no place for claims.
            found = error.errors(include_input=False, include_url=False)[0]
            raise CredentialRefused(
                f"token: claim {named.tenant_claim} or {named.groups_claim}: {found['msg']}"
            ) from None
        words = claims.get("scope", "")
        granted = words.split() if isinstance(words, str) else ()
        return Principal(f"token:{claims['sub']}", Access(tenant, groups), frozenset(set(Scope) & set(granted)))
