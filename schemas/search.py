"""Searches: access, query and the candidates of each retriever."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.documents import DocumentKey, MetadataValue
from schemas.index import StoredChunk, metadata_term, metadata_terms, metadata_text

Vector = NDArray[np.float32]
"""Shape ``(dimension,)``, unit length, so that a dot product is the cosine."""

RRF_K: Final = 60
"""Rank constant of reciprocal rank fusion."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a reader may see: the documents of one tenant that are public or belong to one of these groups."""

    tenant: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HybridSearch:
    """A question for both retrievers.

    Attributes:
        text: the question, for the lexical retriever.
        vector: embedding of the question, unit length, shape (dimension,).
        access: enforced by both retrievers.
        candidates: number of passages that each retriever returns.
        filters: exact matches, all of which must hold; a tuple matches any of its values.
        exact: the vector retriever scores every permitted passage instead of traversing the approximate graph. The time
            is proportional to their number, so this is for checks only.
    """

    text: str
    vector: Vector
    access: Access
    candidates: int
    filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]] = field(default_factory=dict)
    exact: bool = False


class Hit(NamedTuple):
    """One candidate of a retriever. A tuple, because each question creates hundreds.

    Attributes:
        chunk_id: id of the passage.
        key: key of its document.
        score: score of the retriever.
        written: index, and position of the event that wrote the passage. Equal values mean equal content. None if
            unknown.
    """

    chunk_id: str
    key: DocumentKey
    score: float
    written: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates of each retriever, best first."""

    vector: tuple[Hit, ...]
    lexical: tuple[Hit, ...]


def allows(search: HybridSearch, chunk: StoredChunk) -> bool:
    """Whether access and filters of ``search`` permit ``chunk``."""
    if chunk.tenant != search.access.tenant or (chunk.groups and not set(chunk.groups) & set(search.access.groups)):
        return False
    terms = metadata_terms(chunk.metadata)
    for name, wanted in search.filters.items():
        values = wanted if isinstance(wanted, tuple) else (wanted,)
        metadata_name = name.removeprefix("metadata.")
        if metadata_name != name:
            if not any(metadata_term(metadata_name, value) in terms for value in values):
                return False
        elif getattr(chunk, name) not in map(metadata_text, values):
            return False
    return True
