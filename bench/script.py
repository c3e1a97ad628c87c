"""What is common without a stream: one program that parses, splits, embeds what is new, writes, and answers.

It is the least that a change has to cost with the same index, model and passages: no queue, no second process, no
promise that anything is kept when it ends. It remembers the vectors of texts that it has embedded before.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from opensearchpy import AsyncOpenSearch

from infra.embedding.factory import open_embedder
from infra.embedding.port import Embedder
from infra.opensearch.client import connect
from infra.opensearch.index_bodies import chunks_index_body
from infra.settings import Settings
from schemas.search import Vector
from streams.core.splitting import Splitter, embedding_text
from streams.parsing.parse import parse


class Script:
    """Documents in an index of its own. Open one with ``opened``."""

    def __init__(self, client: AsyncOpenSearch, embedder: Embedder, splitter: Splitter, index: str) -> None:
        self._client = client
        self._embedder = embedder
        self._splitter = splitter
        self._index = index
        self._vectors: dict[str, Vector] = {}
        self._standing: dict[str, set[str]] = {}

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings, splitter: Splitter) -> AsyncIterator["Script"]:
        """With an index in the namespace of the settings, which goes with it."""
        opensearch, index = settings.opensearch, f"{settings.namespace}-script"
        embedder, client = open_embedder(settings.embedding), connect(opensearch)
        body = chunks_index_body(
            shards=opensearch.shards,
            replicas=opensearch.replicas,
            dimension=settings.embedding.dimension,
            engine=opensearch.engine,
        )
        try:
            await client.indices.create(index=index, body=body)
            yield cls(client, embedder, splitter, index)
        finally:
            await embedder.close()
            await client.close()

    async def put(self, document_id: str, content: bytes) -> None:
        """Bring a document to this content; it is searchable then."""
        parsed = parse(content, "text/markdown")
        chunks = {f"{document_id}#{one.text_sha256}": one for one in self._splitter.split(parsed.text, parsed.title)}
        texts = {name: embedding_text(parsed.title, one) for name, one in chunks.items()}
        new = list(dict.fromkeys(text for text in texts.values() if text not in self._vectors))
        self._vectors |= zip(new, await self._embedder.embed_passages(new), strict=True) if new else ()
        standing = self._standing.get(document_id, set())
        lines: list[dict[str, Any]] = []
        for name in chunks.keys() - standing:
            lines += (
                {"index": {"_id": name, "routing": document_id}},
                {
                    "text": chunks[name].text,
                    "lexical": texts[name],
                    "vector": self._vectors[texts[name]].tolist(),
                },
            )
        lines += ({"delete": {"_id": name, "routing": document_id}} for name in standing - chunks.keys())
        if lines:
            await self._client.bulk(body=lines, params={"index": self._index, "refresh": "true"})
        self._standing[document_id] = set(chunks)

    async def finds(self, question: str, line: str, *, top_k: int) -> bool:
        """Whether one of the best passages of either leg holds the line."""
        vector = await self._embedder.embed_query(question)
        legs: tuple[dict[str, Any], ...] = (
            {"knn": {"vector": {"vector": vector.tolist(), "k": top_k}}},
            {"match": {"lexical": question}},
        )
        body = [one for leg in legs for one in ({}, {"size": top_k, "query": leg, "_source": ["text"]})]
        answer = await self._client.msearch(body=body, index=self._index)
        return any(line in hit["_source"]["text"] for leg in answer["responses"] for hit in leg["hits"]["hits"])
