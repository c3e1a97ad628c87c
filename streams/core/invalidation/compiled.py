"""The inner loops of judging, compiled: one look at each window, where arrays would take a pass for each step.

Rows are answers, places those of a window, in no order. *Late* is a bit for each place of a window, set where a passage
entered after the answer was made. A row's first term of number 0 ends its terms. Nothing here allocates what grows with
the number of answers, and all of it runs without the interpreter's lock.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Bits = NDArray[np.uint64]
Flags = NDArray[np.bool_]

NOBODY: Final = -1
"""In the place of a passage's number where there is no passage."""

_LOWEST: Final = np.float32(-np.inf)
_HIGHEST: Final = np.float32(np.inf)
_ROUNDING: Final = np.float32(1e-5)
"""Share by which sums of the same numbers in another order may differ, with room to spare."""

_F = TypeVar("_F", bound=Callable[..., Any])


class VectorLeg(NamedTuple):
    """Windows of the vector leg: ``ids`` and ``scores`` of shape (rows, places)."""

    ids: Ints
    scores: Floats
    late: Bits
    floors: Floats


class LexicalLeg(NamedTuple):
    """Windows of the lexical leg, with what scores are made of.

    Attributes:
        ids: shape (rows, places).
        lengths: their codes, likewise.
        late: bits of the places.
        floors: by the statistics of the last call that moved them.
        frequencies: of all rows, one after the other: for each term of a row's question those of its places.
        starts: where each row's begin.
        floor_frequencies: of what stood at the floor when it was set, shape (rows, most terms).
        floor_lengths: codes of the lengths of those.
        terms: of the questions, shape (rows, most terms).
        repeats: how often each question has each of them.
    """

    ids: Ints
    lengths: Bytes
    late: Bits
    floors: Floats
    frequencies: Bytes
    starts: NDArray[np.int64]
    floor_frequencies: Bytes
    floor_lengths: Bytes
    terms: Ints
    repeats: Floats


class Answered(NamedTuple):
    """What the answers are: sources of shape (rows, most sources), and how many passages each wants."""

    sources: Ints
    versions: NDArray[np.int64]
    top: NDArray[np.int16]
    readers: Ints
    questions: Floats


class Fusion(NamedTuple):
    """Statistics of now, and the rule of fusion: weight of each term, norm of each code of a length."""

    weights: Floats
    norms: Floats
    places: int
    rrf_k: int


class Scored(NamedTuple):
    """Lexical scores of the rows that were looked at since the statistics were told.

    Attributes:
        scores: shape (rows, places); the first ``used`` are of ``rows``.
        slots: of each row the place of its scores, or ``NOBODY``.
        rows: in the order of their slots.
        used: one number.
        norms: of each place of the row at hand.
    """

    scores: Floats
    slots: Ints
    rows: Ints
    used: NDArray[np.int64]
    norms: Floats


class Groups(NamedTuple):
    """Numbers in groups: those of group ``at`` lie from ``bounds[at]`` up to ``bounds[at + 1]``."""

    members: Ints
    bounds: NDArray[np.int64]


class Leavers(NamedTuple):
    """Passages that are to leave windows, one after the other.

    Attributes:
        numbers: of them.
        versions: in which they come back, ``NOBODY`` of those that do not.
        by_vector: rows whose vector windows may hold each; one may be named twice.
        by_terms: likewise of the lexical leg.
    """

    numbers: Ints
    versions: NDArray[np.int64]
    by_vector: Groups
    by_terms: Groups


class Newcomers(NamedTuple):
    """Passages that are to enter windows, one in each row of the arrays.

    Attributes:
        numbers: of them.
        vectors: of unit length.
        lengths: their codes.
        frequencies: of each known term.
        allowed: which readers may find them.
    """

    numbers: Ints
    vectors: Floats
    lengths: Bytes
    frequencies: Bytes
    allowed: Flags


def compiled(function: _F) -> _F:
    """A function of arrays and numbers, compiled when it is first called."""
    # Without the interpreter's lock, so that judging may run beside an event loop; kept on disk from run to run.
    fast: _F = njit(cache=True, nogil=True, error_model="numpy")(function)
    return fast


def _summed(function: _F) -> _F:
    """Likewise, where numbers may be added up in any order, so that many are at once."""
    fast: _F = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})(function)
    return fast


@compiled
def leave(
    vector: VectorLeg,
    lexical: LexicalLeg,
    answered: Answered,
    fusion: Fusion,
    scored: Scored,
    gone: Leavers,
    rank: int,
    touched: Flags,
    altered: Flags,
) -> None:
    """Take passages out of all windows, in the lexical leg by the statistics of now.

    Args:
        vector: windows.
        lexical: likewise.
        answered: whose windows they are.
        fusion: statistics of now.
        scored: scores by these statistics, which grow by the rows that are looked at.
        gone: the passages.
        rank: rows in which one of them had it or a better one are marked in ``touched``.
        touched: marks.
        altered: marks of the rows that have one of them among their sources, in another version than the one to come.
    """
    for at in range(len(gone.numbers)):
        number, version = gone.numbers[at], gone.versions[at]
        by_vector = gone.by_vector.members[gone.by_vector.bounds[at] : gone.by_vector.bounds[at + 1]]
        by_terms = gone.by_terms.members[gone.by_terms.bounds[at] : gone.by_terms.bounds[at + 1]]
        for row in by_vector:
            _leave(vector.ids, vector.late, row, vector.scores[row], number, rank, touched)
        for row in by_terms:
            if place_of(lexical.ids[row], number) != NOBODY:
                standing = lexical_scores(lexical, fusion, scored, row)
                _leave(lexical.ids, lexical.late, row, standing, number, rank, touched)
        _cite(answered, by_vector, number, version, altered)
        _cite(answered, by_terms, number, version, altered)


@compiled
def _leave(ids: Ints, late: Bits, row: int, scores: Floats, number: int, rank: int, touched: Flags) -> None:
    place = place_of(ids[row], number)
    if place != NOBODY:
        if above(scores, scores[place]) < rank:
            touched[row] = True
        ids[row, place] = NOBODY
        scores[place] = _LOWEST
        late[row, place >> 6] &= ~(np.uint64(1) << np.uint64(place & 63))


@compiled
def _cite(answered: Answered, rows: Ints, number: int, version: int, altered: Flags) -> None:
    for row in rows:
        for source in range(answered.sources.shape[1]):
            if answered.sources[row, source] == number and answered.versions[row, source] != version:
                altered[row] = True


@compiled
def enter_vector(
    leg: VectorLeg,
    answered: Answered,
    first: int,
    new: Newcomers,
    rank: int,
    touched: Flags,
    entered: Ints,
    counts: Ints,
) -> None:
    """Bring passages into vector windows by their scores in each.

    Args:
        leg: the windows.
        answered: whose windows they are.
        first: row to begin with; as many follow as ``entered`` has columns, or are left.
        new: the passages.
        rank: rows in which one has it or a better one are marked.
        touched: the marks.
        entered: takes for each passage the rows in which it is now.
        counts: takes how many those are.
    """
    counts[:] = 0
    for row in range(first, min(first + entered.shape[1], len(leg.floors))):
        for at in range(len(new.numbers)):
            score = (1 + _product(answered.questions[row], new.vectors[at])) / 2
            if not (score > leg.floors[row]) or not new.allowed[at, answered.readers[row]]:
                continue
            place = _lowest(leg.scores[row])
            lowest = leg.scores[row, place]
            if lowest > _LOWEST:  # Of a full window and the newcomer the least stays outside, and is the floor.
                leg.floors[row] = min(lowest, score)
                if score <= lowest:
                    continue
            leg.ids[row, place] = new.numbers[at]
            leg.scores[row, place] = score
            leg.late[row, place >> 6] |= np.uint64(1) << np.uint64(place & 63)
            entered[at, counts[at]] = row
            counts[at] += 1
            if above(leg.scores[row], score) < rank:
                touched[row] = True


@compiled
def move_floors(leg: LexicalLeg, fusion: Fusion) -> None:
    """Bring the floors of lexical windows to the statistics of now; infinite ones stay."""
    for row in range(len(leg.floors)):
        if np.isfinite(leg.floors[row]):
            norm, score = fusion.norms[leg.floor_lengths[row]], np.float32(0)
            for column in range(leg.terms.shape[1]):
                term = leg.terms[row, column]
                if term == 0:
                    break
                counted = np.float32(leg.floor_frequencies[row, column])
                score += fusion.weights[term] * leg.repeats[row, column] * (counted / (counted + norm))
            leg.floors[row] = score


@compiled
def enter_lexical(
    leg: LexicalLeg,
    answered: Answered,
    fusion: Fusion,
    scored: Scored,
    new: Newcomers,
    at: int,
    holders: Groups,
    shares: Floats,
    sums: Floats,
    found: Ints,
    rank: int,
    touched: Flags,
    entered: Ints,
) -> int:
    """Bring a passage into the lexical windows of the rows that find it.

    Args:
        leg: the windows; their floors are up to date.
        answered: whose windows they are.
        fusion: statistics of now.
        scored: scores by these statistics, which grow by the rows that are looked at.
        new: passages.
        at: the one of them.
        holders: for each of its terms, of the questions that have it the row times the most terms plus the column.
        shares: of each of its terms, what it is worth to a question for each time that it is asked.
        sums: of each row, 0 before and after.
        found: room for all rows.
        rank: rows in which it has it or a better one are marked.
        touched: the marks.
        entered: takes the rows in which it is now.

    Returns:
        How many those are.
    """
    most = leg.repeats.shape[1]
    found, count = found[: _sum_up(leg, holders, shares, sums, found)], 0
    for row in found:
        # Summed up in any order: a bound, not yet the score.
        roughly = sums[row] * (1 + _ROUNDING)
        sums[row] = 0
        if not (roughly > leg.floors[row]) or not new.allowed[at, answered.readers[row]]:
            continue
        own = _own_score(leg, fusion, row, new, at)
        if not (own > leg.floors[row]):
            continue
        standing = lexical_scores(leg, fusion, scored, row)
        place = _lowest(standing)
        if standing[place] > _LOWEST:
            stays_out = bool(own <= standing[place])
            _raise_floor(leg, row, place, own if stays_out else standing[place], new, at, stays_out)
            if stays_out:
                continue
        leg.ids[row, place] = new.numbers[at]
        leg.lengths[row, place] = new.lengths[at]
        start, places = leg.starts[row] + place, leg.ids.shape[1]
        for column in range(most):
            term = leg.terms[row, column]
            if term == 0:
                break
            leg.frequencies[start + column * places] = new.frequencies[at, term]
        leg.late[row, place >> 6] |= np.uint64(1) << np.uint64(place & 63)
        standing[place] = own
        entered[count] = row
        count += 1
        if above(standing, own) < rank:
            touched[row] = True
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
def _own_score(leg: LexicalLeg, fusion: Fusion, row: int, new: Newcomers, at: int) -> Any:
    """BM25 of a newcomer for the question of a row, summed up as that of a place is."""
    norm, own = fusion.norms[new.lengths[at]], np.float32(0)
    for column in range(leg.terms.shape[1]):
        term = leg.terms[row, column]
        if term == 0:
            break
        counted = np.float32(new.frequencies[at, term])
        own += fusion.weights[term] * leg.repeats[row, column] * (counted / (counted + norm))
    return own


@compiled
def _raise_floor(leg: LexicalLeg, row: int, place: int, score: Any, new: Newcomers, at: int, stays_out: bool) -> None:
    """Of a full window and a newcomer the least stays outside, and is the floor: the newcomer, or what stands there."""
    leg.floors[row] = score
    leg.floor_lengths[row] = new.lengths[at] if stays_out else leg.lengths[row, place]
    start, places = leg.starts[row] + place, leg.ids.shape[1]
    for column in range(leg.terms.shape[1]):
        term = leg.terms[row, column]
        if term == 0:
            break
        leg.floor_frequencies[row, column] = (
            new.frequencies[at, term] if stays_out else leg.frequencies[start + column * places]
        )


@compiled
def lexical_scores(leg: LexicalLeg, fusion: Fusion, scored: Scored, row: int) -> Floats:
    """BM25 of the places of a row, minus infinity where there is nobody; the same array until it is forgotten."""
    slot = scored.slots[row]
    if slot != NOBODY:
        known: Floats = scored.scores[slot]
        return known
    slot = scored.used[0]
    scored.used[0] += 1
    scored.slots[row] = slot
    scored.rows[slot] = row
    scores: Floats = scored.scores[slot]
    places, norms = leg.ids.shape[1], scored.norms
    for place in range(places):
        norms[place] = fusion.norms[leg.lengths[row, place]]
        scores[place] = np.float32(0)
    for column in range(leg.terms.shape[1]):
        term = leg.terms[row, column]
        if term == 0:
            break
        weight = fusion.weights[term] * leg.repeats[row, column]
        start = leg.starts[row] + column * places
        counts = leg.frequencies[start : start + places]
        for place in range(places):
            counted = np.float32(counts[place])
            scores[place] += weight * (counted / (counted + norms[place]))
    for place in range(places):
        if leg.ids[row, place] == NOBODY:
            scores[place] = _LOWEST
    return scores


@_summed
def _product(one: Floats, other: Floats) -> Any:
    """Of two vectors."""
    total = np.float32(0)
    for at in range(len(one)):
        total += one[at] * other[at]
    return total


@compiled
def above(scores: Floats, own: Any) -> int:
    """How many scores are greater."""
    count = np.int32(0)  # in the width of what is compared, so that many are at once
    for place in range(len(scores)):
        count = np.int32(count + np.int32(scores[place] > own))
    return int(count)


@compiled
def _lowest(scores: Floats) -> int:
    """Where the lowest score is."""
    lowest = _HIGHEST
    for place in range(len(scores)):
        lowest = min(lowest, scores[place])
    found = np.int32(0)
    for place in range(len(scores)):
        found = max(found, np.int32(place) if scores[place] == lowest else np.int32(0))
    return int(found)


@compiled
def place_of(ids: Ints, number: int) -> int:
    """Where a passage stands, or ``NOBODY``."""
    # To the end in any case: without a way out, many places are compared at once.
    found = np.int32(NOBODY)
    for place in range(len(ids)):
        found = max(found, np.int32(place) if ids[place] == number else np.int32(NOBODY))
    return int(found)
