"""How long exact invalidation takes to judge a change, by the number of cached answers.

Real: documents, changes, questions, vectors, terms and windows. Where more answers are wanted than there are questions,
questions are asked again with a vector that is turned a little, each time another way, so that no two answers have the
same windows. Each size begins with an answer to every question over the snapshot and judges the same changes, the
first of the history that add a passage; what they drop is not filled again.
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
from bench.installation import BenchmarkFailed
from bench.truth import Question, Truth
from freshline.figures import extremes
from freshline.installation import settings_from
from infra.local import Stack
from schemas.search import HybridSearch
from streams.core.invalidation.compiling import compile_loops
from streams.core.invalidation.evidence import Change, Evidence, Passage, Statistics
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.fused import top_of

_TOP_K: Final = 5
_TURN: Final = 0.01
"""Standard deviation that is added to each component of a vector of unit length."""
_SEED: Final = 1
_VECTORS_AT_ONCE: Final = 1_000
_GROUPS: Final = ((1, 1), (2, 9), (10, None))
"""Changes are told apart by how many passages they add: from, to."""
_NOTHING: Final = Change(frozenset(), frozenset(), ())

Say = Callable[[str, str], None]


async def bench_judge(
    stack: Stack, events: Path, questions: Sequence[Path], *, entries: Sequence[int], changes: int, say: Say
) -> list[dict[str, Any]]:
    """Judge the first changes of a history; one object of figures for each number of answers.

    Args:
        stack: a running stack, whose index makes the terms.
        events: the history; the creations at its start are the snapshot.
        questions: files with a JSON object with ``text`` on each line; .jsonl or .jsonl.gz.
        entries: numbers of answers.
        changes: to judge.
        say: told what is being done.

    Raises:
        BenchmarkFailed: the files are of no use.
        BadEventFile: see there.
    """
    compile_loops()
    texts = read_questions(questions)
    snapshot, history = parts_of(events, None)
    settings = settings_from(stack.environment() | {"FRESHLINE_NAMESPACE": f"bench-{secrets.token_hex(4)}"})
    async with Corpus.opened(settings) as corpus:
        say("snapshot", f"{len(snapshot)} documents, {len(texts)} questions")
        asked = [await corpus.question(text) for text in texts]
        kept = settings.query.window_kept
        standing = _Standing(asked, kept=kept, fused=settings.query.window, rrf_k=settings.query.rrf_k)
        for event in snapshot:
            standing.apply(await corpus.change(event))
        judged: list[Change] = []
        for event in history:
            change = await corpus.change(event)
            if change.added:
                judged.append(change)
            if len(judged) == changes:
                break
    if not judged:
        raise BenchmarkFailed(f"{events.name} has no change that adds a passage")
    known = standing.statistics()
    figures = []
    for count in entries:
        say(f"{count} answers", "filling")
        before_bytes = psutil.Process().memory_info().rss
        policy = Exact(
            dimension=len(asked[0].vector), kept=kept, fused=settings.query.window, rrf_k=settings.query.rrf_k
        )
        for evidence in standing.evidence(count):
            policy.put(evidence)
        policy.judge(_NOTHING, known)
        size_bytes, resident_bytes = policy.size_bytes, psutil.Process().memory_info().rss - before_bytes
        figures.append(
            {
                "entries": count,
                **_timed(policy, judged, standing),
                "entries_at_end": len(policy),
                "bytes_per_entry": round(size_bytes / count),
                "resident_bytes_per_entry": round(resident_bytes / count),
                "distinct_questions": len(texts),
                "passages": len(standing),
                "window_kept": kept,
                "blas_threads": environ.get("OPENBLAS_NUM_THREADS", "all"),
            }
        )
        say(f"{count} answers", f"median {figures[-1]['judge_ms']['median']} ms")
    return figures


def _timed(policy: Exact, judged: Sequence[Change], standing: "_Standing") -> dict[str, Any]:
    """Judge all changes, one after the other."""
    changed = standing.copy()
    each: list[tuple[int, float]] = []
    dropped = 0
    for change in judged:
        changed.apply(change)
        told = changed.statistics()
        began_s = time.perf_counter()
        verdict = policy.judge(change, told)
        each.append((len(change.added), (time.perf_counter() - began_s) * 1000))
        dropped += len(verdict.drop)
    groups = {}
    for least, most in _GROUPS:
        times_ms = [ms for added, ms in each if added >= least and (most is None or added <= most)]
        if times_ms:
            name = str(least) if least == most else f"{least}-{most or max(added for added, _ in each)}"
            groups[name] = {"changes": len(times_ms), **extremes(times_ms, digits=2)}
    return {
        "changes": len(judged),
        "passages_added": sum(added for added, _ in each),
        "passages_removed": sum(len(change.removed) for change in judged),
        "dropped": dropped,
        "judge_ms": extremes([ms for _, ms in each], digits=2),
        "judge_ms_by_passages_added": groups,
    }


class _Standing:
    """The passages that are there, and what answers over them are made of."""

    def __init__(self, asked: Sequence[Question], *, kept: int, fused: int, rrf_k: int) -> None:
        self._asked = asked
        self._kept, self._fused, self._rrf_k = kept, fused, rrf_k
        self._passages: dict[str, Passage] = {}
        self._vocabulary = {term for question in asked for term in question.terms}

    def __len__(self) -> int:
        return len(self._passages)

    def copy(self) -> "_Standing":
        """Another that changes apart from this one."""
        other = _Standing(self._asked, kept=self._kept, fused=self._fused, rrf_k=self._rrf_k)
        other._passages = dict(self._passages)
        return other

    def apply(self, change: Change) -> None:
        """Follow a change."""
        for chunk_id in change.removed:
            self._passages.pop(chunk_id, None)
        self._passages |= {passage.chunk.chunk_id: passage for passage in change.added}

    def statistics(self) -> Statistics:
        """Of all passages, for the terms of all questions."""
        held = dict.fromkeys(self._vocabulary, 0)
        for passage in self._passages.values():
            for term in passage.terms.frequencies.keys() & self._vocabulary:
                held[term] += 1
        return Statistics(len(self._passages), sum(one.terms.length for one in self._passages.values()), held)

    def evidence(self, count: int) -> Iterator[Evidence]:
        """So many answers."""
        truth = Truth(self._asked, fused=self._fused, kept=self._kept, top_k=_TOP_K, rrf_k=self._rrf_k)
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
            turned = _turned(np.stack([self._asked[number].vector for number in numbers]), rng)
            scores = (1 + turned @ vectors.T) / 2
            best = np.argsort(-scores, axis=1)[:, : self._kept]
            for at, number in enumerate(numbers):
                window = tuple((names[place], float(scores[at, place])) for place in best[at])
                yield self._answer(f"{start + at}", number, turned[at], window, lexical[number])

    def _answer(
        self, key: str, number: int, vector: NDArray[np.float32], window: tuple[tuple[str, float], ...], lexical: Any
    ) -> Evidence:
        best = top_of(
            [name for name, _ in window], [name for name, _ in lexical], _TOP_K, places=self._fused, rrf_k=self._rrf_k
        )
        return Evidence(
            key=key,
            search=HybridSearch(key, vector, ACCESS, self._kept),
            terms=self._asked[number].terms,
            top_k=_TOP_K,
            sources=tuple((name, self._passages[name].chunk.version) for name in sorted(best)),
            documents=frozenset(self._passages[name].chunk.document_id for name in best),
            vector_window=window,
            lexical_window=lexical,
        )


def _turned(vectors: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    turned = vectors + rng.normal(0, _TURN, vectors.shape).astype(np.float32)
    unit: NDArray[np.float32] = (turned / np.linalg.norm(turned, axis=1, keepdims=True)).astype(np.float32)
    return unit
