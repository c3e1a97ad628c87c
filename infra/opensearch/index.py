"""Document index in OpenSearch."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Self

import orjson
from opensearchpy import AsyncOpenSearch
from typing_extensions import override

from infra.coalescing import Coalescer, gather_all
from infra.opensearch import codec
from infra.opensearch.client import connect, opensearch_errors
from infra.opensearch.port import (
    ChunkChange,
    ChunkWrite,
    DocumentIndex,
    FoundPassage,
    IndexUnavailable,
    ManifestWrite,
    Revision,
    ScannedChunk,
    SearchIndex,
    StoredManifest,
)
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.index import Manifest, StoredChunk
from schemas.search import Candidates, Hit, HybridSearch, Vector

_CONFLICT: Final = 409
_NOT_FOUND: Final = 404
_BAD_REQUEST: Final = 400
_SCAN_PAGE: Final = 500
_BULK_BYTES: Final = 8_000_000
_MAX_REQUESTS: Final = 4
"""Maximum number of concurrent search requests. Further searches are combined in the next one."""
_MAX_SEARCHES: Final = 16
"""Maximum number of searches per request."""
_PASSAGES_PER_REQUEST: Final = 500
_WHOLE_PIT: Final = {"keep_alive": "5m", "allow_partial_pit_creation": "false"}


class OpenSearchIndex(DocumentIndex, SearchIndex):
    """Passages, manifests and stored vectors of one generation."""

    def __init__(self, client: AsyncOpenSearch, settings: Settings, *, generation: str | None = None) -> None:
        names = settings.names
        self.generation = generation or settings.generation
        self._client = client
        self._chunks = names.chunks_index(self.generation)
        self._manifests = names.manifests_index(self.generation)
        self._vectors = names.vectors_index
        self._serving = names.chunks_alias
        self._ef_search = settings.opensearch.ef_search
        # All reads of an instance use the same copy of each shard, if available. Copies are refreshed one after the
        # other, so a search on one and a fetch from another could miss a document that is being replaced.
        self._copy = f"reader-{secrets.token_hex(4)}"
        self._searches: Coalescer[HybridSearch, Candidates] = Coalescer(
            self._msearch, max_calls=_MAX_REQUESTS, max_items=_MAX_SEARCHES
        )

    @classmethod
    def open(cls, settings: Settings, *, generation: str | None = None) -> Self:
        """An index with its own connections. Nothing is sent before the first call."""
        return cls(connect(settings.opensearch), settings, generation=generation)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ready(self) -> None:
        """Check that the serving index responds.

        Raises:
            IndexUnavailable: it does not respond or does not exist.
        """
        with opensearch_errors():
            if not await self._client.indices.exists_alias(name=self._serving):
                raise IndexUnavailable(f"alias {self._serving} has no index: start a worker, which creates one")

    # Read side

    @override
    async def search(self, searches: Sequence[HybridSearch]) -> list[Candidates]:
        # Concurrent searches share a request.
        return await gather_all([self._searches.submit(search) for search in searches])

    async def _msearch(self, searches: Sequence[HybridSearch]) -> list[Candidates | Exception]:
        lines = [
            line for search in searches for line in codec.search_lines(search, self._copy, ef_search=self._ef_search)
        ]
        with opensearch_errors():
            answer = await self._client.msearch(index=self._serving, body=_ndjson(lines))
        found = iter(answer["responses"])
        return [
            _read_candidates(search, vector, lexical)
            for search, vector, lexical in zip(searches, found, found, strict=True)
        ]

    @override
    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        # Reads searchable state, like the search before it, not newer writes.
        if not hits:
            return {}
        docs = [{"_id": hit.chunk_id, "routing": str(hit.key), "_source": codec.CHUNK_SOURCE} for hit in hits]
        params = {"realtime": "false", "preference": self._copy}
        with opensearch_errors():
            answer = await self._client.mget(index=self._serving, body={"docs": docs}, params=params)
        found = (_got(doc) for doc in answer["docs"])
        return {doc["_id"]: codec.read_chunk(doc["_source"]) for doc in found if doc is not None}

    @override
    async def count_chunks(self, key: DocumentKey) -> int:
        own = [{"term": {"tenant": key.tenant}}, {"term": {"document_id": key.document_id}}]
        with opensearch_errors():
            answer = await self._client.count(
                index=self._serving, body={"query": {"bool": {"filter": own}}}, params={"routing": str(key)}
            )
        check_whole(answer)
        return int(answer["count"])

    @override
    async def positions(self, tenant: str) -> dict[int, int]:
        body = codec.positions_of(tenant)
        with opensearch_errors():
            answer = await self._client.search(index=self._manifests, body=body)
        check_whole(answer)
        return codec.read_positions(answer)

    @override
    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> list[Manifest]:
        body = codec.live_documents(tenant, connector, after, limit)
        with opensearch_errors():
            if after is None:
                await self._client.indices.refresh(index=self._manifests)
            answer = await self._client.search(index=self._manifests, body=body)
        check_whole(answer)
        return [codec.read_manifest(hit["_source"]).listed for hit in answer["hits"]["hits"]]

    # Write side

    @override
    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        return {key: found.manifest for key, found in (await self.stored_manifests(keys)).items()}

    @override
    async def stored_manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, StoredManifest]:
        if not keys:
            return {}
        docs = [{"_id": codec.manifest_id(key), "_source": ["manifest"]} for key in keys]
        with opensearch_errors():
            answer = await self._client.mget(index=self._manifests, body={"docs": docs})
        found = [doc for doc in map(_got, answer["docs"]) if doc is not None]
        stored = [StoredManifest(codec.read_manifest(doc["_source"]), _revision(doc)) for doc in found]
        return {one.manifest.key: one for one in stored}

    @override
    async def put_manifests(self, writes: Sequence[ManifestWrite]) -> list[Revision | None]:
        lines: list[dict[str, Any]] = []
        for write in writes:
            name = {"_id": codec.manifest_id(write.manifest.key)}
            if write.replaces is None:
                action: dict[str, Any] = {"create": name}
            else:
                sequence, term = write.replaces
                action = {"index": name | {"if_seq_no": sequence, "if_primary_term": term}}
            lines += [action, codec.manifest_body(write.manifest)]
        results = await self._bulk(self._manifests, lines, refresh=False)
        for result in results:
            _raise_if_unavailable(result)
            if result["status"] not in {200, 201, _CONFLICT}:
                raise ValueError(f"a manifest was rejected: {result['error']}")
        return [None if result["status"] == _CONFLICT else _revision(result) for result in results]

    @override
    async def apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        rejected: list[str | None] = []
        for start, end in _bulk_slices([len(change.put) for change in changes]):
            rejected += await self._apply(changes[start:end])
        return rejected

    async def _apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        rejected: list[str | None] = [None] * len(changes)
        # A change without removals takes one request, which refreshes only the shards that it affects.
        adding = [number for number, change in enumerate(changes) if not change.remove]
        for number, rejection in zip(
            adding, await self._put([changes[at] for at in adding], refresh=True), strict=True
        ):
            rejected[number] = rejection
        # A change with removals takes two: passages are removed only after all new ones are accepted, so a rejected
        # change keeps the old content. Both requests affect the same shards, so one refresh at the end suffices.
        replacing = [number for number, change in enumerate(changes) if change.remove]
        put = await self._put([changes[at] for at in replacing], refresh=False)
        last: list[dict[str, Any]] = []
        for number, rejection in zip(replacing, put, strict=True):
            rejected[number] = rejection
            if rejection is None:
                last += _deletes(changes[number], changes[number].remove)
        for number, rejection in enumerate(rejected):
            if rejection is not None:
                last += _deletes(changes[number], changes[number].put_ids)
        for result in await self._bulk(self._chunks, last, refresh=True):
            _raise_if_unavailable(result)
        return rejected

    async def _put(self, changes: Sequence[ChunkChange], *, refresh: bool) -> list[str | None]:
        lines: list[dict[str, Any]] = []
        owners: list[int] = []
        for number, change in enumerate(changes):
            lines += _writes(change, change.put)
            owners += [number] * len(change.put)
        rejected: list[str | None] = [None] * len(changes)
        for owner, result in zip(owners, await self._bulk(self._chunks, lines, refresh=refresh), strict=True):
            _raise_if_unavailable(result)
            if result["status"] == _BAD_REQUEST:
                rejected[owner] = f"{result['error'].get('type')}: {result['error'].get('reason')}"
        return rejected

    @override
    async def enforce(self, change: ChunkChange) -> None:
        for start in range(0, len(change.put), _PASSAGES_PER_REQUEST):
            lines = _writes(change, change.put[start : start + _PASSAGES_PER_REQUEST])
            for result in await self._bulk(self._chunks, lines, refresh=not change.remove):
                _raise_if_unavailable(result)
                if result["status"] == _BAD_REQUEST:
                    raise IndexUnavailable(
                        f"the index rejected a passage that it had accepted before: {result['error']}"
                    )
        for result in await self._bulk(self._chunks, _deletes(change, change.remove), refresh=True):
            _raise_if_unavailable(result)

    @override
    async def read_passages(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        found: dict[str, ChunkWrite] = {}
        for start in range(0, len(hits), _PASSAGES_PER_REQUEST):
            some = hits[start : start + _PASSAGES_PER_REQUEST]
            docs = [{"_id": hit.chunk_id, "routing": str(hit.key)} for hit in some]
            with opensearch_errors():
                answer = await self._client.mget(index=self._chunks, body={"docs": docs})
            existing = [doc for doc in map(_got, answer["docs"]) if doc is not None]
            found |= {doc["_id"]: codec.read_passage(doc["_source"]) for doc in existing}
        return found

    @override
    async def passages(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, list[FoundPassage]]:
        found: dict[DocumentKey, list[FoundPassage]] = {}
        after: list[Any] | None = None
        while keys:
            with opensearch_errors():
                answer = await self._client.search(index=self._chunks, body=codec.passages_of(keys, after))
            check_whole(answer)
            hits = answer["hits"]["hits"]
            for one in map(codec.read_found, hits):
                if one.chunk.key in keys:
                    found.setdefault(one.chunk.key, []).append(one)
            if len(hits) < codec.PASSAGES_PAGE:
                break
            after = hits[-1]["sort"]
        return found

    @override
    async def advance(self, positions: Mapping[tuple[str, int], int]) -> None:
        lines = [
            line
            for (tenant, partition), offset in positions.items()
            for line in codec.position_lines(tenant, partition, offset)
        ]
        for result in await self._bulk(self._manifests, lines, refresh=False):
            _raise_if_unavailable(result)

    @override
    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        return await read_chunk_ids(self._client, self._chunks, key)

    @override
    async def stored_vectors(self, keys: Sequence[str]) -> dict[str, Vector]:
        if not keys:
            return {}
        with opensearch_errors():
            answer = await self._client.mget(index=self._vectors, body={"ids": list(keys)})
        found = (_got(doc) for doc in answer["docs"])
        return {doc["_id"]: codec.read_vector(doc["_source"]) for doc in found if doc is not None}

    @override
    async def store_vectors(self, vectors: Mapping[str, Vector]) -> None:
        now_ms = int(time.time() * 1000)
        lines: list[dict[str, Any]] = []
        for key, vector in vectors.items():
            lines += [{"index": {"_id": key}}, codec.vector_body(vector, now_ms)]
        for result in await self._bulk(self._vectors, lines, refresh=False):
            _raise_if_unavailable(result)

    # Operators

    @override
    async def scan_manifests(self) -> AsyncIterator[Manifest]:
        with opensearch_errors():
            await self._client.indices.refresh(index=self._manifests)
        async for source in self._scan(self._manifests, dict(codec.ALL_MANIFESTS)):
            yield codec.read_manifest(source)

    @override
    async def scan_chunks(self) -> AsyncIterator[ScannedChunk]:
        async for source in self._scan(self._chunks, {"_source": {"excludes": ["vector"]}}):
            yield codec.read_scanned(source)

    @override
    async def delete_chunks(self, hits: Sequence[Hit]) -> None:
        lines = [{"delete": {"_id": hit.chunk_id, "routing": str(hit.key)}} for hit in hits]
        for result in await self._bulk(self._chunks, lines, refresh=True):
            _raise_if_unavailable(result)

    async def _scan(self, index: str, body: dict[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
        with opensearch_errors():
            snapshot = (await self._client.create_pit(index=index, params=_WHOLE_PIT))["pit_id"]
        try:
            after: list[Any] | None = None
            while True:
                page = body | {
                    "size": _SCAN_PAGE,
                    "pit": {"id": snapshot, "keep_alive": "5m"},
                    "sort": ["_shard_doc"],
                    **({"search_after": after} if after is not None else {}),
                }
                with opensearch_errors():
                    answer = await self._client.search(body=page)
                check_whole(answer)
                hits = answer["hits"]["hits"]
                if not hits:
                    return
                for hit in hits:
                    yield hit["_source"]
                after = hits[-1]["sort"]
        finally:
            await self._client.delete_pit(body={"pit_id": [snapshot]})

    async def _bulk(self, index: str, lines: list[dict[str, Any]], *, refresh: bool) -> list[dict[str, Any]]:
        if not lines:
            return []
        params = {"refresh": "true"} if refresh else {}
        with opensearch_errors():
            answer = await self._client.bulk(index=index, body=_ndjson(lines), params=params)
        return [next(iter(item.values())) for item in answer["items"]]


def _external(change: ChunkChange) -> dict[str, Any]:
    """Routing and version of every write of a change. Outdated writes are conflicts, and have no effect."""
    return {"routing": str(change.key), "version": change.version, "version_type": "external_gte"}


def _writes(change: ChunkChange, writes: Sequence[ChunkWrite]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for write in writes:
        lines += [{"index": {"_id": write.chunk.chunk_id, **_external(change)}}, codec.chunk_body(write)]
    return lines


def _deletes(change: ChunkChange, chunk_ids: Sequence[str]) -> list[dict[str, Any]]:
    return [{"delete": {"_id": chunk_id, **_external(change)}} for chunk_id in chunk_ids]


def _ndjson(lines: Sequence[Mapping[str, Any]]) -> str:
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    return b"".join(orjson.dumps(line, option=option) for line in lines).decode()


def _bulk_slices(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Split a list of changes into requests of bounded size. A change is not split, so it remains one shard request."""
    max_passages = _BULK_BYTES // 10_000  # a passage with its vector as text is about 10 kB
    slices, start, total = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and total + size > max_passages:
            slices.append((start, at))
            start, total = at, 0
        total += size
    if start < len(sizes):
        slices.append((start, len(sizes)))
    return slices


def _read_candidates(search: HybridSearch, *responses: Mapping[str, Any]) -> Candidates | IndexUnavailable:
    """Candidates of one search, or its error, which does not affect the other searches of the request."""
    try:
        vector, lexical = (_read_response(response, search.access.tenant) for response in responses)
    except IndexUnavailable as error:
        return error
    return Candidates(vector, lexical)


def _read_response(response: Mapping[str, Any], tenant: str) -> tuple[Hit, ...]:
    if "error" in response:
        raise IndexUnavailable(f"a search failed: {response['error'].get('reason')}")
    check_whole(response)
    return codec.read_hits(response, tenant)


async def read_chunk_ids(client: AsyncOpenSearch, index: str, key: DocumentKey) -> tuple[str, ...]:
    """Ids of all searchable passages of a document.

    Raises:
        IndexUnavailable: the index or one of its shards did not respond.
    """
    found: list[str] = []
    while True:
        body, params = codec.chunks_of(key, after=found[-1] if found else None)
        with opensearch_errors():
            answer = await client.search(index=index, body=body, params=params)
        check_whole(answer)
        page = codec.read_ids(answer)
        found += page
        if len(page) < codec.MAX_RESULTS:
            return tuple(found)


def check_whole(response: Mapping[str, Any]) -> None:
    """Raise ``IndexUnavailable`` if not all shards have responded.

    Partial results would be cached as a complete answer. OpenSearch does not count a shard without an available copy as
    failed, so the successful ones are counted.
    """
    shards = response["_shards"]
    if shards["successful"] < shards["total"] or response.get("timed_out"):
        raise IndexUnavailable("some shards did not respond")


def _got(doc: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if "error" in doc:
        raise IndexUnavailable(f"a read failed: {doc['error'].get('reason')}")
    return doc if doc["found"] else None


def _revision(written: Mapping[str, Any]) -> Revision:
    return Revision(written["_seq_no"], written["_primary_term"])


def _raise_if_unavailable(result: Mapping[str, Any]) -> None:
    if result["status"] in {200, 201, _CONFLICT, _BAD_REQUEST}:
        return
    if result["status"] == _NOT_FOUND and "error" not in result:  # nothing to delete; a missing index is an error
        return
    raise IndexUnavailable(f"OpenSearch responded with {result['status']}: {result.get('error')}")
