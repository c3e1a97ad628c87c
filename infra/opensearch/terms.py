"""Terms, vectors and statistics from OpenSearch, for the computation of scores."""

from collections.abc import Collection, Mapping, Sequence
from itertools import count, islice
from typing import Any, Final

from opensearchpy import AsyncOpenSearch
from typing_extensions import override

from infra.coalescing import Coalescer
from infra.opensearch import codec
from infra.opensearch.client import opensearch_errors
from infra.opensearch.index import read_chunk_ids
from infra.opensearch.port import ChunkWrite, FieldStatistics, IndexUnavailable, TermIndex
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.search import Hit

_DOCUMENTS_PER_REQUEST: Final = 200
"""Maximum number of documents per request. Each is analyzed, which takes some tenths of a millisecond."""

_MAX_CALLS: Final = 4
"""Maximum number of concurrent calls."""

_MAX_ITEMS: Final = 64
"""Maximum number of concurrent reads that are combined in one call."""

_Docs = Sequence[Mapping[str, Any]]


class OpenSearchTerms(TermIndex):
    """Terms and statistics from OpenSearch.

    The index analyzes stored texts on request, so Freshline does not reimplement its analyzer, and no term vectors are
    stored. Statistics are read from every shard, as a search of type ``dfs_query_then_fetch`` does.
    """

    def __init__(self, client: AsyncOpenSearch, settings: Settings) -> None:
        self._client = client
        self._serving = settings.names.chunks_alias
        self._routings: list[str] = []
        # The slices of a tenant read concurrently.
        self._reads: Coalescer[_Docs, _Docs] = Coalescer(self._read, max_calls=_MAX_CALLS, max_items=_MAX_ITEMS)

    @override
    async def with_vectors(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        if not hits:
            return {}
        docs = [{"_id": hit.chunk_id, "routing": str(hit.key), "_source": _PASSAGE} for hit in hits]
        with opensearch_errors():
            answer = await self._client.mget(index=self._serving, body={"docs": docs}, params={"realtime": "false"})
        found = (_checked(doc) for doc in answer["docs"])
        return {doc["_id"]: codec.read_passage(doc["_source"]) for doc in found if doc["found"]}

    @override
    async def term_counts(self, hits: Sequence[Hit]) -> dict[str, Mapping[str, int]]:
        found = await self._term_vectors([codec.term_vectors(self._serving, hit) for hit in hits])
        return {hit.chunk_id: codec.read_terms(doc) for hit, doc in zip(hits, found, strict=True) if doc["found"]}

    @override
    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        return await read_chunk_ids(self._client, self._serving, key)

    @override
    async def analyze(self, texts: Sequence[str]) -> list[Mapping[str, int]]:
        found = await self._term_vectors([codec.analysis(self._serving, text) for text in texts])
        return [codec.read_terms(doc) for doc in found]

    @override
    async def statistics(self, terms: Collection[str]) -> FieldStatistics:
        if not self._routings:
            self._routings = await self._routing_of_each_shard()
        # Without any term, the response lacks the field statistics, so a term that no passage contains is added.
        requested = [*terms, _NO_TERM]
        shards = [codec.shard_statistics(self._serving, requested, routing) for routing in self._routings]
        return codec.read_statistics(await self._term_vectors(shards), terms)

    async def _term_vectors(self, docs: _Docs) -> list[Mapping[str, Any]]:
        return [_checked(doc) for doc in await self._reads.submit(docs)] if docs else []

    async def _read(self, reads: Sequence[_Docs]) -> list[_Docs]:
        docs = [doc for read in reads for doc in read]
        found: list[Mapping[str, Any]] = []
        for start in range(0, len(docs), _DOCUMENTS_PER_REQUEST):
            body = {"docs": docs[start : start + _DOCUMENTS_PER_REQUEST]}
            with opensearch_errors():
                found += (await self._client.mtermvectors(body=body, params={"realtime": "false"}))["docs"]
        remaining = iter(found)
        return [list(islice(remaining, len(read))) for read in reads]

    async def _routing_of_each_shard(self) -> list[str]:
        """A routing value for each shard, which addresses it in requests without stored documents."""
        with opensearch_errors():
            shards = len((await self._client.search_shards(index=self._serving))["shards"])
            if not shards:
                raise IndexUnavailable(f"alias {self._serving} has no index: start a worker, which creates one")
            routings: dict[int, str] = {}
            for number in count():
                if len(routings) == shards:
                    return list(routings.values())
                answer = await self._client.search_shards(index=self._serving, params={"routing": str(number)})
                routings.setdefault(answer["shards"][0][0]["shard"], str(number))
        raise AssertionError("unreachable")


_NO_TERM: Final = "\u0001"
_PASSAGE: Final = [*codec.CHUNK_SOURCE, "text_sha256", "vector"]


def _checked(doc: Mapping[str, Any]) -> Mapping[str, Any]:
    if "error" in doc:
        raise IndexUnavailable(f"a read failed: {doc['error'].get('reason')}")
    return doc
