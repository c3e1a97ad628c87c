"""What the way in counts."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from schemas.telemetry import ACCEPT_SECONDS, CONTENT_BYTES, EVENTS_ACCEPTED, EVENTS_REFUSED, HTTP_SECONDS_BUCKETS


class IngestMetrics:
    """Metrics of one process.

    Attributes:
        accepted: events that the stream acknowledged, by change.
        refused: events that were not accepted, by problem type.
        seconds: from a read request to the stream's acknowledgement.
        content_bytes: accepted content.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.accepted = Counter(EVENTS_ACCEPTED, "Events that the stream acknowledged.", ("change",), registry=registry)
        self.refused = Counter(EVENTS_REFUSED, "Events that were not accepted.", ("problem",), registry=registry)
        self.seconds = Histogram(
            ACCEPT_SECONDS,
            "Seconds from a read request to the stream's acknowledgement.",
            buckets=HTTP_SECONDS_BUCKETS,
            registry=registry,
        )
        self.content_bytes = Counter(CONTENT_BYTES, "Bytes of accepted content.", registry=registry)
