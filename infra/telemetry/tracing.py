"""Distributed tracing: one trace includes an upload and the cached answers that it invalidates.

Records carry the context as a W3C ``traceparent`` header. Instrumentation of Kafka clients cannot be used, because it
keeps the context in the current task, and records are queued and processed in batches.
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
"""Creates spans that record nothing."""


class OpenSpan:
    """A span in progress.

    Attributes:
        traceparent: context for child spans; that of the parent if nothing is recorded.
    """

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Span | None, traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent

    def end(self, outcome: str, *, failed: bool = False) -> None:
        """End the span."""
        if self._span is not None:
            self._span.set_attribute("freshline.outcome", outcome)
            if failed:
                self._span.set_status(Status(StatusCode.ERROR, outcome))
            self._span.end()


class Tracing:
    """Spans of one process. Without a provider nothing is recorded, and contexts are passed on unchanged."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(TRACER) if provider else None

    def begin(self, name: str, parent: str | None, attributes: Mapping[str, str | int]) -> OpenSpan:
        """Begin a span with the ``traceparent`` of its parent. Without a valid one, a new trace begins."""
        if self._tracer is None:
            return OpenSpan(None, parent)
        context = _W3C.extract({_TRACEPARENT: parent} if parent else {})
        span = self._tracer.start_span(name, context, attributes=dict(attributes))
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, set_span_in_context(span))
        return OpenSpan(span, carrier.get(_TRACEPARENT))

    @property
    def tracer(self) -> Tracer:
        """Tracer for spans of tasks instead of records."""
        return self._tracer or NO_TRACER

    async def close(self) -> None:
        """Export pending spans."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)


def open_tracing(settings: Settings, service: str) -> Tracing:
    """Open the configured tracing of a process: to an OTLP endpoint, or none."""
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint is None:
        return Tracing()
    attributes = {
        "service.name": service,
        "service.namespace": SERVICE_NAMESPACE,
        "freshline.namespace": settings.namespace,
    }
    provider = TracerProvider(
        resource=Resource.create(attributes),
        sampler=ParentBasedTraceIdRatio(settings.telemetry.sample_ratio),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_EVERY_MS))
    return Tracing(provider)
