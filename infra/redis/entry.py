"""What is kept of an answer: the response to send again, and what is needed to judge later changes by it.

Layout, little-endian: a fixed head, then three parts whose lengths the head holds: the response as JSON; the evidence,
as JSON that is deflated; the question's vector and the scores of the vector window as float32. A hit needs the head
and the response only: they are stored apart from the rest.

Vectors and scores keep their full precision: half of it would move a dot product by up to 1e-3, which is more than lies
between neighbours in a window.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Final

import numpy as np
import orjson

from schemas.cache_keys import ENTRY_VERSION
from schemas.documents import DocumentKey
from schemas.search import Access, Hit, HybridSearch

_HEAD: Final = struct.Struct("<BdIII")
_FLOAT: Final = np.dtype("<f4")
_FASTEST: Final = 1


class UnreadableEntry(ValueError):
    """The bytes are not an entry of this version."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached answer.

    Attributes:
        response: JSON object of results, answer and citations.
        search: what was searched for; its window is how deep the legs were asked to go.
        top_k: passages wanted of the fused order.
        sources: chunk id and version of each result.
        vector_window: what the vector leg found, best first.
        lexical_window: what the lexical leg found, best first; scores are not kept, they move with the index.
        filled_ms: epoch milliseconds of the fill.
        positions: partition → offset known to be reflected when it was filled; later ones may be.
    """

    response: bytes
    search: HybridSearch
    top_k: int
    sources: tuple[tuple[str, int], ...]
    vector_window: tuple[Hit, ...]
    lexical_window: tuple[Hit, ...]
    filled_ms: float
    positions: Mapping[int, int] = field(default_factory=dict)

    def encode(self) -> tuple[bytes, bytes]:
        """The stored form: what a hit needs, and what follows it."""
        evidence = zlib.compress(orjson.dumps(self._evidence()), _FASTEST)
        scores = np.array([hit.score for hit in self.vector_window], dtype=_FLOAT)
        numbers = self.search.vector.astype(_FLOAT).tobytes() + scores.tobytes()
        head = _HEAD.pack(ENTRY_VERSION, self.filled_ms, len(self.response), len(evidence), len(numbers))
        return head + self.response, evidence + numbers

    @classmethod
    def decode(cls, stored: bytes) -> "Entry":
        """Read all of a stored entry.

        Raises:
            UnreadableEntry: see there.
        """
        filled_ms, response_bytes, (evidence_bytes, numbers_bytes) = _read_head(stored)
        evidence_start = _HEAD.size + response_bytes
        numbers_start = evidence_start + evidence_bytes
        if len(stored) != numbers_start + numbers_bytes:
            raise UnreadableEntry(
                f"an entry of {numbers_start + numbers_bytes} bytes, of which {len(stored)} are there"
            )
        evidence = orjson.loads(zlib.decompress(stored[evidence_start:numbers_start]))
        numbers = np.frombuffer(stored[numbers_start:], dtype=_FLOAT).astype(np.float32)
        keys = list(map(DocumentKey, repeat(evidence["tenant"]), evidence["documents"]))
        vector_ids, vector_keys = evidence["vector"]
        lexical_ids, lexical_keys = evidence["lexical"]
        count = len(vector_ids)
        vector, scores = numbers[: len(numbers) - count], numbers[len(numbers) - count :]
        filters = {name: tuple(wanted) if isinstance(wanted, list) else wanted for name, wanted in evidence["filters"]}
        access = Access(evidence["tenant"], tuple(evidence["groups"]))
        return cls(
            response=stored[_HEAD.size : evidence_start],
            search=HybridSearch(evidence["text"], vector, access, evidence["window"], filters),
            top_k=evidence["top_k"],
            sources=tuple((chunk_id, version) for chunk_id, version in evidence["sources"]),
            vector_window=tuple(map(Hit, vector_ids, [keys[at] for at in vector_keys], scores.tolist())),
            lexical_window=tuple(map(Hit, lexical_ids, [keys[at] for at in lexical_keys], repeat(0.0))),
            filled_ms=filled_ms,
            positions={int(partition): offset for partition, offset in evidence["positions"].items()},
        )

    def _evidence(self) -> dict[str, Any]:
        windows = (self.vector_window, self.lexical_window)
        documents = {hit.key.document_id: 0 for window in windows for hit in window}
        documents = {document_id: at for at, document_id in enumerate(documents)}
        # By columns: whoever judges reads every entry.
        vector, lexical = (
            ([hit.chunk_id for hit in window], [documents[hit.key.document_id] for hit in window]) for window in windows
        )
        return {
            "tenant": self.search.access.tenant,
            "groups": self.search.access.groups,
            "text": self.search.text,
            "filters": list(self.search.filters.items()),
            "window": self.search.window,
            "top_k": self.top_k,
            "sources": self.sources,
            "documents": list(documents),
            "vector": vector,
            "lexical": lexical,
            "positions": {str(partition): offset for partition, offset in self.positions.items()},
        }


def stored_response(stored: bytes) -> bytes:
    """The response of a stored entry, of which the rest may be missing.

    Raises:
        UnreadableEntry: see there.
    """
    _, response_bytes, rest_bytes = _read_head(stored)
    end = _HEAD.size + response_bytes
    if len(stored) not in {end, end + sum(rest_bytes)}:
        raise UnreadableEntry(f"neither an entry nor the first part of one: {len(stored)} bytes")
    return stored[_HEAD.size : end]


def _read_head(stored: bytes) -> tuple[float, int, tuple[int, int]]:
    if len(stored) < _HEAD.size:
        raise UnreadableEntry(f"an entry has at least {_HEAD.size} bytes, not {len(stored)}")
    version, filled_ms, response_bytes, evidence_bytes, numbers_bytes = _HEAD.unpack_from(stored)
    if version != ENTRY_VERSION:
        raise UnreadableEntry(f"not an entry of version {ENTRY_VERSION}: version {version}")
    return filled_ms, response_bytes, (evidence_bytes, numbers_bytes)
