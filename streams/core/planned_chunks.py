"""Planned chunks as bytes, for plans too large for one record."""

from collections.abc import Sequence

from pydantic import TypeAdapter

from schemas.events import PlannedChunk

_CHUNKS = TypeAdapter(tuple[PlannedChunk, ...])


def dump_chunks(chunks: Sequence[PlannedChunk]) -> bytes:
    """The chunks as JSON."""
    return _CHUNKS.dump_json(tuple(chunks))


def load_chunks(dumped: bytes) -> tuple[PlannedChunk, ...]:
    """The inverse of ``dump_chunks``."""
    return _CHUNKS.validate_json(dumped)
