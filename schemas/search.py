"""Words of a search: who asks, for what, and what each retriever found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.documents import DocumentKey, MetadataValue
from schemas.index import StoredChunk, metadata_term, metadata_terms, metadata_text

Vector = NDArray[np.float32]
"""Shape ``(dimension,)``, of unit length: a dot product is the cosine."""

RRF_K: Final = 60
"""Rank constant of reciprocal rank fusion."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a reader may see: one tenant, and in it the documents of these groups and those without groups."""

    tenant: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HybridSearch:
    """A question for both legs.

    Attributes:
        text: the question, for the lexical leg.
        vector: its embedding, unit length, shape (dimension,).
        access: enforced inside both legs.
        window: places of each leg to return.
        filters: exact matches, all of which must hold; a tuple means any of.
        exact: the vector leg scores every passage that may be found, instead of walking a graph that misses some. Takes
            time by their number: not for questions, but for those who check.
    """

    text: str
    vector: Vector
    access: Access
    window: int
    filters: Mapping[str, MetadataValue | tuple[MetadataValue, ...]] = field(default_factory=dict)
    exact: bool = False


class Hit(NamedTuple):
    """A place in a leg's window. Hundreds are made for each question.

    Attributes:
        chunk_id: of the passage.
        key: of its document.
        score: in that leg.
        written: index and position of the write that was found: the same passage of the same write has the same
            content. None where nobody knows.
    """

    chunk_id: str
    key: DocumentKey
    score: float
    written: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Windows:
    """What each leg found, best first."""

    vector: tuple[Hit, ...]
    lexical: tuple[Hit, ...]


def allows(search: HybridSearch, chunk: StoredChunk) -> bool:
    """True if access and filters of ``search`` let it find ``chunk``."""
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
