"""Cached answers under a policy, and what is wrong with them. Pure, but for the clock that times a judgement.

An answer is *content-stale* if its sources differ from a fresh retrieval's by a passage that was removed, or added,
since it was filled. Any other difference, of order too, is *rank drift*: term statistics moved. A drop is *needed* when
a change makes an answer content-stale; it is right if the answer is.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from streams.core.invalidation.evidence import Change, Evidence, Statistics
from streams.core.invalidation.policy import Policy

Source = tuple[str, int]
"""Chunk id and version."""


class State(Enum):
    """What a cached answer is worth."""

    TRUE = auto()
    DRIFTED = auto()
    STALE = auto()


def state_of(cached: Sequence[Source], fresh: Sequence[Source], filled: int, born: Mapping[Source, int]) -> State:
    """Compare a cached answer with a fresh one.

    Args:
        cached: sources of the cached answer.
        fresh: sources that a retrieval finds now.
        filled: number of the change after which the answer was filled.
        born: passage that is there → number of the change that it came with.
    """
    if tuple(cached) == tuple(fresh):
        return State.TRUE
    removed = any(source not in born for source in cached)
    added = any(born[source] > filled for source in fresh if source not in cached)
    return State.STALE if removed or added else State.DRIFTED


@dataclass(frozen=True, slots=True)
class Moment:
    """The truth after a change.

    Attributes:
        number: of the change.
        fresh: sources that a retrieval finds, by the key of the question.
        evidence: makes the evidence of such a retrieval.
        born: passage that is there → number of the change that it came with.
        frequencies: term of the questions → passages that hold it.
        document_count: passages.
        total_length: terms in all of them.
    """

    number: int
    fresh: Mapping[str, tuple[Source, ...]]
    evidence: Callable[[str], Evidence]
    born: Mapping[Source, int]
    frequencies: Mapping[str, int]
    document_count: int
    total_length: int


@dataclass(slots=True)
class _Cached:
    sources: tuple[Source, ...]
    filled: int
    state: State = State.TRUE


@dataclass(slots=True)
class Answers:
    """Answers that a policy keeps, and what it made of them.

    Attributes:
        policy: judges them; what it must be told of statistics is what the last step of the stream tells it.
        refills_at_once: fill what is dropped again, so that every answer is compared after every change.
    """

    policy: Policy
    refills_at_once: bool
    _kept: dict[str, _Cached] = field(default_factory=dict)
    _vocabulary: set[str] = field(default_factory=set)
    _new_terms: set[str] = field(default_factory=set)
    _compared: int = 0
    _stale: int = 0
    _drifted: int = 0
    _drops: int = 0
    _right_drops: int = 0
    _needed: int = 0
    _met: int = 0
    _refills: int = 0
    _rechecks: int = 0
    _judged_ms: list[float] = field(default_factory=list)
    _asked: int = 0
    _hits: int = 0
    _stale_hits: int = 0

    def fill(self, evidence: Evidence, number: int) -> None:
        """Keep a fresh answer, filled after change ``number``."""
        self._new_terms |= evidence.terms.keys() - self._vocabulary
        self._vocabulary |= evidence.terms.keys()
        self._kept[evidence.key] = _Cached(evidence.sources, number)
        self.policy.put(evidence)

    def ask(self, key: str, moment: Moment) -> None:
        """Serve a question: from what is kept, or else filled now."""
        self._asked += 1
        cached = self._kept.get(key)
        if cached is None:
            self.fill(moment.evidence(key), moment.number)
            return
        self._hits += 1
        self._stale_hits += cached.state is State.STALE

    def change(self, change: Change, moment: Moment) -> None:
        """Judge by a change, drop and refill, and compare every answer with the truth of ``moment``."""
        newly: set[str] = set()
        for key, cached in self._kept.items():
            before = cached.state
            cached.state = state_of(cached.sources, moment.fresh[key], cached.filled, moment.born)
            if cached.state is State.STALE and before is not State.STALE:
                newly.add(key)
        dropped = self._judge(change, moment)
        self._drops += len(dropped)
        self._right_drops += sum(self._kept[key].state is State.STALE for key in dropped)
        self._needed += len(newly)
        self._met += len(newly & dropped)
        for key in dropped:
            del self._kept[key]
            self.policy.discard(key)
        if self.refills_at_once:
            self._refills += len(dropped)
            for key in sorted(dropped):
                self.fill(moment.evidence(key), moment.number)
        self._compared += len(self._kept)
        self._stale += sum(cached.state is State.STALE for cached in self._kept.values())
        self._drifted += sum(cached.state is State.DRIFTED for cached in self._kept.values())

    def stale_now(self) -> float:
        """Share of the kept answers that are content-stale."""
        return _share(sum(cached.state is State.STALE for cached in self._kept.values()), len(self._kept))

    def at_rest(self) -> dict[str, Any]:
        """Figures of the comparisons; a share without anything to share is null."""
        return {
            "content_stale_share": _share(self._stale, self._compared),
            "rank_drift_share": _share(self._drifted, self._compared),
            "compared": self._compared,
            "drops": self._drops,
            "needed": self._needed,
            "drops_per_needed": self._drops / self._needed if self._needed else None,
            "precision": self._right_drops / self._drops if self._drops else None,
            "recall": self._met / self._needed if self._needed else None,
            "refills": self._refills,
            "rechecks": self._rechecks,
            "evaluation_ms": {
                "median": round(statistics.median(self._judged_ms), 3) if self._judged_ms else None,
                "max": round(max(self._judged_ms), 3) if self._judged_ms else None,
            },
        }

    def in_traffic(self) -> dict[str, Any]:
        """Figures of what was asked."""
        return {
            "requests": self._asked,
            "hit_share": _share(self._hits, self._asked),
            "served_past_objective": self._stale_hits,
        }

    def _judge(self, change: Change, moment: Moment) -> set[str]:
        added = {term for passage in change.added for term in passage.terms.frequencies}
        named = self._new_terms | (added & self._vocabulary)
        self._new_terms = set()
        told = Statistics(
            moment.document_count, moment.total_length, {term: moment.frequencies[term] for term in named}
        )
        began_s = time.perf_counter()
        verdict = self.policy.judge(change, told)
        self._judged_ms.append((time.perf_counter() - began_s) * 1000)
        self._rechecks += len(verdict.recheck)
        return set(verdict.drop) | self._recheck(verdict.recheck - verdict.drop, moment)

    def _recheck(self, keys: Collection[str], moment: Moment) -> set[str]:
        """Retrieve again: the same sources stay, with the windows of now; of the others, the keys."""
        other = {key for key in keys if set(self._kept[key].sources) != set(moment.fresh[key])}
        for key in _without(keys, other):
            self.policy.put(moment.evidence(key))
        return other


def _without(keys: Iterable[str], others: Collection[str]) -> list[str]:
    return sorted(key for key in keys if key not in others)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
