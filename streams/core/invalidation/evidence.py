"""Changes, and the evidence of cached answers that is evaluated against them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from schemas.index import StoredChunk
from schemas.search import HybridSearch, Vector


@dataclass(frozen=True, slots=True)
class TermCounts:
    """The terms of a text, as the analyser of the index produces them.

    Attributes:
        frequencies: term → number of occurrences.
        length: number of terms, which Lucene stores as the length of the field.
    """

    frequencies: Mapping[str, int]
    length: int

    @classmethod
    def of(cls, frequencies: Mapping[str, int]) -> "TermCounts":
        """Counts whose length is their sum: the analyser emits one term for each position."""
        return cls(frequencies, sum(frequencies.values()))


@dataclass(frozen=True, slots=True)
class Passage:
    """A searchable passage with everything that determines its rank.

    Attributes:
        vector: unit length, shape (dimension,).
    """

    chunk: StoredChunk
    vector: Vector
    terms: TermCounts


@dataclass(frozen=True, slots=True)
class Change:
    """Changes in a tenant's part of the index, merged into one.

    Evaluation is idempotent: a change that was evaluated before, or that an answer already reflects, keeps the answer.
    Removed passages are not among its candidates; an added passage is a source with the same version, or keeps its
    rank.

    Attributes:
        removed: ids of removed passages.
        added: passages that are new or rewritten under the same id.
    """

    removed: frozenset[str]
    added: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Term statistics of the lexical field, as searches use them.

    Attributes:
        document_count: number of passages with the field. Lucene counts removed passages until it merges them away.
        total_length: number of terms in all of them.
        frequencies: term → number of passages that contain it. Terms that are absent keep their previous value.
    """

    document_count: int
    total_length: int
    frequencies: Mapping[str, int] = field(default_factory=dict)

    @property
    def average_length(self) -> float:
        """Mean length of the field, at least 1, so that an empty index does not cause a division by zero."""
        return max(self.total_length / max(self.document_count, 1), 1.0)


@dataclass(frozen=True, slots=True)
class Evidence:
    """The data of a cached answer from which changes are evaluated.

    Attributes:
        key: key of the answer.
        search: search of the answer. A candidate list shorter than ``search.candidates`` is complete.
        terms: terms of the question with the number of their occurrences.
        top_k: number of passages of the fused order.
        sources: chunk id and version of the passages in the answer.
        vector_candidates: candidates of the vector search, best first, as (chunk id, (1 + cosine) / 2).
        lexical_candidates: candidates of the lexical search, best first, as (chunk id, terms).
    """

    key: str
    search: HybridSearch
    terms: Mapping[str, int]
    top_k: int
    sources: tuple[tuple[str, int], ...]
    vector_candidates: tuple[tuple[str, float], ...]
    lexical_candidates: tuple[tuple[str, TermCounts], ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of evaluating a change.

    Attributes:
        drop: keys of answers that the change alters, or may alter. The policy no longer contains them.
        recheck: keys of answers with too few remaining candidates for a decision. Repeat the search and ``put`` them,
            or evict and ``discard`` them.
    """

    drop: frozenset[str] = frozenset()
    recheck: frozenset[str] = frozenset()
