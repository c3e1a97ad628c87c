"""The HTTP face of the query service."""

import itertools
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
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
from query.answers.question import question_described, read_question
from query.answers.stream import AnswerStreams, StreamEvent
from query.api.console import console
from query.cache.freshness import PositionNotReached
from query.operations.endpoints import Operations, add_operations
from query.operations.explain import AnswerExplainer, add_explaining
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
    "with the reason `busy`, `failed` or `limited`; `usage`, where an answer was written; `as_of`; `done`. A stream "
    "without `done` was cut off.",
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
        400: "The body did not come as long as it was declared.",
        401: "A valid credential is needed.",
        403: "The credential lacks the scope `query`; or none is set up, and only this machine is served.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        422: "A field is wrong; `errors` names it.",
        429: "The tenant asks too much; `Retry-After` says when to ask again.",
        503: "A part does not answer, or `min_position` is not reached; `as_of` then has the current positions.",
    }.items()
}


def question_limit(per_second: int) -> TenantLimit:
    """Questions that each tenant may ask of this process in a second; 0 sets no limit."""
    return TenantLimit("questions in a second", per_second=per_second)


def build_app(
    answering: AnswerService,
    streamed: AnswerStreams,
    *,
    credentials: Credentials,
    operations: Operations,
    explaining: AnswerExplainer,
    registry: CollectorRegistry,
    audited: Literal["changes", "all"] = "changes",
    deadline_s: float = 20.0,
    limit: TenantLimit | None = None,
    seconds: Histogram | None = None,
    tracer: Tracer = NO_TRACER,
    peers: PeerProcesses | None = None,
) -> FastAPI:
    """The application; it owns nothing that needs closing."""
    limit = limit or question_limit(0)
    app = FastAPI(
        title="Freshline query API",
        version="1",
        summary="Answers over documents that change all the time, each with the positions it is true for.",
        redoc_url=None,
        docs_url=None,
    )
    install_problems(app)
    install_metrics(app, service="query", registry=registry, seconds=seconds, peers=peers)

    install_audit(app, audited)
    reader = Depends(credentials.requiring(Scope.QUERY))

    async def query(request: Request, access: Annotated[Access, reader]) -> Response:
        """Answer a question from the passages that the caller may see."""
        with operations.noting(), _problems_said():
            limit.take(access.tenant)
            question = await read_question(request)
            async with deadline_in(deadline_s):
                body = await answering.answer(question, access)
        return Response(body, media_type=_JSON)

    answered: dict[str, Any] = {"model": QueryResponse, "content": {_JSON: {"example": _EXAMPLE_RESPONSE}}}
    for path, documented in (("/v1/query", True), ("/query", False)):
        app.post(
            path,
            response_class=Response,
            responses={200: answered, **_PROBLEMS},
            openapi_extra=question_described(),
            operation_id="query",
            include_in_schema=documented,
        )(query)

    @app.post(
        "/v1/answers",
        response_class=Response,
        responses={200: _STREAM, **_PROBLEMS},
        openapi_extra=question_described(),
    )
    async def answers(request: Request, access: Annotated[Access, reader]) -> Response:
        """Answer a question with text as it is written, as server-sent events. Going away ends the work."""
        with operations.noting(), _problems_said():
            limit.take(access.tenant)
            question = await read_question(request)
            async with deadline_in(deadline_s):
                events = await streamed.begin(question, access)
        return StreamingResponse(_server_sent(events), media_type=_EVENT_STREAM, headers=_UNBUFFERED)

    add_operations(app, operations, credentials)
    add_explaining(app, explaining, credentials)
    install_tracing(app, tracer)
    app.get("/", include_in_schema=False)(console)
    _document_problems(app)
    return app


@contextmanager
def _problems_said() -> Iterator[None]:
    """Tell failures of answering as problems; those of the stores are told everywhere alike."""
    try:
        yield
    except PositionNotReached as error:
        detail = f"{error}: ask again, or without min_position for the state in `as_of`"
        raise ProblemRaised(
            ProblemType.POSITION_NOT_REACHED, detail, retry_after_s=_RETRY_AFTER_S, as_of=error.as_of.positions
        ) from error
    except Overloaded as error:
        detail = f"{error}; ask again after `Retry-After`"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=error.retry_after_s) from error
    except EmbeddingThrottled as error:
        raise ProblemRaised(
            ProblemType.UNAVAILABLE, f"{error}; repeat the request later", retry_after_s=error.retry_after_s
        ) from error
    except OverLimit as error:
        raise ProblemRaised(ProblemType.RATE_LIMITED, str(error), retry_after_s=error.retry_after_s) from error
    except DeadlineExceeded as error:
        detail = f"the answer was {error}; repeat the request later"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=_RETRY_AFTER_S) from error
    except EmbeddingError as error:
        detail = "the question could not be embedded; repeat the request later"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=_RETRY_AFTER_S) from error


async def _server_sent(events: AsyncGenerator[StreamEvent | None, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            if event is None:
                yield format_sse_event(comment="still here")
            else:
                yield format_sse_event(event=event.name, data_str=event.data.decode())


def _document_problems(app: FastAPI) -> None:
    """FastAPI documents each model under the route's own media type; problems have one of theirs."""
    documented = [app.openapi()["paths"][path]["post"]["responses"].values() for path in ("/v1/query", "/v1/answers")]
    for response in itertools.chain.from_iterable(documented):
        content = response["content"]
        if _JSON in content and content[_JSON]["schema"]["$ref"].endswith(f"/{Problem.__name__}"):
            content[PROBLEM_MEDIA_TYPE] = content.pop(_JSON)
