"""Questions in request bodies."""

from typing import Any, Final

from fastapi import Request
from pydantic import ValidationError

from infra.web.bodies import read_body
from infra.web.problems import ProblemRaised, invalid, invalid_fields
from query.cache.key import normalised
from schemas.problems import InvalidField, ProblemType
from schemas.queries import QueryRequest

MAX_BODY_BYTES: Final = 256_000
"""Fits a question and filters of maximum length."""

_JSON: Final = "application/json"
_EXAMPLE: Final = {
    "query": "How long can I work from abroad?",
    "top_k": 3,
    "generate": True,
    "filters": {"metadata.department": ["people", "legal"]},
    "min_position": "documents.v1-3:42",
}


async def read_question(request: Request) -> QueryRequest:
    """Read and validate the question of a request.

    Raises:
        ProblemRaised: the body is not JSON, is too large, or has invalid fields.
    """
    # Also a CSRF protection: a cross-origin page may send JSON only after a preflight request.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _JSON:
        raise ProblemRaised(ProblemType.UNSUPPORTED_TYPE, f"send the question as Content-Type: {_JSON}")
    try:
        question = QueryRequest.model_validate_json(await read_body(request, MAX_BODY_BYTES))
    except ValidationError as error:
        fields = invalid_fields([{"loc": detail["loc"], "msg": detail["msg"]} for detail in error.errors()])
        raise invalid("the question has invalid fields", fields) from None
    if not normalised(question.query):
        raise invalid("the question has invalid fields", [InvalidField(field="query", message="has no text")])
    return question


def question_openapi() -> dict[str, Any]:
    """OpenAPI description of the request body, for ``openapi_extra``."""
    schema = QueryRequest.model_json_schema(mode="validation")
    return {"requestBody": {"required": True, "content": {_JSON: {"schema": schema, "example": _EXAMPLE}}}}
