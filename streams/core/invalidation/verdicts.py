"""Compiled evaluation of answers whose candidates have changed. Fuses only as much as the decision needs.

Of equal scores the older passage ranks first, as in an index: first the candidates of the fill in their order, then
late candidates in the order in which they were added.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from streams.core.invalidation.compiled import (
    EMPTY,
    AnswerColumns,
    Bits,
    Floats,
    Ints,
    LexicalCandidates,
    Scoring,
    Scratch,
    VectorCandidates,
    compiled,
    score_lexical,
    slot_of,
)

KEEP: Final = 0
WATCH: Final = 1
SHORT: Final = 2
DROP: Final = 3

_TIE: Final = 1e-12
"""Tie breaker by vector rank: far smaller than the difference between the scores of any two pairs of ranks."""
EDGE_RANKS: Final = 2
"""Number of ranks around the last fused one that a passage can cross when statistics change slightly."""
_MARGIN: Final = 5e-4
"""Margin of fused scores. A difference of one rank among the first twenty changes a score by 1.5e-4 to 2.6e-4."""
_UNRANKED: Final = 1 << 30


Verdicts = NDArray[np.uint8]


class _RowCandidates(NamedTuple):
    """Candidates of one answer: ids, scores and late bits of each retriever, the depth of fusion, and its constant."""

    vector_ids: Ints
    vector_scores: Floats
    vector_late: Bits
    lexical_ids: Ints
    lexical_scores: Floats
    lexical_late: Bits
    depth: int
    rrf_k: int


@compiled
def evaluate_row(
    row: int,
    vector: VectorCandidates,
    lexical: LexicalCandidates,
    answers: AnswerColumns,
    scoring: Scoring,
    scratch: Scratch,
) -> int:
    """Evaluate an answer, none of whose sources was removed.

    ``DROP`` if the fused top k contains a late passage that is not a source. The fusion is computed only if such a
    passage scores at least as high as the lowest source. ``WATCH`` if a small change of statistics can bring a late
    passage there. ``SHORT`` if fewer candidates are known than are fused, or if a source is no candidate. Otherwise
    ``KEEP``.

    Args:
        row: row of the answer.
        vector: vector candidates.
        lexical: lexical candidates.
        answers: columns of the answers.
        scoring: current statistics.
        scratch: contains the current lexical scores of the row.
    """
    top = int(answers.top[row])
    candidates = _row_candidates(row, top, vector, lexical, scoring, scratch.scores)
    if _is_short(candidates.vector_scores, vector.floors[row], candidates.depth) or _is_short(
        candidates.lexical_scores, lexical.floors[row], candidates.depth
    ):
        return SHORT
    sources = answers.sources[row]
    lowest, lowest_narrow, unranked = _lowest_source(candidates, sources, top)
    if unranked:  # The score of a source that is no candidate is unknown.
        return SHORT
    highest, highest_wide = _highest_late(candidates, sources, lowest_narrow - _MARGIN)
    if highest > 0 and highest >= lowest and _has_late_passage(candidates, sources, lowest, top, scratch):
        return DROP
    return WATCH if highest_wide > 0 and highest_wide >= lowest_narrow - _MARGIN else KEEP


@compiled
def compare_rows(
    rows: Ints,
    vector: VectorCandidates,
    lexical: LexicalCandidates,
    answers: AnswerColumns,
    scoring: Scoring,
    scratch: Scratch,
    out: Verdicts,
) -> None:
    """Whether the sources equal the fused top k: ``KEEP`` or ``DROP`` for each of ``rows``."""
    for at in range(len(rows)):
        row, top = rows[at], int(answers.top[rows[at]])
        sources = answers.sources[row]
        score_lexical(lexical, scoring, row, scratch)
        found = _fused_top(_row_candidates(row, top, vector, lexical, scoring, scratch.scores), 0.0, top, scratch)
        cited, held = 0, 0
        for source in sources:
            cited += source != EMPTY
        for number in scratch.best[:found]:
            held += slot_of(sources, number) != EMPTY
        out[at] = KEEP if cited == held == found else DROP


@compiled
def _row_candidates(
    row: int, top: int, vector: VectorCandidates, lexical: LexicalCandidates, scoring: Scoring, lexical_scores: Floats
) -> _RowCandidates:
    return _RowCandidates(
        vector.ids[row],
        vector.scores[row],
        vector.late[row],
        lexical.ids[row],
        lexical_scores,
        lexical.late[row],
        max(top, scoring.fused),
        scoring.rrf_k,
    )


@compiled
def _lowest_source(candidates: _RowCandidates, sources: Ints, top: int) -> tuple[float, float, bool]:
    """Lowest score of a source; the same with fewer fused ranks; whether a source is in no candidate list."""
    lowest, lowest_narrow, count, unranked = np.inf, np.inf, 0, False
    for source in sources:
        if source != EMPTY:
            count += 1
            vector_rank = _rank_of(source, candidates.vector_ids, candidates.vector_scores, candidates.vector_late)
            lexical_rank = _rank_of(source, candidates.lexical_ids, candidates.lexical_scores, candidates.lexical_late)
            unranked = unranked or (vector_rank == _UNRANKED and lexical_rank == _UNRANKED)
            lowest = min(lowest, _fused_score(vector_rank, lexical_rank, candidates.depth, candidates.rrf_k))
            lowest_narrow = min(
                lowest_narrow, _fused_score(vector_rank, lexical_rank, candidates.depth - EDGE_RANKS, candidates.rrf_k)
            )
    # An answer with fewer than k sources accepts any passage.
    return (lowest, lowest_narrow, unranked) if count >= top else (0.0, 0.0, unranked)


@compiled
def _highest_late(candidates: _RowCandidates, sources: Ints, min_score: float) -> tuple[float, float]:
    """Highest score of a late passage that is not a source; the same with more fused ranks. Below ``min_score``, 0."""
    highest, highest_wide = 0.0, 0.0
    # If a single retriever cannot reach the score, the passage must be a candidate of both. The late ones among them
    # are then found in the vector candidates.
    in_both = min_score > 1 / (candidates.rrf_k + 1) + _TIE
    for retriever in range(1 if in_both else 2):
        in_vector = retriever == 0
        late = candidates.vector_late if in_vector else candidates.lexical_late
        ids = candidates.vector_ids if in_vector else candidates.lexical_ids
        scores = candidates.vector_scores if in_vector else candidates.lexical_scores
        for slot in range(len(ids)):
            number = ids[slot]
            if not _is_set(late, slot) or (in_both and slot_of(candidates.lexical_ids, number) == EMPTY):
                continue
            rank = _rank(ids, scores, late, slot)
            # The rank in one retriever can already exclude a passage.
            if (
                rank > candidates.depth + EDGE_RANKS
                or 1 / (candidates.rrf_k + rank) + 1 / (candidates.rrf_k + 1) < min_score
            ):
                continue
            if slot_of(sources, number) != EMPTY:
                continue
            vector_rank, lexical_rank = rank, rank
            if in_vector:
                lexical_rank = _rank_of(
                    number, candidates.lexical_ids, candidates.lexical_scores, candidates.lexical_late
                )
            else:
                vector_rank = _rank_of(number, candidates.vector_ids, candidates.vector_scores, candidates.vector_late)
            highest = max(highest, _fused_score(vector_rank, lexical_rank, candidates.depth, candidates.rrf_k))
            highest_wide = max(
                highest_wide, _fused_score(vector_rank, lexical_rank, candidates.depth + EDGE_RANKS, candidates.rrf_k)
            )
    return highest, highest_wide


@compiled
def _has_late_passage(candidates: _RowCandidates, sources: Ints, min_score: float, top: int, scratch: Scratch) -> bool:
    """Whether the fused top k, all of which score at least ``min_score``, contains a late passage that is no source."""
    for number in scratch.best[: _fused_top(candidates, min_score, top, scratch)]:
        if slot_of(sources, number) == EMPTY and (
            _is_late(candidates.vector_ids, candidates.vector_late, number)
            or _is_late(candidates.lexical_ids, candidates.lexical_late, number)
        ):
            return True
    return False


@compiled
def _is_short(scores: Floats, floor: float, wanted: int) -> bool:
    """Whether fewer than ``wanted`` candidates are known although more exist."""
    if not np.isfinite(floor):
        return False
    known = np.int32(0)
    for slot in range(len(scores)):
        known = np.int32(known + np.int32(scores[slot] >= floor))
    return bool(known < wanted)


@compiled
def _fused_score(vector_rank: int, lexical_rank: int, depth: int, rrf_k: int) -> float:
    """Fused score of two ranks. Ranks beyond ``depth`` do not count."""
    score = 0.0
    if vector_rank <= depth:
        score += 1 / (rrf_k + vector_rank) + _TIE / vector_rank
    if lexical_rank <= depth:
        score += 1 / (rrf_k + lexical_rank)
    return score


@compiled
def _fused_top(candidates: _RowCandidates, min_score: float, top: int, scratch: Scratch) -> int:
    """Write the best passages with fused scores of at least ``min_score`` to ``scratch.best``; their number."""
    best, scores = scratch.best, scratch.fused
    count, other_retriever = 0, 1 / (candidates.rrf_k + 1)
    for at in range(len(candidates.vector_ids) + len(candidates.lexical_ids)):
        in_vector = at < len(candidates.vector_ids)
        slot = at if in_vector else at - len(candidates.vector_ids)
        number = candidates.vector_ids[slot] if in_vector else candidates.lexical_ids[slot]
        if number == EMPTY:
            continue
        vector_rank, lexical_rank = _UNRANKED, _UNRANKED
        if in_vector:
            vector_rank = _rank(candidates.vector_ids, candidates.vector_scores, candidates.vector_late, slot)
        else:
            lexical_rank = _rank(candidates.lexical_ids, candidates.lexical_scores, candidates.lexical_late, slot)
        if _fused_score(vector_rank, lexical_rank, candidates.depth, candidates.rrf_k) + other_retriever < min_score:
            continue
        if in_vector:
            lexical_rank = _rank_of(number, candidates.lexical_ids, candidates.lexical_scores, candidates.lexical_late)
        elif slot_of(candidates.vector_ids, number) != EMPTY:
            continue
        score = _fused_score(vector_rank, lexical_rank, candidates.depth, candidates.rrf_k)
        if score < min_score or score == 0 or (count == top and score <= scores[count - 1]):
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
def _rank(ids: Ints, scores: Floats, late: Bits, slot: int) -> int:
    """Rank of the passage in a slot. Of equal scores the older passage ranks first, as in an index."""
    score = scores[slot]
    above, up_to = np.int32(0), np.int32(0)  # in the width of the compared values, so that the loop is vectorised
    for other in range(len(scores)):
        above = np.int32(above + np.int32(scores[other] > score))
        up_to = np.int32(up_to + np.int32(scores[other] >= score))
    if up_to > above + 1:
        age = _age(ids, late, slot)
        for other in range(len(scores)):
            if scores[other] == score and _age(ids, late, other) < age:
                above += 1
    return int(above) + 1


@compiled
def _age(ids: Ints, late: Bits, slot: int) -> int:
    """Age of a passage: candidates of the fill in the order of slots, then late ones in the order of their numbers."""
    return int(len(ids) + ids[slot]) if _is_set(late, slot) else slot


@compiled
def _rank_of(number: int, ids: Ints, scores: Floats, late: Bits) -> int:
    """Rank of a passage; ``_UNRANKED`` if it is no candidate."""
    slot = slot_of(ids, number)
    return _UNRANKED if slot == EMPTY else _rank(ids, scores, late, slot)


@compiled
def _is_late(ids: Ints, late: Bits, number: int) -> bool:
    slot = slot_of(ids, number)
    return bool(slot != EMPTY and _is_set(late, slot))


@compiled
def _is_set(late: Bits, slot: int) -> bool:
    return bool((late[slot >> 6] >> np.uint64(slot & 63)) & np.uint64(1))
