"""What the service is compared with, each a server of its own.

Hits with an ASGI application that does nothing else, and with the usual way to cache; both answer the questions of one
file with the bytes that the service gave. Misses with the usual way to search by vectors. Started by ``beside``.
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


class Question(BaseModel):
    """What is asked."""

    query: str
    top_k: int = 5


class Passage(BaseModel):
    """A result."""

    text: str
    score: float
    document_id: str
    version: int
    title: str | None
    source: str | None
    heading_path: list[str]
    span: tuple[int, int]
    metadata: dict[str, Any] | None


class Answer(BaseModel):
    """An answer."""

    results: list[Passage]
    answer: str | None
    citations: list[dict[str, Any]] | None
    unanswered: str | None
    query_time_ms: float
    cached: bool
    as_of: dict[str, Any]


class Bare:
    """The least that an ASGI application can do: read the body, look it up, send the bytes."""

    def __init__(self, answers: dict[bytes, bytes]) -> None:
        self._answers = {
            body: (answer, [*_HEADERS, (b"content-length", str(len(answer)).encode())])
            for body, answer in answers.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a question."""
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


def usual(redis: Redis) -> FastAPI:
    """FastAPI with models in and out, and one GET of Redis under a time to live."""
    app = FastAPI()

    @app.post("/v1/query")
    async def query(question: Question) -> Answer:
        stored = await redis.get(f"usual:{question.query}:{question.top_k}")
        return Answer.model_validate_json(stored or b"")

    return app


class Found(BaseModel):
    """What a search by vectors found."""

    results: list[Passage]
    query_time_ms: float


def by_vectors(client: AsyncOpenSearch, embedder: Embedder, index: str) -> FastAPI:
    """FastAPI with models in and out, the question's vector, and one k-NN query.

    Less than the service does: one leg of two, as wide as what is wanted of it, and nobody learns what the answer is
    true for. Model, client and index are the service's.
    """
    app = FastAPI()

    @app.post("/v1/query")
    async def query(question: Question) -> Found:
        began_s = time.perf_counter()
        vector = (await embedder.embed_query(question.query)).tolist()
        body = {
            "size": question.top_k,
            "query": {"knn": {"vector": {"vector": vector, "k": question.top_k}}},
            "_source": {"excludes": ["vector", "lexical"]},
        }
        hits = (await client.search(index=index, body=body))["hits"]["hits"]
        results = [
            Passage(score=hit["_score"], span=(hit["_source"]["start"], hit["_source"]["end"]), **hit["_source"])
            for hit in hits
        ]
        return Found(results=results, query_time_ms=(time.perf_counter() - began_s) * 1_000)

    return app


async def _app(kind: str, settings: Settings, answers: dict[bytes, bytes]) -> ASGIApp:
    match kind:
        case "bare":
            return Bare(answers)
        case "usual":
            # A pool that raises when all its connections are in use would fail most requests at thousands of them.
            pool = BlockingConnectionPool.from_url(settings.redis.url, max_connections=_CONNECTIONS, timeout=30)
            redis = Redis.from_pool(pool)
            for body, answer in answers.items():
                question = Question.model_validate_json(body)
                await redis.set(f"usual:{question.query}:{question.top_k}", answer, ex=_TTL_S)
            return usual(redis)
        case "vectors":
            index = settings.names.chunks_alias
            return by_vectors(connect(settings.opensearch), open_embedder(settings.embedding), index)
    raise ValueError(f"no baseline {kind!r}")


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
    """``python -m bench.baselines KIND PORT [FILE]``; each line of the file: question, answer."""
    kind, port, *files = sys.argv[1:]
    answers = {}
    for file in files:
        for line in Path(file).read_bytes().splitlines():
            question, answer = orjson.loads(line)
            answers[question.encode()] = answer.encode()
    uvloop.run(_serve(kind, int(port), answers))


if __name__ == "__main__":
    main()
