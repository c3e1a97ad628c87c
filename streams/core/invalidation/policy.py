"""What every way of invalidating does, and the four simple ones that exact invalidation is measured against."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from streams.core.invalidation.evidence import Change, Evidence, Statistics


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a change means for the answers.

    Attributes:
        drop: keys of answers that it alters, or may alter; they have left the policy's store.
        recheck: keys whose windows are too short to tell: retrieve again and ``put``, or drop and ``discard``.
    """

    drop: frozenset[str] = frozenset()
    recheck: frozenset[str] = frozenset()


class Policy(Protocol):
    """A store of answers' evidence and a rule by which changes drop them."""

    def put(self, evidence: Evidence) -> None:
        """Keep an answer, in the place of an earlier one of its key."""
        ...

    def discard(self, key: str) -> None:
        """Forget an answer, if it is there."""
        ...

    def judge(self, change: Change, statistics: Statistics) -> Verdict:
        """Which answers a change alters. ``statistics`` are those that a search of this moment would use."""
        ...


class _Marked:
    """Answers found by marks that they share with a change."""

    def __init__(self) -> None:
        self._marks: dict[str, frozenset[str]] = {}
        self._keys: dict[str, set[str]] = {}

    def discard(self, key: str) -> None:
        for mark in self._marks.pop(key, ()):
            self._keys[mark].discard(key)

    def _mark(self, key: str, marks: frozenset[str]) -> None:
        self.discard(key)
        self._marks[key] = marks
        for mark in marks:
            self._keys.setdefault(mark, set()).add(key)

    def _drop(self, marks: Iterable[str]) -> Verdict:
        keys = frozenset(key for mark in marks for key in self._keys.get(mark, ()))
        for key in keys:
            self.discard(key)
        return Verdict(drop=keys)


class Nothing:
    """Answers end with their time alone."""

    def put(self, evidence: Evidence) -> None:
        """See ``Policy``."""

    def discard(self, key: str) -> None:
        """See ``Policy``."""

    def judge(self, _change: Change, _statistics: Statistics) -> Verdict:
        """See ``Policy``."""
        return Verdict()


class CitedChunk(_Marked):
    """A change drops the answers that have a passage of it among their sources."""

    def put(self, evidence: Evidence) -> None:
        """See ``Policy``."""
        self._mark(evidence.key, frozenset(chunk_id for chunk_id, _ in evidence.sources))

    def judge(self, change: Change, _statistics: Statistics) -> Verdict:
        """See ``Policy``."""
        return self._drop(change.removed.union(passage.chunk.chunk_id for passage in change.added))


class CitedDocument(_Marked):
    """A change drops the answers that have a passage of its document among their sources."""

    def put(self, evidence: Evidence) -> None:
        """See ``Policy``."""
        self._mark(evidence.key, evidence.documents)

    def judge(self, change: Change, _statistics: Statistics) -> Verdict:
        """See ``Policy``."""
        return self._drop(change.documents)


class Everything(_Marked):
    """A change drops every answer."""

    def put(self, evidence: Evidence) -> None:
        """See ``Policy``."""
        self._mark(evidence.key, frozenset(("",)))

    def judge(self, change: Change, _statistics: Statistics) -> Verdict:
        """See ``Policy``."""
        return self._drop(("",)) if change.removed or change.added else Verdict()


SIMPLE: Final[dict[str, Callable[[], Policy]]] = {
    "none": Nothing,
    "cited_chunk": CitedChunk,
    "cited_document": CitedDocument,
    "all": Everything,
}
"""The policies besides ``streams.core.invalidation.exact.Exact``, by the names that the benchmark gives them."""
