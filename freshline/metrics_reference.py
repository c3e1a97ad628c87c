"""The reference of metrics, from their declarations."""

from typing import Final

from schemas import telemetry
from schemas.telemetry import MetricSpec

_HEADER: Final = """\
# Metrics

<!-- Generated from schemas/telemetry.py by `make schemas`; the descriptions are edited there. -->

Both services export metrics for Prometheus at `/metrics`. A worker does if `FRESHLINE_STREAMS__METRICS_PORT` is set. If
several processes serve one address, each sample has the label `process`.
[Operations](operations.md#monitoring) describes which of them to monitor.
"""
_SECTIONS: Final = {
    "service": "Both services",
    "ingest": "Ingest service",
    "worker": "Workers",
    "query": "Query service",
}


def declared_metrics() -> tuple[MetricSpec, ...]:
    """All declared metrics, in the order of their declarations."""
    return tuple(spec for spec in vars(telemetry).values() if isinstance(spec, MetricSpec))


def metrics_reference() -> str:
    """The page, as Markdown."""
    parts = [_HEADER]
    for process, title in _SECTIONS.items():
        rows = [
            f"| `{spec.name}` | {spec.kind} | {', '.join(f'`{label}`' for label in spec.labels)} | {spec.help} |"
            for spec in declared_metrics()
            if spec.process == process
        ]
        parts.append(
            "\n".join([f"## {title}\n", "| metric | type | labels | meaning |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)
