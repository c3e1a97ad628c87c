"""Error responses as RFC 9457 problem details."""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from infra.blobs.port import BlobStoreUnavailable
from infra.credentials.port import CredentialsUnavailable
from infra.kafka.port import StreamUnavailable
from infra.opensearch.port import IndexUnavailable
from infra.redis.port import CacheUnavailable
from schemas.problems import PROBLEM_MEDIA_TYPE, InvalidField, Problem, ProblemType

RETRY_AFTER_S: Final = 1.0
"""``Retry-After`` when a store did not respond. Most such failures are restarts or fail-overs of a few seconds."""

MAX_INVALID_FIELDS: Final = 20
"""Maximum number of invalid fields in a response."""

_log = structlog.get_logger(__name__)

_STATUS_AND_TITLE: Final[dict[ProblemType, tuple[int, str]]] = {
    ProblemType.INVALID_REQUEST: (422, "Invalid request"),
    ProblemType.UNAUTHENTICATED: (401, "Authentication required"),
    ProblemType.FORBIDDEN: (403, "Forbidden"),
    ProblemType.NOT_FOUND: (404, "Not found"),
    ProblemType.CONFLICT: (409, "Conflict with the state of the document"),
    ProblemType.TOO_LARGE: (413, "Content too large"),
    ProblemType.UNSUPPORTED_TYPE: (415, "Unsupported content type"),
    ProblemType.RATE_LIMITED: (429, "Too many requests"),
    ProblemType.UNAVAILABLE: (503, "Service unavailable"),
    ProblemType.POSITION_NOT_REACHED: (503, "Position not reached"),
    ProblemType.INTERNAL: (500, "Internal error"),
}

_UNAVAILABLE_DETAIL: Final[dict[type[Exception], str]] = {
    StreamUnavailable: "the event stream did not acknowledge in time; retry the request",
    CacheUnavailable: "Redis did not respond in time; retry the request",
    IndexUnavailable: "the search index did not respond in time; retry the request",
    CredentialsUnavailable: "the credential cannot be verified now; retry the request",
    BlobStoreUnavailable: "the content store did not respond in time; retry the request",
}

_VALUE_ERROR_PREFIX: Final = "Value error, "


class ProblemRaised(Exception):
    """Ends a request with a problem.

    Attributes:
        problem: the problem. ``instance`` is set to the path of the request in the response.
    """

    def __init__(
        self,
        kind: ProblemType,
        detail: str,
        *,
        status: int | None = None,
        errors: Sequence[InvalidField] = (),
        retry_after_s: float | None = None,
        as_of: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(detail)
        default_status, title = _STATUS_AND_TITLE[kind]
        self.problem = Problem(
            type=f"/problems/{kind}",
            title=title,
            status=status or default_status,
            detail=detail,
            errors=tuple(errors),
            retry_after_s=retry_after_s,
            as_of=dict(as_of) if as_of is not None else None,
        )


def invalid(detail: str, errors: Sequence[InvalidField]) -> ProblemRaised:
    """Problem of a request with invalid fields. The detail includes the first of them."""
    listed = tuple(errors)[:MAX_INVALID_FIELDS]
    first = f": {listed[0].field}: {listed[0].message}" if listed else ""
    return ProblemRaised(ProblemType.INVALID_REQUEST, f"{detail}{first}", errors=listed)


def invalid_fields(errors: Sequence[Mapping[str, Any]], *, skip: int = 0) -> tuple[InvalidField, ...]:
    """Convert pydantic errors, without the rejected values; ``skip`` drops leading parts of each location."""
    return tuple(
        InvalidField(
            field=".".join(str(part) for part in error["loc"][skip:]) or "body",
            message=str(error["msg"]).removeprefix(_VALUE_ERROR_PREFIX),
        )
        for error in errors[:MAX_INVALID_FIELDS]
    )


def as_problem(error: Exception) -> Problem:
    """Convert an error to a problem. Unexpected errors become ``internal``, without details."""
    match error:
        case ProblemRaised():
            return error.problem
        case RequestValidationError():
            return invalid("the request has invalid fields", invalid_fields(error.errors(), skip=1)).problem
        case HTTPException():
            return _of_status(error).problem
        case ClientDisconnect():
            detail = "the client disconnected before the end of the body"
            return ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=HTTPStatus.BAD_REQUEST).problem
    for kind, detail in _UNAVAILABLE_DETAIL.items():
        if isinstance(error, kind):
            retry_after_s = getattr(error, "retry_after_s", 0.0) or RETRY_AFTER_S
            return ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=retry_after_s).problem
    return ProblemRaised(ProblemType.INTERNAL, "see the log of the service; retry the request later").problem


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """HTTP response of a problem, with the headers that its status requires."""
    all_headers = dict(headers or {})
    if problem.retry_after_s is not None:
        all_headers["Retry-After"] = str(math.ceil(problem.retry_after_s))
    if problem.status == HTTPStatus.UNAUTHORIZED:
        all_headers["WWW-Authenticate"] = "Bearer"
    return Response(
        problem.model_dump_json(exclude_defaults=True),
        status_code=problem.status,
        headers=all_headers,
        media_type=PROBLEM_MEDIA_TYPE,
    )


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` of a route that may return problems with these statuses."""
    return {
        status: {"model": Problem, "content": {PROBLEM_MEDIA_TYPE: {}}, "description": "Problem details (RFC 9457)."}
        for status in statuses
    }


def install_problems(app: FastAPI) -> None:
    """Convert every error of ``app`` to problem details."""

    async def answer(request: Request, error: Exception) -> Response:
        problem = as_problem(error).model_copy(update={"instance": request.scope["path"]})
        if problem.status == HTTPStatus.SERVICE_UNAVAILABLE and not isinstance(error, ProblemRaised):
            _log.warning("request_unavailable", path=problem.instance, reason=str(error))
        allowed = {"Allow": _allowed(request)} if problem.status == HTTPStatus.METHOD_NOT_ALLOWED else None
        return problem_response(problem, allowed)

    for kind in (
        ProblemRaised,
        RequestValidationError,
        HTTPException,
        ClientDisconnect,
        *_UNAVAILABLE_DETAIL,
        Exception,
    ):
        app.add_exception_handler(kind, answer)


def _allowed(request: Request) -> str:
    """Methods of all routes with this path. The router reports those of the first match only."""
    routes = (route for route in request.app.routes if isinstance(route, Route))
    methods = (route.methods or set() for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted(set().union(*methods)))


def _of_status(error: HTTPException) -> ProblemRaised:
    """Convert an error of the router or the framework."""
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return ProblemRaised(ProblemType.NOT_FOUND, "unknown path; see the API description at /docs")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            detail = "method not allowed for this path; the Allow header lists the allowed methods"
            return ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=error.status_code)
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return ProblemRaised(ProblemType.INTERNAL, str(error.detail), status=status)
        case status:
            return ProblemRaised(ProblemType.INVALID_REQUEST, str(error.detail), status=status)
