"""Ingest process: builds the stores and the application, serves, and shuts down in order."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import structlog
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, ProcessCollector

from infra.blobs import open_blob_store
from infra.blobs.port import BlobStore, ref_of
from infra.credentials.factory import opened_credentials
from infra.kafka.document_log import KafkaDocumentLog
from infra.kafka.producer import KafkaProducer
from infra.kafka.topic_reader import read_partition, read_to_end
from infra.opensearch.client import connect
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.webhooks import OpenSearchWebhooks
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from infra.redis.event_states import RedisEventStates
from infra.redis.versions import RedisVersions
from infra.settings import Settings
from infra.telemetry.logging import configure_logging
from infra.telemetry.tracing import open_tracing
from infra.web.server import listening, wait_for_shutdown
from ingest.accept import Stores
from ingest.api import build_api
from ingest.dead_letters import DeadLetterQueue
from ingest.event_log import EventLog

_log = structlog.get_logger(__name__)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests in progress are completed.

    Raises:
        UnsafeBind: the address is not loopback and no credential is required.
        CannotListen: the address cannot be bound.
        StreamUnavailable: no broker responds.
    """
    configure_logging(settings)
    async with opened(settings) as app, listening(app, settings.ingest, settings) as url:
        _log.info("ingest_listening", url=url)
        await wait_for_shutdown()
        _log.info("ingest_stopping")


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[FastAPI]:
    """The application with its stores; leaving the context flushes the producer and closes the stores.

    Raises:
        StreamUnavailable: no broker responds.
    """
    async with AsyncExitStack() as exit_stack:
        blobs = open_blob_store(settings.blobs)
        exit_stack.push_async_callback(blobs.close)
        index = OpenSearchIndex.open(settings)
        exit_stack.push_async_callback(index.close)
        search = connect(settings.opensearch)
        exit_stack.push_async_callback(search.close)
        redis = connect_redis(settings.redis)
        exit_stack.push_async_callback(redis.aclose)
        tracing = open_tracing(settings, "ingest")
        exit_stack.push_async_callback(tracing.close)
        producer = await KafkaProducer.open(settings)
        exit_stack.push_async_callback(producer.close)
        credentials = await exit_stack.enter_async_context(opened_credentials(settings))
        states = RedisEventStates(redis, settings.names)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        async def check_redis() -> None:
            await states.get(settings.tenant.default, "ready")

        yield build_api(
            settings,
            Stores(
                blobs,
                producer,
                RedisVersions(redis, settings.names),
                states,
                index,
                RedisAnswerCache(redis, settings.names, settings.answers),
                partial(read_partition, settings),
                KafkaDocumentLog(settings),
                tracing,
            ),
            DeadLetterQueue(partial(read_to_end, settings), producer, EventLog(producer, states, tracing)),
            OpenSearchWebhooks(search, settings.names),
            credentials=credentials,
            required={"kafka": producer.ready, "blobs": lambda: _check_blobs(blobs)},
            # Not required: Redis is shared by all replicas, so another replica would not do better, and events with a
            # revision are accepted without it.
            useful={"redis": check_redis, "index": index.ready},
            registry=registry,
        )


async def _check_blobs(blobs: BlobStore) -> None:
    await blobs.exists(ref_of(b""))
