"""Windows and what is done to one of them, compiled: one look at each, where arrays would take a pass for each step.

Rows are answers, places those of a window, in no order. *Late* is a bit for each place of a window, set where a passage
entered after the answer was made. A row's first term of number 0 ends its terms. All of it runs without the
interpreter's lock.
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

NOBODY: Final = -1
"""In the place of a passage's number where there is no passage."""

MOST_COUNTED: Final = 65_535
"""How often a passage may have a term for an answer to be judged by it; by one that has it more often none is."""

_ONE: Final = np.float32(1)
_LOWEST: Final = np.float32(-np.inf)
_HIGHEST: Final = np.float32(np.inf)
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
    frequencies: Counts
    starts: NDArray[np.int64]
    floor_frequencies: Counts
    floor_lengths: Bytes
    terms: Ints
    repeats: Floats


class Answered(NamedTuple):
    """What the answers are: sources of shape (rows, most sources), passages wanted, vectors of their questions."""

    sources: Ints
    versions: NDArray[np.int64]
    top: NDArray[np.int16]
    readers: Ints
    questions: Floats


class Fusion(NamedTuple):
    """Statistics of now, and the rule of fusion: weight of each term, inverse norm of each code of a length."""

    weights: Floats
    inverses: Floats
    places: int
    rrf_k: int


class Scratch(NamedTuple):
    """What the row at hand is judged with.

    Attributes:
        scores: of the places of its lexical leg.
        sums: what scores are rounded from.
        inverses: of the places, see ``Fusion``.
        best: of its passages, as many as any answer wants.
        fused: scores of those.
    """

    scores: Floats
    sums: NDArray[np.float64]
    inverses: Floats
    best: Ints
    fused: NDArray[np.float64]


def scratch_of(places: int, wanted: int) -> Scratch:
    """For windows of so many places, and answers that want so many passages at most."""
    return Scratch(
        np.empty(places, dtype=np.float32),
        np.empty(places, dtype=np.float64),
        np.empty(places, dtype=np.float32),
        np.empty(wanted, dtype=np.int32),
        np.empty(wanted, dtype=np.float64),
    )


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
    frequencies: Counts
    allowed: Flags


def compiled(function: _F) -> _F:
    """A function of arrays and numbers, compiled when it is first called. It makes no arrays but views of those."""
    # Without the interpreter's lock, so that judging may run beside an event loop; kept on disk from run to run; and
    # without counting who refers to an array, which took a fifth of the time.
    fast: _F = njit(cache=True, nogil=True, error_model="numpy", _nrt=False)(function)
    return fast


def summed(function: _F) -> _F:
    """Likewise, where numbers may be added up in any order, so that many are at once."""
    fast: _F = njit(cache=True, nogil=True, error_model="numpy", _nrt=False, fastmath={"reassoc", "nsz", "contract"})(
        function
    )
    return fast


@compiled
def cites(answered: Answered, row: int, number: int, version: int) -> bool:
    """Whether a row has a passage among its sources, in another version than this one."""
    found = False
    for source in range(answered.sources.shape[1]):
        found |= answered.sources[row, source] == number and answered.versions[row, source] != version
    return found


@compiled
def leave_vector(leg: VectorLeg, row: int, number: int, rank: int) -> bool:
    """Take a passage out of a vector window; whether it had ``rank`` in it, or a better one (from 0)."""
    place = place_of(leg.ids[row], number)
    if place == NOBODY:
        return False
    near = above(leg.scores[row], leg.scores[row, place]) < rank
    leg.scores[row, place] = _LOWEST
    leg.ids[row, place] = NOBODY
    leg.late[row, place >> 6] &= ~(np.uint64(1) << np.uint64(place & 63))
    return bool(near)


@compiled
def leave_lexical(leg: LexicalLeg, row: int, place: int, standing: Floats, rank: int) -> bool:
    """Take the passage in a place out of a lexical window, whose scores are ``standing``; likewise."""
    near = above(standing, standing[place]) < rank
    standing[place] = _LOWEST
    leg.ids[row, place] = NOBODY
    leg.late[row, place >> 6] &= ~(np.uint64(1) << np.uint64(place & 63))
    return bool(near)


@compiled
def enter_vector(leg: VectorLeg, row: int, score: Any, number: int) -> bool:
    """Bring a passage into a vector window; False if it stays below its floor."""
    if not (score > leg.floors[row]):
        return False
    place = _lowest(leg.scores[row])
    lowest = leg.scores[row, place]
    if lowest > _LOWEST:  # Of a full window and the newcomer the least stays outside, and is the floor.
        leg.floors[row] = min(lowest, score)
        if score <= lowest:
            return False
    leg.ids[row, place] = number
    leg.scores[row, place] = score
    leg.late[row, place >> 6] |= np.uint64(1) << np.uint64(place & 63)
    return True


@compiled
def enter_lexical(leg: LexicalLeg, row: int, standing: Floats, score: Any, new: Newcomers, at: int) -> bool:
    """Bring a passage into a lexical window, whose scores are ``standing``; likewise."""
    if not (score > leg.floors[row]):
        return False
    place = _lowest(standing)
    if standing[place] > _LOWEST:
        stays_out = bool(score <= standing[place])
        _raise_floor(leg, row, place, score if stays_out else standing[place], new, at, stays_out)
        if stays_out:
            return False
    leg.ids[row, place] = new.numbers[at]
    leg.lengths[row, place] = new.lengths[at]
    start, places = leg.starts[row] + place, leg.ids.shape[1]
    for column in range(leg.terms.shape[1]):
        term = leg.terms[row, column]
        if term == 0:
            break
        leg.frequencies[start + column * places] = new.frequencies[at, term]
    leg.late[row, place >> 6] |= np.uint64(1) << np.uint64(place & 63)
    standing[place] = score
    return True


@compiled
def move_floors(leg: LexicalLeg, fusion: Fusion) -> None:
    """Bring the floors of lexical windows to the statistics of now; infinite ones stay."""
    for row in range(len(leg.floors)):
        if np.isfinite(leg.floors[row]):
            inverse, score = fusion.inverses[leg.floor_lengths[row]], 0.0
            for column in range(leg.terms.shape[1]):
                term = leg.terms[row, column]
                if term == 0:
                    break
                weight = fusion.weights[term] * leg.repeats[row, column]
                score += weight - weight / (_ONE + np.float32(leg.floor_frequencies[row, column]) * inverse)
            leg.floors[row] = np.float32(score)


@compiled
def lexical_score(leg: LexicalLeg, fusion: Fusion, row: int, new: Newcomers, at: int) -> Any:
    """BM25 of a newcomer for the question of a row, summed up as that of a place is."""
    inverse, own = fusion.inverses[new.lengths[at]], 0.0
    for column in range(leg.terms.shape[1]):
        term = leg.terms[row, column]
        if term == 0:
            break
        weight = fusion.weights[term] * leg.repeats[row, column]
        own += weight - weight / (_ONE + np.float32(new.frequencies[at, term]) * inverse)
    return np.float32(own)


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
def score_lexical(leg: LexicalLeg, fusion: Fusion, row: int, scratch: Scratch) -> None:
    """BM25 of the places of a row, minus infinity where there is nobody. The arithmetic is that of ``bm25.share``."""
    places, sums, inverses = leg.ids.shape[1], scratch.sums, scratch.inverses
    for place in range(places):
        inverses[place] = fusion.inverses[leg.lengths[row, place]]
        sums[place] = 0.0
    for column in range(leg.terms.shape[1]):
        term = leg.terms[row, column]
        if term == 0:
            break
        weight = fusion.weights[term] * leg.repeats[row, column]
        start = leg.starts[row] + column * places
        counts = leg.frequencies[start : start + places]
        for place in range(places):
            sums[place] += weight - weight / (_ONE + np.float32(counts[place]) * inverses[place])
    for place in range(places):
        scratch.scores[place] = _LOWEST if leg.ids[row, place] == NOBODY else np.float32(sums[place])


@summed
def product(one: Floats, other: Floats) -> Any:
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
