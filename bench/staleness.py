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
        evidence: makes the evidence of such a retrieval, while this moment lasts; with both windows, or without.
        born: passage that is there → number of the change that it came with.
        frequencies: term of the questions → passages that hold it.
        document_count: passages.
        total_length: terms in all of them.
    """

    number: int
    fresh: Mapping[str, tuple[Source, ...]]
    evidence: Callable[[str, bool], Evidence]
    born: Mapping[Source, int]
    frequencies: Mapping[str, int]
    document_count: int
    total_length: int


@dataclass(slots=True)
class Cached:
    """An answer that is kept.

    Attributes:
        sources: that it was made of.
        filled: number of the change after which it was retrieved.
        state: as of the last change.
    """

    sources: tuple[Source, ...]
    filled: int
    state: State = State.TRUE

    def compare(self, key: str, moment: Moment) -> None:
        """Bring the state up to date."""
        self.state = state_of(self.sources, moment.fresh[key], self.filled, moment.born)


@dataclass(slots=True)
class Judge:
    """A policy, told what the last step of the stream would tell it.

    Of the statistics that is the frequency of every term of the questions that has another than when it was last told.
    An index says them of the terms of what was added; those of what was removed it changes later, when it merges
    segments, and then its searches score by them too. The truth knows of no segments and changes both at once.

    Attributes:
        policy: decides.
        windows: whether it looks at windows; the simple ones do not, so that none need be made.
        rechecks: answers that had to be retrieved again to tell.
        judged_ms: of each judgement.
    """

    policy: Policy
    windows: bool
    rechecks: int = 0
    judged_ms: list[float] = field(default_factory=list)
    _told: dict[str, int] = field(default_factory=dict)

    def put(self, evidence: Evidence) -> None:
        """Tell of a fill."""
        self.policy.put(evidence)
        # A term is told of again when a question with it comes, for the policy knew of it only with that question.
        for term in evidence.terms:
            self._told.pop(term, None)

    def dropped(self, change: Change, moment: Moment, kept: Mapping[str, Cached]) -> set[str]:
        """Keys of the answers that are to be dropped; they have left the policy."""
        other = dict(moment.frequencies.items() - self._told.items()) if self.windows else {}
        self._told.update(other)
        told = Statistics(moment.document_count, moment.total_length, other)
        began_s = time.perf_counter()
        verdict = self.policy.judge(change, told)
        self.judged_ms.append((time.perf_counter() - began_s) * 1000)
        self.rechecks += len(verdict.recheck)
        drop = set(verdict.drop) | self._other(verdict.recheck - verdict.drop, moment, kept)
        for key in drop:
            self.policy.discard(key)
        return drop

    def _other(self, keys: Collection[str], moment: Moment, kept: Mapping[str, Cached]) -> set[str]:
        """Retrieve again: the same sources stay, with the windows of now; of the others, the keys."""
        other = {key for key in keys if set(kept[key].sources) != set(moment.fresh[key])}
        for key in _without(keys, other):
            self.policy.put(moment.evidence(key, self.windows))
        return other


@dataclass(slots=True)
class Oracle(Judge):
    """Drops what has become content-stale and nothing else: what no policy can be better than."""

    def dropped(self, _change: Change, _moment: Moment, kept: Mapping[str, Cached]) -> set[str]:
        """See ``Judge``."""
        return {key for key, cached in kept.items() if cached.state is State.STALE}


@dataclass(slots=True)
class Answers:
    """One answer to each question, filled again when it is dropped, and compared with the truth after each change."""

    judge: Judge
    _kept: dict[str, Cached] = field(default_factory=dict)
    _compared: int = 0
    _stale: int = 0
    _drifted: int = 0
    _drops: int = 0
    _right_drops: int = 0
    _needed: int = 0
    _met: int = 0
    _refills: int = 0

    def fill(self, key: str, moment: Moment) -> None:
        """Keep a fresh answer."""
        evidence = moment.evidence(key, self.judge.windows)
        self._kept[key] = Cached(evidence.sources, moment.number)
        self.judge.put(evidence)

    def change(self, change: Change, moment: Moment) -> None:
        """Judge by a change, drop and refill, and compare every answer with the truth of ``moment``."""
        newly: set[str] = set()
        for key, cached in self._kept.items():
            before = cached.state
            cached.compare(key, moment)
            if cached.state is State.STALE and before is not State.STALE:
                newly.add(key)
        dropped = self.judge.dropped(change, moment, self._kept)
        self._drops += len(dropped)
        self._right_drops += sum(self._kept[key].state is State.STALE for key in dropped)
        self._needed += len(newly)
        self._met += len(newly & dropped)
        self._refills += len(dropped)
        for key in sorted(dropped):
            self.fill(key, moment)
        self._compared += len(self._kept)
        self._stale += sum(cached.state is State.STALE for cached in self._kept.values())
        self._drifted += sum(cached.state is State.DRIFTED for cached in self._kept.values())

    def stale_share(self) -> float:
        """Share of the kept answers that are content-stale now."""
        return share(sum(cached.state is State.STALE for cached in self._kept.values()), len(self._kept))

    def figures(self) -> dict[str, Any]:
        """Of the comparisons; a share without anything to share is null."""
        judged_ms = self.judge.judged_ms
        return {
            "content_stale_share": share(self._stale, self._compared),
            "rank_drift_share": share(self._drifted, self._compared),
            "compared": self._compared,
            "content_stale": self._stale,
            "drops": self._drops,
            "needed": self._needed,
            "drops_per_needed": self._drops / self._needed if self._needed else None,
            "precision": self._right_drops / self._drops if self._drops else None,
            "recall": self._met / self._needed if self._needed else None,
            "refills": self._refills,
            "rechecks": self.judge.rechecks,
            "evaluation_ms": {
                "median": round(statistics.median(judged_ms), 3) if judged_ms else None,
                "max": round(max(judged_ms), 3) if judged_ms else None,
            },
        }


def _without(keys: Iterable[str], others: Collection[str]) -> list[str]:
    return sorted(key for key in keys if key not in others)


def share(part: int, whole: int) -> float:
    """Part of a whole; 0 of nothing."""
    return part / whole if whole else 0.0
