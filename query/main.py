"""The query process: opens the stores, builds the read path, serves, and closes everything in reverse order."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
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
from infra.opensearch.client import CONNECTIONS
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import IndexUnavailable
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis, redis_errors
from infra.redis.event_states import RedisEventStates
from infra.redis.port import CacheUnavailable
from infra.settings import Settings
from infra.tasks import cancel_and_wait
from infra.telemetry.logging import configure_logging
from infra.telemetry.tracing import Tracing, open_tracing
from infra.web.credentials import Credentials
from infra.web.inline_responder import InlineResponder
from infra.web.metrics import METRICS, http_seconds
from infra.web.peers import PeerProcesses
from infra.web.server import listening, wait_for_shutdown
from query.answers.answer import AnswerService
from query.answers.fill import AnswerFill, AnswerStore
from query.answers.refresh_ahead import RefreshAhead, RefreshPolicy
from query.answers.stream import AnswerStreams
from query.api.app import ApiPolicy, ApiServices, ApiTelemetry, build_app, question_limit
from query.api.fast_path import URLS, FastPath, Gate, QuestionKeys, counted_in
from query.api.hit_counts import HitCounts
from query.cache.freshness import FreshnessReader, FreshnessSources
from query.cache.invalidation_lag import InvalidationLag, InvalidationLagMonitor
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.operations.alerting import Alerting
from query.operations.answer_records import AnswerRecords
from query.operations.auditor import Auditor, AuditPolicy
from query.operations.endpoints import Dependency, Operations
from query.operations.explain import AnswerExplainer
from query.operations.observers import Observers
from query.overload.admission import Admission
from query.overload.bulkhead import Bulkhead
from query.overload.guarded_stores import GuardedGenerator, GuardedIndex
from query.overload.token_budget import GenerationBudget
from query.retrieval.retrieve import FusionPolicy, Retrieval
from query.telemetry.metrics import QueryMetrics
from schemas.search import RRF_K, Access

_WARM_UP: Final = "what is new"

_log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Serve questions until SIGTERM or SIGINT.

    Raises:
        UnsafeBind, CannotListen: see ``infra.web.server.listening``.
        ValueError, FileNotFoundError: the embedding model does not match the settings.
    """
    configure_logging(settings)
    async with serving(settings):
        tune_gc()
        await wait_for_shutdown()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[str]:
    """The running service; yields its base URL. Leaving it drains: first the requests in progress, then the stores.

    Neither Redis nor the index has to be available at the start.
    """
    async with AsyncExitStack() as closing:
        process = _open_process(closing, settings)
        stores = await build_stores(closing, settings, process.metrics)
        path = build_read_path(closing, settings, process.metrics, stores)
        await _warm_up(stores, path.retrieval, settings.tenant.default)
        operations = await _open_operations(closing, settings, process, stores, path)
        app, fast_path = _build_api(closing, settings, process=process, stores=stores, path=path, operations=operations)
        base_url = await closing.enter_async_context(_listening(app, fast_path, settings))
        _log.info("query_serving", url=base_url, namespace=settings.namespace)
        try:
            yield base_url
        finally:
            operations.drain()
            await asyncio.sleep(settings.query.drain_s)  # load balancers poll /ready


@dataclass(frozen=True, slots=True)
class Process:
    """Telemetry of the process."""

    registry: CollectorRegistry
    tracing: Tracing
    metrics: QueryMetrics


@dataclass(frozen=True, slots=True)
class Stores:
    """Everything outside the process, with the protection in front of it."""

    redis: Redis
    cache: RedisAnswerCache
    states: RedisEventStates
    opensearch: OpenSearchIndex
    index: GuardedIndex
    embedder: Embedder
    generator: GuardedGenerator
    generator_bulkhead: Bulkhead
    credentials: Credentials


@dataclass(frozen=True, slots=True)
class ReadPath:
    """From a question to an answer."""

    near: NearCache
    subscription: InvalidationSubscription
    freshness: FreshnessReader
    retrieval: Retrieval
    records: AnswerRecords
    maker: AnswerMaker
    observers: Observers
    answers: AnswerService
    streams: AnswerStreams


async def build_stores(closing: AsyncExitStack, settings: Settings, metrics: QueryMetrics) -> Stores:
    """Open clients of all stores. Makes no calls yet."""
    embedder = _closed_by(closing, open_embedder(settings.embedding))
    generation, search = settings.generator, settings.opensearch
    bulkhead = Bulkhead("generator", slots=generation.concurrency, metrics=metrics, ignored=(AnswerWithheld,))
    generator = _closed_by(
        closing, GuardedGenerator(open_generator(generation), bulkhead=bulkhead, timeout_s=generation.timeout_s)
    )
    opensearch = _closed_by(closing, OpenSearchIndex.open(settings))
    index_bulkhead = Bulkhead("index", slots=CONNECTIONS, metrics=metrics)
    redis = await closing.enter_async_context(aclosing(connect_redis(settings.redis)))
    return Stores(
        redis=redis,
        cache=RedisAnswerCache(redis, settings.names, settings.answers),
        states=RedisEventStates(redis, settings.names),
        opensearch=opensearch,
        index=GuardedIndex(opensearch, bulkhead=index_bulkhead, metrics=metrics, timeout_s=search.timeout_s),
        embedder=embedder,
        generator=generator,
        generator_bulkhead=bulkhead,
        credentials=await closing.enter_async_context(opened_credentials(settings)),
    )


def build_read_path(closing: AsyncExitStack, settings: Settings, metrics: QueryMetrics, stores: Stores) -> ReadPath:
    """Build the read path and start its background tasks: subscription, lag monitor, auditor, refresh-ahead."""
    query, generation, cache = settings.query, settings.generator, stores.cache
    refresh = RefreshAhead(
        RefreshPolicy(
            per_s=query.refreshes_per_s,
            min_hits=query.refresh_min_hits,
            # An extractive answer costs no more than the retrieval.
            generated=generation.provider == "extractive",
            deadline_s=query.deadline_s,
        ),
        metrics,
    )
    near = NearCache(slices=cache.count, max_bytes=query.near_cache_bytes, on_invalidated=refresh.on_invalidated)
    metrics.near_cache_bytes.set_function(lambda: near.size_bytes)
    subscription = InvalidationSubscription(cache, near)
    _in_background(closing, subscription.run(), "invalidation-subscription")
    monitor = InvalidationLagMonitor(cache, stores.opensearch, metrics)
    _in_background(closing, monitor.run(), "invalidation-lag")
    freshness = FreshnessReader(
        FreshnessSources(cache, near, stores.index, subscription, monitor),
        metrics=metrics,
        wait_s=query.min_position_wait_s,
    )
    retrieval = Retrieval(
        index=stores.index,
        embedder=stores.embedder,
        metrics=metrics,
        policy=FusionPolicy(candidates=query.candidates, kept=query.candidates_kept, rrf_k=RRF_K),
        admission=Admission(
            target_ms=query.miss_target_ms,
            queue_ms=query.miss_queue_ms,
            max_concurrent=CONNECTIONS,
            metrics=metrics,
            is_lagging=lambda: monitor.lags,
        ),
    )
    records = AnswerRecords(cache, cache, stores.states)
    auditor = Auditor(
        AuditPolicy(query.audit_sample_rate, query.audits_per_s),
        records=records,
        index=stores.index,
        retrieval=retrieval,
        metrics=metrics,
    )
    _in_background(closing, auditor.run(), "auditor")
    fill = AnswerFill(
        freshness=freshness,
        retrieval=retrieval,
        generator=stores.generator,
        store=AnswerStore(cache, query.cache_ttl_s),
        metrics=metrics,
        budget=GenerationBudget(
            tokens_per_minute=generation.tenant_tokens_per_minute, tokens_per_answer=generation.max_tokens
        ),
    )
    fusion = f"rrf {RRF_K} of {query.candidates}"
    maker = AnswerMaker(settings.generation, stores.embedder.model.fingerprint, stores.generator.name, fusion)
    observers = Observers(auditor, refresh)
    answers = _closed_by(
        closing, AnswerService(freshness=freshness, fill=fill, maker=maker, metrics=metrics, observer=observers)
    )
    _in_background(closing, refresh.run(answers, lambda: retrieval.has_spare_capacity), "refresh-ahead")
    streams = AnswerStreams(answers=answers, fill=fill, generator=stores.generator, metrics=metrics)
    return ReadPath(
        near=near,
        subscription=subscription,
        freshness=freshness,
        retrieval=retrieval,
        records=records,
        maker=maker,
        observers=observers,
        answers=answers,
        streams=_closed_by(closing, streams),
    )


def _open_process(closing: AsyncExitStack, settings: Settings) -> Process:
    registry = CollectorRegistry()
    tracing = open_tracing(settings, "query")
    closing.push_async_callback(tracing.close)
    return Process(registry, tracing, QueryMetrics(registry, tracing.tracer))


async def _open_operations(
    closing: AsyncExitStack, settings: Settings, process: Process, stores: Stores, path: ReadPath
) -> Operations:
    operations = Operations(
        _dependencies(stores, path.subscription, settings.tenant.default),
        process.metrics.rolling_stats,
        memory_limit_bytes=settings.query.memory_limit_bytes or None,
        peers=PeerProcesses.of_this_process(),
    )
    _start_alerting(closing, operations, settings, process.metrics)
    handlers = {METRICS: lambda _: generate_latest(process.registry), **operations.peer_handlers}
    await closing.enter_async_context(operations.peers.listening(handlers))
    return operations


def _build_api(
    closing: AsyncExitStack,
    settings: Settings,
    *,
    process: Process,
    stores: Stores,
    path: ReadPath,
    operations: Operations,
) -> tuple[FastAPI, FastPath | None]:
    limit, seconds = question_limit(settings.query.tenant_requests_per_s), http_seconds(process.registry)
    explainer = AnswerExplainer(
        records=path.records,
        near=path.near,
        freshness=path.freshness,
        maker=path.maker,
        candidates=settings.query.candidates,
    )
    app = build_app(
        ApiServices(path.answers, path.streams, explainer, operations),
        ApiPolicy(stores.credentials, limit, settings.query.deadline_s, settings.credentials.audit),
        ApiTelemetry(process.registry, seconds, process.tracing.tracer, operations.peers),
    )
    if _needs_every_request(settings):
        return app, None
    counts = HitCounts(process.metrics, counted_in(seconds))
    closing.callback(counts.flush)
    fast_path = FastPath(
        app,
        answers=path.freshness,
        keys=QuestionKeys(path.maker),
        gate=Gate(stores.credentials, limit, operations),
        counts=counts,
        capacity=path.retrieval,
        observer=path.observers,
    )
    return app, fast_path


def _listening(app: FastAPI, fast_path: FastPath | None, settings: Settings) -> AbstractAsyncContextManager[str]:
    if fast_path is None:
        return listening(app, settings.query, settings)
    return listening(fast_path, settings.query, settings, inline=InlineResponder(URLS, fast_path.respond))


def _needs_every_request(settings: Settings) -> bool:
    """Whether each question is traced or written to the audit log, which the fast path does not do."""
    return settings.telemetry.otlp_endpoint is not None or settings.credentials.audit == "all"


def _start_alerting(closing: AsyncExitStack, operations: Operations, settings: Settings, metrics: QueryMetrics) -> None:
    channels = open_channels(settings.alerts)
    for channel in channels:
        closing.push_async_callback(channel.close)
    if channels:
        source = f"query on {socket.gethostname()}, process {os.getpid()}, {settings.namespace}"
        alerting = Alerting(operations, channels, settings.alerts, metrics=metrics, source=source)
        _in_background(closing, alerting.run(), "alerting")


async def _warm_up(stores: Stores, retrieval: Retrieval, tenant: str) -> None:
    """Take the cost of the model's first run and the index's first search before users do."""
    await stores.embedder.embed_query(_WARM_UP)
    try:
        await stores.opensearch.ready()
        await retrieval.retrieve(_WARM_UP, Access(tenant), top_k=1, filters={})
    except IndexUnavailable as error:
        _log.warning("index_not_warmed", reason=str(error))


def _dependencies(stores: Stores, subscription: InvalidationSubscription, tenant: str) -> Mapping[str, Dependency]:
    async def redis_responds() -> None:
        with redis_errors():
            await stores.redis.ping()

    async def subscription_is_live() -> None:
        if not subscription.trusted:
            raise CacheUnavailable("Redis evicts keys at will: set maxmemory-policy to noeviction")
        if not subscription.live:
            raise CacheUnavailable(
                "not subscribed to invalidation messages: hits come from Redis alone, and waits take up to 50 ms longer"
            )

    lag = InvalidationLag(stores.cache, stores.opensearch, tenant)
    return {
        "index": Dependency(stores.opensearch.ready, required=True),
        "redis": Dependency(redis_responds, required=False),
        "subscription": Dependency(subscription_is_live, required=False),
        "generator": Dependency(stores.generator_bulkhead.check, required=False),
        "invalidation": Dependency(lag.require_caught_up, required=False),
    }


class _Closing(Protocol):
    async def close(self) -> None: ...


_Resource = TypeVar("_Resource", bound=_Closing)


def _closed_by(closing: AsyncExitStack, resource: _Resource) -> _Resource:
    closing.push_async_callback(resource.close)
    return resource


def _in_background(closing: AsyncExitStack, work: Coroutine[Any, Any, None], name: str) -> None:
    task = asyncio.create_task(work, name=name)

    async def end() -> None:
        await cancel_and_wait(task)
        if not task.cancelled():
            task.result()

    closing.push_async_callback(end)
