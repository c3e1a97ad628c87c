"""One sweep over all answers that a change touches, compiled: each is looked at once, all that meets it at that time.

First it is noted which passages may leave or enter which windows (*touches*). Then these are put in the order of rows,
so that a row is brought to the processor once, changed, and judged while it is there.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import (
    NOBODY,
    Answered,
    Flags,
    Floats,
    Fusion,
    Groups,
    Ints,
    Leavers,
    LexicalLeg,
    Newcomers,
    Scratch,
    VectorLeg,
    above,
    cites,
    compiled,
    enter_lexical,
    enter_vector,
    leave_lexical,
    leave_vector,
    lexical_score,
    place_of,
    product,
    score_lexical,
)
from streams.core.invalidation.verdicts import DROP, WATCH, Verdicts, judge_row

_LEAVES_VECTOR: Final = 0
_LEAVES_LEXICAL: Final = 1
_ENTERS_VECTOR: Final = 2
_ENTERS_LEXICAL: Final = 3
_KINDS: Final = 4

IN_VECTOR: Final = _ENTERS_VECTOR
IN_LEXICAL: Final = _ENTERS_LEXICAL
"""Legs that a passage may enter."""

_ROUNDING: Final = np.float32(1e-5)
"""Share by which sums of the same numbers in another order may differ, with room to spare."""

DOUBT: Final = 2e-6
"""The index adds up the products of two vectors in an order of its own, so of two scores that differ by less than this
either may be the higher. A newcomer's is raised by it: where it cannot be told whether it comes first, it does."""


class Touches(NamedTuple):
    """What may happen to rows.

    Attributes:
        rows: to which.
        codes: what: ``_KINDS`` times the place of the passage among those that leave, or enter, plus how.
        scores: of those that enter.
    """

    rows: Ints
    codes: Ints
    scores: Floats


@compiled
def find_leavers(gone: Leavers, touches: Touches) -> int:
    """Note all leaves; ``touches`` has room. How many there are."""
    count = 0
    for at in range(len(gone.numbers)):
        for row in gone.by_vector.members[gone.by_vector.bounds[at] : gone.by_vector.bounds[at + 1]]:
            touches.rows[count], touches.codes[count] = row, at * _KINDS + _LEAVES_VECTOR
            count += 1
        for row in gone.by_terms.members[gone.by_terms.bounds[at] : gone.by_terms.bounds[at + 1]]:
            touches.rows[count], touches.codes[count] = row, at * _KINDS + _LEAVES_LEXICAL
            count += 1
    return count


@compiled
def find_by_vector(
    leg: VectorLeg, answered: Answered, first: int, end: int, new: Newcomers, touches: Touches, count: int
) -> int:
    """Note which passages score more than the floors of rows, from the first up to the end.

    Args:
        leg: vector windows.
        answered: whose they are.
        first: row.
        end: row after the last.
        new: the passages.
        touches: has room for each of them in each row.
        count: how many it has.

    Returns:
        How many it has now.
    """
    for row in range(first, end):
        for at in range(len(new.numbers)):
            own = (1 + product(answered.questions[row], new.vectors[at])) / 2
            score = own + DOUBT
            if score > leg.floors[row] and new.allowed[at, answered.readers[row]]:
                for place in range(leg.ids.shape[1]):
                    if leg.ids[row, place] == new.numbers[at] and abs(leg.scores[row, place] - own) <= DOUBT:
                        # The window reflects this change already: the score is the index's own, and in no doubt.
                        score = leg.scores[row, place]
                        break
                touches.rows[count], touches.codes[count] = row, at * _KINDS + _ENTERS_VECTOR
                touches.scores[count] = score
                count += 1
    return count


@compiled
def find_by_terms(
    leg: LexicalLeg,
    answered: Answered,
    fusion: Fusion,
    new: Newcomers,
    at: int,
    holders: Groups,
    shares: Floats,
    sums: Floats,
    found: Ints,
    touches: Touches,
    count: int,
) -> int:
    """Note in which rows a passage scores more than the floor.

    Args:
        leg: lexical windows; their floors are up to date.
        answered: whose they are.
        fusion: statistics of now.
        new: passages.
        at: the one of them.
        holders: for each of its terms, of the questions that have it the row times the most terms plus the column.
        shares: of each of its terms, no less than what it is worth to a question for each time that it is asked.
        sums: of each row, 0 before and after.
        found: room for all rows.
        touches: likewise.
        count: how many it has.

    Returns:
        How many it has now.
    """
    for row in found[: _sum_up(leg, holders, shares, sums, found)]:
        # Summed up in any order: a bound, not yet the score.
        roughly = sums[row] * (1 + _ROUNDING)
        sums[row] = 0
        if roughly > leg.floors[row] and new.allowed[at, answered.readers[row]]:
            score = lexical_score(leg, fusion, row, new, at)
            if score > leg.floors[row]:
                touches.rows[count], touches.codes[count] = row, at * _KINDS + _ENTERS_LEXICAL
                touches.scores[count] = score
                count += 1
    return count


@compiled
def _sum_up(leg: LexicalLeg, holders: Groups, shares: Floats, sums: Floats, found: Ints) -> int:
    """What the terms of a passage are worth to each row that has one of them; how many rows were found."""
    count, most = 0, leg.repeats.shape[1]
    for term in range(len(shares)):
        for holder in holders.members[holders.bounds[term] : holders.bounds[term + 1]]:
            row = holder // most
            if sums[row] == 0:
                found[count] = row
                count += 1
            sums[row] += shares[term] * leg.repeats[row, holder - row * most]
    return count


@compiled
def by_row(touches: Touches, count: int, ordered: Touches, ends: NDArray[np.int64]) -> None:
    """Put touches in the order of rows, those of a row in the order in which they were noted.

    Args:
        touches: to put in order.
        count: how many there are.
        ordered: takes them, with ``NOBODY`` for their rows.
        ends: takes where those of each row end.
    """
    ends[:] = 0
    for at in range(count):
        ends[touches.rows[at]] += 1
    total = 0
    for row in range(len(ends)):
        total, ends[row] = total + ends[row], total
    for at in range(count):
        place = ends[touches.rows[at]]
        ordered.codes[place], ordered.scores[place] = touches.codes[at], touches.scores[at]
        ordered.rows[place] = NOBODY
        ends[touches.rows[at]] = place + 1


@compiled
def sweep(
    vector: VectorLeg,
    lexical: LexicalLeg,
    answered: Answered,
    fusion: Fusion,
    scratch: Scratch,
    gone: Leavers,
    new: Newcomers,
    ordered: Touches,
    ends: NDArray[np.int64],
    rank: int,
    watched: Flags,
    verdicts: Verdicts,
) -> None:
    """Change all windows that are touched, and judge the answers that may differ.

    Args:
        vector: windows.
        lexical: likewise; their floors are up to date.
        answered: whose they are.
        fusion: statistics of now.
        scratch: to work with.
        gone: passages that leave.
        new: passages that enter.
        ordered: what may happen; afterwards ``rows`` has the row of each passage that entered, else ``NOBODY``.
        ends: where what may happen to each row ends.
        rank: a row is judged if what left or entered had it, or a better one.
        watched: rows that are judged in any case; afterwards those of the next time.
        verdicts: takes one for each row that is judged, and ``DROP`` of those that show what is gone.
    """
    begin = 0
    for row in range(len(ends)):
        end, near, scored = ends[row], watched[row], False
        if begin < end:
            altered = _is_altered(answered, row, gone, ordered, begin, end)
            near |= _change_vector(vector, row, gone, new, ordered, begin, end, rank)
            near_by_terms, scored = _change_lexical(lexical, row, fusion, scratch, gone, new, ordered, begin, end, rank)
            begin = end
            if altered:
                verdicts[row] = DROP
                continue
            near |= near_by_terms
        if near:
            if not scored:
                score_lexical(lexical, fusion, row, scratch)
            verdicts[row] = judge_row(row, vector, lexical, answered, fusion, scratch)
            watched[row] = verdicts[row] == WATCH


@compiled
def _is_altered(answered: Answered, row: int, gone: Leavers, ordered: Touches, begin: int, end: int) -> bool:
    """Whether one of those that leave is a source; each was in one window at least when the answer was put."""
    found = False
    for touch in range(begin, end):
        at, kind = divmod(ordered.codes[touch], _KINDS)
        if kind <= _LEAVES_LEXICAL:
            found |= cites(answered, row, gone.numbers[at], gone.versions[at])
    return found


@compiled
def _change_vector(
    leg: VectorLeg, row: int, gone: Leavers, new: Newcomers, ordered: Touches, begin: int, end: int, rank: int
) -> bool:
    """Whether something with ``rank`` or a better one left or entered."""
    near = False
    for touch in range(begin, end):
        at, kind = divmod(ordered.codes[touch], _KINDS)
        if kind == _LEAVES_VECTOR:
            near |= leave_vector(leg, row, gone.numbers[at], rank)
        elif kind == _ENTERS_VECTOR and enter_vector(leg, row, ordered.scores[touch], new.numbers[at]):
            ordered.rows[touch] = row
            near |= above(leg.scores[row], ordered.scores[touch]) < rank
    return near


@compiled
def _change_lexical(
    leg: LexicalLeg,
    row: int,
    fusion: Fusion,
    scratch: Scratch,
    gone: Leavers,
    new: Newcomers,
    ordered: Touches,
    begin: int,
    end: int,
    rank: int,
) -> tuple[bool, bool]:
    """Likewise; and whether the row is scored now, which it is if anything happened."""
    near, scored = False, False
    for touch in range(begin, end):
        at, kind = divmod(ordered.codes[touch], _KINDS)
        if kind == _LEAVES_LEXICAL:
            place = place_of(leg.ids[row], gone.numbers[at])
            if place != NOBODY:
                if not scored:
                    score_lexical(leg, fusion, row, scratch)
                    scored = True
                near |= leave_lexical(leg, row, place, scratch.scores, rank)
        elif kind == _ENTERS_LEXICAL:
            if not scored:
                score_lexical(leg, fusion, row, scratch)
                scored = True
            if enter_lexical(leg, row, scratch.scores, ordered.scores[touch], new, at):
                ordered.rows[touch] = row
                near |= above(scratch.scores, ordered.scores[touch]) < rank
    return near, scored


def entered(ordered: Touches, count: int, passages: int, kind: int) -> Groups:
    """Rows that each passage entered.

    Args:
        ordered: as ``sweep`` left them.
        count: how many there are.
        passages: how many of them came.
        kind: ``IN_VECTOR`` or ``IN_LEXICAL``.
    """
    bounds = np.zeros(passages + 1, dtype=np.int64)
    _count_entered(ordered, count, kind, bounds)
    np.cumsum(bounds, out=bounds)
    members = np.empty(bounds[-1], dtype=np.int32)
    _gather_entered(ordered, count, kind, members, bounds.copy())
    return Groups(members, bounds)


@compiled
def _count_entered(ordered: Touches, count: int, kind: int, after: NDArray[np.int64]) -> None:
    for touch in range(count):
        if ordered.rows[touch] != NOBODY and ordered.codes[touch] % _KINDS == kind:
            after[ordered.codes[touch] // _KINDS + 1] += 1


@compiled
def _gather_entered(ordered: Touches, count: int, kind: int, members: Ints, fill: NDArray[np.int64]) -> None:
    for touch in range(count):
        if ordered.rows[touch] != NOBODY and ordered.codes[touch] % _KINDS == kind:
            at = ordered.codes[touch] // _KINDS
            members[fill[at]] = ordered.rows[touch]
            fill[at] += 1


def touches_of(room: int) -> Touches:
    """Room for so many."""
    return Touches(np.empty(room, dtype=np.int32), np.empty(room, dtype=np.int32), np.empty(room, dtype=np.float32))
