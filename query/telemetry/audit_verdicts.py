"""What a second look at a cached answer says of it. Pure: times and readings are arguments.

The fresh sources differ from the served ones for three reasons, which the stream's positions tell apart:

- passages that have not changed since the fill rank otherwise: *drift*;
- a change beyond the answer's positions came or took away a passage: *newer*, which the answer does not promise;
- a change that its positions claim came or took away a passage: a *violation*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from schemas.positions import Position

Source = tuple[str, int]
"""Chunk id, and the version of the document that wrote it."""


class Verdict(StrEnum):
    """What an audited answer was."""

    SAME = "same"
    DRIFT = "drift"
    NEWER = "newer"
    VIOLATION = "violation"
    GONE = "gone"
    """Dropped, ended or filled anew before it was looked at."""


@dataclass(frozen=True, slots=True)
class Altered:
    """A passage that was written, or is no longer there, and so makes the sources differ.

    Attributes:
        source: the passage.
        document_id: of its document.
        added: False where it is gone.
        position: of the change; None where nothing tells of one.
        searchable_ms: epoch milliseconds at which the change was seen to be searchable; None where that is not known.
    """

    source: Source
    document_id: str
    added: bool
    position: Position | None
    searchable_ms: float | None


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict.

    Attributes:
        verdict: see there.
        because: the changes that decided it.
        stale_ms: for how long the oldest of them had been searchable when the answer was served; None where there is
            none, where it is not known, and where it became searchable only afterwards.
    """

    verdict: Verdict
    because: tuple[Altered, ...] = ()
    stale_ms: float | None = None


_WORST_FIRST: Final = (Verdict.VIOLATION, Verdict.NEWER)


def difference(served: Sequence[Source], fresh: Sequence[Source]) -> tuple[list[Source], list[Source]]:
    """Sources that only the served answer has, and those that only the fresh one has, each in its order."""
    return [one for one in served if one not in fresh], [one for one in fresh if one not in served]


def judged(
    served: Sequence[Source],
    fresh: Sequence[Source],
    altered: Sequence[Altered],
    *,
    as_of: Mapping[int, int],
    filled_at: Mapping[int, int],
    served_ms: float,
) -> Finding:
    """What the difference says.

    Args:
        served: sources of the answer, best first.
        fresh: sources that a retrieval finds now.
        altered: of the differing passages, those added, and those gone. One that is still there and lost its place is
            none of them.
        as_of: partition → offset that the answer was served with.
        filled_at: partition → offset known to be reflected when it was filled.
        served_ms: when it was served, epoch milliseconds.
    """
    if tuple(served) == tuple(fresh):
        return Finding(Verdict.SAME)
    verdicts = [(_verdict(one, as_of, filled_at), one) for one in altered]
    for verdict in _WORST_FIRST:
        because = tuple(one for its_verdict, one in verdicts if its_verdict is verdict)
        if because:
            return Finding(verdict, because, stale_ms([one.searchable_ms for one in because], served_ms))
    return Finding(Verdict.DRIFT)


def stale_ms(searchable_ms: Sequence[float | None], served_ms: float) -> float | None:
    """How long before the answer was served the first of these moments was; None where none was, or none is known."""
    known = [at_ms for at_ms in searchable_ms if at_ms is not None and at_ms < served_ms]
    return served_ms - min(known) if known else None


def _verdict(one: Altered, as_of: Mapping[int, int], filled_at: Mapping[int, int]) -> Verdict:
    if one.position is None:
        return Verdict.VIOLATION
    partition, offset = one.position
    if offset > as_of.get(partition, -1):
        return Verdict.NEWER
    # What stood at the fill and was not among the best then has not come: it ranks otherwise.
    stood = one.added and offset <= filled_at.get(partition, -1)
    return Verdict.DRIFT if stood else Verdict.VIOLATION
