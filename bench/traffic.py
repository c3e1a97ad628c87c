"""Simulated traffic on a cache while documents change: which answers are served, and how stale they are.

Time is simulated. A change becomes *searchable* at an instant; from then on new retrievals reflect it, and some answers
are content-stale. Its invalidations take effect ``invalidation_delay_s`` later. A cached answer is served immediately.
Otherwise the question is retrieved at that instant, and the answer is stored ``fill_s`` later, unless a change was
evaluated in between: then it is served but not stored, as when a fill loses the epoch race. Entries expire ``ttl_s``
after they were stored, whatever the policy.

A hit is an *SLO violation* if its answer has been content-stale for more than ``objective_s``, counted from when the
change that made it stale became searchable.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.policies import DocumentChange, DocumentEvidence
from bench.staleness import CachedEntry, EntryState, PolicyEvaluator, TruthSnapshot, ratio


@dataclass(frozen=True, slots=True)
class SimulationTiming:
    """Durations, in seconds.

    Attributes:
        change_every_s: interval between changes.
        invalidation_delay_s: from a change becoming searchable to the removal of the last copy of an invalidated
            answer.
        fill_s: from a retrieval to the storage of its answer.
        ttl_s: TTL of a stored answer.
        objective_s: freshness objective.
    """

    change_every_s: float = 1.0
    invalidation_delay_s: float = 0.1
    fill_s: float = 0.01
    ttl_s: float = 300.0
    objective_s: float = 1.0


@dataclass(slots=True)
class _Stored:
    answer: CachedEntry
    stored_s: float
    stale_since_s: float | None = None


@dataclass(slots=True)
class SimulatedTraffic:
    """An initially empty cache. Times must not decrease."""

    evaluator: PolicyEvaluator
    timing: SimulationTiming
    _stored: dict[str, _Stored] = field(default_factory=dict)
    _filling: set[str] = field(default_factory=set)
    _due: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _planned: int = 0
    _evaluated: int = 0
    _snapshot: TruthSnapshot | None = None
    _searchable_s: float = 0.0
    _asked: int = 0
    _hits: int = 0
    _stale_within: int = 0
    _slo_violations: int = 0

    def begin(self, snapshot: TruthSnapshot) -> None:
        """Start with this ground truth."""
        self._snapshot = snapshot

    def change(self, change: DocumentChange, snapshot: TruthSnapshot, at_s: float) -> None:
        """A change becomes searchable."""
        self.until(at_s)
        self._snapshot, self._searchable_s = snapshot, at_s
        for key, stored in self._stored.items():
            self._compare(key, stored, snapshot)
        self._plan(at_s + self.timing.invalidation_delay_s, lambda _: self._invalidate(change))

    def ask(self, key: str, at_s: float) -> None:
        """Ask a question."""
        self.until(at_s)
        self._asked += 1
        stored = self._stored.get(key)
        if stored is not None and at_s - stored.stored_s >= self.timing.ttl_s:
            del self._stored[key]
            self.evaluator.policy.discard(key)
            stored = None
        if stored is None:
            self._fill(key, at_s)
            return
        self._hits += 1
        if stored.stale_since_s is not None:
            violated = at_s - stored.stale_since_s > self.timing.objective_s
            self._slo_violations += violated
            self._stale_within += not violated

    def until(self, until_s: float) -> None:
        """Run everything due by ``until_s``, in order. Call before a change, while the previous snapshot is valid."""
        while self._due and self._due[0][0] <= until_s:
            due_s, _, action = heapq.heappop(self._due)
            action(due_s)

    def figures(self) -> dict[str, Any]:
        """Figures of the requests."""
        return {
            "requests": self._asked,
            "hit_rate": ratio(self._hits, self._asked),
            "slo_violations": self._slo_violations,
            "stale_within_slo": self._stale_within,
        }

    def _fill(self, key: str, at_s: float) -> None:
        if key in self._filling:  # single flight: the question waits for the pending answer
            return
        if self._snapshot is None:
            raise RuntimeError("begin() was not called")
        evidence, number, evaluated = (
            self._snapshot.evidence(key, self.evaluator.uses_candidates),
            self._snapshot.number,
            self._evaluated,
        )
        self._filling.add(key)
        self._plan(at_s + self.timing.fill_s, lambda stored_s: self._store(evidence, number, evaluated, stored_s))

    def _store(self, evidence: DocumentEvidence, number: int, evaluated: int, at_s: float) -> None:
        self._filling.discard(evidence.key)
        if evaluated != self._evaluated:
            return
        stored = self._stored[evidence.key] = _Stored(CachedEntry(evidence.sources, number), at_s)
        self.evaluator.put(evidence)
        if self._snapshot is not None:
            self._compare(evidence.key, stored, self._snapshot)

    def _invalidate(self, change: DocumentChange) -> None:
        self._evaluated += 1
        if self._snapshot is not None:
            entries = {key: stored.answer for key, stored in self._stored.items()}
            for key in self.evaluator.invalidated(change, self._snapshot, entries):
                del self._stored[key]

    def _compare(self, key: str, stored: _Stored, snapshot: TruthSnapshot) -> None:
        stored.answer.compare(key, snapshot)
        if stored.answer.state is not EntryState.STALE:
            stored.stale_since_s = None
        elif stored.stale_since_s is None:
            stored.stale_since_s = self._searchable_s

    def _plan(self, due_s: float, action: Callable[[float], None]) -> None:
        self._planned += 1
        heapq.heappush(self._due, (due_s, self._planned, action))
