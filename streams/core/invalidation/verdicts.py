"""Verdicts over answers whose windows a change has touched: fused anew as far as it takes to tell. Compiled.

Of equal scores the older passage comes first, as in an index: what an answer was made of in the order in which it stood
there, then what came later in the order in which it came.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import (
    NOBODY,
    Answered,
    Bits,
    Floats,
    Fusion,
    Ints,
    LexicalLeg,
    Scratch,
    VectorLeg,
    compiled,
    place_of,
    score_lexical,
)

KEEP: Final = 0
WATCH: Final = 1
SHORT: Final = 2
DROP: Final = 3

_TIE: Final = 1e-12
"""Raises a score by its vector rank: far less than the scores of two different pairs of ranks differ."""
EDGE: Final = 2
"""Places beside the last that is fused from which a passage may come in, or go out, as statistics move by little."""
_MARGIN: Final = 5e-4
"""Of fused scores; moving by a place among the first twenty makes a difference of 1.5e-4 to 2.6e-4."""
_NOWHERE: Final = 1 << 30


Verdicts = NDArray[np.uint8]


class _Windows(NamedTuple):
    """One answer's windows: ids, scores and late bits of each leg; what is fused of them, and by which constant."""

    vector_ids: Ints
    by_vector: Floats
    vector_late: Bits
    lexical_ids: Ints
    by_terms: Floats
    lexical_late: Bits
    deepest: int
    rrf_k: int


@compiled
def judge_row(
    row: int,
    vector: VectorLeg,
    lexical: LexicalLeg,
    answered: Answered,
    fusion: Fusion,
    scratch: Scratch,
) -> int:
    """What became of an answer whose sources are all there.

    ``DROP`` if a late passage is in the fused top k, and is not one of the sources. None is if each scores less than
    every source; where one does not, all passages are fused. ``WATCH`` if statistics that move by little may bring one
    there, ``SHORT`` if less is known of a leg than is fused, and else ``KEEP``.

    Args:
        row: of the answer.
        vector: windows.
        lexical: likewise.
        answered: whose they are.
        fusion: statistics of now.
        scratch: has scores of the row's lexical window by these.
    """
    top = int(answered.top[row])
    own = _windows(row, top, vector, lexical, fusion, scratch.scores)
    if _is_short(own.by_vector, vector.floors[row], own.deepest) or _is_short(
        own.by_terms, lexical.floors[row], own.deepest
    ):
        return SHORT
    sources = answered.sources[row]
    lowest, fear, lost = _lowest_source(own, sources, top)
    if lost:  # A source that neither window holds would not be missed when it is removed.
        return SHORT
    highest, hope = _highest_late(own, sources, fear - _MARGIN)
    if highest > 0 and highest >= lowest and _shows_late(own, sources, lowest, top, scratch):
        return DROP
    return WATCH if hope > 0 and hope >= fear - _MARGIN else KEEP


@compiled
def compare_rows(
    rows: Ints,
    vector: VectorLeg,
    lexical: LexicalLeg,
    answered: Answered,
    fusion: Fusion,
    scratch: Scratch,
    out: Verdicts,
) -> None:
    """Whether the sources are the fused top k: ``KEEP`` or ``DROP`` for each of ``rows``."""
    for at in range(len(rows)):
        row, top = rows[at], int(answered.top[rows[at]])
        sources = answered.sources[row]
        score_lexical(lexical, fusion, row, scratch)
        found = _top(_windows(row, top, vector, lexical, fusion, scratch.scores), 0.0, top, scratch)
        cited, held = 0, 0
        for source in sources:
            cited += source != NOBODY
        for number in scratch.best[:found]:
            held += place_of(sources, number) != NOBODY
        out[at] = KEEP if cited == held == found else DROP


@compiled
def _windows(row: int, top: int, vector: VectorLeg, lexical: LexicalLeg, fusion: Fusion, by_terms: Floats) -> _Windows:
    return _Windows(
        vector.ids[row],
        vector.scores[row],
        vector.late[row],
        lexical.ids[row],
        by_terms,
        lexical.late[row],
        max(top, fusion.places),
        fusion.rrf_k,
    )


@compiled
def _lowest_source(own: _Windows, sources: Ints, top: int) -> tuple[float, float, bool]:
    """The lowest score of a source; the same with a narrower edge; whether a source is in no window."""
    lowest, fear, count, lost = np.inf, np.inf, 0, False
    for source in sources:
        if source != NOBODY:
            count += 1
            first = _rank_of(source, own.vector_ids, own.by_vector, own.vector_late)
            second = _rank_of(source, own.lexical_ids, own.by_terms, own.lexical_late)
            lost = lost or (first == _NOWHERE and second == _NOWHERE)
            lowest = min(lowest, _share(first, second, own.deepest, own.rrf_k))
            fear = min(fear, _share(first, second, own.deepest - EDGE, own.rrf_k))
    # An answer with room for more takes whatever comes.
    return (lowest, fear, lost) if count >= top else (0.0, 0.0, lost)


@compiled
def _highest_late(own: _Windows, sources: Ints, least: float) -> tuple[float, float]:
    """The highest score of a late passage that is no source; the same with a wider edge. Less than ``least`` is 0."""
    highest, hope = 0.0, 0.0
    # Where no leg alone makes as much, a passage has to be in both; and one that is late is so in the vector leg too.
    in_both = least > 1 / (own.rrf_k + 1) + _TIE
    for leg in range(1 if in_both else 2):
        in_vector = leg == 0
        late = own.vector_late if in_vector else own.lexical_late
        ids = own.vector_ids if in_vector else own.lexical_ids
        scores = own.by_vector if in_vector else own.by_terms
        for place in range(len(ids)):
            number = ids[place]
            if not _is_set(late, place) or (in_both and place_of(own.lexical_ids, number) == NOBODY):
                continue
            rank = _rank(ids, scores, late, place)
            # One leg alone tells of some that they are too far behind.
            if rank > own.deepest + EDGE or 1 / (own.rrf_k + rank) + 1 / (own.rrf_k + 1) < least:
                continue
            if place_of(sources, number) != NOBODY:
                continue
            first, second = rank, rank
            if in_vector:
                second = _rank_of(number, own.lexical_ids, own.by_terms, own.lexical_late)
            else:
                first = _rank_of(number, own.vector_ids, own.by_vector, own.vector_late)
            highest = max(highest, _share(first, second, own.deepest, own.rrf_k))
            hope = max(hope, _share(first, second, own.deepest + EDGE, own.rrf_k))
    return highest, hope


@compiled
def _shows_late(own: _Windows, sources: Ints, least: float, top: int, scratch: Scratch) -> bool:
    """Whether the fused top k, all of which scores ``least`` or more, has a late passage that is no source."""
    for number in scratch.best[: _top(own, least, top, scratch)]:
        if place_of(sources, number) == NOBODY and (
            _is_late(own.vector_ids, own.vector_late, number) or _is_late(own.lexical_ids, own.lexical_late, number)
        ):
            return True
    return False


@compiled
def _is_short(scores: Floats, floor: float, wanted: int) -> bool:
    """Whether less of an order is known than is wanted, although there is more."""
    if not np.isfinite(floor):
        return False
    known = np.int32(0)
    for place in range(len(scores)):
        known = np.int32(known + np.int32(scores[place] >= floor))
    return bool(known < wanted)


@compiled
def _share(by_vector: int, by_terms: int, deepest: int, rrf_k: int) -> float:
    """Fused score of two ranks, of which those below ``deepest`` do not count."""
    score = 0.0
    if by_vector <= deepest:
        score += 1 / (rrf_k + by_vector) + _TIE / by_vector
    if by_terms <= deepest:
        score += 1 / (rrf_k + by_terms)
    return score


@compiled
def _top(own: _Windows, least: float, top: int, scratch: Scratch) -> int:
    """Note as best the ``top`` passages of the best fused scores, none of less than ``least``; how many there are."""
    best, scores = scratch.best, scratch.fused
    count, other_leg = 0, 1 / (own.rrf_k + 1)
    for at in range(len(own.vector_ids) + len(own.lexical_ids)):
        in_vector = at < len(own.vector_ids)
        place = at if in_vector else at - len(own.vector_ids)
        number = own.vector_ids[place] if in_vector else own.lexical_ids[place]
        if number == NOBODY:
            continue
        first, second = _NOWHERE, _NOWHERE
        if in_vector:
            first = _rank(own.vector_ids, own.by_vector, own.vector_late, place)
        else:
            second = _rank(own.lexical_ids, own.by_terms, own.lexical_late, place)
        if _share(first, second, own.deepest, own.rrf_k) + other_leg < least:
            continue
        if in_vector:
            second = _rank_of(number, own.lexical_ids, own.by_terms, own.lexical_late)
        elif place_of(own.vector_ids, number) != NOBODY:
            continue
        score = _share(first, second, own.deepest, own.rrf_k)
        if score < least or score == 0 or (count == top and score <= scores[count - 1]):
            continue
        if count < top:
            count += 1
        to = count - 1
        while to > 0 and scores[to - 1] < score:
            scores[to], best[to] = scores[to - 1], best[to - 1]
            to -= 1
        scores[to], best[to] = score, number
    return count


@compiled
def _rank(ids: Ints, scores: Floats, late: Bits, place: int) -> int:
    """Rank of what stands in a place. Of equal scores the older comes first, as an index has it."""
    own = scores[place]
    above, up_to = np.int32(0), np.int32(0)  # in the width of what is compared, so that many are at once
    for other in range(len(scores)):
        above = np.int32(above + np.int32(scores[other] > own))
        up_to = np.int32(up_to + np.int32(scores[other] >= own))
    if up_to > above + 1:
        born = _born(ids, late, place)
        for other in range(len(scores)):
            if scores[other] == own and _born(ids, late, other) < born:
                above += 1
    return int(above) + 1


@compiled
def _born(ids: Ints, late: Bits, place: int) -> int:
    """What an answer was made of stands in the order of its places, before what came later in the order of numbers."""
    return int(len(ids) + ids[place]) if _is_set(late, place) else place


@compiled
def _rank_of(number: int, ids: Ints, scores: Floats, late: Bits) -> int:
    """Rank of a passage, below every other where it is not."""
    place = place_of(ids, number)
    return _NOWHERE if place == NOBODY else _rank(ids, scores, late, place)


@compiled
def _is_late(ids: Ints, late: Bits, number: int) -> bool:
    place = place_of(ids, number)
    return bool(place != NOBODY and _is_set(late, place))


@compiled
def _is_set(late: Bits, place: int) -> bool:
    return bool((late[place >> 6] >> np.uint64(place & 63)) & np.uint64(1))
