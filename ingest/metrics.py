"""Metrics of the ingest service."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from schemas.telemetry import ACCEPT_SECONDS, CONTENT_BYTES, EVENTS_ACCEPTED, EVENTS_REJECTED, HTTP_SECONDS_BUCKETS


class IngestMetrics:
    """Metrics of one process.

    Attributes:
        accepted: events acknowledged by the stream, by change.
        rejected: events not accepted, by problem type.
        seconds: time from a read request to the acknowledgement of the stream.
        content_bytes: size of accepted content.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.accepted = Counter(EVENTS_ACCEPTED, "Events that the stream acknowledged.", ("change",), registry=registry)
        self.rejected = Counter(EVENTS_REJECTED, "Events that were not accepted.", ("problem",), registry=registry)
        self.seconds = Histogram(
            ACCEPT_SECONDS,
            "Seconds from a read request to the stream's acknowledgement.",
            buckets=HTTP_SECONDS_BUCKETS,
            registry=registry,
        )
        self.content_bytes = Counter(CONTENT_BYTES, "Bytes of accepted content.", registry=registry)
