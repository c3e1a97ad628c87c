"""The HTTP face of the query service."""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final

import orjson
from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from infra.embedding.port import EmbeddingError, EmbeddingThrottled
from infra.generation.port import GenerationError, GenerationThrottled
from infra.opensearch.port import Access
from infra.web.bodies import read_body
from infra.web.credentials import Credentials
from infra.web.metrics import install_metrics
from infra.web.problems import ProblemRaised, install_problems, invalid, invalid_fields
from query.answering import Answering
from query.console import console
from query.core.cache_key import normalised
from query.standing import PositionNotReached
from schemas.problems import PROBLEM_MEDIA_TYPE, InvalidField, Problem, ProblemType
from schemas.queries import QueryRequest, QueryResponse

MAX_BODY_BYTES: Final = 256_000
"""A question and its filters at their own limits fit."""

_JSON: Final = "application/json"
_RETRY_AFTER_S: Final = 1.0

_EXAMPLE_REQUEST: Final = {
    "query": "How long can I work from abroad?",
    "top_k": 3,
    "generate": True,
    "filters": {"metadata.department": ["people", "legal"]},
    "min_position": "documents.v1-3:42",
}
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
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        401: "A valid credential is needed.",
        403: "Without an API key, only this machine is served.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        422: "A field is wrong; `errors` names it.",
        503: "A part does not answer, or `min_position` is not reached; `as_of` then has the current positions.",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Part:
    """Something that readiness depends on.

    Attributes:
        check: raises an exception that says what is wrong.
        needed: False where questions are answered without it, only slower.
    """

    check: Callable[[], Awaitable[None]]
    needed: bool


def build_app(
    answering: Answering, *, credentials: Credentials, parts: Mapping[str, Part], registry: CollectorRegistry
) -> FastAPI:
    """The application; it owns nothing that needs closing."""
    app = FastAPI(
        title="Freshline query API",
        version="1",
        summary="Answers over documents that change all the time, each with the positions it is true for.",
        redoc_url=None,
        docs_url=None,
    )
    install_problems(app)
    install_metrics(app, service="query", registry=registry)

    async def access_of(request: Request) -> Access:
        # A coroutine, as FastAPI would run the plain callable in a thread.
        return credentials(request)

    async def query(request: Request, access: Annotated[Access, Depends(access_of)]) -> Response:
        """Answer a question from the passages that the caller may see."""
        question = await _read_question(request)
        with _problems_said():
            body = await answering.answer(question, access)
        return Response(body, media_type=_JSON)

    request_body = {"required": True, "content": {_JSON: {"schema": _request_schema(), "example": _EXAMPLE_REQUEST}}}
    answered: dict[str, Any] = {"model": QueryResponse, "content": {_JSON: {"example": _EXAMPLE_RESPONSE}}}
    for path, documented in (("/v1/query", True), ("/query", False)):
        app.post(
            path,
            response_class=Response,
            responses={200: answered, **_PROBLEMS},
            openapi_extra={"requestBody": request_body},
            operation_id="query",
            include_in_schema=documented,
        )(query)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "A needed part does not answer."}})
    async def ready() -> Response:
        """Whether questions can be answered now: `ready`, `degraded` (slower), or `unavailable` with status 503."""
        report = {name: await _fault(part) for name, part in parts.items()}
        is_out = any(fault and parts[name].needed for name, fault in report.items())
        status = "unavailable" if is_out else "degraded" if any(report.values()) else "ready"
        body = {"status": status, "parts": {name: fault or "ready" for name, fault in report.items()}}
        return Response(orjson.dumps(body), status_code=503 if is_out else 200, media_type=_JSON)

    app.get("/", include_in_schema=False)(console)
    _document_problems(app)
    return app


async def _read_question(request: Request) -> QueryRequest:
    # Also keeps other web pages from asking in a reader's browser: they may send JSON only after asking us.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise ProblemRaised(ProblemType.UNSUPPORTED_TYPE, f"send the question as Content-Type: {_JSON}")
    try:
        question = QueryRequest.model_validate_json(await read_body(request, MAX_BODY_BYTES))
    except ValidationError as error:
        fields = invalid_fields([{"loc": found["loc"], "msg": found["msg"]} for found in error.errors()])
        raise invalid("the question has wrong fields", fields) from None
    if not normalised(question.query):
        raise invalid("the question has wrong fields", [InvalidField(field="query", message="has no text")])
    return question


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
    except (EmbeddingThrottled, GenerationThrottled) as error:
        raise ProblemRaised(
            ProblemType.UNAVAILABLE, f"{error}; repeat the request later", retry_after_s=error.retry_after_s
        ) from error
    except EmbeddingError as error:
        detail = "the question could not be embedded; repeat the request later"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=_RETRY_AFTER_S) from error
    except GenerationError as error:
        detail = "no answer could be written; repeat the request, or ask without generate"
        raise ProblemRaised(ProblemType.UNAVAILABLE, detail, retry_after_s=_RETRY_AFTER_S) from error


def _document_problems(app: FastAPI) -> None:
    """FastAPI documents each model under the route's own media type; problems have one of theirs."""
    for response in app.openapi()["paths"]["/v1/query"]["post"]["responses"].values():
        content = response["content"]
        if content[_JSON]["schema"]["$ref"].endswith(f"/{Problem.__name__}"):
            content[PROBLEM_MEDIA_TYPE] = content.pop(_JSON)


async def _fault(part: Part) -> str | None:
    try:
        await part.check()
    except Exception as error:  # noqa: BLE001 - a part that fails in an unforeseen way is not ready either
        return str(error) or type(error).__name__
    return None


def _request_schema() -> dict[str, Any]:
    return QueryRequest.model_json_schema(mode="validation")
