"""Encoding of a cached answer: the response, and the evidence that evaluation needs.

Layout, little-endian: a fixed-size header with the lengths of three parts; the response as JSON; the evidence as
deflated JSON; the question's vector and the scores of the vector candidates as float32. A cache hit needs the header
and the response only, so Redis stores them apart from the rest.

Vectors and scores keep float32 precision. With float16, a dot product would deviate by up to 1e-3, which exceeds the
difference between neighbouring candidates.
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

_HEADER: Final = struct.Struct("<BdIII")
_FLOAT: Final = np.dtype("<f4")
_FASTEST_COMPRESSION: Final = 1


class UnreadableEntry(ValueError):
    """The bytes are not an entry of this version."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached answer.

    Attributes:
        response: JSON object with results, answer and citations.
        search: search of the question, with the number of requested candidates.
        top_k: number of fused results.
        sources: chunk id and version of each result.
        vector_candidates: candidates of the vector retriever, best first.
        lexical_candidates: candidates of the lexical retriever, best first. Their scores depend on the whole index and
            are not stored.
        filled_ms: epoch milliseconds of the fill.
        positions: partition → offset known to be reflected at the fill; later offsets may be reflected too.
    """

    response: bytes
    search: HybridSearch
    top_k: int
    sources: tuple[tuple[str, int], ...]
    vector_candidates: tuple[Hit, ...]
    lexical_candidates: tuple[Hit, ...]
    filled_ms: float
    positions: Mapping[int, int] = field(default_factory=dict)

    def encode(self) -> tuple[bytes, bytes]:
        """The two parts to store: header and response, and evidence."""
        evidence = zlib.compress(orjson.dumps(self._evidence()), _FASTEST_COMPRESSION)
        scores = np.array([hit.score for hit in self.vector_candidates], dtype=_FLOAT)
        numbers = self.search.vector.astype(_FLOAT).tobytes() + scores.tobytes()
        header = _HEADER.pack(ENTRY_VERSION, self.filled_ms, len(self.response), len(evidence), len(numbers))
        return header + self.response, evidence + numbers

    @classmethod
    def decode(cls, stored: bytes) -> "Entry":
        """Decode a complete entry.

        Raises:
            UnreadableEntry: the entry has another version or length.
        """
        filled_ms, response_bytes, (evidence_bytes, numbers_bytes) = _read_header(stored)
        evidence_start = _HEADER.size + response_bytes
        numbers_start = evidence_start + evidence_bytes
        if len(stored) != numbers_start + numbers_bytes:
            raise UnreadableEntry(
                f"the entry has {len(stored)} bytes, its header declares {numbers_start + numbers_bytes}"
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
            response=stored[_HEADER.size : evidence_start],
            search=HybridSearch(evidence["text"], vector, access, evidence["candidates"], filters),
            top_k=evidence["top_k"],
            sources=tuple((chunk_id, version) for chunk_id, version in evidence["sources"]),
            vector_candidates=tuple(map(Hit, vector_ids, [keys[at] for at in vector_keys], scores.tolist())),
            lexical_candidates=tuple(map(Hit, lexical_ids, [keys[at] for at in lexical_keys], repeat(0.0))),
            filled_ms=filled_ms,
            positions={int(partition): offset for partition, offset in evidence["positions"].items()},
        )

    def _evidence(self) -> dict[str, Any]:
        candidates = (self.vector_candidates, self.lexical_candidates)
        documents = {hit.key.document_id: 0 for hits in candidates for hit in hits}
        documents = {document_id: at for at, document_id in enumerate(documents)}
        # Columns, because they decode faster, and evaluation decodes every entry.
        vector, lexical = (
            ([hit.chunk_id for hit in hits], [documents[hit.key.document_id] for hit in hits]) for hits in candidates
        )
        return {
            "tenant": self.search.access.tenant,
            "groups": self.search.access.groups,
            "text": self.search.text,
            "filters": list(self.search.filters.items()),
            "candidates": self.search.candidates,
            "top_k": self.top_k,
            "sources": self.sources,
            "documents": list(documents),
            "vector": vector,
            "lexical": lexical,
            "positions": {str(partition): offset for partition, offset in self.positions.items()},
        }


def stored_response(stored: bytes) -> bytes:
    """The response of an entry, with or without its evidence.

    Raises:
        UnreadableEntry: the entry has another version or length.
    """
    _, response_bytes, evidence_bytes = _read_header(stored)
    end = _HEADER.size + response_bytes
    if len(stored) not in {end, end + sum(evidence_bytes)}:
        raise UnreadableEntry(f"neither an entry nor its first part: {len(stored)} bytes")
    return stored[_HEADER.size : end]


def _read_header(stored: bytes) -> tuple[float, int, tuple[int, int]]:
    if len(stored) < _HEADER.size:
        raise UnreadableEntry(f"an entry has at least {_HEADER.size} bytes, not {len(stored)}")
    version, filled_ms, response_bytes, evidence_bytes, numbers_bytes = _HEADER.unpack_from(stored)
    if version != ENTRY_VERSION:
        raise UnreadableEntry(f"the entry has version {version}, not {ENTRY_VERSION}")
    return filled_ms, response_bytes, (evidence_bytes, numbers_bytes)
