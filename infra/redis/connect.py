"""How every part of Freshline reaches Redis: one kind of client, one translation of what may go wrong."""

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
"""States of a server that pass by themselves or by an operator's hand; every other error is a mistake of ours."""


def connect_redis(settings: RedisSettings) -> Redis:
    """A client whose replies are bytes; it connects with its first command. Close it with ``await client.aclose()``.

    The pool blocks: with all connections in use a caller waits up to ``timeout_s`` for one, where redis-py's plain pool
    would fail at once. A connection that broke while idle is replaced once, silently; a command that timed out is not
    repeated, so that ``timeout_s`` stays the limit.
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
    """Say ``CacheUnavailable`` for whatever means that Redis cannot serve now."""
    try:
        yield
    except _UNAVAILABLE as error:
        raise CacheUnavailable(f"Redis: {error}") from error
