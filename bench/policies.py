"""Invalidation policies that exact invalidation is compared with, and the evidence that only they use."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from typing_extensions import override

from streams.core.invalidation.evidence import Change, Evaluation, Evidence, Statistics


@dataclass(frozen=True, slots=True)
class DocumentChange(Change):
    """A change, with the ids of the changed documents."""

    documents: frozenset[str]


@dataclass(frozen=True, slots=True)
class DocumentEvidence(Evidence):
    """Evidence, with the ids of the documents of the sources."""

    documents: frozenset[str]


class Policy(Protocol):
    """Stores the evidence of answers, and decides which of them a change invalidates."""

    def put(self, evidence: DocumentEvidence) -> None:
        """Store the evidence of an answer; replaces an earlier one with the same key."""
        ...

    def discard(self, key: str) -> None:
        """Remove an answer, if present."""
        ...

    def evaluate(self, change: DocumentChange, statistics: Statistics) -> Evaluation:
        """Answers that a change alters. ``statistics`` are those of a search at this moment."""
        ...


class _Tagged:
    """Answers, indexed by the tags that they may share with a change."""

    def __init__(self) -> None:
        self._tags: dict[str, frozenset[str]] = {}
        self._keys: dict[str, set[str]] = {}

    def discard(self, key: str) -> None:
        for tag in self._tags.pop(key, ()):
            self._keys[tag].discard(key)

    def _put(self, key: str, tags: frozenset[str]) -> None:
        self.discard(key)
        self._tags[key] = tags
        for tag in tags:
            self._keys.setdefault(tag, set()).add(key)

    def _drop(self, tags: Iterable[str]) -> Evaluation:
        keys = frozenset(key for tag in tags for key in self._keys.get(tag, ()))
        for key in keys:
            self.discard(key)
        return Evaluation(drop=keys)


class NoInvalidation(Policy):
    """Answers expire by their TTL only."""

    @override
    def put(self, evidence: DocumentEvidence) -> None:
        pass

    @override
    def discard(self, key: str) -> None:
        pass

    @override
    def evaluate(self, change: DocumentChange, statistics: Statistics) -> Evaluation:
        return Evaluation()


class CitedChunk(_Tagged, Policy):
    """A change invalidates the answers with one of its passages among their sources."""

    @override
    def put(self, evidence: DocumentEvidence) -> None:
        self._put(evidence.key, frozenset(chunk_id for chunk_id, _ in evidence.sources))

    @override
    def evaluate(self, change: DocumentChange, statistics: Statistics) -> Evaluation:
        return self._drop(change.removed.union(passage.chunk.chunk_id for passage in change.added))


class CitedDocument(_Tagged, Policy):
    """A change invalidates the answers with a passage of its documents among their sources."""

    @override
    def put(self, evidence: DocumentEvidence) -> None:
        self._put(evidence.key, evidence.documents)

    @override
    def evaluate(self, change: DocumentChange, statistics: Statistics) -> Evaluation:
        return self._drop(change.documents)


class Everything(_Tagged, Policy):
    """A change invalidates every answer."""

    @override
    def put(self, evidence: DocumentEvidence) -> None:
        self._put(evidence.key, frozenset(("",)))

    @override
    def evaluate(self, change: DocumentChange, statistics: Statistics) -> Evaluation:
        return self._drop(("",)) if change.removed or change.added else Evaluation()


SIMPLE: Final[dict[str, Callable[[], Policy]]] = {
    "none": NoInvalidation,
    "cited_chunk": CitedChunk,
    "cited_document": CitedDocument,
    "all": Everything,
}
"""The policies besides ``streams.core.invalidation.exact.Exact``, by their names on the command line."""
