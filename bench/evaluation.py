"""Time of exact invalidation to evaluate a change, by the number of cached answers.

Documents, changes, questions, vectors, terms and candidates are real. For more answers than questions, questions are
repeated with slightly rotated vectors, so that no two answers have the same candidates. Each size starts with answers
to every question over the snapshot and evaluates the same changes, the first of the history that add a passage.
Invalidated answers are not replaced.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from os import environ
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from numpy.typing import NDArray

from bench.corpus import ACCESS, Corpus, parts_of, read_questions
from bench.ground_truth import AnalyzedQuestion, GroundTruth
from bench.installation import BenchmarkFailed
from freshline.figures import extremes
from freshline.installation import settings_from
from infra.local import Stack
from schemas.search import RRF_K, HybridSearch
from streams.core.invalidation.compiling import compile_loops
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.fused import fused_top

_TOP_K: Final = 5
_NOISE: Final = 0.01
"""Standard deviation of the noise on each component of a unit vector."""
_SEED: Final = 1
_VECTORS_AT_ONCE: Final = 1_000
_GROUPS: Final = ((1, 1), (2, 9), (10, None))
"""Changes are grouped by the number of added passages: minimum, maximum."""
_NO_CHANGE: Final = Change(frozenset(), ())

Say = Callable[[str, str], None]


async def bench_evaluation(
    stack: Stack, events: Path, questions: Sequence[Path], *, entries: Sequence[int], changes: int, say: Say
) -> list[dict[str, Any]]:
    """Evaluate the first changes of a history. One object of figures for each number of answers.

    Args:
        stack: a running stack, whose index produces the terms.
        events: the history; its leading creations are the snapshot.
        questions: JSON Lines files with ``text``; .jsonl or .jsonl.gz.
        entries: numbers of answers.
        changes: number of changes.
        say: reports progress.

    Raises:
        BenchmarkFailed: the files cannot be used.
        BadEventFile: a line is no event.
    """
    compile_loops()
    texts = read_questions(questions)
    snapshot, history = parts_of(events, None)
    settings = settings_from(stack.environment() | {"FRESHLINE_NAMESPACE": f"bench-{secrets.token_hex(4)}"})
    async with Corpus.opened(settings) as corpus:
        say("snapshot", f"{len(snapshot)} documents, {len(texts)} questions")
        asked = [await corpus.question(text) for text in texts]
        kept = settings.query.candidates_kept
        passages = _AnsweredPassages(asked, kept=kept, fused=settings.query.candidates, rrf_k=RRF_K)
        for event in snapshot:
            passages.apply(await corpus.change(event))
        changes_evaluated: list[Change] = []
        for event in history:
            change = await corpus.change(event)
            if change.added:
                changes_evaluated.append(change)
            if len(changes_evaluated) == changes:
                break
    if not changes_evaluated:
        raise BenchmarkFailed(f"{events.name} has no change that adds a passage")
    statistics = passages.statistics()
    figures = []
    for count in entries:
        say(f"{count} answers", "filling")
        before_bytes = psutil.Process().memory_info().rss
        policy = Exact(dimension=len(asked[0].vector), kept=kept, fused=settings.query.candidates, rrf_k=RRF_K)
        for evidence in passages.evidence(count):
            policy.put(evidence)
        policy.evaluate(_NO_CHANGE, statistics)
        size_bytes, resident_bytes = policy.size_bytes, psutil.Process().memory_info().rss - before_bytes
        figures.append(
            {
                "entries": count,
                **_timed(policy, changes_evaluated, passages),
                "entries_at_end": len(policy),
                "bytes_per_entry": round(size_bytes / count),
                "resident_bytes_per_entry": round(resident_bytes / count),
                "distinct_questions": len(texts),
                "passages": len(passages),
                "candidates_kept": kept,
                "blas_threads": environ.get("OPENBLAS_NUM_THREADS", "all"),
            }
        )
        say(f"{count} answers", f"median {figures[-1]['evaluation_ms']['median']} ms")
    return figures


def _timed(policy: Exact, changes_evaluated: Sequence[Change], passages: "_AnsweredPassages") -> dict[str, Any]:
    """Evaluate all changes in sequence."""
    changed = passages.copy()
    each: list[tuple[int, float]] = []
    invalidated = 0
    for change in changes_evaluated:
        changed.apply(change)
        statistics = changed.statistics()
        began_s = time.perf_counter()
        verdict = policy.evaluate(change, statistics)
        each.append((len(change.added), (time.perf_counter() - began_s) * 1000))
        invalidated += len(verdict.drop)
    groups = {}
    for minimum, maximum in _GROUPS:
        times_ms = [ms for added, ms in each if added >= minimum and (maximum is None or added <= maximum)]
        if times_ms:
            name = str(minimum) if minimum == maximum else f"{minimum}-{maximum or max(added for added, _ in each)}"
            groups[name] = {"changes": len(times_ms), **extremes(times_ms, digits=2)}
    return {
        "changes": len(changes_evaluated),
        "passages_added": sum(added for added, _ in each),
        "passages_removed": sum(len(change.removed) for change in changes_evaluated),
        "invalidated": invalidated,
        "evaluation_ms": extremes([ms for _, ms in each], digits=2),
        "evaluation_ms_by_passages_added": groups,
    }


class _AnsweredPassages:
    """The current passages, and the evidence of answers over them."""

    def __init__(self, asked: Sequence[AnalyzedQuestion], *, kept: int, fused: int, rrf_k: int) -> None:
        self._asked = asked
        self._kept, self._fused, self._rrf_k = kept, fused, rrf_k
        self._passages: dict[str, Passage] = {}
        self._vocabulary = {term for question in asked for term in question.terms}

    def __len__(self) -> int:
        return len(self._passages)

    def copy(self) -> "_AnsweredPassages":
        """A copy that changes independently."""
        other = _AnsweredPassages(self._asked, kept=self._kept, fused=self._fused, rrf_k=self._rrf_k)
        other._passages = dict(self._passages)
        return other

    def apply(self, change: Change) -> None:
        """Apply a change."""
        for chunk_id in change.removed:
            self._passages.pop(chunk_id, None)
        self._passages |= {passage.chunk.chunk_id: passage for passage in change.added}

    def statistics(self) -> Statistics:
        """Statistics of all passages, for the terms of all questions."""
        held = dict.fromkeys(self._vocabulary, 0)
        for passage in self._passages.values():
            for term in passage.terms.frequencies.keys() & self._vocabulary:
                held[term] += 1
        return Statistics(len(self._passages), sum(one.terms.length for one in self._passages.values()), held)

    def evidence(self, count: int) -> Iterator[Evidence]:
        """Evidence of ``count`` answers."""
        truth = GroundTruth(self._asked, fused=self._fused, kept=self._kept, top_k=_TOP_K, rrf_k=self._rrf_k)
        truth.change((), {name: (one.vector, one.terms.frequencies) for name, one in self._passages.items()})
        lexical = [
            tuple((chunk_id, self._passages[chunk_id].terms) for chunk_id, _ in found.lexical.window())
            for found in truth.find()
        ]
        names = list(self._passages)
        vectors = np.stack([self._passages[name].vector for name in names]).astype(np.float32)
        rng = np.random.default_rng(_SEED)
        for start in range(0, count, _VECTORS_AT_ONCE):
            numbers = [number % len(self._asked) for number in range(start, min(start + _VECTORS_AT_ONCE, count))]
            rotated = _rotated(np.stack([self._asked[number].vector for number in numbers]), rng)
            scores = (1 + rotated @ vectors.T) / 2
            best = np.argsort(-scores, axis=1)[:, : self._kept]
            for at, number in enumerate(numbers):
                candidates = tuple((names[column], float(scores[at, column])) for column in best[at])
                yield self._answer(f"{start + at}", number, rotated[at], candidates, lexical[number])

    def _answer(
        self,
        key: str,
        number: int,
        vector: NDArray[np.float32],
        candidates: tuple[tuple[str, float], ...],
        lexical: Any,
    ) -> Evidence:
        best = fused_top(
            [name for name, _ in candidates],
            [name for name, _ in lexical],
            _TOP_K,
            candidates=self._fused,
            rrf_k=self._rrf_k,
        )
        return Evidence(
            key=key,
            search=HybridSearch(key, vector, ACCESS, self._kept),
            terms=self._asked[number].terms,
            top_k=_TOP_K,
            sources=tuple((name, self._passages[name].chunk.version) for name in sorted(best)),
            vector_candidates=candidates,
            lexical_candidates=lexical,
        )


def _rotated(vectors: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    rotated = vectors + rng.normal(0, _NOISE, vectors.shape).astype(np.float32)
    unit: NDArray[np.float32] = (rotated / np.linalg.norm(rotated, axis=1, keepdims=True)).astype(np.float32)
    return unit
