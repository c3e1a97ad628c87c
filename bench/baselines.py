"""Baseline servers that the service is compared with. Started by ``bench.baseline_server``.

- ``bare``: an ASGI application that looks up the response of a request body.
- ``usual``: FastAPI with a cache in Redis.
- ``vectors``: FastAPI with one k-NN query, for cache misses.

``bare`` and ``usual`` serve responses recorded from the service.
"""

import sys
import time
from pathlib import Path
from typing import Any, Final

import orjson
import uvicorn
import uvloop
from fastapi import FastAPI
from opensearchpy import AsyncOpenSearch
from pydantic import BaseModel
from redis.asyncio import BlockingConnectionPool, Redis
from starlette.types import ASGIApp, Receive, Scope, Send

from infra.embedding.factory import open_embedder
from infra.embedding.port import Embedder
from infra.opensearch.client import connect
from infra.settings import Settings

_TTL_S: Final = 3_600
_CONNECTIONS: Final = 64
_HEADERS: Final = ((b"content-type", b"application/json"),)


class QuestionBody(BaseModel):
    """Request."""

    query: str
    top_k: int = 5


class PassageBody(BaseModel):
    """Result of a search."""

    text: str
    score: float
    document_id: str
    version: int
    title: str | None
    source: str | None
    heading_path: list[str]
    span: tuple[int, int]
    metadata: dict[str, Any] | None


class AnswerBody(BaseModel):
    """Response."""

    results: list[PassageBody]
    answer: str | None
    citations: list[dict[str, Any]] | None
    unanswered: str | None
    query_time_ms: float
    cached: bool
    as_of: dict[str, Any]


class BareApp:
    """The minimal ASGI application: read the body, look it up, send the response."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        self._answers = {
            body: (answer, [*_HEADERS, (b"content-length", str(len(answer)).encode())])
            for body, answer in answers.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        answer, headers = self._answers[body]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def conventional_cache(redis: Redis) -> FastAPI:
    """FastAPI with request and response models, and one Redis GET of entries with a TTL."""
    app = FastAPI()

    @app.post("/v1/query")
    async def query(question: QuestionBody) -> AnswerBody:
        stored = await redis.get(f"usual:{question.query}:{question.top_k}")
        return AnswerBody.model_validate_json(stored or b"")

    return app


class SearchBody(BaseModel):
    """Response of a vector search."""

    results: list[PassageBody]
    query_time_ms: float


def vector_search(client: AsyncOpenSearch, embedder: Embedder, index: str) -> FastAPI:
    """FastAPI with request and response models, query embedding, and one k-NN query.

    It does less than the service: one retriever of two, exactly ``top_k`` results, and no freshness information. Model,
    client and index are those of the service.
    """
    app = FastAPI()

    @app.post("/v1/query")
    async def query(question: QuestionBody) -> SearchBody:
        began_s = time.perf_counter()
        vector = (await embedder.embed_query(question.query)).tolist()
        body = {
            "size": question.top_k,
            "query": {"knn": {"vector": {"vector": vector, "k": question.top_k}}},
            "_source": {"excludes": ["vector", "lexical"]},
        }
        hits = (await client.search(index=index, body=body))["hits"]["hits"]
        results = [
            PassageBody(score=hit["_score"], span=(hit["_source"]["start"], hit["_source"]["end"]), **hit["_source"])
            for hit in hits
        ]
        return SearchBody(results=results, query_time_ms=(time.perf_counter() - began_s) * 1_000)

    return app


async def _app(kind: str, settings: Settings, answers: dict[bytes, bytes]) -> ASGIApp:
    match kind:
        case "bare":
            return BareApp(answers)
        case "usual":
            # Blocking: other pools fail a request if all connections are in use.
            pool = BlockingConnectionPool.from_url(settings.redis.url, max_connections=_CONNECTIONS, timeout=30)
            redis = Redis.from_pool(pool)
            for body, answer in answers.items():
                question = QuestionBody.model_validate_json(body)
                await redis.set(f"usual:{question.query}:{question.top_k}", answer, ex=_TTL_S)
            return conventional_cache(redis)
        case "vectors":
            index = settings.names.chunks_alias
            return vector_search(connect(settings.opensearch), open_embedder(settings.embedding), index)
    raise ValueError(f"unknown baseline {kind!r}")


async def _serve(kind: str, port: int, answers: dict[bytes, bytes]) -> None:
    config = uvicorn.Config(
        await _app(kind, Settings(), answers),
        port=port,
        http="httptools",
        loop="none",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        backlog=4_096,
        timeout_keep_alive=75,
    )
    await uvicorn.Server(config).serve()


def main() -> None:
    """``python -m bench.baselines KIND PORT [FILE]``; each line of the file is a JSON array of question and answer."""
    kind, port, *files = sys.argv[1:]
    answers = {}
    for file in files:
        for line in Path(file).read_bytes().splitlines():
            question, answer = orjson.loads(line)
            answers[question.encode()] = answer.encode()
    uvloop.run(_serve(kind, int(port), answers))


if __name__ == "__main__":
    main()
