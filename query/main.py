"""The query process: builds its parts once, serves, and takes them down again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import structlog
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from infra.embedding.opening import open_embedder
from infra.embedding.port import Embedder
from infra.generation.opening import open_generator
from infra.opensearch.port import Access, IndexUnavailable
from infra.opensearch.store import OpenSearchIndex
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis, redis_errors
from infra.redis.port import CacheUnavailable
from infra.settings import Settings
from infra.telemetry.logging import configure_logging
from infra.web.credentials import Credentials
from infra.web.server import listening, until_told_to_stop
from query.answering import Answering
from query.api import Part, build_app
from query.core.cache_key import AnswerMaker
from query.metrics import QueryMetrics
from query.retrieval import Retrieval
from query.standing import Standings
from query.watch import AppliedWatch

_WARM_UP: Final = "what is new"

_log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Serve questions until SIGTERM or SIGINT.

    Raises:
        UnsafeBind, CannotListen: see ``infra.web.server.listening``.
        ValueError, FileNotFoundError: the embedding model is not as the settings say.
    """
    configure_logging(settings)
    async with serving(settings):
        await until_told_to_stop()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """The running service; yields its base URL. Leaving ends it: first the requests under way, then its parts.

    Neither Redis nor the index has to be there at the start.
    """
    async with AsyncExitStack() as ending:
        registry = CollectorRegistry()
        metrics = QueryMetrics(registry)
        embedder = open_embedder(settings.embedding)
        ending.push_async_callback(embedder.close)
        generator = open_generator(settings.generator)
        ending.push_async_callback(generator.close)
        index = OpenSearchIndex.open(settings)
        ending.push_async_callback(index.close)
        redis = connect_redis(settings.redis)
        ending.push_async_callback(redis.aclose)
        cache = RedisAnswerCache(redis, settings.names)
        watch = AppliedWatch(cache)
        watching = asyncio.create_task(watch.run(), name="applied-watch")
        ending.push_async_callback(_end, watching)

        fusion = f"rrf {settings.query.rrf_k} of {settings.query.window}"
        maker = AnswerMaker(settings.generation, embedder.model.fingerprint, generator.name, fusion)
        standings = Standings(
            cache=cache, index=index, watch=watch, metrics=metrics, wait_s=settings.query.min_position_wait_s
        )
        retrieval = Retrieval(
            index=index,
            embedder=embedder,
            metrics=metrics,
            window=settings.query.window,
            rrf_k=settings.query.rrf_k,
        )
        answering = Answering(
            standings=standings,
            retrieval=retrieval,
            generator=generator,
            cache=cache,
            maker=maker,
            metrics=metrics,
            ttl_s=settings.query.cache_ttl_s,
        )
        ending.push_async_callback(answering.close)
        await _warm_up(embedder, index, retrieval, settings.tenant.default)
        app = build_app(
            answering,
            credentials=Credentials(settings.tenant),
            parts=_parts(index, redis, watch),
            registry=registry,
        )
        base_url = await ending.enter_async_context(listening(app, settings.query, settings.tenant))
        _log.info("query_serving", url=base_url, namespace=settings.namespace)
        yield base_url


async def _warm_up(embedder: Embedder, index: OpenSearchIndex, retrieval: Retrieval, tenant: str) -> None:
    """The first run of a model and the first search of an index are slow: let them be ours."""
    await embedder.embed_query(_WARM_UP)
    try:
        await index.ready()
        await retrieval.retrieve(_WARM_UP, Access(tenant), top_k=1, filters={})
    except IndexUnavailable as error:
        _log.warning("index_not_warmed", reason=str(error))


def _parts(index: OpenSearchIndex, redis: Redis, watch: AppliedWatch) -> dict[str, Part]:
    async def redis_answers() -> None:
        with redis_errors():
            await redis.ping()

    async def subscription_is_live() -> None:
        if not watch.live:
            raise CacheUnavailable("not subscribed to announcements: waits for a position take up to 50 ms longer")

    return {
        "index": Part(index.ready, needed=True),
        "redis": Part(redis_answers, needed=False),
        "subscription": Part(subscription_is_live, needed=False),
    }


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
