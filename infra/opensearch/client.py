"""OpenSearch clients and translation of their errors."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import boto3
import orjson
from opensearchpy import (
    AIOHttpConnection,
    AsyncHttpConnection,
    AsyncOpenSearch,
    AsyncTransport,
    AWSV4SignerAsyncAuth,
)
from opensearchpy.exceptions import ConnectionError as OpenSearchConnectionError
from opensearchpy.exceptions import SerializationError, TransportError
from opensearchpy.serializer import JSONSerializer
from typing_extensions import override

from infra.opensearch.port import IndexUnavailable
from infra.settings import OpenSearchSettings

_UNAVAILABLE_STATUS: Final = frozenset({429, 500, 502, 503, 504})

CONNECTIONS: Final = 64
"""Maximum number of connections of one process, and therefore of concurrent requests."""

_DEAD_S: Final = 5.0
"""Time for which an unreachable node is not used."""


class _Transport(AsyncTransport):  # type: ignore[misc]  # opensearch-py is not typed here
    """Also closes the connections of nodes marked as dead, which the library omits."""

    @override
    async def close(self) -> None:
        await super().close()
        for connection in self.seed_connections:
            await connection.close()


class _Json(JSONSerializer):  # type: ignore[misc]  # as above
    """Decodes responses several times as fast as the default serializer."""

    @override
    def loads(self, s: str | bytes) -> Any:
        try:
            return orjson.loads(s)
        except ValueError as error:
            raise SerializationError(s, error) from error


def connect(settings: OpenSearchSettings) -> AsyncOpenSearch:
    """A client for one process.

    Raises:
        ValueError: a setting that the authentication requires is missing.
    """
    hosts = settings.url.split(",")
    options: dict[str, Any] = {
        "hosts": hosts,
        "timeout": settings.timeout_s,
        # If a node is unreachable or has no cluster state yet, the next one is tried. Callers decide all other retries,
        # because they have deadlines.
        "max_retries": len(hosts) - 1,
        "retry_on_status": (503,),
        "dead_timeout": _DEAD_S,
        "pool_maxsize": CONNECTIONS,
        "maxsize": CONNECTIONS,
        "connection_class": AIOHttpConnection,
        "serializers": {"application/json": _Json()},
        "serializer": _Json(),
    }
    if settings.auth == "basic":
        if settings.username is None or settings.password is None:
            raise ValueError("FRESHLINE_OPENSEARCH__USERNAME and __PASSWORD must be set with auth=basic")
        options["http_auth"] = (settings.username, settings.password.get_secret_value())
    elif settings.auth == "aws":
        if settings.region is None:
            raise ValueError("FRESHLINE_OPENSEARCH__REGION must be set with auth=aws")
        credentials = boto3.Session().get_credentials()
        options["http_auth"] = AWSV4SignerAsyncAuth(credentials, settings.region, "es")
        options["connection_class"] = AsyncHttpConnection
    # The client logs every failed request with its body, which may contain documents. Failures are raised anyway.
    logging.getLogger("opensearch").setLevel(logging.CRITICAL)
    return AsyncOpenSearch(transport_class=_Transport, **options)


@contextmanager
def opensearch_errors() -> Iterator[None]:
    """Translate temporary errors to ``IndexUnavailable``. Other errors, such as 400 and 404, are defects."""
    try:
        yield
    except OpenSearchConnectionError as error:  # includes timeouts
        raise IndexUnavailable(f"OpenSearch did not respond: {error.error}") from error
    except TransportError as error:
        # A missing index is temporary too: the first worker creates it.
        if error.status_code in _UNAVAILABLE_STATUS or error.error == "index_not_found_exception":
            raise IndexUnavailable(f"OpenSearch responded with {error.status_code}: {error.error}") from error
        raise
