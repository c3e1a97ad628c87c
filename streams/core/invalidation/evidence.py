"""What a change is and what a cached answer stands on, as the policies judge them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from schemas.index import StoredChunk
from schemas.search import HybridSearch, Vector


@dataclass(frozen=True, slots=True)
class TermCounts:
    """A text as the index's analyser makes it.

    Attributes:
        frequencies: term → how often.
        length: number of terms, as Lucene counts a field's length.
    """

    frequencies: Mapping[str, int]
    length: int

    @classmethod
    def of(cls, frequencies: Mapping[str, int]) -> "TermCounts":
        """Counts whose length is their sum: the analyser puts one term at each position."""
        return cls(frequencies, sum(frequencies.values()))


@dataclass(frozen=True, slots=True)
class Passage:
    """A searchable passage with all that decides where it ranks.

    Attributes:
        vector: unit length, shape (dimension,).
    """

    chunk: StoredChunk
    vector: Vector
    terms: TermCounts


@dataclass(frozen=True, slots=True)
class Change:
    """What became different in a tenant's part of the index; several changes may be judged as one.

    Judging a change again, or one that an answer reflects already, keeps the answer: what is removed is not in its
    windows, what is added is a source with the same version, or ranks where it ranked.

    Attributes:
        removed: ids of passages that are gone.
        added: passages that are new, or stored anew under their old id.
    """

    removed: frozenset[str]
    added: tuple[Passage, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Term statistics of the lexical field, as the search scores with them.

    Attributes:
        document_count: passages that have the field; Lucene counts removed ones until it merges them away.
        total_length: terms in all of them.
        frequencies: term → passages that hold it; terms that are not named keep their last known value.
    """

    document_count: int
    total_length: int
    frequencies: Mapping[str, int] = field(default_factory=dict)

    @property
    def average_length(self) -> float:
        """Mean length of the field, at least 1 so that an empty index divides nothing by zero."""
        return max(self.total_length / max(self.document_count, 1), 1.0)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a cached answer was made of.

    Attributes:
        key: names the answer.
        search: the search that led to it; a window with fewer places than ``search.window`` holds all there is.
        terms: the question's terms with how often each occurs.
        top_k: passages wanted of the fused order.
        sources: chunk id and version of the passages in the answer.
        vector_window: (chunk id, score) of the vector leg, best first; a score is (1 + cosine) / 2.
        lexical_window: (chunk id, its terms) of the lexical leg, best first.
    """

    key: str
    search: HybridSearch
    terms: Mapping[str, int]
    top_k: int
    sources: tuple[tuple[str, int], ...]
    vector_window: tuple[tuple[str, float], ...]
    lexical_window: tuple[tuple[str, TermCounts], ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a change means for the answers.

    Attributes:
        drop: keys of answers that it alters, or may alter. They have been removed from the store.
        recheck: keys of answers with too few remaining candidates to decide: retrieve again and ``put``, or drop and
            ``discard``.
    """

    drop: frozenset[str] = frozenset()
    recheck: frozenset[str] = frozenset()
