"""The index on a real OpenSearch cluster."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, Self

import orjson
from opensearchpy import AsyncOpenSearch
from typing_extensions import override

from infra.coalescing import Coalescer, gathered
from infra.opensearch import codec
from infra.opensearch.client import connect, unavailable_is_said
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
from schemas.search import Hit, HybridSearch, Vector, Windows

_CONFLICT: Final = 409
_NOT_FOUND: Final = 404
_BAD_REQUEST: Final = 400
_SCAN_PAGE: Final = 500
_BULK_BYTES: Final = 8_000_000
_REQUESTS: Final = 4
"""Requests with searches under way; what comes meanwhile makes the next one."""
_SEARCHES_OF_ONE: Final = 16
_PASSAGES_A_REQUEST: Final = 500
_WHOLE_PIT: Final = {"keep_alive": "5m", "allow_partial_pit_creation": "false"}


class OpenSearchIndex(DocumentIndex, SearchIndex):
    """Passages, manifests and stored vectors of one generation; both sides of the port."""

    def __init__(self, client: AsyncOpenSearch, settings: Settings, *, generation: str | None = None) -> None:
        names = settings.names
        self.generation = generation or settings.generation
        self._client = client
        self._chunks = names.chunks_index(self.generation)
        self._manifests = names.manifests_index(self.generation)
        self._vectors = names.vectors_index
        self._serving = names.chunks_alias
        self._ef_search = settings.opensearch.ef_search
        # All reads of one store go to the same copy of a shard while it is there. Copies are refreshed one after the
        # other: a search of one and a fetch from another would miss a document that is being replaced.
        self._copy = f"reader-{secrets.token_hex(4)}"
        self._searches: Coalescer[HybridSearch, Windows] = Coalescer(
            self._msearch, at_a_time=_REQUESTS, most=_SEARCHES_OF_ONE
        )

    @classmethod
    def open(cls, settings: Settings, *, generation: str | None = None) -> Self:
        """A store with connections of its own; nothing is sent before the first call."""
        return cls(connect(settings.opensearch), settings, generation=generation)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def ready(self) -> None:
        """Check that the serving index answers.

        Raises:
            IndexUnavailable: it does not, or is not there.
        """
        with unavailable_is_said():
            if not await self._client.indices.exists_alias(name=self._serving):
                raise IndexUnavailable(f"there is no index behind {self._serving}: start a worker, it makes one")

    # Read side

    @override
    async def search(self, searches: Sequence[HybridSearch]) -> list[Windows]:
        """See ``SearchIndex.search``. Searches of callers at the same time make one request."""
        return await gathered([self._searches.ask(search) for search in searches])

    async def _msearch(self, searches: Sequence[HybridSearch]) -> list[Windows | Exception]:
        lines = [
            line for search in searches for line in codec.search_lines(search, self._copy, ef_search=self._ef_search)
        ]
        with unavailable_is_said():
            answer = await self._client.msearch(index=self._serving, body=_ndjson(lines))
        legs = iter(answer["responses"])
        return [_windows(search, vector, lexical) for search, vector, lexical in zip(searches, legs, legs, strict=True)]

    @override
    async def fetch(self, hits: Sequence[Hit]) -> dict[str, StoredChunk]:
        """See ``SearchIndex.fetch``. Reads what is searchable, like the search before it, not what is newer."""
        if not hits:
            return {}
        docs = [{"_id": hit.chunk_id, "routing": str(hit.key), "_source": codec.CHUNK_SOURCE} for hit in hits]
        params = {"realtime": "false", "preference": self._copy}
        with unavailable_is_said():
            answer = await self._client.mget(index=self._serving, body={"docs": docs}, params=params)
        found = (_got(doc) for doc in answer["docs"])
        return {doc["_id"]: codec.read_chunk(doc["_source"]) for doc in found if doc is not None}

    @override
    async def count_chunks(self, key: DocumentKey) -> int:
        mine = [{"term": {"tenant": key.tenant}}, {"term": {"document_id": key.document_id}}]
        with unavailable_is_said():
            answer = await self._client.count(
                index=self._serving, body={"query": {"bool": {"filter": mine}}}, params={"routing": str(key)}
            )
        check_whole(answer)
        return int(answer["count"])

    @override
    async def positions(self, tenant: str) -> dict[int, int]:
        body = codec.positions_of(tenant)
        with unavailable_is_said():
            answer = await self._client.search(index=self._manifests, body=body)
        check_whole(answer)
        return codec.read_positions(answer)

    @override
    async def live_documents(
        self, tenant: str, *, connector: str | None, after: str | None, limit: int
    ) -> list[Manifest]:
        body = codec.live_documents(tenant, connector, after, limit)
        with unavailable_is_said():
            if after is None:
                await self._client.indices.refresh(index=self._manifests)
            answer = await self._client.search(index=self._manifests, body=body)
        check_whole(answer)
        return [codec.read_manifest(hit["_source"]).listed for hit in answer["hits"]["hits"]]

    # Write side

    @override
    async def manifests(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, Manifest]:
        return {key: found.manifest for key, found in (await self.standing(keys)).items()}

    @override
    async def standing(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, StoredManifest]:
        if not keys:
            return {}
        docs = [{"_id": codec.manifest_id(key), "_source": ["manifest"]} for key in keys]
        with unavailable_is_said():
            answer = await self._client.mget(index=self._manifests, body={"docs": docs})
        found = [doc for doc in map(_got, answer["docs"]) if doc is not None]
        standing = [StoredManifest(codec.read_manifest(doc["_source"]), _revision(doc)) for doc in found]
        return {one.manifest.key: one for one in standing}

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
                raise ValueError(f"a manifest was refused: {result['error']}")
        return [None if result["status"] == _CONFLICT else _revision(result) for result in results]

    @override
    async def apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        refused: list[str | None] = []
        for start, end in _bulk_slices([len(change.put) for change in changes]):
            refused += await self._apply(changes[start:end])
        return refused

    async def _apply(self, changes: Sequence[ChunkChange]) -> list[str | None]:
        refused: list[str | None] = [None] * len(changes)
        # A change that only adds takes one request, which refreshes exactly the shards that it touches.
        adding = [number for number, change in enumerate(changes) if not change.remove]
        for number, refusal in zip(adding, await self._put([changes[at] for at in adding], refresh=True), strict=True):
            refused[number] = refusal
        # One that also removes takes two: passages go only when all new ones of their document are in, so a refused
        # update leaves the old content whole; both requests touch the same shards, so one refresh at the end suffices.
        replacing = [number for number, change in enumerate(changes) if change.remove]
        put = await self._put([changes[at] for at in replacing], refresh=False)
        last: list[dict[str, Any]] = []
        for number, refusal in zip(replacing, put, strict=True):
            refused[number] = refusal
            if refusal is None:
                last += _deletes(changes[number], changes[number].remove)
        for number, refusal in enumerate(refused):
            if refusal is not None:
                last += _deletes(changes[number], changes[number].put_ids)
        for result in await self._bulk(self._chunks, last, refresh=True):
            _raise_if_unavailable(result)
        return refused

    async def _put(self, changes: Sequence[ChunkChange], *, refresh: bool) -> list[str | None]:
        lines: list[dict[str, Any]] = []
        owners: list[int] = []
        for number, change in enumerate(changes):
            lines += _writes(change, change.put)
            owners += [number] * len(change.put)
        refused: list[str | None] = [None] * len(changes)
        for owner, result in zip(owners, await self._bulk(self._chunks, lines, refresh=refresh), strict=True):
            _raise_if_unavailable(result)
            if result["status"] == _BAD_REQUEST:
                refused[owner] = f"{result['error'].get('type')}: {result['error'].get('reason')}"
        return refused

    @override
    async def enforce(self, change: ChunkChange) -> None:
        for start in range(0, len(change.put), _PASSAGES_A_REQUEST):
            lines = _writes(change, change.put[start : start + _PASSAGES_A_REQUEST])
            for result in await self._bulk(self._chunks, lines, refresh=not change.remove):
                _raise_if_unavailable(result)
                if result["status"] == _BAD_REQUEST:
                    raise IndexUnavailable(f"the index refuses what it had taken: {result['error']}")
        for result in await self._bulk(self._chunks, _deletes(change, change.remove), refresh=True):
            _raise_if_unavailable(result)

    @override
    async def read_passages(self, hits: Sequence[Hit]) -> dict[str, ChunkWrite]:
        found: dict[str, ChunkWrite] = {}
        for start in range(0, len(hits), _PASSAGES_A_REQUEST):
            some = hits[start : start + _PASSAGES_A_REQUEST]
            docs = [{"_id": hit.chunk_id, "routing": str(hit.key)} for hit in some]
            with unavailable_is_said():
                answer = await self._client.mget(index=self._chunks, body={"docs": docs})
            there = [doc for doc in map(_got, answer["docs"]) if doc is not None]
            found |= {doc["_id"]: codec.read_passage(doc["_source"]) for doc in there}
        return found

    @override
    async def passages(self, keys: Sequence[DocumentKey]) -> dict[DocumentKey, list[FoundPassage]]:
        found: dict[DocumentKey, list[FoundPassage]] = {}
        after: list[Any] | None = None
        while keys:
            with unavailable_is_said():
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
        lines = [line for lane, offset in positions.items() for line in codec.position_lines(*lane, offset)]
        for result in await self._bulk(self._manifests, lines, refresh=False):
            _raise_if_unavailable(result)

    @override
    async def chunk_ids(self, key: DocumentKey) -> tuple[str, ...]:
        return await named_chunks(self._client, self._chunks, key)

    @override
    async def stored_vectors(self, keys: Sequence[str]) -> dict[str, Vector]:
        if not keys:
            return {}
        with unavailable_is_said():
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
        with unavailable_is_said():
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
        with unavailable_is_said():
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
                with unavailable_is_said():
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
        with unavailable_is_said():
            answer = await self._client.bulk(index=index, body=_ndjson(lines), params=params)
        return [next(iter(item.values())) for item in answer["items"]]


def _external(change: ChunkChange) -> dict[str, Any]:
    """Routing and version of every write of a change; a stale one is refused with a conflict, which is as good."""
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
    """Cut a list of changes into requests of bounded size; one change is never cut, so it stays one shard request."""
    most = _BULK_BYTES // 10_000  # a passage with its vector as text is about 10 kB
    slices, start, total = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and total + size > most:
            slices.append((start, at))
            start, total = at, 0
        total += size
    if start < len(sizes):
        slices.append((start, len(sizes)))
    return slices


def _windows(search: HybridSearch, *legs: Mapping[str, Any]) -> Windows | IndexUnavailable:
    """What one search found, or why it failed: those beside it in the request are none the worse."""
    try:
        vector, lexical = (_searched(leg, search.access.tenant) for leg in legs)
    except IndexUnavailable as error:
        return error
    return Windows(vector, lexical)


def _searched(response: Mapping[str, Any], tenant: str) -> tuple[Hit, ...]:
    if "error" in response:
        raise IndexUnavailable(f"a search failed: {response['error'].get('reason')}")
    check_whole(response)
    return codec.read_hits(response, tenant)


async def named_chunks(client: AsyncOpenSearch, index: str, key: DocumentKey) -> tuple[str, ...]:
    """See ``DocumentIndex.chunk_ids``.

    Raises:
        IndexUnavailable: see there.
    """
    named: list[str] = []
    while True:
        body, params = codec.chunks_of(key, after=named[-1] if named else None)
        with unavailable_is_said():
            answer = await client.search(index=index, body=body, params=params)
        check_whole(answer)
        page = codec.read_ids(answer)
        named += page
        if len(page) < codec.MAX_RESULTS:
            return tuple(named)


def check_whole(response: Mapping[str, Any]) -> None:
    """Raise ``IndexUnavailable`` where only some shards have answered.

    Results of some would pass for an answer, be cached as one, and be wrong. A shard without a copy that could be
    asked, as when the only one dies, is not among the failed: those that answered are counted.
    """
    shards = response["_shards"]
    if shards["successful"] < shards["total"] or response.get("timed_out"):
        raise IndexUnavailable("some shards did not answer")


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
    raise IndexUnavailable(f"OpenSearch answered {result['status']}: {result.get('error')}")
