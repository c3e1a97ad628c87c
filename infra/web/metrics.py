"""How long requests take, and the page where Prometheus reads it."""

import time

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from schemas.telemetry import HTTP_SECONDS, HTTP_SECONDS_BUCKETS

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
    return Histogram(
        HTTP_SECONDS,
        "Seconds from a request's head to the end of its response.",
        ("service", "method", "route", "status"),
        buckets=HTTP_SECONDS_BUCKETS,
        registry=registry,
    )


def install_metrics(
    app: FastAPI, *, service: str, registry: CollectorRegistry, seconds: Histogram | None = None
) -> None:
    """Time every request of ``app``, and serve ``registry`` at ``/metrics``.

    Args:
        app: the application.
        service: its name.
        registry: what is served.
        seconds: where times go, if others note there too; by default made and registered here.
    """
    app.add_middleware(HttpMetrics, service=service, seconds=seconds or http_seconds(registry))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
