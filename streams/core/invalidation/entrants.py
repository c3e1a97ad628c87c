"""Which new passage comes into an answer, and where it ranks: for people, one answer at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from schemas.search import allows
from streams.core.invalidation.bm25 import idf, inverse_norms, length_code, share
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts


@dataclass(frozen=True, slots=True)
class Entrant:
    """A new passage among those of an answer.

    Attributes:
        passage: see there.
        vector_rank: its place in the vector leg, from 1; None where it is not among those that are fused.
        lexical_rank: the same of the lexical leg.
    """

    passage: Passage
    vector_rank: int | None
    lexical_rank: int | None


def entrant(evidence: Evidence, change: Change, statistics: Statistics, *, fused: int, rrf_k: int) -> Entrant | None:
    """The highest new passage of the answer's ``top_k`` after a change; None where none of them is there.

    Args:
        evidence: of the answer, from before the change.
        change: what is gone and what is new.
        statistics: of after the change, with the frequencies of all terms of the question.
        fused: places of a window that are fused.
        rrf_k: constant of the fusion.
    """
    new = {one.chunk.chunk_id: one for one in change.added if allows(evidence.search, one.chunk)}
    gone = change.removed.union(passage.chunk.chunk_id for passage in change.added)
    depth = max(fused, evidence.top_k)
    question = evidence.search.vector
    vector = {chunk_id: score for chunk_id, score in evidence.vector_window if chunk_id not in gone}
    vector |= {chunk_id: (1 + float(one.vector @ question)) / 2 for chunk_id, one in new.items()}
    counts = {chunk_id: terms for chunk_id, terms in evidence.lexical_window if chunk_id not in gone}
    counts |= {
        chunk_id: one.terms
        for chunk_id, one in new.items()
        if not evidence.terms.keys().isdisjoint(one.terms.frequencies)
    }
    lexical = dict(zip(counts, _bm25(evidence.terms, counts.values(), statistics), strict=True))
    by_vector, by_terms = _ranks(vector, depth), _ranks(lexical, depth)
    shares = {
        chunk_id: sum(1 / (rrf_k + ranks[chunk_id]) for ranks in (by_vector, by_terms) if chunk_id in ranks)
        for chunk_id in by_vector.keys() | by_terms.keys()
    }
    order = sorted(shares, key=lambda chunk_id: (-shares[chunk_id], by_vector.get(chunk_id, depth + 1)))
    for chunk_id in order[: evidence.top_k]:
        if chunk_id in new:
            return Entrant(new[chunk_id], by_vector.get(chunk_id), by_terms.get(chunk_id))
    return None


def _bm25(question: Mapping[str, int], passages: Iterable[TermCounts], statistics: Statistics) -> list[float]:
    weights = idf(np.array([statistics.frequencies.get(term, 0) for term in question]), statistics.document_count)
    weights *= np.array(list(question.values()), dtype=np.float32)
    inverses = inverse_norms(statistics.average_length)
    found = []
    for one in passages:
        held = np.array([one.frequencies.get(term, 0) for term in question], dtype=np.float32)
        shares = share(weights, held, inverses[length_code(one.length)])
        found.append(float(np.float32(shares.sum(dtype=np.float64))))
    return found


def _ranks(scores: Mapping[str, float], depth: int) -> dict[str, int]:
    order = sorted(scores, key=lambda chunk_id: -scores[chunk_id])
    return {chunk_id: rank for rank, chunk_id in enumerate(order[:depth], start=1)}
