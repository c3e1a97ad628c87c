"""Evaluation time grows linearly with the number of cached answers. Compares ratios within one run."""

import random
import statistics
import time
from collections import Counter

import numpy as np

from schemas.index import StoredChunk
from schemas.search import Access, HybridSearch
from streams.core.invalidation.bm25 import idf, inverse_norms, length_code, term_score
from streams.core.invalidation.compiling import compile_loops
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics, TermCounts
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.fused import fused_top

DIMENSION, WORDS, PASSAGES, KEPT, FUSED, TOP_K, RRF_K = 128, 400, 1_500, 80, 50, 5, 60
FEW, MANY = 4_000, 16_000
ACCESS = Access("acme")


def unit(rng):
    vector = rng.normal(size=DIMENSION).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Corpus:
    """Passages with Zipf-distributed words, and evidence of answers over them."""

    def __init__(self):
        self.rng = np.random.default_rng(5)
        self.random = random.Random(5)
        self.weights = [1 / rank for rank in range(1, WORDS + 1)]
        self.passages = {f"p{number}": self.passage(f"p{number}", 1) for number in range(PASSAGES)}
        held = Counter(term for one in self.passages.values() for term in one.terms.frequencies)
        lengths = [one.terms.length for one in self.passages.values()]
        self.statistics = Statistics(PASSAGES, sum(lengths), held)
        self.names = list(self.passages)
        self.vectors = np.stack([one.vector for one in self.passages.values()])
        inverses = inverse_norms(self.statistics.average_length)[[length_code(length) for length in lengths]]
        self.shares = {}
        for term in held:
            counts = np.array([one.terms.frequencies.get(term, 0) for one in self.passages.values()], dtype=np.float32)
            self.shares[term] = term_score(idf(np.array([held[term]]), PASSAGES)[0], counts, inverses)

    def passage(self, name, version):
        words = self.random.choices(range(WORDS), self.weights, k=self.random.randint(40, 120))
        chunk = StoredChunk(
            chunk_id=name, tenant="acme", document_id=name, version=version, position="documents.v1-0:0",
            text="", text_sha256="", start=0, end=0,
        )  # fmt: skip
        return Passage(chunk, unit(self.rng), TermCounts.of(Counter(f"w{word}" for word in words)))

    def evidence(self, key):
        vector = unit(self.rng)
        terms = Counter(f"w{word}" for word in self.random.choices(range(WORDS), self.weights, k=5))
        by_vector = (1 + self.vectors @ vector) / 2
        by_terms = sum(self.shares[term] * repeats for term, repeats in terms.items())
        vector_candidates = [(self.names[at], float(by_vector[at])) for at in np.argsort(-by_vector)[:KEPT]]
        lexical_candidates = [
            (self.names[at], self.passages[self.names[at]].terms)
            for at in np.argsort(-by_terms)[:KEPT]
            if by_terms[at] > 0
        ]
        best = fused_top(
            [name for name, _ in vector_candidates],
            [name for name, _ in lexical_candidates],
            TOP_K,
            candidates=FUSED,
            rrf_k=RRF_K,
        )
        return Evidence(
            key=key,
            search=HybridSearch(key, vector, ACCESS, KEPT),
            terms=terms,
            top_k=TOP_K,
            sources=tuple((name, 1) for name in sorted(best)),
            vector_candidates=tuple(vector_candidates),
            lexical_candidates=tuple(lexical_candidates),
        )


def filled(corpus, count):
    policy = Exact(dimension=DIMENSION, kept=KEPT, fused=FUSED, rrf_k=RRF_K)
    for number in range(count):
        policy.put(corpus.evidence(f"q{number}"))
    return policy


def test_time_is_linear_and_memory_bounded():
    compile_loops()
    corpus = Corpus()
    few, many = filled(corpus, FEW), filled(corpus, MANY)
    changes = [
        Change(
            frozenset(f"p{number * 5 + at}" for at in range(5)),
            tuple(corpus.passage(f"n{number * 5 + at}", 2) for at in range(5)),
        )
        for number in range(12)
    ]
    ratios = []
    for change in changes:
        times_s = []
        for policy in (few, many):
            began_s = time.process_time()
            policy.evaluate(change, corpus.statistics)
            times_s.append(time.process_time() - began_s)
        ratios.append(times_s[1] / times_s[0])
    assert len(many) > MANY / 2, "most answers were evaluated to the end"
    # Four times the answers; the fixed cost of a change lowers the ratio.
    assert statistics.median(ratios) < 6
    assert many.size_bytes / len(many) < 6_000
