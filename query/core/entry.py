"""What is kept of an answer: the response to send again, and what is needed to judge later changes by it.

Layout, little-endian: a fixed head, then three parts whose lengths the head holds: the response as JSON; sources and
windows as JSON; the query vector as float16. A hit needs the head and the response only.
"""

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import orjson

from infra.opensearch.port import Hit, Vector

ENTRY_VERSION: Final = 1
"""Part of every cache key, so that processes of two releases never read each other's entries."""

_HEAD: Final = struct.Struct("<BdIII")
_VECTOR_TYPE: Final = np.dtype("<f2")

Window = tuple[tuple[str, float], ...]
"""Chunk ids with their scores in one leg, best first."""


class UnreadableEntry(ValueError):
    """The bytes are not an entry of this version."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached answer.

    Attributes:
        response: JSON object of results, answer and citations.
        sources: chunk id and version of each result.
        vector_window: what the vector leg found.
        lexical_window: what the lexical leg found.
        query_vector: unit length, shape (dimension,); float16 once stored, which moves a dot product by less than 1e-3.
        filled_ms: epoch milliseconds of the fill.
    """

    response: bytes
    sources: tuple[tuple[str, int], ...]
    vector_window: Window
    lexical_window: Window
    query_vector: Vector
    filled_ms: float

    def encode(self) -> bytes:
        """The stored form."""
        evidence = orjson.dumps((self.sources, self.vector_window, self.lexical_window))
        vector = self.query_vector.astype(_VECTOR_TYPE).tobytes()
        head = _HEAD.pack(ENTRY_VERSION, self.filled_ms, len(self.response), len(evidence), len(vector))
        return b"".join((head, self.response, evidence, vector))

    @classmethod
    def decode(cls, stored: bytes) -> "Entry":
        """Read all of a stored entry.

        Raises:
            UnreadableEntry: see there.
        """
        filled_ms, response_bytes, evidence_bytes = _read_head(stored)
        evidence_start = _HEAD.size + response_bytes
        vector_start = evidence_start + evidence_bytes
        sources, vector_window, lexical_window = orjson.loads(stored[evidence_start:vector_start])
        return cls(
            response=stored[_HEAD.size : evidence_start],
            sources=tuple((chunk_id, version) for chunk_id, version in sources),
            vector_window=tuple((chunk_id, score) for chunk_id, score in vector_window),
            lexical_window=tuple((chunk_id, score) for chunk_id, score in lexical_window),
            query_vector=np.frombuffer(stored[vector_start:], dtype=_VECTOR_TYPE).astype(np.float32),
            filled_ms=filled_ms,
        )


def stored_response(stored: bytes) -> bytes:
    """The response of a stored entry, without reading the rest.

    Raises:
        UnreadableEntry: see there.
    """
    _, response_bytes, _ = _read_head(stored)
    return stored[_HEAD.size : _HEAD.size + response_bytes]


def window_of(hits: tuple[Hit, ...]) -> Window:
    """A leg's window as it is kept."""
    return tuple((hit.chunk_id, hit.score) for hit in hits)


def _read_head(stored: bytes) -> tuple[float, int, int]:
    if len(stored) < _HEAD.size:
        raise UnreadableEntry(f"an entry has at least {_HEAD.size} bytes, not {len(stored)}")
    version, filled_ms, response_bytes, evidence_bytes, vector_bytes = _HEAD.unpack_from(stored)
    expected = _HEAD.size + response_bytes + evidence_bytes + vector_bytes
    if version != ENTRY_VERSION or len(stored) != expected:
        raise UnreadableEntry(f"not an entry of version {ENTRY_VERSION}: version {version}, {len(stored)} bytes")
    return filled_ms, response_bytes, evidence_bytes
