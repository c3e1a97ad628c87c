"""Connection to OpenSearch, and what its failures mean."""

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

_DEAD_S: Final = 5.0
"""How long a node that could not be reached is left alone."""


class _Transport(AsyncTransport):  # type: ignore[misc]  # opensearch-py is not typed here
    """Closes the connections of nodes that are passed over too, which the library forgets."""

    @override
    async def close(self) -> None:
        await super().close()
        for connection in self.seed_connections:
            await connection.close()


class _Json(JSONSerializer):  # type: ignore[misc]  # as above
    """Reads answers several times as fast as the library's own."""

    @override
    def loads(self, s: str | bytes) -> Any:
        try:
            return orjson.loads(s)
        except ValueError as error:
            raise SerializationError(s, error) from error


def connect(settings: OpenSearchSettings) -> AsyncOpenSearch:
    """A client with connections for everything one process does at once.

    Raises:
        ValueError: authentication is set without what it needs.
    """
    hosts = settings.url.split(",")
    options: dict[str, Any] = {
        "hosts": hosts,
        "timeout": settings.timeout_s,
        # A node that cannot be reached, or that has no state of the cluster yet, is passed over for the next one. All
        # other retries are decided by the callers, who know their deadlines.
        "max_retries": len(hosts) - 1,
        "retry_on_status": (503,),
        "dead_timeout": _DEAD_S,
        "pool_maxsize": settings.connections,
        "maxsize": settings.connections,
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
    # The client logs every failed request with its body, and bodies hold documents; failures reach us as exceptions.
    logging.getLogger("opensearch").setLevel(logging.CRITICAL)
    return AsyncOpenSearch(transport_class=_Transport, **options)


@contextmanager
def unavailable_is_said() -> Iterator[None]:
    """Turn "not now" answers into IndexUnavailable; programming errors (400, 404 …) pass through."""
    try:
        yield
    except OpenSearchConnectionError as error:  # time-outs too
        raise IndexUnavailable(f"OpenSearch did not answer: {error.error}") from error
    except TransportError as error:
        # No index yet is "not now" as well: the first worker makes it.
        if error.status_code in _UNAVAILABLE_STATUS or error.error == "index_not_found_exception":
            raise IndexUnavailable(f"OpenSearch answered {error.status_code}: {error.error}") from error
        raise
