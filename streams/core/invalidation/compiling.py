"""Compiles the inner loops before they are needed."""

import numpy as np

from schemas.index import StoredChunk
from schemas.search import Access, HybridSearch
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts
from streams.core.invalidation.exact import Exact


def compile_loops() -> None:
    """Compile the inner loops: takes some seconds once, then loads them from the user's cache."""
    chunk = StoredChunk(
        chunk_id="a",
        tenant="a",
        document_id="a",
        version=1,
        position="documents.v1-0:0",
        text="",
        text_sha256="",
        start=0,
        end=0,
    )
    passage = Passage(chunk, np.ones(1, dtype=np.float32), TermCounts.of({"a": 1}))
    policy = Exact(dimension=1, kept=2, fused=1, rrf_k=1)
    policy.put(
        Evidence(
            key="a",
            search=HybridSearch("a", passage.vector, Access("a"), 3),
            terms={"a": 1},
            top_k=1,
            sources=(("b", 1),),
            vector_candidates=(("b", 0.0),),
            lexical_candidates=(("b", passage.terms),),
        )
    )
    statistics = Statistics(1, 1, {"a": 1})
    policy.altered(("a",), statistics)
    policy.evaluate(Change(frozenset(("c",)), (passage,)), statistics)
    policy.evaluate(Change(frozenset(("a",)), ()), statistics)
