"""Spans of HTTP requests, as part of the client's trace."""

from typing import Final

from fastapi import FastAPI
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import NoOpTracer, SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

_TRACE_CONTEXT: Final = TraceContextTextMapPropagator()
_SERVER_ERROR: Final = 500


class _HeaderGetter(Getter[Headers]):
    @override
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        return carrier.getlist(key) or None

    @override
    def keys(self, carrier: Headers) -> list[str]:
        return carrier.keys()


class Traced:
    """ASGI middleware. Spans have method, route and status, and no content of the request.

    Args:
        app: application to trace.
        tracer: creates the spans.
    """

    def __init__(self, app: ASGIApp, *, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request within a span."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        parent = _TRACE_CONTEXT.extract(Headers(scope=scope), getter=_HeaderGetter())
        method = scope["method"]
        # Without exceptions: their messages may contain content of the request.
        with self._tracer.start_as_current_span(
            method, parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:

            async def observing(message: Message) -> None:
                if message["type"] == "http.response.start":
                    route = getattr(scope.get("route"), "path", None)
                    span.set_attribute("http.request.method", method)
                    span.set_attribute("http.response.status_code", message["status"])
                    if route is not None:
                        span.update_name(f"{method} {route}")
                        span.set_attribute("http.route", route)
                    if message["status"] >= _SERVER_ERROR:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            await self._app(scope, receive, observing)


def install_tracing(app: FastAPI, tracer: Tracer) -> None:
    """Trace every request of ``app``. Does nothing with a no-op tracer."""
    if not isinstance(tracer, NoOpTracer):
        app.add_middleware(Traced, tracer=tracer)
