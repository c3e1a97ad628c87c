"""Request durations, and the ``/metrics`` endpoint."""

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from infra.telemetry.metrics import histogram
from infra.web.peers import PeerProcesses
from schemas.telemetry import HTTP_SECONDS

METRICS: Final = "metrics"
"""Name of the peer request for the samples of a process."""

_UNROUTED = "(none)"


class HttpMetrics:
    """ASGI middleware that measures requests by route, so that document ids do not become label values."""

    def __init__(self, app: ASGIApp, *, service: str, seconds: Histogram) -> None:
        self._app = app
        self._service = service
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request and observe its duration."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 500

        async def observing(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, observing)
        finally:
            route = getattr(scope.get("route"), "path", _UNROUTED)
            method = scope["method"] if route != _UNROUTED else _UNROUTED
            labels = self._seconds.labels(self._service, method, route, str(status))
            labels.observe(time.perf_counter() - began_s)


def http_seconds(registry: CollectorRegistry) -> Histogram:
    """Durations of requests, by service, method, route and status. Registered once per registry."""
    return histogram(HTTP_SECONDS, registry)


def install_metrics(
    app: FastAPI,
    *,
    service: str,
    registry: CollectorRegistry,
    seconds: Histogram | None = None,
    peers: PeerProcesses | None = None,
) -> None:
    """Measure every request of ``app``, and serve ``registry`` at ``/metrics``.

    If several processes share the address, the response has the samples of all of them with a label ``process``. With
    the samples of one process only, counters would decrease between scrapes, which indicates restarts.

    Args:
        app: the application.
        service: name of the service.
        registry: registry to serve.
        seconds: histogram of durations, if shared; default: registered here.
        peers: other processes of the address, which handle ``METRICS`` by ``generate_latest``.
    """
    app.add_middleware(HttpMetrics, service=service, seconds=seconds or http_seconds(registry))
    peers = peers or PeerProcesses()

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        page = generate_latest(registry)
        if peers.shares:
            page = page_of_all({peers.pid: page, **await peers.ask(METRICS)})
        return Response(page, headers={"Content-Type": CONTENT_TYPE_LATEST})


def page_of_all(pages: Mapping[int, bytes]) -> bytes:
    """Merge the samples of several processes, with a label ``process``.

    Args:
        pages: process id → samples in the text format.
    """
    families: dict[tuple[str, str], Metric] = {}
    for process, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            merged = families.setdefault(
                (family.name, family.type), Metric(family.name, family.documentation, family.type)
            )
            merged.samples += (
                sample._replace(labels={**sample.labels, "process": str(process)}) for sample in family.samples
            )
    return generate_latest(_Merged(families.values()))


class _Merged(Collector):
    """Existing metric families as a collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._families
