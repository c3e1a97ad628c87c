"""Encoding of planned chunks that do not fit into a record."""

from collections.abc import Sequence

from pydantic import TypeAdapter

from schemas.events import PlannedChunk

_CHUNKS = TypeAdapter(tuple[PlannedChunk, ...])


def dump_chunks(chunks: Sequence[PlannedChunk]) -> bytes:
    """Encode chunks as JSON."""
    return _CHUNKS.dump_json(tuple(chunks))


def load_chunks(dumped: bytes) -> tuple[PlannedChunk, ...]:
    """Decode the output of ``dump_chunks``."""
    return _CHUNKS.validate_json(dumped)
