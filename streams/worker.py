"""The worker process: any subset of the steps on real systems, watched, ended in order."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import structlog
from prometheus_client import CollectorRegistry, start_http_server

from infra.blobs import open_blob_store
from infra.embedding.factory import open_embedder, open_tokenizer
from infra.gc_tuning import tune_gc
from infra.kafka.producer import KafkaProducer
from infra.kafka.provision import StreamAdmin
from infra.opensearch.client import connect
from infra.opensearch.provision import create_indices
from infra.opensearch.store import OpenSearchIndex
from infra.opensearch.terms import OpenSearchTerms
from infra.opensearch.webhooks import OpenSearchWebhooks
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.event_states import RedisEventStates
from infra.settings import Settings
from infra.tasks import ended
from infra.telemetry.logging import configure_logging
from infra.telemetry.tracing import open_tracing
from infra.web.server import until_told_to_stop
from infra.webhooks.sender import HttpSender
from streams.core.invalidation.compiling import compile_loops
from streams.core.splitting import SPLITTER_VERSION, Splitter
from streams.evaluation import Fusion, SliceEvaluators
from streams.faust_app import FaustWorker
from streams.metrics import WorkerMetrics
from streams.parsing.parse import PARSER_VERSION
from streams.parsing.sandbox import ParserPool
from streams.progress import StatesProgress
from streams.runner import Runner, Step
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate
from streams.steps.notify import Notify
from streams.steps.prepare import Prepare
from streams.topology import StepName
from streams.watchdog import Watched, measure_lag, watch
from streams.webhook_delivery import WebhookDelivery
from streams.webhook_retries import WebhookRetries

log = structlog.get_logger(__name__)


async def work(settings: Settings, steps: Sequence[StepName]) -> None:
    """Run the steps until SIGTERM or SIGINT.

    Raises:
        WorkerStalled: a step makes no progress or has crashed; restart the process.
        TooManyDeadLetters: most records fail; find out why before it is started again.
        StreamUnavailable: no broker answers at the start.
        IndexUnavailable: no index answers at the start.
    """
    configure_logging(settings)
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    await create_indices(settings)
    async with AsyncExitStack() as closing:
        tracing = open_tracing(settings, f"worker {' '.join(steps)}")
        closing.push_async_callback(tracing.close)
        producer = await KafkaProducer.open(settings)
        closing.push_async_callback(producer.close)
        registry = CollectorRegistry()
        metrics = WorkerMetrics(registry)
        built = await _build(settings, steps, closing, metrics)
        if settings.streams.metrics_port:
            server, _thread = start_http_server(settings.streams.metrics_port, "127.0.0.1", registry)
            closing.callback(server.shutdown)
        watched = []
        for step in built:
            runner = Runner(
                step,
                producer,
                settings.streams,
                on_finished=metrics.finished,
                on_retry=metrics.retried,
                tracing=tracing,
            )
            metrics.watch(step.name, runner)
            watched.append(await _start(settings, step.name, runner, closing))
        tune_gc()
        log.info("worker started", steps=[str(step) for step in steps])
        watching = asyncio.create_task(watch(settings, watched), name="watchdog")
        told = asyncio.create_task(until_told_to_stop(), name="signals")
        measuring = asyncio.create_task(measure_lag(settings, watched, metrics.behind), name="lag")
        try:
            await asyncio.wait([watching, told], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            await ended(watching, told, measuring)
        log.info("worker stopping")


async def _start(settings: Settings, step: StepName, runner: Runner, closing: AsyncExitStack) -> Watched:
    running = asyncio.create_task(runner.run(), name=f"runner-{step}")
    consumer = FaustWorker(settings, step, runner.take)
    await consumer.start()

    async def stop() -> None:
        # The runner first: what it has not finished is not committed, and is read again by whoever comes next.
        await ended(running)
        await consumer.stop()

    closing.push_async_callback(stop)
    return Watched(step, consumer, runner, running)


async def _build(
    settings: Settings, steps: Sequence[StepName], closing: AsyncExitStack, metrics: WorkerMetrics
) -> list[Step]:
    """The steps, with what each needs and nothing that none needs."""
    redis = connect_redis(settings.redis)
    closing.push_async_callback(redis.aclose)
    states = RedisEventStates(redis, settings.names)
    progress = StatesProgress(states)
    closing.push_async_callback(progress.close)
    blobs = open_blob_store(settings.blobs)
    closing.push_async_callback(blobs.close)
    built: list[Step] = []
    if StepName.PREPARE in steps:
        parsers = ParserPool(settings.parse)
        closing.push_async_callback(parsers.close)
        await parsers.start()
        built.append(Prepare(blobs, parsers, splitter(settings), profile(settings), progress))
    if StepName.INDEX in steps:
        index = OpenSearchIndex.open(settings)
        closing.push_async_callback(index.close)
        embedder = open_embedder(settings.embedding)
        closing.push_async_callback(embedder.close)
        built.append(Index(index, embedder, blobs, settings.generation, settings.streams.batch_chunks, progress))
    if StepName.INVALIDATE in steps:
        slices = RedisAnswerCache(redis, settings.names, settings.answers)
        judges = await _judges(settings, slices, closing)
        built.append(Invalidate(slices, judges, states))
    if StepName.NOTIFY in steps:
        built.append(await _build_notify(settings, closing, metrics))
    return built


async def _build_notify(settings: Settings, closing: AsyncExitStack, metrics: WorkerMetrics) -> Step:
    """The step, and beside it what tries again."""
    client = connect(settings.opensearch)
    closing.push_async_callback(client.close)
    sender = await closing.enter_async_context(HttpSender(settings.webhooks))
    store = OpenSearchWebhooks(client, settings.names)
    courier = WebhookDelivery(store, sender, settings.webhooks, metrics.webhook_messages)
    redelivering = asyncio.create_task(WebhookRetries(courier, metrics.webhooks_waiting).run(), name="redelivery")
    closing.push_async_callback(ended, redelivering)
    return Notify(courier)


async def _judges(settings: Settings, slices: RedisAnswerCache, closing: AsyncExitStack) -> SliceEvaluators:
    client = connect(settings.opensearch)
    closing.push_async_callback(client.close)
    index, terms = OpenSearchIndex(client, settings), OpenSearchTerms(client, settings)
    await asyncio.to_thread(compile_loops)
    judges = SliceEvaluators(slices, index, terms, fusion=fusion(settings), settings=settings.answers)
    following = asyncio.create_task(judges.follow(), name="judges")

    async def stop() -> None:
        await ended(following)
        await judges.close()

    closing.push_async_callback(stop)
    return judges


def profile(settings: Settings) -> str:
    """What chunks depend on besides their document; chunks of different profiles never mix."""
    split = settings.split
    return "/".join(
        (
            PARSER_VERSION,
            SPLITTER_VERSION,
            f"{split.chunk_tokens}+{split.overlap_tokens}",
            settings.embedding.model,
        )
    )


def fusion(settings: Settings) -> Fusion:
    """How the query tier makes answers."""
    query = settings.query
    return Fusion(
        settings.embedding.dimension, max(query.candidates_kept, query.candidates), query.candidates, query.rrf_k
    )


def splitter(settings: Settings) -> Splitter:
    """What makes passages of texts."""
    tokenizer = open_tokenizer(settings.embedding)
    return Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)
