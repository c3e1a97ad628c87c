"""Baseline without a stream: one program that parses, splits, embeds new passages, writes, and searches.

It is the minimal cost of a change with the same index, model and passages, without queue, second process or durability.
It caches the vectors of embedded texts.
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


class SingleProcessPipeline:
    """Documents in a dedicated index. Created by ``opened``."""

    def __init__(self, client: AsyncOpenSearch, embedder: Embedder, splitter: Splitter, index: str) -> None:
        self._client = client
        self._embedder = embedder
        self._splitter = splitter
        self._index = index
        self._vectors: dict[str, Vector] = {}
        self._indexed: dict[str, set[str]] = {}

    @classmethod
    @asynccontextmanager
    async def opened(cls, settings: Settings, splitter: Splitter) -> AsyncIterator["SingleProcessPipeline"]:
        """With an index in the namespace of the settings, which is deleted with the namespace."""
        opensearch, index = settings.opensearch, f"{settings.namespace}-single-process"
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
        """Index this content of a document. It is searchable on return."""
        parsed = parse(content, "text/markdown")
        chunks = {f"{document_id}#{one.text_sha256}": one for one in self._splitter.split(parsed.text, parsed.title)}
        texts = {name: embedding_text(parsed.title, one) for name, one in chunks.items()}
        new = list(dict.fromkeys(text for text in texts.values() if text not in self._vectors))
        self._vectors |= zip(new, await self._embedder.embed_passages(new), strict=True) if new else ()
        indexed = self._indexed.get(document_id, set())
        lines: list[dict[str, Any]] = []
        for name in chunks.keys() - indexed:
            lines += (
                {"index": {"_id": name, "routing": document_id}},
                {
                    "text": chunks[name].text,
                    "lexical": texts[name],
                    "vector": self._vectors[texts[name]].tolist(),
                },
            )
        lines += ({"delete": {"_id": name, "routing": document_id}} for name in indexed - chunks.keys())
        if lines:
            await self._client.bulk(body=lines, params={"index": self._index, "refresh": "true"})
        self._indexed[document_id] = set(chunks)

    async def finds(self, question: str, line: str, *, top_k: int) -> bool:
        """Whether one of the best passages of either retriever contains the line."""
        vector = await self._embedder.embed_query(question)
        retrievers: tuple[dict[str, Any], ...] = (
            {"knn": {"vector": {"vector": vector.tolist(), "k": top_k}}},
            {"match": {"lexical": question}},
        )
        body = [one for query in retrievers for one in ({}, {"size": top_k, "query": query, "_source": ["text"]})]
        answer = await self._client.msearch(body=body, index=self._index)
        return any(
            line in hit["_source"]["text"] for response in answer["responses"] for hit in response["hits"]["hits"]
        )
