"""Twins of the stores that may be slow or fail at any await, with a simple parser and splitter."""

from collections.abc import Callable
from hashlib import sha256

from faults import Fault, Faults

from freshline.verify.served import stored_passages
from infra.blobs.memory import MemoryBlobStore
from infra.blobs.port import BlobStoreUnavailable
from infra.embedding.hashing import HashingEmbedder
from infra.embedding.port import EmbeddingError, EmbeddingThrottled
from infra.kafka.memory import MemoryStreams
from infra.kafka.port import StreamUnavailable
from infra.opensearch.memory import MemoryIndex
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates
from infra.redis.port import CacheUnavailable
from schemas.documents import DocumentKey
from schemas.events import PlannedChunk
from streams.core.splitting import embedding_text
from streams.parsing.parse import ParsedDocument
from streams.parsing.sandbox import ParseFailed

PARTITIONS = 2
DIMENSION = 16
ROOM = 50
"""More passages than a history creates."""
BROKEN = b"%BROKEN"
UNEMBEDDABLE = "No model takes this."
REFUSED = "No index takes this."


class Streams(MemoryStreams):
    """Sometimes appends only the first of several records, or appends all and loses the acknowledgement."""

    def __init__(self, faults: Faults) -> None:
        super().__init__(PARTITIONS)
        self._faults = faults
        self.on_placed: Callable[[], None] = lambda: None

    async def send_all(self, records):
        taken = self._faults.rng.randint(0, len(records))
        await self._faults.before(StreamUnavailable)
        await super().send_all(records[:taken])
        self.on_placed()
        await self._faults.before(StreamUnavailable)
        placed = await super().send_all(records[taken:])
        self.on_placed()
        await self._faults.after(StreamUnavailable)
        return placed


class Blobs(MemoryBlobStore):
    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults

    async def get(self, ref):
        await self._faults.before(BlobStoreUnavailable)
        return await super().get(ref)


class Embedder(HashingEmbedder):
    def __init__(self, faults: Faults) -> None:
        super().__init__(DIMENSION)
        self._faults = faults

    async def embed_passages(self, texts):
        await self._faults.before(lambda why: EmbeddingThrottled(why, retry_after_s=0.2))
        if self._faults.happens(Fault.FAILURE, 0.15):
            raise EmbeddingError("it failed")
        if any(UNEMBEDDABLE in text for text in texts):
            raise EmbeddingError("it fails each time")
        return await super().embed_passages(texts)


class Cache(MemoryAnswerCache):
    def __init__(self, faults: Faults, now_us: Callable[[], int]) -> None:
        super().__init__(now_us)
        self._faults = faults

    async def lookup(self, tenant, key, *, lease_ms=0, with_evidence=False):
        await self._faults.before(CacheUnavailable)
        lookup = await super().lookup(tenant, key, lease_ms=lease_ms, with_evidence=with_evidence)
        await self._faults.after(CacheUnavailable)
        return lookup

    async def store(self, tenant, key, entry, *, epoch, ttl_s, evidence=b""):
        await self._faults.before(CacheUnavailable)
        stored = await super().store(tenant, key, entry, epoch=epoch, ttl_s=ttl_s, evidence=evidence)
        await self._faults.after(CacheUnavailable)
        return stored

    async def apply(self, tenant, positions, *, drop):
        await self._faults.before(CacheUnavailable)
        epoch = await super().apply(tenant, positions, drop=drop)
        await self._faults.after(CacheUnavailable)
        return epoch

    async def append(self, tenant, number, positions, change):
        await self._faults.before(CacheUnavailable)
        appended = await super().append(tenant, number, positions, change)
        await self._faults.after(CacheUnavailable)
        return appended

    async def pending(self, tenant, number, *, after_epoch, after_fill):
        await self._faults.before(CacheUnavailable)
        pending = await super().pending(tenant, number, after_epoch=after_epoch, after_fill=after_fill)
        await self._faults.after(CacheUnavailable)  # the read may be outdated by now
        return pending

    async def entries(self, tenant, number, keys):
        await self._faults.before(CacheUnavailable)
        return await super().entries(tenant, number, keys)

    async def commit(self, tenant, number, *, evaluated, epoch, drop, reason=b""):
        await self._faults.before(CacheUnavailable)
        committed = await super().commit(tenant, number, evaluated=evaluated, epoch=epoch, drop=drop, reason=reason)
        await self._faults.after(CacheUnavailable)
        return committed


class States(MemoryEventStates):
    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self._faults = faults

    async def advance(self, progress):
        await self._faults.before(CacheUnavailable)
        if self._faults.happens(Fault.FORGOTTEN, 0.1):
            return  # accepted by a Redis that lost its last second
        await super().advance(progress)


class WatchedIndex(MemoryIndex):
    """Calls hooks whenever other passages may have become searchable."""

    on_refresh: Callable[[], None] = staticmethod(lambda: None)
    on_advance: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, faults: Faults, *, gc_deletes_s: float, now_s: Callable[[], float]) -> None:
        self._faults = faults
        self._taken: set[str] = set()
        super().__init__(
            DIMENSION, gc_deletes_s=gc_deletes_s, now_s=now_s, pause=lambda: faults.before(IndexUnavailable)
        )

    async def search(self, searches):
        await self._faults.before(IndexUnavailable)
        return await super().search(searches)

    async def fetch(self, hits):
        await self._faults.before(IndexUnavailable)  # the index may change between a search and its fetch
        return await super().fetch(hits)

    async def manifests(self, keys):
        await self._faults.before(IndexUnavailable)
        return await super().manifests(keys)

    async def chunk_ids(self, key):
        await self._faults.before(IndexUnavailable)
        return await super().chunk_ids(key)

    async def stored_manifests(self, keys):
        await self._faults.before(IndexUnavailable)
        manifests = await super().stored_manifests(keys)
        await self._faults.after(IndexUnavailable)  # the read may be outdated by now
        return manifests

    async def put_manifests(self, writes):
        put = await super().put_manifests(writes)
        await self._faults.after(IndexUnavailable)
        return put

    async def apply(self, changes):
        if self._faults.happens(Fault.FAILURE, 0.05):
            raise ValueError("the store's client failed")
        refused = await super().apply(changes)
        await self._faults.after(IndexUnavailable)
        if self._faults.happens(Fault.FAILURE, 0.05):
            raise ValueError("the store's client failed, afterwards")
        return refused

    async def _put(self, writes, version):
        refused = await super()._put(writes, version)
        if any(REFUSED in one.chunk.text for one in writes):
            return "it holds what is refused"
        # Content that was stored before is accepted again.
        known = all(one.chunk.chunk_id in self._taken for one in writes)
        if refused is None and not known and self._faults.happens(Fault.REFUSAL, 0.1):
            return "refused this time"
        if refused is None:
            self._taken |= {one.chunk.chunk_id for one in writes}
        return refused

    async def read_passages(self, hits):
        await self._faults.before(IndexUnavailable)
        found = await super().read_passages(hits)
        await self._faults.after(IndexUnavailable)  # the read may be outdated by now
        return found

    async def passages(self, keys):
        await self._faults.before(IndexUnavailable)
        return await super().passages(keys)

    async def advance(self, positions):
        await super().advance(positions)
        self.on_advance()
        await self._faults.after(IndexUnavailable)

    def _refresh(self, keys):
        super()._refresh(keys)
        self.on_refresh()

    def seen(self, key: DocumentKey) -> dict[str, int]:
        """Searchable passages of a document."""
        return stored_passages(one.chunk for _, one in sorted(self._searchable.items()) if one.chunk.key == key)

    def lose_manifest(self, key: DocumentKey) -> None:
        """Remove the manifest as an external program does; its passages stay searchable."""
        del self._manifests[key]


class Parsers:
    async def parse(self, content, _content_type, _file_name):
        if content.startswith(BROKEN):
            raise ParseFailed("broken", "it is")
        return ParsedDocument(content.decode(), None, "text/plain")


class Splitter:
    """One passage per line."""

    def split(self, text, title):
        chunks = []
        at = 0
        for line in text.splitlines():
            bare = PlannedChunk(text=line, start=at, end=at + len(line), text_sha256="")
            named = sha256(embedding_text(title, bare).encode()).hexdigest()
            chunks.append(bare.model_copy(update={"text_sha256": named}))
            at += len(line) + 1
        return chunks
