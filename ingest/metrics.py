"""Metrics of the ingest service."""

from prometheus_client import CollectorRegistry

from infra.telemetry.metrics import counter, histogram
from schemas import telemetry


class IngestMetrics:
    """Metrics of one process.

    Attributes:
        accepted: events acknowledged by the stream, by change.
        rejected: events not accepted, by problem type.
        seconds: time from a read request to the acknowledgement of the stream.
        content_bytes: size of accepted content.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.accepted = counter(telemetry.EVENTS_ACCEPTED, registry)
        self.rejected = counter(telemetry.EVENTS_REJECTED, registry)
        self.seconds = histogram(telemetry.ACCEPT_SECONDS, registry)
        self.content_bytes = counter(telemetry.CONTENT_BYTES, registry)
