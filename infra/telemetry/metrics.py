"""Prometheus collectors of declared metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from schemas.telemetry import MetricSpec


def counter(spec: MetricSpec, registry: CollectorRegistry) -> Counter:
    """Register a counter."""
    _require(spec, "counter")
    return Counter(spec.name, spec.help, spec.labels, registry=registry)


def gauge(spec: MetricSpec, registry: CollectorRegistry) -> Gauge:
    """Register a gauge."""
    _require(spec, "gauge")
    return Gauge(spec.name, spec.help, spec.labels, registry=registry)


def histogram(spec: MetricSpec, registry: CollectorRegistry) -> Histogram:
    """Register a histogram."""
    _require(spec, "histogram")
    return Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets, registry=registry)


def _require(spec: MetricSpec, kind: str) -> None:
    if spec.kind != kind:
        raise ValueError(f"{spec.name} is declared as a {spec.kind}, not a {kind}")
