"""Questions asked of a cache while documents change, on a clock of its own: who is served what, and how old it is.

A change becomes *searchable* at an instant of this clock. From then on fresh retrievals find it, and some answers are
content-stale. What a policy makes of the change takes effect ``drop_after_s`` later. A question that is cached is
served at once; another is retrieved, as things are when it is asked, and its answer is stored ``fill_s`` later, unless
a change was judged in between: then it is served and not stored, as an installation's fill finds out by the epoch.
Stored answers end ``ttl_s`` after they were stored, whatever their policy.

A hit is *served past the objective* if its answer has been content-stale for longer than ``objective_s``, counted from
the instant at which the change that made it so became searchable. A stale hit before that is within the objective.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.staleness import Cached, Judge, Moment, State, share
from streams.core.invalidation.evidence import Change, Evidence


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast everything goes, in seconds.

    Attributes:
        change_every_s: from one searchable change to the next.
        drop_after_s: from a change being searchable to the last copy of what it drops being gone.
        fill_s: from a retrieval to its answer being stored.
        ttl_s: life of a stored answer.
        objective_s: a change is in what is served so long after it became searchable.
    """

    change_every_s: float = 1.0
    drop_after_s: float = 0.1
    fill_s: float = 0.01
    ttl_s: float = 300.0
    objective_s: float = 1.0


@dataclass(slots=True)
class _Stored:
    answer: Cached
    stored_s: float
    stale_since_s: float | None = None


@dataclass(slots=True)
class Traffic:
    """A cache that is empty at first. Times never go back."""

    judge: Judge
    pace: Pace
    _stored: dict[str, _Stored] = field(default_factory=dict)
    _filling: set[str] = field(default_factory=set)
    _due: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    _planned: int = 0
    _judged: int = 0
    _moment: Moment | None = None
    _searchable_s: float = 0.0
    _asked: int = 0
    _hits: int = 0
    _stale_within: int = 0
    _stale_past: int = 0

    def begin(self, moment: Moment) -> None:
        """Start with what is searchable."""
        self._moment = moment

    def change(self, change: Change, moment: Moment, at_s: float) -> None:
        """A change becomes searchable."""
        self.until(at_s)
        self._moment, self._searchable_s = moment, at_s
        for key, stored in self._stored.items():
            self._compare(key, stored, moment)
        self._plan(at_s + self.pace.drop_after_s, lambda _: self._drop(change))

    def ask(self, key: str, at_s: float) -> None:
        """A question is asked."""
        self.until(at_s)
        self._asked += 1
        stored = self._stored.get(key)
        if stored is not None and at_s - stored.stored_s >= self.pace.ttl_s:
            del self._stored[key]
            self.judge.policy.discard(key)
            stored = None
        if stored is None:
            self._fill(key, at_s)
            return
        self._hits += 1
        if stored.stale_since_s is not None:
            past = at_s - stored.stale_since_s > self.pace.objective_s
            self._stale_past += past
            self._stale_within += not past

    def until(self, until_s: float) -> None:
        """Do whatever is due by then, in order; before a change, while its predecessor's moment lasts."""
        while self._due and self._due[0][0] <= until_s:
            due_s, _, what = heapq.heappop(self._due)
            what(due_s)

    def figures(self) -> dict[str, Any]:
        """Of what was asked."""
        return {
            "requests": self._asked,
            "hit_share": share(self._hits, self._asked),
            "served_past_objective": self._stale_past,
            "served_stale_within_objective": self._stale_within,
        }

    def _fill(self, key: str, at_s: float) -> None:
        if key in self._filling:  # one flight for each question: this one waits for the other's answer
            return
        if self._moment is None:
            raise RuntimeError("asked before it began")
        evidence, number, judged = self._moment.evidence(key, self.judge.windows), self._moment.number, self._judged
        self._filling.add(key)
        self._plan(at_s + self.pace.fill_s, lambda stored_s: self._store(evidence, number, judged, stored_s))

    def _store(self, evidence: Evidence, number: int, judged: int, at_s: float) -> None:
        self._filling.discard(evidence.key)
        if judged != self._judged:
            return
        stored = self._stored[evidence.key] = _Stored(Cached(evidence.sources, number), at_s)
        self.judge.put(evidence)
        if self._moment is not None:
            self._compare(evidence.key, stored, self._moment)

    def _drop(self, change: Change) -> None:
        self._judged += 1
        if self._moment is not None:
            kept = {key: stored.answer for key, stored in self._stored.items()}
            for key in self.judge.dropped(change, self._moment, kept):
                del self._stored[key]

    def _compare(self, key: str, stored: _Stored, moment: Moment) -> None:
        stored.answer.compare(key, moment)
        if stored.answer.state is not State.STALE:
            stored.stale_since_s = None
        elif stored.stale_since_s is None:
            stored.stale_since_s = self._searchable_s

    def _plan(self, due_s: float, what: Callable[[float], None]) -> None:
        self._planned += 1
        heapq.heappush(self._due, (due_s, self._planned, what))
