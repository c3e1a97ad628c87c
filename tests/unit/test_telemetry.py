"""Traces through the runner, and what workers count, as Prometheus reads it."""

import asyncio

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from infra.kafka.codec import TRACEPARENT, encode_event, header
from infra.kafka.memory import MemoryStreams
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_states import MemoryEventStates
from infra.settings import StreamSettings
from infra.telemetry.tracing import Tracing
from ingest.event_log import EventLog
from schemas.events import Change, DocumentEvent
from schemas.telemetry import RECORDS_FINISHED, RECORDS_LAG, RETRIES, STEP_WAITING
from schemas.topics import CHUNKS, DOCUMENTS
from streams.core.outcomes import Finished
from streams.metrics import WorkerMetrics
from streams.runner import Delivery, Record, Runner
from streams.topology import StepName

EVENT = DocumentEvent(event_id="e", tenant="local", document_id="d", version=1, change=Change.DELETED, accepted_ms=0)
SENDER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Step:
    name = StepName.PREPARE

    def __init__(self):
        self.failures = []
        self.held = asyncio.Event()

    async def run(self, tasks):
        if self.failures:
            self.held.set()
            raise self.failures.pop()
        yield [
            Finished((Record(CHUNKS.name, b"k", b"", ((TRACEPARENT, task.traceparent.encode()),), 0),))
            for task in tasks
        ]


def recorder() -> tuple[Tracing, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter


async def run_one(runner: Runner, record: Record) -> None:
    done = asyncio.Event()
    running = asyncio.create_task(runner.run())
    await runner.take(Delivery(0, 0, record.key, record.value, record.headers, done.set))
    async with asyncio.timeout(10):
        await done.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def passed_on(tracing: Tracing) -> str | None:
    """The trace context of what the step writes, for an event that is placed below the sender's span."""
    streams = MemoryStreams(1)
    await EventLog(streams, MemoryEventStates(), tracing).append(EVENT, SENDER)
    [placed] = streams.log[DOCUMENTS.name, 0]
    runner = Runner(Step(), streams, StreamSettings(), on_finished=lambda *_: None, tracing=tracing)
    await run_one(runner, placed)
    [written] = streams.log[CHUNKS.name, 0]
    return header(written.headers, TRACEPARENT)


async def test_each_span_is_below_the_one_before():
    tracing, exporter = recorder()
    context = await passed_on(tracing)
    accept, prepare = exporter.get_finished_spans()
    assert (accept.name, prepare.name) == ("accept", "prepare")
    assert f"{accept.context.trace_id:032x}" == f"{prepare.context.trace_id:032x}" == SENDER.split("-")[1]
    assert f"{accept.parent.span_id:016x}" == SENDER.split("-")[2]
    assert prepare.parent.span_id == accept.context.span_id
    assert context == f"00-{prepare.context.trace_id:032x}-{prepare.context.span_id:016x}-01"
    assert prepare.attributes["freshline.outcome"] == "finished"


async def test_without_an_endpoint_the_trace_of_the_sender_passes_through():
    assert await passed_on(Tracing()) == SENDER


def test_context_that_is_malformed_begins_a_trace():
    tracing, exporter = recorder()
    tracing.begin("one", "no traceparent", {}).end("finished")
    [span] = exporter.get_finished_spans()
    assert span.parent is None


async def test_waiting_and_retries_and_lag_are_reported():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    step = Step()
    settings = StreamSettings(retry_first_ms=200, retry_max_ms=200)
    runner = Runner(
        step,
        MemoryStreams(1),
        settings,
        on_finished=metrics.count_finished,
        on_retry=metrics.count_retry,
        tracing=recorder()[0],
    )
    metrics.watch(StepName.PREPARE, runner)
    metrics.set_lag(StepName.PREPARE, 7)
    waiting = {"step": "prepare"}
    assert registry.get_sample_value(STEP_WAITING.name, waiting) == 0
    step.failures = [IndexUnavailable("down")]
    ended = asyncio.create_task(run_one(runner, encode_event(EVENT)))
    await step.held.wait()
    assert registry.get_sample_value(STEP_WAITING.name, waiting) == 1
    await ended
    assert registry.get_sample_value(STEP_WAITING.name, waiting) == 0
    assert registry.get_sample_value(RECORDS_LAG.name, waiting) == 7
    assert registry.get_sample_value(RETRIES.name, waiting | {"reason": "IndexUnavailable"}) == 1
    assert registry.get_sample_value(RECORDS_FINISHED.name, waiting | {"outcome": "finished"}) == 1
