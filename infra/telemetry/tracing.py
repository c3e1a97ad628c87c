"""Traces: one from an upload to the last cached answer that it drops, over all processes.

The context travels in our own records, as a W3C ``traceparent`` header: instrumentation of Kafka clients keeps it in
the running task, and a record goes through a queue and in batches.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import NoOpTracer, Span, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from infra.settings import Settings
from schemas.telemetry import SERVICE_NAMESPACE, TRACER

_TRACEPARENT: Final = "traceparent"
_EXPORT_EVERY_MS: Final = 1_000
_W3C: Final = TraceContextTextMapPropagator()

NO_TRACER: Final[Tracer] = NoOpTracer()
"""Makes spans that record nothing."""


class OpenSpan:
    """A span under way.

    Attributes:
        traceparent: names it to whoever goes on with the trace; the parent's where nothing is recorded.
    """

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Span | None, traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent

    def end(self, outcome: str, *, failed: bool = False) -> None:
        """End it."""
        if self._span is not None:
            self._span.set_attribute("freshline.outcome", outcome)
            if failed:
                self._span.set_status(Status(StatusCode.ERROR, outcome))
            self._span.end()


class Tracing:
    """Spans of one process. Without a provider nothing is recorded, and traces of others pass through."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(TRACER) if provider else None

    def begin(self, name: str, parent: str | None, attributes: Mapping[str, str | int]) -> OpenSpan:
        """Begin a span below ``parent``, a ``traceparent``; below none, or one that is malformed, a trace begins."""
        if self._tracer is None:
            return OpenSpan(None, parent)
        context = _W3C.extract({_TRACEPARENT: parent} if parent else {})
        span = self._tracer.start_span(name, context, attributes=dict(attributes))
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span))
        return OpenSpan(span, carrier.get(_TRACEPARENT))

    @property
    def tracer(self) -> Tracer:
        """For spans that follow a task, not a record."""
        return self._tracer or NO_TRACER

    async def close(self) -> None:
        """Send what is waiting."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)


def open_tracing(settings: Settings, service: str) -> Tracing:
    """Tracing of a process, as the settings say: to an OTLP endpoint, or none."""
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint is None:
        return Tracing()
    about = {"service.name": service, "service.namespace": SERVICE_NAMESPACE, "freshline.namespace": settings.namespace}
    provider = TracerProvider(
        resource=Resource.create(about),
        sampler=ParentBasedTraceIdRatio(settings.telemetry.sample_ratio),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MS))
    return Tracing(provider)
