"""The query process: builds its parts once, serves, and takes them down again."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from typing import Any, Final, Protocol, TypeVar

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, generate_latest
from redis.asyncio import Redis

from infra.alerts.factory import open_channels
from infra.credentials.factory import opened_credentials
from infra.embedding.factory import open_embedder
from infra.embedding.port import Embedder
from infra.gc_tuning import tune_gc
from infra.generation.factory import open_generator
from infra.generation.port import AnswerWithheld
from infra.opensearch.port import IndexUnavailable
from infra.opensearch.store import OpenSearchIndex
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis, redis_errors
from infra.redis.event_states import RedisEventStates
from infra.redis.port import CacheUnavailable
from infra.settings import GenerationSettings, OpenSearchSettings, Settings
from infra.tasks import ended
from infra.telemetry.logging import configure_logging
from infra.telemetry.tracing import open_tracing
from infra.web.inline_responder import InlineResponder
from infra.web.metrics import METRICS, http_seconds
from infra.web.peers import PeerProcesses
from infra.web.server import listening, until_told_to_stop
from query.answers.answer import AnswerService
from query.answers.refresh_ahead import RefreshAhead
from query.answers.stream import AnswerStreams
from query.api.app import build_app, question_limit
from query.api.fast_path import URLS, FastPath, Keys, counted_in
from query.api.hit_counts import HitCounts
from query.cache.freshness import FreshnessReader
from query.cache.invalidation_lag import InvalidationLag, InvalidationLagMonitor
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.operations.alerting import Alerting
from query.operations.auditor import Auditor
from query.operations.endpoints import Operations, Part
from query.operations.explain import AnswerExplainer
from query.overload.admission import Admission
from query.overload.bulkhead import Bulkhead
from query.overload.guarded_stores import GuardedGenerator, GuardedIndex
from query.overload.token_budget import GenerationBudget
from query.retrieval.retrieve import Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.search import Access

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
        tune_gc()
        await until_told_to_stop()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """The running service; yields its base URL. Leaving ends it: first the requests under way, then its parts.

    Neither Redis nor the index has to be there at the start.
    """
    async with AsyncExitStack() as ending:
        registry = CollectorRegistry()
        tracing = open_tracing(settings, "query")
        ending.push_async_callback(tracing.close)
        metrics = QueryMetrics(registry, tracing.tracer)
        embedder = _closed_by(ending, open_embedder(settings.embedding))
        generator_guard, generator = _guarded_generator(settings.generator, metrics)
        ending.push_async_callback(generator.close)
        opensearch = _closed_by(ending, OpenSearchIndex.open(settings))
        index = _guarded_index(opensearch, settings.opensearch, metrics)
        redis = await ending.enter_async_context(aclosing(connect_redis(settings.redis)))
        cache = RedisAnswerCache(redis, settings.names, settings.answers)
        states = RedisEventStates(redis, settings.names)
        refills = _refills(settings, metrics)
        near = _near(cache, settings, refills, metrics)
        watch = InvalidationSubscription(cache, near)
        _in_background(ending, watch.run(), "applied-watch")

        fusion = f"rrf {settings.query.rrf_k} of {settings.query.window}"
        maker = AnswerMaker(settings.generation, embedder.model.fingerprint, generator.name, fusion)
        lag = InvalidationLagMonitor(cache, opensearch, metrics)
        _in_background(ending, lag.run(), "lag-watch")
        freshness = FreshnessReader(
            cache=cache,
            near=near,
            index=index,
            watch=watch,
            metrics=metrics,
            wait_s=settings.query.min_position_wait_s,
            behind=lambda tenant: lag.behind(tenant) or not watch.trusted,
            searchable=lag.searchable,
        )
        retrieval = Retrieval(
            index=index,
            embedder=embedder,
            metrics=metrics,
            window=settings.query.window,
            kept=settings.query.window_kept,
            rrf_k=settings.query.rrf_k,
            admission=_admission(settings, metrics, lag),
        )
        auditor = Auditor(
            share=settings.query.audit_share,
            per_s=settings.query.audits_per_s,
            cache=cache,
            slices=cache,
            index=index,
            retrieval=retrieval,
            states=states,
            metrics=metrics,
        )
        _in_background(ending, auditor.run(), "auditor")
        answering = AnswerService(
            freshness=freshness,
            retrieval=retrieval,
            generator=generator,
            cache=cache,
            maker=maker,
            metrics=metrics,
            ttl_s=settings.query.cache_ttl_s,
            budget=GenerationBudget(
                tokens_per_minute=settings.generator.tenant_tokens_per_minute,
                tokens_per_answer=settings.generator.max_tokens,
            ),
            audit=auditor.saw,
            asked=refills.asked,
        )
        ending.push_async_callback(answering.close)
        _in_background(ending, refills.run(answering, lambda: retrieval.has_room), "refills")
        streamed = _closed_by(ending, AnswerStreams(answering=answering, generator=generator, metrics=metrics))
        credentials = await ending.enter_async_context(opened_credentials(settings))
        await _warm_up(embedder, opensearch, retrieval, settings.tenant.default)
        parts = _parts(opensearch, redis, watch, generator_guard) | {
            "invalidation": Part(InvalidationLag(cache, opensearch, settings.tenant.default).check, needed=False)
        }
        operations = await _operations(ending, parts, settings, metrics, registry)
        limit, seconds = question_limit(settings.query.tenant_requests_per_s), http_seconds(registry)
        app = build_app(
            answering,
            streamed,
            credentials=credentials,
            audited=settings.credentials.audit,
            deadline_s=settings.query.deadline_s,
            limit=limit,
            seconds=seconds,
            tracer=tracing.tracer,
            operations=operations,
            explaining=AnswerExplainer(
                cache=cache,
                slices=cache,
                near=near,
                states=states,
                maker=maker,
                window=settings.query.window,
                behind=freshness.left_aside,
            ),
            registry=registry,
            peers=operations.peers,
        )
        hits = None
        if not _looks_at_each(settings):
            counts = HitCounts(metrics, counted_in(seconds))
            ending.callback(counts.flush)
            hits = FastPath(
                app,
                near=freshness.near_hit,
                keys=Keys(maker),
                credentials=credentials,
                limit=limit,
                operations=operations,
                counts=counts,
                audit=auditor.saw,
                full=retrieval.is_full,
                shared=freshness.shared_hit,
                proof=freshness.near_proof,
            )
        base_url = await ending.enter_async_context(_listening(app, hits, settings))
        _log.info("query_serving", url=base_url, namespace=settings.namespace)
        try:
            yield base_url
        finally:
            operations.drain()
            await asyncio.sleep(settings.query.drain_s)  # balancers look at /ready now and then


class _Closing(Protocol):
    async def close(self) -> None: ...


_Part = TypeVar("_Part", bound=_Closing)


def _closed_by(ending: AsyncExitStack, part: _Part) -> _Part:
    ending.push_async_callback(part.close)
    return part


def _near(cache: RedisAnswerCache, settings: Settings, refills: RefreshAhead, metrics: QueryMetrics) -> NearCache:
    near = NearCache(slices=cache.count, max_bytes=settings.query.near_bytes, dropped=refills.dropped)
    metrics.near_bytes.set_function(lambda: near.size_bytes)
    return near


def _refills(settings: Settings, metrics: QueryMetrics) -> RefreshAhead:
    return RefreshAhead(
        per_s=settings.query.refills_per_s,
        hits=settings.query.refill_hits,
        # An extract costs no more than the retrieval.
        written=settings.generator.provider == "extractive",
        deadline_s=settings.query.deadline_s,
        metrics=metrics,
    )


def _admission(settings: Settings, metrics: QueryMetrics, lag: InvalidationLagMonitor) -> Admission:
    return Admission(
        target_ms=settings.query.miss_target_ms,
        queue_ms=settings.query.miss_queue_ms,
        most=settings.opensearch.connections,
        metrics=metrics,
        late=lambda: lag.late,
    )


def _listening(app: FastAPI, hits: FastPath | None, settings: Settings) -> AbstractAsyncContextManager[str]:
    if hits is None:
        return listening(app, settings.query, settings)
    return listening(hits, settings.query, settings, at_once=InlineResponder(URLS, hits.at_once))


def _looks_at_each(settings: Settings) -> bool:
    """Whether each question is to be traced or told in the audit log: then none takes the short way."""
    return settings.telemetry.otlp_endpoint is not None or settings.credentials.audit == "all"


async def _operations(
    ending: AsyncExitStack,
    parts: Mapping[str, Part],
    settings: Settings,
    metrics: QueryMetrics,
    registry: CollectorRegistry,
) -> Operations:
    operations = Operations(
        parts,
        metrics.recent,
        memory_limit_bytes=settings.query.memory_limit_bytes or None,
        peers=PeerProcesses.of_this_process(),
    )
    _begin_alerting(ending, operations, settings, metrics)
    told = {METRICS: lambda _: generate_latest(registry), **operations.told}
    await ending.enter_async_context(operations.peers.listening(told))
    return operations


def _begin_alerting(ending: AsyncExitStack, operations: Operations, settings: Settings, metrics: QueryMetrics) -> None:
    channels = open_channels(settings.alerts)
    for channel in channels:
        ending.push_async_callback(channel.close)
    if channels:
        source = f"query on {socket.gethostname()}, process {os.getpid()}, {settings.namespace}"
        alerting = Alerting(operations, channels, settings.alerts, metrics=metrics, source=source)
        _in_background(ending, alerting.run(), "alerting")


def _guarded_generator(settings: GenerationSettings, metrics: QueryMetrics) -> tuple[Bulkhead, GuardedGenerator]:
    guard = Bulkhead("generator", places=settings.concurrency, metrics=metrics, harmless=(AnswerWithheld,))
    return guard, GuardedGenerator(open_generator(settings), guard=guard, limit_s=settings.timeout_s)


def _guarded_index(index: OpenSearchIndex, settings: OpenSearchSettings, metrics: QueryMetrics) -> GuardedIndex:
    guard = Bulkhead("index", places=settings.connections, metrics=metrics)
    return GuardedIndex(index, guard=guard, metrics=metrics, limit_s=settings.timeout_s)


async def _warm_up(embedder: Embedder, index: OpenSearchIndex, retrieval: Retrieval, tenant: str) -> None:
    """The first run of a model and the first search of an index are slow: let them be ours."""
    await embedder.embed_query(_WARM_UP)
    try:
        await index.ready()
        await retrieval.retrieve(_WARM_UP, Access(tenant), top_k=1, filters={})
    except IndexUnavailable as error:
        _log.warning("index_not_warmed", reason=str(error))


def _parts(
    index: OpenSearchIndex, redis: Redis, watch: InvalidationSubscription, generator: Bulkhead
) -> dict[str, Part]:
    async def redis_answers() -> None:
        with redis_errors():
            await redis.ping()

    async def subscription_is_live() -> None:
        if not watch.trusted:
            raise CacheUnavailable("Redis evicts keys at will: set maxmemory-policy to noeviction")
        if not watch.live:
            raise CacheUnavailable(
                "not subscribed to announcements: answers come from Redis alone, and waits take up to 50 ms longer"
            )

    return {
        "index": Part(index.ready, needed=True),
        "redis": Part(redis_answers, needed=False),
        "subscription": Part(subscription_is_live, needed=False),
        "generator": Part(generator.check, needed=False),
    }


def _in_background(ending: AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> None:
    task = asyncio.create_task(work, name=name)

    async def end() -> None:
        await ended(task)
        if not task.cancelled():
            task.result()

    ending.push_async_callback(end)
