"""HTTP API of the query service."""

import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry, Histogram

from infra.embedding.port import EmbeddingError, EmbeddingThrottled
from infra.telemetry.tracing import NO_TRACER
from infra.web.audit import install_audit
from infra.web.credentials import Credentials
from infra.web.limits import OverLimit, TenantLimit
from infra.web.metrics import install_metrics
from infra.web.peers import PeerProcesses
from infra.web.problems import ProblemRaised, install_problems
from infra.web.tracing import install_tracing
from query.answers.answer import AnswerService
from query.answers.question import question_openapi, read_question
from query.answers.stream import AnswerStreams, StreamEvent
from query.api.console import console
from query.cache.freshness import PositionNotReached
from query.operations.endpoints import Operations, add_operations_routes
from query.operations.explain import AnswerExplainer, add_explain_route
from query.overload.admission import Overloaded
from query.overload.deadline import DeadlineExceeded, deadline_in
from schemas.credentials import Scope
from schemas.problems import PROBLEM_MEDIA_TYPE, Problem, ProblemType
from schemas.queries import QueryResponse
from schemas.search import Access

_JSON: Final = "application/json"
_EVENT_STREAM: Final = "text/event-stream"
_UNBUFFERED: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_RETRY_AFTER_S: Final = 1.0

_EXAMPLE_RESPONSE: Final = {
    "results": [
        {
            "text": "You may work from another country for up to 30 days a year.",
            "score": 0.0325,
            "document_id": "handbook/travel.md",
            "version": 7,
            "title": "Travel",
            "source": "https://example.org/handbook/travel",
            "heading_path": ["Working abroad"],
            "span": [120, 179],
            "metadata": {"department": "people"},
        }
    ],
    "answer": "You may work from another country for up to 30 days a year. [1]",
    "citations": [{"source": 1, "quote": "You may work from another country for up to 30 days a year."}],
    "query_time_ms": 11.8,
    "cached": False,
    "as_of": {"positions": {"3": 42}, "checked_ms": 1767225600000.0},
}
_STREAM: Final[dict[str, Any]] = {
    "description": "`sources` (as `results` of `/v1/query`); any number of `token` and `citation`, or one `unanswered` "
    "with the reason `busy`, `failed` or `limited`; `usage` if an answer was generated; `as_of`; `done`. A stream "
    "without `done` is truncated.",
    "content": {
        _EVENT_STREAM: {
            "example": 'event: sources\ndata: {"results": []}\n\n'
            'event: token\ndata: {"text": "You may work from another country for up to 30 days a year. [1]"}\n\n'
            'event: citation\ndata: {"source": 1, "quote": "You may work from another country for up to 30 days"}\n\n'
            'event: usage\ndata: {"input_tokens": 812, "output_tokens": 17}\n\n'
            'event: as_of\ndata: {"positions": {"3": 42}, "checked_ms": 1767225600000.0}\n\n'
            'event: done\ndata: {"cached": false, "query_time_ms": 912.4}\n\n',
        }
    },
}
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        400: "The body length differs from Content-Length.",
        401: "A valid credential is required.",
        403: "The credential lacks the scope `query`, or no credential is configured and the client is not local.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        422: "A field is invalid; see `errors`.",
        429: "The tenant exceeded its rate limit; retry after `Retry-After`.",
        503: "A dependency is unavailable, the service is overloaded, or `min_position` is not reached: `as_of` then "
        "has the current positions.",
    }.items()
}


def question_limit(per_second: int) -> TenantLimit:
    """Rate limit of each tenant in this process; 0 for unlimited."""
    return TenantLimit("questions in a second", per_second=per_second)


@dataclass(frozen=True, slots=True)
class ApiServices:
    """Use cases behind the routes.

    Attributes:
        answers: complete answers.
        streams: streamed answers.
        explainer: explanations of cached answers.
        operations: health, readiness and statistics.
    """

    answers: AnswerService
    streams: AnswerStreams
    explainer: AnswerExplainer
    operations: Operations


@dataclass(frozen=True, slots=True)
class ApiPolicy:
    """Which requests are served.

    Attributes:
        credentials: authentication.
        limit: rate limit of each tenant.
        deadline_s: deadline of one question.
        audit_log: requests to write to the audit log.
    """

    credentials: Credentials
    limit: TenantLimit = field(default_factory=lambda: question_limit(0))
    deadline_s: float = 20.0
    audit_log: Literal["changes", "all"] = "changes"


@dataclass(frozen=True, slots=True)
class ApiTelemetry:
    """Metrics and traces of requests.

    Attributes:
        registry: served at ``/metrics``.
        seconds: latency histogram; None to register one in ``registry``.
        tracer: starts a span for each request.
        peers: other processes that serve the same address, whose metrics are served too.
    """

    registry: CollectorRegistry
    seconds: Histogram | None = None
    tracer: Tracer = NO_TRACER
    peers: PeerProcesses | None = None


def build_app(services: ApiServices, policy: ApiPolicy, telemetry: ApiTelemetry) -> FastAPI:
    """The application. It owns no resources that need closing."""
    operations, credentials, limit = services.operations, policy.credentials, policy.limit
    app = FastAPI(
        title="Freshline query API",
        version="1",
        summary="Answers from continuously changing documents, each with the stream positions that it reflects.",
        redoc_url=None,
        docs_url=None,
    )
    install_problems(app)
    install_metrics(app, service="query", registry=telemetry.registry, seconds=telemetry.seconds, peers=telemetry.peers)
    install_audit(app, policy.audit_log)
    reader = Depends(credentials.requiring(Scope.QUERY))

    async def query(request: Request, access: Annotated[Access, reader]) -> Response:
        """Answer a question from the passages visible to the caller."""
        with operations.recorded(), _problems_raised():
            limit.take(access.tenant)
            question = await read_question(request)
            async with deadline_in(policy.deadline_s):
                body = await services.answers.answer(question, access)
        return Response(body, media_type=_JSON)

    response_200: dict[str, Any] = {"model": QueryResponse, "content": {_JSON: {"example": _EXAMPLE_RESPONSE}}}
    for path, is_documented in (("/v1/query", True), ("/query", False)):
        app.post(
            path,
            response_class=Response,
            responses={200: response_200, **_PROBLEMS},
            openapi_extra=question_openapi(),
            operation_id="query",
            include_in_schema=is_documented,
        )(query)

    @app.post(
        "/v1/answers",
        response_class=Response,
        responses={200: _STREAM, **_PROBLEMS},
        openapi_extra=question_openapi(),
    )
    async def answers(request: Request, access: Annotated[Access, reader]) -> Response:
        """Stream an answer as server-sent events while it is generated. Disconnecting cancels the generation."""
        with operations.recorded(), _problems_raised():
            limit.take(access.tenant)
            question = await read_question(request)
            async with deadline_in(policy.deadline_s):
                events = await services.streams.begin(question, access)
        return StreamingResponse(_server_sent(events), media_type=_EVENT_STREAM, headers=_UNBUFFERED)

    add_operations_routes(app, operations, credentials)
    add_explain_route(app, services.explainer, credentials)
    install_tracing(app, telemetry.tracer)
    app.get("/", include_in_schema=False)(console)
    _document_problems(app)
    return app


@contextmanager
def _problems_raised() -> Iterator[None]:
    """Convert exceptions of the read path to problems. ``install_problems`` converts those of the stores."""
    try:
        yield
    except PositionNotReached as error:
        detail = f"{error}: retry, or omit min_position for an answer that reflects `as_of`"
        raise ProblemRaised(
            ProblemType.POSITION_NOT_REACHED, detail, retry_after_s=_RETRY_AFTER_S, as_of=error.as_of.positions
        ) from error
    except Overloaded as error:
        detail = f"{error}; retry after `Retry-After`"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=error.retry_after_s) from error
    except EmbeddingThrottled as error:
        raise ProblemRaised(
            ProblemType.UNAVAILABLE, f"{error}; retry later", retry_after_s=error.retry_after_s
        ) from error
    except OverLimit as error:
        raise ProblemRaised(ProblemType.RATE_LIMITED, str(error), retry_after_s=error.retry_after_s) from error
    except DeadlineExceeded as error:
        detail = f"the answer was {error}; retry later"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=_RETRY_AFTER_S) from error
    except EmbeddingError as error:
        detail = "the question could not be embedded; retry later"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=_RETRY_AFTER_S) from error


async def _server_sent(events: AsyncGenerator[StreamEvent | None, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            if event is None:
                yield format_sse_event(comment="keep-alive")
            else:
                yield format_sse_event(event=event.name, data_str=event.data.decode())


def _document_problems(app: FastAPI) -> None:
    """Document problems under their own media type; FastAPI documents each model under that of the route."""
    documented = [app.openapi()["paths"][path]["post"]["responses"].values() for path in ("/v1/query", "/v1/answers")]
    for response in itertools.chain.from_iterable(documented):
        content = response["content"]
        if _JSON in content and content[_JSON]["schema"]["$ref"].endswith(f"/{Problem.__name__}"):
            content[PROBLEM_MEDIA_TYPE] = content.pop(_JSON)
