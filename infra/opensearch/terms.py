"""Terms, vectors and statistics as a real OpenSearch cluster has them, for those who compute its scores."""

from collections.abc import Collection, Mapping, Sequence
from itertools import count, islice
from typing import Any, Final

from opensearchpy import AsyncOpenSearch
from typing_extensions import override

from infra.coalescing import Coalescer
from infra.opensearch import codec
from infra.opensearch.client import unavailable_is_said
from infra.opensearch.port import ChunkWrite, FieldStatistics, IndexUnavailable, TermIndex
from infra.opensearch.store import named_chunks
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.search import Hit

_DOCUMENTS_AT_ONCE: Final = 200
"""Documents of one request: a passage is analysed anew for each, which takes some tenths of a millisecond."""

_AT_A_TIME: Final = 4
_OF_ONE: Final = 64
"""Calls under way, and how much of what was asked at the same time goes in one."""

_Docs = Sequence[Mapping[str, Any]]


class OpenSearchTerms(TermIndex):
    """See ``TermIndex``.

    Terms come from the index itself, which analyses the stored text again: nothing of an analyser is built here, and no
    term vector is stored. Statistics are asked of every shard, as a search of type ``dfs_query_then_fetch`` does.
    """

    def __init__(self, client: AsyncOpenSearch, settings: Settings) -> None:
        self._client = client
        self._serving = settings.names.chunks_alias
        self._routings: list[str] = []
        # The slices of a tenant ask at the same time.
        self._asked: Coalescer[_Docs, _Docs] = Coalescer(self._ask, at_a_time=_AT_A_TIME, most=_OF_ONE)

    @override
    async def with_vectors(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        if not hits:
            return {}
        docs = [{"_id": hit.chunk_id, "routing": str(hit.key), "_source": _PASSAGE} for hit in hits]
        with unavailable_is_said():
            answer = await self._client.mget(index=self._serving, body={"docs": docs}, params={"realtime": "false"})
        found = (_told(doc) for doc in answer["docs"])
        return {doc["_id"]: codec.read_passage(doc["_source"]) for doc in found if doc["found"]}

    @override
    async def term_counts(self, hits: Sequence[Hit]) -> dict[str, Mapping[str, int]]:
        found = await self._term_vectors([codec.term_vectors(self._serving, hit) for hit in hits])
        return {hit.chunk_id: codec.read_terms(doc) for hit, doc in zip(hits, found, strict=True) if doc["found"]}

    @override
    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        return await named_chunks(self._client, self._serving, key)

    @override
    async def analysed(self, texts: Sequence[str]) -> list[Mapping[str, int]]:
        found = await self._term_vectors([codec.analysis(self._serving, text) for text in texts])
        return [codec.read_terms(doc) for doc in found]

    @override
    async def statistics(self, terms: Collection[str]) -> FieldStatistics:
        if not self._routings:
            self._routings = await self._routing_of_each_shard()
        # A text without a term has no statistics either: one that no passage holds asks for those of the field.
        asked = [*terms, _NO_TERM]
        shards = [codec.shard_statistics(self._serving, asked, routing) for routing in self._routings]
        return codec.read_statistics(await self._term_vectors(shards), terms)

    async def _term_vectors(self, docs: _Docs) -> list[Mapping[str, Any]]:
        return [_told(doc) for doc in await self._asked.ask(docs)] if docs else []

    async def _ask(self, asks: Sequence[_Docs]) -> list[_Docs]:
        docs = [doc for ask in asks for doc in ask]
        found: list[Mapping[str, Any]] = []
        for start in range(0, len(docs), _DOCUMENTS_AT_ONCE):
            body = {"docs": docs[start : start + _DOCUMENTS_AT_ONCE]}
            with unavailable_is_said():
                found += (await self._client.mtermvectors(body=body, params={"realtime": "false"}))["docs"]
        told = iter(found)
        return [list(islice(told, len(ask))) for ask in asks]

    async def _routing_of_each_shard(self) -> list[str]:
        """A routing value that leads to each shard: how one is named where documents are not stored."""
        with unavailable_is_said():
            shards = len((await self._client.search_shards(index=self._serving))["shards"])
            if not shards:
                raise IndexUnavailable(f"there is no index behind {self._serving}: start a worker, it makes one")
            routings: dict[int, str] = {}
            for number in count():
                if len(routings) == shards:
                    return list(routings.values())
                answer = await self._client.search_shards(index=self._serving, params={"routing": str(number)})
                routings.setdefault(answer["shards"][0][0]["shard"], str(number))
        raise AssertionError("unreachable")


_NO_TERM: Final = "\u0001"
_PASSAGE: Final = [*codec.CHUNK_SOURCE, "text_sha256", "vector"]


def _told(doc: Mapping[str, Any]) -> Mapping[str, Any]:
    if "error" in doc:
        raise IndexUnavailable(f"a read failed: {doc['error'].get('reason')}")
    return doc
