"""What the service's hits are compared with: an ASGI application that does nothing else, and the usual way to cache.

Both answer the questions of one file with the bytes that the service gave; run by ``freshline bench hits``.
"""

import sys
from pathlib import Path
from typing import Any, Final

import orjson
import uvicorn
import uvloop
from fastapi import FastAPI
from pydantic import BaseModel
from redis.asyncio import BlockingConnectionPool, Redis
from starlette.types import Receive, Scope, Send

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


async def _serve(kind: str, answers: dict[bytes, bytes], port: int, redis_url: str) -> None:
    if kind == "bare":
        app: Any = Bare(answers)
    else:
        # A pool that raises when all its connections are in use would fail most requests at thousands of connections.
        pool = BlockingConnectionPool.from_url(redis_url, max_connections=_CONNECTIONS, timeout=30)
        redis = Redis.from_pool(pool)
        for body, answer in answers.items():
            question = Question.model_validate_json(body)
            await redis.set(f"usual:{question.query}:{question.top_k}", answer, ex=_TTL_S)
        app = usual(redis)
    config = uvicorn.Config(
        app,
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
    """``python -m freshline.bench.baselines KIND FILE PORT REDIS_URL``; each line of the file: question, answer."""
    kind, file, port, redis_url = sys.argv[1:]
    answers = {}
    for line in Path(file).read_bytes().splitlines():
        question, answer = orjson.loads(line)
        answers[question.encode()] = answer.encode()
    uvloop.run(_serve(kind, answers, int(port), redis_url))


if __name__ == "__main__":
    main()
