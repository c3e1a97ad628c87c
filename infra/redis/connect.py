"""Redis clients and translation of their errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from infra.redis.port import CacheUnavailable
from infra.settings import RedisSettings

_CONNECTIONS: Final = 64
"""Maximum number of connections of one client; further callers wait for a free one."""

_UNAVAILABLE: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.MasterDownError,
    exceptions.ClusterDownError,
    exceptions.OutOfMemoryError,
)
"""Temporary server states, or ones that an operator resolves. Every other error is a defect of Freshline."""


def connect_redis(settings: RedisSettings) -> Redis:
    """A client that returns bytes. It connects with its first command; close it with ``await client.aclose()``.

    If all connections are in use, a caller waits up to ``timeout_s`` for one; the default pool of redis-py would fail
    immediately. A connection that broke while idle is replaced once. A command that timed out is not retried, so that
    ``timeout_s`` limits every call.
    """
    pool = BlockingConnectionPool.from_url(
        settings.url,
        max_connections=_CONNECTIONS,
        timeout=settings.timeout_s,
        socket_timeout=settings.timeout_s,
        socket_connect_timeout=settings.timeout_s,
        retry=Retry(NoBackoff(), 1, supported_errors=(exceptions.ConnectionError,)),
        health_check_interval=30,
    )
    return Redis.from_pool(pool)


@contextmanager
def redis_errors() -> Iterator[None]:
    """Translate errors of an unavailable Redis to ``CacheUnavailable``."""
    try:
        yield
    except _UNAVAILABLE as error:
        raise CacheUnavailable(f"Redis: {error}") from error
