"""Audit log of requests, without their content."""

import time
from typing import Final, Literal

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.credentials.port import Principal
from schemas.credentials import Scope as CredentialScope

_REFUSED: Final = frozenset({401, 403, 429})

_log = structlog.get_logger("audit")


class AuditLog:
    """ASGI middleware. A line has subject, tenant, method, route, status and, for an upload, the id of the event.

    It contains no question, text, document id or query string, because other people than those with access to the
    documents may read the log. Routes without authentication are not logged.

    Args:
        app: application to audit.
        audited: ``all``, or ``changes`` for rejected requests and all that are not questions.
    """

    def __init__(self, app: ASGIApp, *, audited: Literal["changes", "all"]) -> None:
        self._app = app
        self._audited = audited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward the request and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status, event = 500, None
        state = scope.setdefault("state", {})

        async def observing(message: Message) -> None:
            nonlocal status, event
            if message["type"] == "http.response.start":
                status = message["status"]
                event = next((value for name, value in message["headers"] if name.lower() == b"location"), None)
            await send(message)

        try:
            await self._app(scope, receive, observing)
        finally:
            principal: Principal | None = state.get("principal")
            if status in _REFUSED or (principal is not None and self._is_audited(state.get("scope"))):
                _log.info(
                    "request",
                    subject=principal.subject if principal else None,
                    tenant=principal.access.tenant if principal else None,
                    client=scope["client"][0] if scope.get("client") else None,
                    method=scope["method"],
                    route=getattr(scope.get("route"), "path", None),
                    status=status,
                    event_id=event.decode().rpartition("/")[2] if event else None,
                    ms=round((time.perf_counter() - began_s) * 1_000, 3),
                )

    def _is_audited(self, used: CredentialScope | None) -> bool:
        return self._audited == "all" or used is not CredentialScope.QUERY


def install_audit(app: FastAPI, audited: Literal["changes", "all"]) -> None:
    """Audit every request of ``app``."""
    app.add_middleware(AuditLog, audited=audited)
