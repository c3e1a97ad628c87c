"""Every error leaves as RFC 9457 problem details, whoever raised it."""

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
"""Pause advised where a store did not answer: most such states are a restart or a fail-over, over in seconds."""

MAX_INVALID_FIELDS: Final = 20
"""Most wrong fields that are named; a body can hold any number of them."""

_log = structlog.get_logger(__name__)

_STATUS_AND_TITLE: Final[dict[ProblemType, tuple[int, str]]] = {
    ProblemType.INVALID_REQUEST: (422, "The request is not valid"),
    ProblemType.UNAUTHENTICATED: (401, "A valid credential is needed"),
    ProblemType.FORBIDDEN: (403, "This is not allowed"),
    ProblemType.NOT_FOUND: (404, "There is nothing here"),
    ProblemType.CONFLICT: (409, "The state of the document does not allow this"),
    ProblemType.TOO_LARGE: (413, "The content is too large"),
    ProblemType.UNSUPPORTED_TYPE: (415, "This type of content is not supported"),
    ProblemType.RATE_LIMITED: (429, "Too many requests"),
    ProblemType.UNAVAILABLE: (503, "The service cannot do this now"),
    ProblemType.POSITION_NOT_REACHED: (503, "The position asked for is not reached yet"),
    ProblemType.INTERNAL: (500, "Something went wrong on our side"),
}

_UNAVAILABLE_DETAIL: Final[dict[type[Exception], str]] = {
    StreamUnavailable: "the event stream did not acknowledge in time; repeat the request",
    CacheUnavailable: "Redis did not answer in time; repeat the request",
    IndexUnavailable: "the search index did not answer in time; repeat the request",
    CredentialsUnavailable: "whether the credential is valid cannot be told now; repeat the request",
    BlobStoreUnavailable: "the content store did not answer in time; repeat the request",
}

_VALUE_ERROR_PREFIX: Final = "Value error, "


class ProblemRaised(Exception):
    """A request ends with this problem.

    Attributes:
        problem: what is wrong; ``instance`` is filled in with the request's path when it is answered.
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
        usual_status, title = _STATUS_AND_TITLE[kind]
        self.problem = Problem(
            type=f"/problems/{kind}",
            title=title,
            status=status or usual_status,
            detail=detail,
            errors=tuple(errors),
            retry_after_s=retry_after_s,
            as_of=dict(as_of) if as_of is not None else None,
        )


def invalid(detail: str, errors: Sequence[InvalidField]) -> ProblemRaised:
    """The problem of a request with wrong fields; the first of them is named in the detail too."""
    named = tuple(errors)[:MAX_INVALID_FIELDS]
    first = f": {named[0].field}: {named[0].message}" if named else ""
    return ProblemRaised(ProblemType.INVALID_REQUEST, f"{detail}{first}", errors=named)


def invalid_fields(errors: Sequence[Mapping[str, Any]], *, skip: int = 0) -> tuple[InvalidField, ...]:
    """Pydantic's findings as fields with messages, without the rejected values; ``skip`` drops leading path parts."""
    return tuple(
        InvalidField(
            field=".".join(str(part) for part in error["loc"][skip:]) or "body",
            message=str(error["msg"]).removeprefix(_VALUE_ERROR_PREFIX),
        )
        for error in errors[:MAX_INVALID_FIELDS]
    )


def as_problem(error: Exception) -> Problem:
    """The problem that tells of ``error``; an error nobody foresaw becomes ``internal`` and reveals nothing."""
    match error:
        case ProblemRaised():
            return error.problem
        case RequestValidationError():
            return invalid("the request has wrong fields", invalid_fields(error.errors(), skip=1)).problem
        case HTTPException():
            return _of_status(error).problem
        case ClientDisconnect():
            detail = "the connection ended before the body did"
            return ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=HTTPStatus.BAD_REQUEST).problem
    for kind, detail in _UNAVAILABLE_DETAIL.items():
        if isinstance(error, kind):
            retry_after_s = getattr(error, "retry_after_s", 0.0) or RETRY_AFTER_S
            return ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=retry_after_s).problem
    return ProblemRaised(ProblemType.INTERNAL, "the error is in the service's log; repeat the request later").problem


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The problem as an HTTP response with the headers that belong to its status."""
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


def problems_told(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that may answer with these problems, for its description."""
    return {
        status: {"model": Problem, "content": {PROBLEM_MEDIA_TYPE: {}}, "description": "Problem details (RFC 9457)."}
        for status in statuses
    }


def install_problems(app: FastAPI) -> None:
    """Answer every error of ``app`` with problem details."""

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
    """Methods of all routes with this path; the router names those of the first only."""
    routes = (route for route in request.app.routes if isinstance(route, Route))
    fitting = (route.methods or set() for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted(set().union(*fitting)))


def _of_status(error: HTTPException) -> ProblemRaised:
    """Errors of the router and the framework, which know a status and at most a phrase."""
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return ProblemRaised(ProblemType.NOT_FOUND, "no such path; the API is described at /docs")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            detail = "this path does not take this method; the Allow header names those it takes"
            return ProblemRaised(ProblemType.INVALID_REQUEST, detail, status=error.status_code)
        case status if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return ProblemRaised(ProblemType.INTERNAL, str(error.detail), status=status)
        case status:
            return ProblemRaised(ProblemType.INVALID_REQUEST, str(error.detail), status=status)
