"""Compiled sweep over all answers that a change may affect. Visits each row once and applies all updates to it.

First, the removals and insertions that may affect each row are collected (*updates*). They are then ordered by row, so
that each row is loaded into the processor's cache once, updated, and evaluated while it is there.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import (
    EMPTY,
    Additions,
    AnswerColumns,
    Flags,
    Floats,
    Groups,
    Ints,
    LexicalCandidates,
    Removals,
    Scoring,
    Scratch,
    VectorCandidates,
    compiled,
    count_above,
    dot_product,
    insert_lexical,
    insert_vector,
    lexical_score,
    remove_lexical,
    remove_vector,
    score_lexical,
    slot_of,
)
from streams.core.invalidation.verdicts import DROP, WATCH, Verdicts, evaluate_row

_REMOVE_VECTOR: Final = 0
_REMOVE_LEXICAL: Final = 1
_INSERT_VECTOR: Final = 2
_INSERT_LEXICAL: Final = 3
_KINDS: Final = 4

IN_VECTOR: Final = _INSERT_VECTOR
IN_LEXICAL: Final = _INSERT_LEXICAL
"""Kinds of insertions: into the vector or the lexical candidates."""

_ROUNDING: Final = np.float32(1e-5)
"""Maximum relative difference between sums of the same numbers in different orders, with a reserve."""

SCORE_TOLERANCE: Final = 2e-6
"""Tolerance of vector scores. The index sums the products of two vectors in an order of its own, so either of two
scores that differ by less may be the higher one there. The score of an added passage is raised by it: if its order is
uncertain, it ranks first."""


class RowUpdates(NamedTuple):
    """Possible updates of rows.

    Attributes:
        rows: row of each update.
        codes: ``_KINDS`` times the index of the passage among removals or additions, plus the kind of the update.
        scores: scores of insertions.
    """

    rows: Ints
    codes: Ints
    scores: Floats


@compiled
def find_removals(removals: Removals, updates: RowUpdates) -> int:
    """Collect all removals; ``updates`` must have room for them. Returns their number."""
    count = 0
    for at in range(len(removals.numbers)):
        for row in removals.by_vector.members[removals.by_vector.bounds[at] : removals.by_vector.bounds[at + 1]]:
            updates.rows[count], updates.codes[count] = row, at * _KINDS + _REMOVE_VECTOR
            count += 1
        for row in removals.by_terms.members[removals.by_terms.bounds[at] : removals.by_terms.bounds[at + 1]]:
            updates.rows[count], updates.codes[count] = row, at * _KINDS + _REMOVE_LEXICAL
            count += 1
    return count


@compiled
def find_vector_insertions(
    candidates: VectorCandidates,
    answers: AnswerColumns,
    first: int,
    end: int,
    additions: Additions,
    updates: RowUpdates,
    count: int,
) -> int:
    """Collect the added passages that score above the floors of the rows from ``first`` up to ``end``.

    Args:
        candidates: vector candidates.
        answers: columns of the answers.
        first: first row.
        end: row after the last one.
        additions: added passages.
        updates: has room for each passage in each row.
        count: number of updates so far.

    Returns:
        Number of updates.
    """
    for row in range(first, end):
        for at in range(len(additions.numbers)):
            exact = (1 + dot_product(answers.questions[row], additions.vectors[at])) / 2
            score = exact + SCORE_TOLERANCE
            if score > candidates.floors[row] and additions.allowed[at, answers.readers[row]]:
                for slot in range(candidates.ids.shape[1]):
                    if (
                        candidates.ids[row, slot] == additions.numbers[at]
                        and abs(candidates.scores[row, slot] - exact) <= SCORE_TOLERANCE
                    ):
                        # The candidates reflect this change already: the score is the exact one of the index.
                        score = candidates.scores[row, slot]
                        break
                updates.rows[count], updates.codes[count] = row, at * _KINDS + _INSERT_VECTOR
                updates.scores[count] = score
                count += 1
    return count


@compiled
def find_lexical_insertions(
    candidates: LexicalCandidates,
    answers: AnswerColumns,
    scoring: Scoring,
    additions: Additions,
    at: int,
    holders: Groups,
    shares: Floats,
    sums: Floats,
    found: Ints,
    updates: RowUpdates,
    count: int,
) -> int:
    """Collect the rows in which an added passage scores above the floor.

    Args:
        candidates: lexical candidates with current floors.
        answers: columns of the answers.
        scoring: current statistics.
        additions: added passages.
        at: index of the passage among them.
        holders: for each of its terms, the questions that contain it, as row times maximum number of terms plus column.
        shares: for each of its terms, an upper bound of the score that one occurrence in a question contributes.
        sums: one number for each row; 0 before and after.
        found: room for all rows.
        updates: room for all rows.
        count: number of updates so far.

    Returns:
        Number of updates.
    """
    for row in found[: _sum_up(candidates, holders, shares, sums, found)]:
        # Summed in any order: an upper bound, not the score.
        bound = sums[row] * (1 + _ROUNDING)
        sums[row] = 0
        if bound > candidates.floors[row] and additions.allowed[at, answers.readers[row]]:
            score = lexical_score(candidates, scoring, row, additions, at)
            if score > candidates.floors[row]:
                updates.rows[count], updates.codes[count] = row, at * _KINDS + _INSERT_LEXICAL
                updates.scores[count] = score
                count += 1
    return count


@compiled
def _sum_up(candidates: LexicalCandidates, holders: Groups, shares: Floats, sums: Floats, found: Ints) -> int:
    """Sum the term scores of a passage for each row that contains one of its terms; number of these rows."""
    count, columns = 0, candidates.repeats.shape[1]
    for term in range(len(shares)):
        for holder in holders.members[holders.bounds[term] : holders.bounds[term + 1]]:
            row = holder // columns
            if sums[row] == 0:
                found[count] = row
                count += 1
            sums[row] += shares[term] * candidates.repeats[row, holder - row * columns]
    return count


@compiled
def order_by_row(updates: RowUpdates, count: int, ordered: RowUpdates, ends: NDArray[np.int64]) -> None:
    """Order updates by row. Updates of a row keep their order.

    Args:
        updates: updates to order.
        count: their number.
        ordered: receives them, with ``EMPTY`` for their rows.
        ends: receives the end of each row's updates.
    """
    ends[:] = 0
    for at in range(count):
        ends[updates.rows[at]] += 1
    total = 0
    for row in range(len(ends)):
        total, ends[row] = total + ends[row], total
    for at in range(count):
        slot = ends[updates.rows[at]]
        ordered.codes[slot], ordered.scores[slot] = updates.codes[at], updates.scores[at]
        ordered.rows[slot] = EMPTY
        ends[updates.rows[at]] = slot + 1


@compiled
def sweep(
    vector: VectorCandidates,
    lexical: LexicalCandidates,
    answers: AnswerColumns,
    scoring: Scoring,
    scratch: Scratch,
    removals: Removals,
    additions: Additions,
    ordered: RowUpdates,
    ends: NDArray[np.int64],
    rank: int,
    watched: Flags,
    verdicts: Verdicts,
) -> None:
    """Apply the updates, and evaluate the answers that they may alter.

    Args:
        vector: vector candidates.
        lexical: lexical candidates with current floors.
        answers: columns of the answers.
        scoring: current statistics.
        scratch: working memory.
        removals: removed passages.
        additions: added passages.
        ordered: updates by row; on return, ``rows`` contains the row of each insertion that took place, else ``EMPTY``.
        ends: end of each row's updates.
        rank: a row is evaluated if a removed or inserted passage had this rank or a better one.
        watched: rows that are evaluated in any case; on return, those of the next sweep.
        verdicts: contains ``DROP`` for rows with a removed source; receives a verdict for each evaluated row.
    """
    begin = 0
    for row in range(len(ends)):
        end, near, scored = ends[row], watched[row], False
        if begin < end:
            if verdicts[row] == DROP:
                begin = end
                continue
            near |= _update_vector(vector, row, removals, additions, ordered, begin, end, rank)
            near_lexical, scored = _update_lexical(
                lexical, row, scoring, scratch, removals, additions, ordered, begin, end, rank
            )
            begin = end
            near |= near_lexical
        if near:
            if not scored:
                score_lexical(lexical, scoring, row, scratch)
            verdicts[row] = evaluate_row(row, vector, lexical, answers, scoring, scratch)
            watched[row] = verdicts[row] == WATCH


@compiled
def _update_vector(
    candidates: VectorCandidates,
    row: int,
    removals: Removals,
    additions: Additions,
    ordered: RowUpdates,
    begin: int,
    end: int,
    rank: int,
) -> bool:
    """Whether a passage with ``rank`` or a better one was removed or inserted."""
    near = False
    for update in range(begin, end):
        at, kind = divmod(ordered.codes[update], _KINDS)
        if kind == _REMOVE_VECTOR:
            near |= remove_vector(candidates, row, removals.numbers[at], rank)
        elif kind == _INSERT_VECTOR and insert_vector(candidates, row, ordered.scores[update], additions.numbers[at]):
            ordered.rows[update] = row
            near |= count_above(candidates.scores[row], ordered.scores[update]) < rank
    return near


@compiled
def _update_lexical(
    candidates: LexicalCandidates,
    row: int,
    scoring: Scoring,
    scratch: Scratch,
    removals: Removals,
    additions: Additions,
    ordered: RowUpdates,
    begin: int,
    end: int,
    rank: int,
) -> tuple[bool, bool]:
    """The same for lexical candidates; and whether the row has current scores, which it has after any update."""
    near, scored = False, False
    for update in range(begin, end):
        at, kind = divmod(ordered.codes[update], _KINDS)
        if kind == _REMOVE_LEXICAL:
            slot = slot_of(candidates.ids[row], removals.numbers[at])
            if slot != EMPTY:
                if not scored:
                    score_lexical(candidates, scoring, row, scratch)
                    scored = True
                near |= remove_lexical(candidates, row, slot, scratch.scores, rank)
        elif kind == _INSERT_LEXICAL:
            if not scored:
                score_lexical(candidates, scoring, row, scratch)
                scored = True
            if insert_lexical(candidates, row, scratch.scores, ordered.scores[update], additions, at):
                ordered.rows[update] = row
                near |= count_above(scratch.scores, ordered.scores[update]) < rank
    return near, scored


def inserted_rows(ordered: RowUpdates, count: int, passages: int, kind: int) -> Groups:
    """Rows into which each passage was inserted.

    Args:
        ordered: updates after ``sweep``.
        count: their number.
        passages: number of added passages.
        kind: ``IN_VECTOR`` or ``IN_LEXICAL``.
    """
    bounds = np.zeros(passages + 1, dtype=np.int64)
    _count_inserted(ordered, count, kind, bounds)
    np.cumsum(bounds, out=bounds)
    members = np.empty(bounds[-1], dtype=np.int32)
    _gather_inserted(ordered, count, kind, members, bounds.copy())
    return Groups(members, bounds)


@compiled
def _count_inserted(ordered: RowUpdates, count: int, kind: int, after: NDArray[np.int64]) -> None:
    for update in range(count):
        if ordered.rows[update] != EMPTY and ordered.codes[update] % _KINDS == kind:
            after[ordered.codes[update] // _KINDS + 1] += 1


@compiled
def _gather_inserted(ordered: RowUpdates, count: int, kind: int, members: Ints, fill: NDArray[np.int64]) -> None:
    for update in range(count):
        if ordered.rows[update] != EMPTY and ordered.codes[update] % _KINDS == kind:
            at = ordered.codes[update] // _KINDS
            members[fill[at]] = ordered.rows[update]
            fill[at] += 1


def allocate_updates(size: int) -> RowUpdates:
    """Allocate room for updates."""
    return RowUpdates(np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32), np.empty(size, dtype=np.float32))
