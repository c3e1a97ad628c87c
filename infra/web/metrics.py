"""How long requests take, and the page where Prometheus reads it."""

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
"""Under this name processes of one address ask each other for what is served at ``/metrics``."""

_UNROUTED = "(none)"


class HttpMetrics:
    """ASGI middleware that times each request by route, so that document ids never become label values."""

    def __init__(self, app: ASGIApp, *, service: str, seconds: Histogram) -> None:
        self._app = app
        self._service = service
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and observe how long it took."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 500

        async def noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting_status)
        finally:
            route = getattr(scope.get("route"), "path", _UNROUTED)
            method = scope["method"] if route != _UNROUTED else _UNROUTED
            labels = self._seconds.labels(self._service, method, route, str(status))
            labels.observe(time.perf_counter() - began_s)


def http_seconds(registry: CollectorRegistry) -> Histogram:
    """The times of requests, by service, method, route and status; once for each registry."""
    return histogram(HTTP_SECONDS, registry)


def install_metrics(
    app: FastAPI,
    *,
    service: str,
    registry: CollectorRegistry,
    seconds: Histogram | None = None,
    peers: PeerProcesses | None = None,
) -> None:
    """Time every request of ``app``, and serve ``registry`` at ``/metrics``.

    Where several processes serve the address, samples of all of them are served, each with its ``process``: a number
    that goes up and down with whoever answers would look like restarts.

    Args:
        app: the application.
        service: its name.
        registry: what is served.
        seconds: where times go, if others note there too; by default made and registered here.
        peers: other processes of the address; they answer ``METRICS`` by ``generate_latest``.
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
    """One page of the samples of several processes, each with a label ``process``.

    Args:
        pages: of each process, in the text format.
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
    """Families that are there already, as what ``generate_latest`` takes."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    @override
    def collect(self) -> Iterator[Metric]:
        yield from self._families
