"""Creation of credential verification from the settings."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from infra.credentials.issuer_keys import IssuerKeys
from infra.credentials.key_table import KeyTable
from infra.credentials.tokens import TokenVerifier
from infra.opensearch.client import connect
from infra.opensearch.keys import OpenSearchKeys
from infra.settings import Settings
from infra.tasks import cancel_and_wait
from infra.web.credentials import Credentials


@asynccontextmanager
async def opened_credentials(settings: Settings) -> AsyncIterator[Credentials]:
    """Open verification by stored API keys and keys of the issuer. Neither must be available at the start.

    Raises:
        ValueError: an issuer is configured without an audience.
    """
    async with AsyncExitStack() as resources:
        tokens = _token_verifier(settings)
        if tokens is not None:
            resources.push_async_callback(tokens.close)
        client = connect(settings.opensearch)
        resources.push_async_callback(client.close)
        refresh_s, stale_s = settings.credentials.refresh_s, settings.credentials.stale_s
        keys = KeyTable(OpenSearchKeys(client, settings.names), refresh_s=refresh_s, stale_s=stale_s)
        await keys.refresh()
        refreshing = asyncio.create_task(keys.run(), name="api-keys")
        resources.push_async_callback(cancel_and_wait, refreshing)
        yield Credentials(settings, keys=keys, tokens=tokens)


def _token_verifier(settings: Settings) -> TokenVerifier | None:
    jwt = settings.jwt
    if jwt.issuer is None:
        return None
    if not jwt.audience:
        raise ValueError("FRESHLINE_JWT__AUDIENCE is not set: without it, tokens for other services would be accepted")
    return TokenVerifier(IssuerKeys(jwt.issuer, jwt.jwks_url), jwt)
