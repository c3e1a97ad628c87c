"""Explains which new passage enters an answer, and at which rank. Evaluates one answer at a time."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from schemas.search import allows
from streams.core.invalidation.bm25 import idf, inverse_norms, length_code, term_score
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts


@dataclass(frozen=True, slots=True)
class Entrant:
    """A new passage of an answer.

    Attributes:
        passage: the passage.
        vector_rank: rank in the vector search, from 1; None if it is not a fused candidate there.
        lexical_rank: the same for the lexical search.
    """

    passage: Passage
    vector_rank: int | None
    lexical_rank: int | None


def entrant(evidence: Evidence, change: Change, statistics: Statistics, *, fused: int, rrf_k: int) -> Entrant | None:
    """The highest new passage in the answer's top k after a change; None if there is none.

    Args:
        evidence: evidence of the answer before the change.
        change: removed and added passages.
        statistics: statistics after the change, with the frequencies of all terms of the question.
        fused: number of candidates of each retriever that are fused.
        rrf_k: constant of the fusion.
    """
    new = {one.chunk.chunk_id: one for one in change.added if allows(evidence.search, one.chunk)}
    outdated = change.removed.union(passage.chunk.chunk_id for passage in change.added)
    depth = max(fused, evidence.top_k)
    question = evidence.search.vector
    vector = {chunk_id: score for chunk_id, score in evidence.vector_candidates if chunk_id not in outdated}
    vector |= {chunk_id: (1 + float(one.vector @ question)) / 2 for chunk_id, one in new.items()}
    counts = {chunk_id: terms for chunk_id, terms in evidence.lexical_candidates if chunk_id not in outdated}
    counts |= {
        chunk_id: one.terms
        for chunk_id, one in new.items()
        if not evidence.terms.keys().isdisjoint(one.terms.frequencies)
    }
    lexical = dict(zip(counts, _bm25(evidence.terms, counts.values(), statistics), strict=True))
    vector_ranks, lexical_ranks = _ranks(vector, depth), _ranks(lexical, depth)
    scores = {
        chunk_id: sum(1 / (rrf_k + ranks[chunk_id]) for ranks in (vector_ranks, lexical_ranks) if chunk_id in ranks)
        for chunk_id in vector_ranks.keys() | lexical_ranks.keys()
    }
    order = sorted(scores, key=lambda chunk_id: (-scores[chunk_id], vector_ranks.get(chunk_id, depth + 1)))
    for chunk_id in order[: evidence.top_k]:
        if chunk_id in new:
            return Entrant(new[chunk_id], vector_ranks.get(chunk_id), lexical_ranks.get(chunk_id))
    return None


def _bm25(question: Mapping[str, int], passages: Iterable[TermCounts], statistics: Statistics) -> list[float]:
    weights = idf(np.array([statistics.frequencies.get(term, 0) for term in question]), statistics.document_count)
    weights *= np.array(list(question.values()), dtype=np.float32)
    inverses = inverse_norms(statistics.average_length)
    scores = []
    for terms in passages:
        frequencies = np.array([terms.frequencies.get(term, 0) for term in question], dtype=np.float32)
        term_scores = term_score(weights, frequencies, inverses[length_code(terms.length)])
        scores.append(float(np.float32(term_scores.sum(dtype=np.float64))))
    return scores


def _ranks(scores: Mapping[str, float], depth: int) -> dict[str, int]:
    order = sorted(scores, key=lambda chunk_id: -scores[chunk_id])
    return {chunk_id: rank for rank, chunk_id in enumerate(order[:depth], start=1)}
