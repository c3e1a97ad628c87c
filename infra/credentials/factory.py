"""What a service needs to know who asks, from the settings."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from infra.credentials.issuer_keys import IssuerKeys
from infra.credentials.key_table import KeyTable
from infra.credentials.tokens import TokenVerifier
from infra.opensearch.client import connect
from infra.opensearch.keys import OpenSearchKeys
from infra.settings import Settings
from infra.tasks import ended
from infra.web.credentials import Credentials


@asynccontextmanager
async def opened_credentials(settings: Settings) -> AsyncIterator[Credentials]:
    """Credentials that follow the stored API keys and the issuer's; neither has to be there at the start.

    Raises:
        ValueError: an issuer is set without what it needs.
    """
    async with AsyncExitStack() as ending:
        tokens = _token_verifier(settings)
        if tokens is not None:
            ending.push_async_callback(tokens.close)
        client = connect(settings.opensearch)
        ending.push_async_callback(client.close)
        told = settings.credentials
        keys = KeyTable(OpenSearchKeys(client, settings.names), refresh_s=told.refresh_s, stale_s=told.stale_s)
        await keys.refresh()
        reading = asyncio.create_task(keys.run(), name="api-keys")
        ending.push_async_callback(ended, reading)
        yield Credentials(settings, keys=keys, tokens=tokens)


def _token_verifier(settings: Settings) -> TokenVerifier | None:
    told = settings.jwt
    if told.issuer is None:
        return None
    if not told.audience:
        raise ValueError("FRESHLINE_JWT__AUDIENCE is not set: without it tokens made for other services would do")
    return TokenVerifier(IssuerKeys(told.issuer, told.jwks_url), told)
