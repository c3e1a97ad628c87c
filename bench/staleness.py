"""Cached answers of a policy, and their staleness. Pure, except for the clock that times evaluations.

An answer is *content-stale* if its sources differ from those of a new retrieval by a passage that was removed, or
added, since it was filled. Any other difference, also of order, is *rank drift*: term statistics have changed. An
invalidation is *needed* if a change makes the answer content-stale, and *correct* if the answer is.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from typing_extensions import override

from bench.policies import DocumentChange, DocumentEvidence, Policy
from streams.core.invalidation.evidence import Statistics

Source = tuple[str, int]
"""Chunk id and version."""


class EntryState(Enum):
    """State of a cached answer."""

    FRESH = auto()
    DRIFTED = auto()
    STALE = auto()


def state_of(cached: Sequence[Source], fresh: Sequence[Source], filled: int, born: Mapping[Source, int]) -> EntryState:
    """Compare a cached answer with a new retrieval.

    Args:
        cached: sources of the cached answer.
        fresh: sources of a new retrieval.
        filled: number of the change after which the answer was filled.
        born: live passage → number of the change that added it.
    """
    if tuple(cached) == tuple(fresh):
        return EntryState.FRESH
    removed = any(source not in born for source in cached)
    added = any(born[source] > filled for source in fresh if source not in cached)
    return EntryState.STALE if removed or added else EntryState.DRIFTED


@dataclass(frozen=True, slots=True)
class TruthSnapshot:
    """The ground truth after a change.

    Attributes:
        number: number of the change.
        fresh: question → sources of a new retrieval.
        evidence: returns the evidence of such a retrieval, with or without candidates, until the next change.
        born: live passage → number of the change that added it.
        frequencies: term of the questions → passages that contain it.
        document_count: number of passages.
        total_length: terms in all passages.
    """

    number: int
    fresh: Mapping[str, tuple[Source, ...]]
    evidence: Callable[[str, bool], DocumentEvidence]
    born: Mapping[Source, int]
    frequencies: Mapping[str, int]
    document_count: int
    total_length: int


@dataclass(slots=True)
class CachedEntry:
    """A cached answer.

    Attributes:
        sources: its sources.
        filled: number of the change after which it was retrieved.
        state: state after the last change.
    """

    sources: tuple[Source, ...]
    filled: int
    state: EntryState = EntryState.FRESH

    def compare(self, key: str, snapshot: TruthSnapshot) -> None:
        """Update the state."""
        self.state = state_of(self.sources, snapshot.fresh[key], self.filled, snapshot.born)


@dataclass(slots=True)
class PolicyEvaluator:
    """Applies a policy to changes, with the input that the last step of the stream provides.

    That includes the frequency of each term of the questions if it has changed since it was last provided. The index
    reports those of the terms of added passages; those of removed passages change when segments are merged, and
    searches use them from then on. The ground truth has no segments and changes both at once.

    Attributes:
        policy: the policy.
        uses_candidates: whether it uses candidates; the simple policies do not.
        rechecks: answers that had to be retrieved again.
        evaluated_ms: duration of each evaluation.
    """

    policy: Policy
    uses_candidates: bool
    rechecks: int = 0
    evaluated_ms: list[float] = field(default_factory=list)
    _provided: dict[str, int] = field(default_factory=dict)

    def put(self, evidence: DocumentEvidence) -> None:
        """A fill."""
        self.policy.put(evidence)
        # Provided again: the policy keeps frequencies only for the terms of its questions.
        for term in evidence.terms:
            self._provided.pop(term, None)

    def invalidated(
        self, change: DocumentChange, snapshot: TruthSnapshot, entries: Mapping[str, CachedEntry]
    ) -> set[str]:
        """Keys of the answers that a change invalidates. They have been removed from the policy."""
        changed = dict(snapshot.frequencies.items() - self._provided.items()) if self.uses_candidates else {}
        self._provided.update(changed)
        statistics_now = Statistics(snapshot.document_count, snapshot.total_length, changed)
        began_s = time.perf_counter()
        verdict = self.policy.evaluate(change, statistics_now)
        self.evaluated_ms.append((time.perf_counter() - began_s) * 1000)
        self.rechecks += len(verdict.recheck)
        drop = set(verdict.drop) | self._retrieve_again(verdict.recheck - verdict.drop, snapshot, entries)
        for key in drop:
            self.policy.discard(key)
        return drop

    def _retrieve_again(
        self, keys: Collection[str], snapshot: TruthSnapshot, entries: Mapping[str, CachedEntry]
    ) -> set[str]:
        """Retrieve again. Answers with the same sources stay, with new candidates; returns the keys of the others."""
        other = {key for key in keys if set(entries[key].sources) != set(snapshot.fresh[key])}
        for key in _without(keys, other):
            self.policy.put(snapshot.evidence(key, self.uses_candidates))
        return other


@dataclass(slots=True)
class OracleEvaluator(PolicyEvaluator):
    """Invalidates exactly the content-stale answers: the optimum of any policy."""

    @override
    def invalidated(
        self, change: DocumentChange, snapshot: TruthSnapshot, entries: Mapping[str, CachedEntry]
    ) -> set[str]:
        return {key for key, cached in entries.items() if cached.state is EntryState.STALE}


@dataclass(slots=True)
class SteadyStateCache:
    """One answer per question, replaced when invalidated, and compared with the ground truth after each change."""

    evaluator: PolicyEvaluator
    _entries: dict[str, CachedEntry] = field(default_factory=dict)
    _compared: int = 0
    _stale: int = 0
    _drifted: int = 0
    _invalidations: int = 0
    _correct_invalidations: int = 0
    _needed: int = 0
    _recalled: int = 0
    _replacements: int = 0

    def fill(self, key: str, snapshot: TruthSnapshot) -> None:
        """Store a new answer."""
        evidence = snapshot.evidence(key, self.evaluator.uses_candidates)
        self._entries[key] = CachedEntry(evidence.sources, snapshot.number)
        self.evaluator.put(evidence)

    def change(self, change: DocumentChange, snapshot: TruthSnapshot) -> None:
        """Evaluate a change, replace invalidated answers, and compare all answers with ``snapshot``."""
        newly_stale: set[str] = set()
        for key, cached in self._entries.items():
            before = cached.state
            cached.compare(key, snapshot)
            if cached.state is EntryState.STALE and before is not EntryState.STALE:
                newly_stale.add(key)
        invalidated = self.evaluator.invalidated(change, snapshot, self._entries)
        self._invalidations += len(invalidated)
        self._correct_invalidations += sum(self._entries[key].state is EntryState.STALE for key in invalidated)
        self._needed += len(newly_stale)
        self._recalled += len(newly_stale & invalidated)
        self._replacements += len(invalidated)
        for key in sorted(invalidated):
            self.fill(key, snapshot)
        self._compared += len(self._entries)
        self._stale += sum(cached.state is EntryState.STALE for cached in self._entries.values())
        self._drifted += sum(cached.state is EntryState.DRIFTED for cached in self._entries.values())

    def stale_rate(self) -> float:
        """Fraction of the answers that are content-stale."""
        return ratio(sum(cached.state is EntryState.STALE for cached in self._entries.values()), len(self._entries))

    def figures(self) -> dict[str, Any]:
        """Figures; a ratio without a denominator is null."""
        evaluated_ms = self.evaluator.evaluated_ms
        return {
            "content_stale_rate": ratio(self._stale, self._compared),
            "rank_drift_rate": ratio(self._drifted, self._compared),
            "compared": self._compared,
            "content_stale": self._stale,
            "invalidations": self._invalidations,
            "needed_invalidations": self._needed,
            "invalidations_per_needed": self._invalidations / self._needed if self._needed else None,
            "precision": self._correct_invalidations / self._invalidations if self._invalidations else None,
            "recall": self._recalled / self._needed if self._needed else None,
            "replacements": self._replacements,
            "rechecks": self.evaluator.rechecks,
            "evaluation_ms": {
                "median": round(statistics.median(evaluated_ms), 3) if evaluated_ms else None,
                "max": round(max(evaluated_ms), 3) if evaluated_ms else None,
            },
        }


def _without(keys: Iterable[str], others: Collection[str]) -> list[str]:
    return sorted(key for key in keys if key not in others)


def ratio(part: int, whole: int) -> float:
    """``part / whole``; 0 if both are 0."""
    return part / whole if whole else 0.0
