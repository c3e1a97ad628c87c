"""Arrays of candidates, and compiled operations on one row of them.

Each operation needs one pass, where numpy needs several. Rows are answers, columns are the slots of their candidates,
in no order. *Late* is a bit for each slot, set if the passage became a candidate after the fill. Term number 0
terminates the terms of a row. All functions run without the GIL.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Counts = NDArray[np.uint16]
Bits = NDArray[np.uint64]
Flags = NDArray[np.bool_]

EMPTY: Final = -1
"""Marks a slot without a passage."""

MAX_FREQUENCY: Final = 65_535
"""Highest term frequency of a passage that is evaluated. With a higher one, no answer is evaluated by this passage."""

_ONE: Final = np.float32(1)
_LOWEST: Final = np.float32(-np.inf)
_HIGHEST: Final = np.float32(np.inf)
_F = TypeVar("_F", bound=Callable[..., Any])


class VectorCandidates(NamedTuple):
    """Candidates of the vector search: ``ids`` and ``scores`` of shape (rows, slots)."""

    ids: Ints
    scores: Floats
    late: Bits
    floors: Floats


class LexicalCandidates(NamedTuple):
    """Candidates of the lexical search, with the data from which scores are computed.

    Attributes:
        ids: shape (rows, slots).
        lengths: length codes, same shape.
        late: bits of the slots.
        floors: according to the statistics of the last ``move_floors``.
        frequencies: of all rows, one after the other: for each term of a row's question, the frequencies of its slots.
        starts: index of each row's first frequency.
        floor_frequencies: of the passage that defined the floor, shape (rows, max terms).
        floor_lengths: length codes of these passages.
        terms: of the questions, shape (rows, max terms).
        repeats: number of occurrences of each term in the question.
    """

    ids: Ints
    lengths: Bytes
    late: Bits
    floors: Floats
    frequencies: Counts
    starts: NDArray[np.int64]
    floor_frequencies: Counts
    floor_lengths: Bytes
    terms: Ints
    repeats: Floats


class AnswerColumns(NamedTuple):
    """Columns of the answers.

    Attributes:
        sources: passages of each answer, shape (rows, max sources).
        versions: their versions, same shape.
        top: number of passages that each answer wants.
        readers: number of each combination of access rights and filters.
        questions: vectors of the questions, shape (rows, dimension).
    """

    sources: Ints
    versions: NDArray[np.int64]
    top: NDArray[np.int16]
    readers: Ints
    questions: Floats


class Scoring(NamedTuple):
    """Current statistics and the rule of fusion.

    Attributes:
        weights: weight of each term.
        inverses: inverse norm of each length code.
        fused: candidates of each retriever that are fused.
        rrf_k: constant of the fusion.
    """

    weights: Floats
    inverses: Floats
    fused: int
    rrf_k: int


class Scratch(NamedTuple):
    """Working memory for the evaluation of one row.

    Attributes:
        scores: lexical scores of the slots.
        sums: the same before rounding.
        inverses: inverse norms of the slots.
        best: its best passages, as many as the largest top k.
        fused: fused scores of these.
    """

    scores: Floats
    sums: NDArray[np.float64]
    inverses: Floats
    best: Ints
    fused: NDArray[np.float64]


def allocate_scratch(slots: int, wanted: int) -> Scratch:
    """Allocate working memory for ``slots`` candidates and answers of at most ``wanted`` passages."""
    return Scratch(
        np.empty(slots, dtype=np.float32),
        np.empty(slots, dtype=np.float64),
        np.empty(slots, dtype=np.float32),
        np.empty(wanted, dtype=np.int32),
        np.empty(wanted, dtype=np.float64),
    )


class Groups(NamedTuple):
    """Numbers in groups: group ``at`` extends from ``bounds[at]`` up to ``bounds[at + 1]``."""

    members: Ints
    bounds: NDArray[np.int64]


class Removals(NamedTuple):
    """Passages to remove from the candidates.

    Attributes:
        numbers: numbers of the passages.
        versions: versions in which they are added again, ``EMPTY`` for those that are not.
        by_vector: rows whose vector candidates may contain each passage, possibly with duplicates.
        by_terms: the same for lexical candidates.
    """

    numbers: Ints
    versions: NDArray[np.int64]
    by_vector: Groups
    by_terms: Groups


class Additions(NamedTuple):
    """Passages to add to the candidates, one in each row of the arrays.

    Attributes:
        numbers: numbers of the passages.
        vectors: of unit length.
        lengths: length codes.
        frequencies: of each known term.
        allowed: which readers may find them.
    """

    numbers: Ints
    vectors: Floats
    lengths: Bytes
    frequencies: Counts
    allowed: Flags


def compiled(function: _F) -> _F:
    """Compile a function of arrays and numbers on its first call. It must not allocate arrays, only views."""
    # nogil: an evaluation can run concurrently with an event loop. cache: compiled code is kept on disk between runs.
    # _nrt: no reference counting of arrays, which took a fifth of the time.
    fast: _F = njit(cache=True, nogil=True, error_model="numpy", _nrt=False)(function)
    return fast


def compiled_fastmath(function: _F) -> _F:
    """Compile a function whose sums may be reordered, so that they are vectorised."""
    fast: _F = njit(cache=True, nogil=True, error_model="numpy", _nrt=False, fastmath={"reassoc", "nsz", "contract"})(
        function
    )
    return fast


@compiled
def remove_vector(candidates: VectorCandidates, row: int, number: int, rank: int) -> bool:
    """Remove a passage from the vector candidates; whether its rank (from 0) was ``rank`` or better."""
    slot = slot_of(candidates.ids[row], number)
    if slot == EMPTY:
        return False
    near = count_above(candidates.scores[row], candidates.scores[row, slot]) < rank
    candidates.scores[row, slot] = _LOWEST
    candidates.ids[row, slot] = EMPTY
    candidates.late[row, slot >> 6] &= ~(np.uint64(1) << np.uint64(slot & 63))
    return bool(near)


@compiled
def remove_lexical(candidates: LexicalCandidates, row: int, slot: int, scores: Floats, rank: int) -> bool:
    """Remove the passage in a slot from lexical candidates with ``scores``; whether its rank was ``rank`` or better."""
    near = count_above(scores, scores[slot]) < rank
    scores[slot] = _LOWEST
    candidates.ids[row, slot] = EMPTY
    candidates.late[row, slot >> 6] &= ~(np.uint64(1) << np.uint64(slot & 63))
    return bool(near)


@compiled
def insert_vector(candidates: VectorCandidates, row: int, score: Any, number: int) -> bool:
    """Add a passage to the vector candidates. False if it is below the floor or the lowest candidate."""
    if not (score > candidates.floors[row]):
        return False
    slot = _lowest_slot(candidates.scores[row])
    lowest = candidates.scores[row, slot]
    if lowest > _LOWEST:  # full: the lowest candidate or the new passage stays outside and is the floor
        candidates.floors[row] = min(lowest, score)
        if score <= lowest:
            return False
    candidates.ids[row, slot] = number
    candidates.scores[row, slot] = score
    candidates.late[row, slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
    return True


@compiled
def insert_lexical(
    candidates: LexicalCandidates, row: int, scores: Floats, score: Any, additions: Additions, at: int
) -> bool:
    """Add a passage to lexical candidates with ``scores``. False if it is below the floor or the lowest candidate."""
    if not (score > candidates.floors[row]):
        return False
    slot = _lowest_slot(scores)
    if scores[slot] > _LOWEST:
        is_outside = bool(score <= scores[slot])
        _raise_floor(candidates, row, slot, score if is_outside else scores[slot], additions, at, is_outside)
        if is_outside:
            return False
    candidates.ids[row, slot] = additions.numbers[at]
    candidates.lengths[row, slot] = additions.lengths[at]
    start, slots = candidates.starts[row] + slot, candidates.ids.shape[1]
    for column in range(candidates.terms.shape[1]):
        term = candidates.terms[row, column]
        if term == 0:
            break
        candidates.frequencies[start + column * slots] = additions.frequencies[at, term]
    candidates.late[row, slot >> 6] |= np.uint64(1) << np.uint64(slot & 63)
    scores[slot] = score
    return True


@compiled
def move_floors(candidates: LexicalCandidates, scoring: Scoring) -> None:
    """Recompute the floors of lexical candidates with the current statistics. Infinite floors do not change."""
    for row in range(len(candidates.floors)):
        if np.isfinite(candidates.floors[row]):
            inverse, score = scoring.inverses[candidates.floor_lengths[row]], 0.0
            for column in range(candidates.terms.shape[1]):
                term = candidates.terms[row, column]
                if term == 0:
                    break
                weight = scoring.weights[term] * candidates.repeats[row, column]
                score += weight - weight / (_ONE + np.float32(candidates.floor_frequencies[row, column]) * inverse)
            candidates.floors[row] = np.float32(score)


@compiled
def lexical_score(candidates: LexicalCandidates, scoring: Scoring, row: int, additions: Additions, at: int) -> Any:
    """BM25 score of an added passage for the question of a row, summed in the same order as in ``score_lexical``."""
    inverse, score = scoring.inverses[additions.lengths[at]], 0.0
    for column in range(candidates.terms.shape[1]):
        term = candidates.terms[row, column]
        if term == 0:
            break
        weight = scoring.weights[term] * candidates.repeats[row, column]
        score += weight - weight / (_ONE + np.float32(additions.frequencies[at, term]) * inverse)
    return np.float32(score)


@compiled
def _raise_floor(
    candidates: LexicalCandidates, row: int, slot: int, score: Any, additions: Additions, at: int, is_outside: bool
) -> None:
    """Set the floor of a full row to an added passage that stays outside, or to the candidate that it replaces."""
    candidates.floors[row] = score
    candidates.floor_lengths[row] = additions.lengths[at] if is_outside else candidates.lengths[row, slot]
    start, slots = candidates.starts[row] + slot, candidates.ids.shape[1]
    for column in range(candidates.terms.shape[1]):
        term = candidates.terms[row, column]
        if term == 0:
            break
        candidates.floor_frequencies[row, column] = (
            additions.frequencies[at, term] if is_outside else candidates.frequencies[start + column * slots]
        )


@compiled
def score_lexical(candidates: LexicalCandidates, scoring: Scoring, row: int, scratch: Scratch) -> None:
    """BM25 scores of the slots of a row, minus infinity for empty slots. Same arithmetic as ``bm25.term_score``."""
    slots, sums, inverses = candidates.ids.shape[1], scratch.sums, scratch.inverses
    for slot in range(slots):
        inverses[slot] = scoring.inverses[candidates.lengths[row, slot]]
        sums[slot] = 0.0
    for column in range(candidates.terms.shape[1]):
        term = candidates.terms[row, column]
        if term == 0:
            break
        weight = scoring.weights[term] * candidates.repeats[row, column]
        start = candidates.starts[row] + column * slots
        counts = candidates.frequencies[start : start + slots]
        for slot in range(slots):
            sums[slot] += weight - weight / (_ONE + np.float32(counts[slot]) * inverses[slot])
    for slot in range(slots):
        scratch.scores[slot] = _LOWEST if candidates.ids[row, slot] == EMPTY else np.float32(sums[slot])


@compiled_fastmath
def dot_product(one: Floats, other: Floats) -> Any:
    """Dot product of two vectors."""
    total = np.float32(0)
    for at in range(len(one)):
        total += one[at] * other[at]
    return total


@compiled
def count_above(scores: Floats, score: Any) -> int:
    """Number of scores that are greater than ``score``."""
    count = np.int32(0)  # in the width of the compared values, so that the loop is vectorised
    for slot in range(len(scores)):
        count = np.int32(count + np.int32(scores[slot] > score))
    return int(count)


@compiled
def _lowest_slot(scores: Floats) -> int:
    """Slot of the lowest score."""
    lowest = _HIGHEST
    for slot in range(len(scores)):
        lowest = min(lowest, scores[slot])
    found = np.int32(0)
    for slot in range(len(scores)):
        found = max(found, np.int32(slot) if scores[slot] == lowest else np.int32(0))
    return int(found)


@compiled
def slot_of(ids: Ints, number: int) -> int:
    """Slot of a passage, or ``EMPTY``."""
    # No early exit, so that the loop is vectorised.
    found = np.int32(EMPTY)
    for slot in range(len(ids)):
        found = max(found, np.int32(slot) if ids[slot] == number else np.int32(EMPTY))
    return int(found)
