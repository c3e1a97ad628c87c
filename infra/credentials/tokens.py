"""Verification of signed tokens (JWT) of an OIDC issuer."""

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
"""Time for which a verified token is accepted without verifying its signature again."""

_CLOCK_LEEWAY_S: Final = 30
"""Tolerated difference between the clocks of the issuer and of this machine."""

_TENANT: Final[TypeAdapter[str]] = TypeAdapter(TenantId)
_GROUPS: Final[TypeAdapter[tuple[str, ...]]] = TypeAdapter(Groups)


class TokenVerifier:
    """Verifies tokens of one issuer for one audience, signed with one algorithm.

    The settings define the algorithm: a token must not choose how it is verified. Tenant and groups are claims; scopes
    are the words of the claim ``scope`` that Freshline defines.

    Args:
        keys: keys of the issuer.
        settings: required claims and algorithm.
        monotonic_s: monotonic clock.
        now_s: clock, in epoch seconds.
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
        """Verify a token.

        Raises:
            CredentialRefused: the token is not valid.
            CredentialsUnavailable: the keys of the issuer are not available.
        """
        keys = await self._keys.current()
        try:
            token = await self._decoded(text, keys)
            self._claims.validate(token.claims)
        except (JoseError, ValueError) as error:
            raise CredentialRefused(f"token: {error}") from error
        claims = token.claims
        remaining_s = float(claims["exp"]) + _CLOCK_LEEWAY_S - self._now_s()
        return Verified(self._principal(claims), self._monotonic_s() + min(RECHECK_S, remaining_s))

    async def close(self) -> None:
        """Close the connections to the issuer."""
        await self._keys.close()

    async def _decoded(self, text: str, keys: KeySet) -> Token:
        try:
            return decode(text, keys, algorithms=[self._settings.algorithm])
        except InvalidKeyIdError:  # the issuer may have rotated its keys
            newer = await self._keys.current(since=keys)
            if newer is keys:
                raise
            return decode(text, newer, algorithms=[self._settings.algorithm])

    def _principal(self, claims: Mapping[str, Any]) -> Principal:
        tenant_claim, groups_claim = self._settings.tenant_claim, self._settings.groups_claim
        try:
            tenant = _TENANT.validate_python(claims.get(tenant_claim))
            groups = _GROUPS.validate_python(claims.get(groups_claim, ()))
        except ValidationError as error:
            # Claims must not appear in the log.
            first = error.errors(include_input=False, include_url=False)[0]
            raise CredentialRefused(f"token: claim {tenant_claim} or {groups_claim}: {first['msg']}") from None
        words = claims.get("scope", "")
        granted = words.split() if isinstance(words, str) else ()
        return Principal(f"token:{claims['sub']}", Access(tenant, groups), frozenset(set(Scope) & set(granted)))
