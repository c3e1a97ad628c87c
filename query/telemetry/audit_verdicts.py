"""Evaluation of an audited answer. Pure: times and retrieved sources are arguments.

Stream positions separate the three reasons for which fresh sources differ from the served ones:

- *drift*: passages that have not changed since the fill rank differently;
- *newer*: a change after the answer's positions added or removed a passage. The answer does not promise it;
- *violation*: a change that the answer's positions cover added or removed a passage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.positions import Position

Source = tuple[str, int]
"""Chunk id, and the version of the document that wrote it."""


class AuditVerdict(StrEnum):
    """Result of an audit; see the module."""

    SAME = "same"
    DRIFT = "drift"
    NEWER = "newer"
    VIOLATION = "violation"
    GONE = "gone"
    """Invalidated, expired or replaced before the audit."""


@dataclass(frozen=True, slots=True)
class SourceChange:
    """A passage that was added or removed, so that fresh and served sources differ.

    Attributes:
        source: the passage.
        document_id: its document.
        added: False if it was removed.
        position: position of the change; None if unknown.
        searchable_ms: epoch milliseconds at which the change was observed to be searchable; None if unknown.
    """

    source: Source
    document_id: str
    added: bool
    position: Position | None
    searchable_ms: float | None


@dataclass(frozen=True, slots=True)
class AuditResult:
    """Verdict and evidence.

    Attributes:
        verdict: result of the audit.
        changes: changes that led to the verdict.
        staleness_ms: how long the oldest of these changes had been searchable when the answer was served; None if there
            is no such change, its time is unknown, or it became searchable later.
    """

    verdict: AuditVerdict
    changes: tuple[SourceChange, ...] = ()
    staleness_ms: float | None = None


_WORST_FIRST: Final = (AuditVerdict.VIOLATION, AuditVerdict.NEWER)


def difference(served: Sequence[Source], fresh: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """Sources missing from ``fresh``, and sources missing from ``served``, each in its original order."""
    return [source for source in served if source not in fresh], [source for source in fresh if source not in served]


def evaluate(
    served: Sequence[Source],
    fresh: Sequence[Source],
    changes: Sequence[SourceChange],
    *,
    as_of: Mapping[int, int],
    filled_at: Mapping[int, int],
    served_ms: float,
) -> AuditResult:
    """Evaluate the difference between served and fresh sources.

    Args:
        served: sources of the answer, best first.
        fresh: sources of a new retrieval, best first.
        changes: added and removed passages among the differing sources. Excludes passages that exist unchanged and only
            rank lower.
        as_of: partition → offset that the answer was served with.
        filled_at: partition → offset that the answer reflected when it was filled.
        served_ms: epoch milliseconds at which it was served.
    """
    if tuple(served) == tuple(fresh):
        return AuditResult(AuditVerdict.SAME)
    verdicts = [(_verdict(change, as_of, filled_at), change) for change in changes]
    for worst in _WORST_FIRST:
        causes = tuple(change for verdict, change in verdicts if verdict is worst)
        if causes:
            return AuditResult(worst, causes, staleness_ms([change.searchable_ms for change in causes], served_ms))
    return AuditResult(AuditVerdict.DRIFT)


def staleness_ms(searchable_ms: Sequence[float | None], served_ms: float) -> float | None:
    """Time from the earliest of ``searchable_ms`` to ``served_ms``; None if none is known to precede it."""
    earlier_ms = [at_ms for at_ms in searchable_ms if at_ms is not None and at_ms < served_ms]
    return served_ms - min(earlier_ms) if earlier_ms else None


def _verdict(change: SourceChange, as_of: Mapping[int, int], filled_at: Mapping[int, int]) -> AuditVerdict:
    if change.position is None:
        return AuditVerdict.VIOLATION
    partition, offset = change.position
    if offset > as_of.get(partition, -1):
        return AuditVerdict.NEWER
    # A passage that existed at the fill, and was not among the best then, was not added since: its rank drifted.
    existed = change.added and offset <= filled_at.get(partition, -1)
    return AuditVerdict.DRIFT if existed else AuditVerdict.VIOLATION
