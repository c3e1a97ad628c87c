"""The worker process: runs any subset of the steps, monitors them, and stops them in order."""

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
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.provision import create_indices
from infra.opensearch.terms import OpenSearchTerms
from infra.opensearch.webhooks import OpenSearchWebhooks
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.event_states import RedisEventStates
from infra.settings import Settings
from infra.tasks import cancel_and_wait
from infra.telemetry.logging import configure_logging
from infra.telemetry.tracing import open_tracing
from infra.web.server import wait_for_shutdown
from infra.webhooks.sender import HttpSender
from schemas.search import RRF_K
from streams.core.invalidation.compiling import compile_loops
from streams.core.splitting import SPLITTER_VERSION, Splitter
from streams.evaluation import FusionParameters
from streams.faust_app import FaustWorker
from streams.metrics import WorkerMetrics
from streams.parsing.parse import PARSER_VERSION
from streams.parsing.sandbox import ParserPool
from streams.progress import EventStateProgress
from streams.runner import Runner, Step
from streams.slice_evaluators import SliceEvaluators
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate
from streams.steps.notify import Notify
from streams.steps.prepare import Prepare
from streams.topology import StepName
from streams.watchdog import WatchedStep, measure_lag, watch
from streams.webhook_delivery import WebhookDelivery
from streams.webhook_retries import WebhookRetries

_log = structlog.get_logger(__name__)


async def work(settings: Settings, steps: Sequence[StepName]) -> None:
    """Run the steps until SIGTERM or SIGINT.

    Raises:
        WorkerStalled: a step crashed or makes no progress; restart the process.
        TooManyDeadLetters: a step would give up most of its records; find the cause before a restart.
        StreamUnavailable: no broker responds at startup.
        IndexUnavailable: the index does not respond at startup.
    """
    configure_logging(settings)
    async with StreamAdmin(settings) as admin:
        await admin.create_topics()
    await create_indices(settings)
    async with AsyncExitStack() as resources:
        tracing = open_tracing(settings, f"worker {' '.join(steps)}")
        resources.push_async_callback(tracing.close)
        producer = await KafkaProducer.open(settings)
        resources.push_async_callback(producer.close)
        registry = CollectorRegistry()
        metrics = WorkerMetrics(registry)
        running_steps = await _build(settings, steps, resources, metrics)
        if settings.streams.metrics_port:
            server, _thread = start_http_server(settings.streams.metrics_port, "127.0.0.1", registry)
            resources.callback(server.shutdown)
        watched = []
        for step in running_steps:
            runner = Runner(
                step,
                producer,
                settings.streams,
                on_finished=metrics.count_finished,
                on_retry=metrics.count_retry,
                tracing=tracing,
            )
            metrics.watch(step.name, runner)
            watched.append(await _start(settings, step.name, runner, resources))
        tune_gc()
        _log.info("worker_started", steps=[str(step) for step in steps])
        watching = asyncio.create_task(watch(settings, watched), name="watchdog")
        stop_signal = asyncio.create_task(wait_for_shutdown(), name="signals")
        measuring = asyncio.create_task(measure_lag(settings, watched, metrics.set_lag), name="lag")
        try:
            await asyncio.wait([watching, stop_signal], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
        finally:
            await cancel_and_wait(watching, stop_signal, measuring)
        _log.info("worker_stopping")


async def _start(settings: Settings, step: StepName, runner: Runner, resources: AsyncExitStack) -> WatchedStep:
    running = asyncio.create_task(runner.run(), name=f"runner-{step}")
    consumer = FaustWorker(settings, step, runner.take)
    await consumer.start()

    async def stop() -> None:
        # The runner first: records that it has not finished stay uncommitted, and the next owner of the partition reads
        # them again.
        await cancel_and_wait(running)
        await consumer.stop()

    resources.push_async_callback(stop)
    return WatchedStep(step, consumer, runner, running)


async def _build(
    settings: Settings, steps: Sequence[StepName], resources: AsyncExitStack, metrics: WorkerMetrics
) -> list[Step]:
    """Build the steps, and only the dependencies that these steps need."""
    redis = connect_redis(settings.redis)
    resources.push_async_callback(redis.aclose)
    states = RedisEventStates(redis, settings.names)
    progress = EventStateProgress(states)
    resources.push_async_callback(progress.close)
    blobs = open_blob_store(settings.blobs)
    resources.push_async_callback(blobs.close)
    running_steps: list[Step] = []
    if StepName.PREPARE in steps:
        parsers = ParserPool(settings.parse)
        resources.push_async_callback(parsers.close)
        await parsers.start()
        running_steps.append(Prepare(blobs, parsers, splitter(settings), profile(settings), progress))
    if StepName.INDEX in steps:
        index = OpenSearchIndex.open(settings)
        resources.push_async_callback(index.close)
        embedder = open_embedder(settings.embedding)
        resources.push_async_callback(embedder.close)
        running_steps.append(
            Index(index, embedder, blobs, settings.generation, settings.streams.batch_chunks, progress)
        )
    if StepName.INVALIDATE in steps:
        slices = RedisAnswerCache(redis, settings.names, settings.answers)
        evaluators = await _build_evaluators(settings, slices, resources)
        running_steps.append(Invalidate(slices, evaluators, states))
    if StepName.NOTIFY in steps:
        running_steps.append(await _build_notify(settings, resources, metrics))
    return running_steps


async def _build_notify(settings: Settings, resources: AsyncExitStack, metrics: WorkerMetrics) -> Step:
    """Build the step, and start its retries in the background."""
    client = connect(settings.opensearch)
    resources.push_async_callback(client.close)
    sender = await resources.enter_async_context(HttpSender(settings.webhooks))
    store = OpenSearchWebhooks(client, settings.names)
    delivery = WebhookDelivery(store, sender, settings.webhooks, metrics.count_webhook_messages)
    retrying = asyncio.create_task(WebhookRetries(delivery, metrics.set_webhooks_waiting).run(), name="webhook-retries")
    resources.push_async_callback(cancel_and_wait, retrying)
    return Notify(delivery)


async def _build_evaluators(settings: Settings, slices: RedisAnswerCache, resources: AsyncExitStack) -> SliceEvaluators:
    client = connect(settings.opensearch)
    resources.push_async_callback(client.close)
    index, terms = OpenSearchIndex(client, settings), OpenSearchTerms(client, settings)
    await asyncio.to_thread(compile_loops)
    evaluators = SliceEvaluators(slices, index, terms, fusion=fusion(settings), settings=settings.answers)
    loading = asyncio.create_task(evaluators.follow(), name="load-answers")

    async def stop() -> None:
        await cancel_and_wait(loading)
        await evaluators.close()

    resources.push_async_callback(stop)
    return evaluators


def profile(settings: Settings) -> str:
    """Versions of everything that a chunk depends on besides its document. Chunks of different profiles never mix."""
    split = settings.split
    return "/".join(
        (
            PARSER_VERSION,
            SPLITTER_VERSION,
            f"{split.chunk_tokens}+{split.overlap_tokens}",
            settings.embedding.model,
        )
    )


def fusion(settings: Settings) -> FusionParameters:
    """Parameters of retrieval and fusion that the query service uses."""
    query = settings.query
    return FusionParameters(
        settings.embedding.dimension, max(query.candidates_kept, query.candidates), query.candidates, RRF_K
    )


def splitter(settings: Settings) -> Splitter:
    """Splitter of the configured model."""
    tokenizer = open_tokenizer(settings.embedding)
    return Splitter(tokenizer, settings.split.chunk_tokens, settings.split.overlap_tokens)
