"""Accuracy of invalidation policies along a recorded history, compared with the ground truth.

Real: the product's code parses, splits and embeds the contents and writes them to a dedicated OpenSearch index, whose
analyzer produces the terms of passages and questions. The policies are those of the last step of the stream.

Computed: new retrievals, one per question after each change, which fill answers and are compared with all of them
(``ground_truth``), and the term statistics for the policies. For a sample, the real index is searched as well, and the
fraction of equal results is reported. Differences are due to approximate k-NN, statistics that count removed passages,
and ties.

Each policy is measured twice. In the *steady state* there is one answer per question, replaced when invalidated,
and all are compared after every change (``staleness``). In *simulated traffic*, questions are drawn with a Zipf
distribution and asked of an initially empty cache in simulated time, in which invalidations and fills take time
(``traffic``).

Memory: all live passages, sixteen bytes for each pair of passage and question, and a few kB per answer and policy.
"""

import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from bench.corpus import ACCESS, Corpus, parts_of, read_questions
from bench.ground_truth import AnalyzedQuestion, GroundTruth, GroundTruthResult
from bench.policies import SIMPLE, DocumentChange, DocumentEvidence
from bench.staleness import OracleEvaluator, PolicyEvaluator, Source, SteadyStateCache, TruthSnapshot
from bench.traffic import SimulatedTraffic, SimulationTiming
from freshline.installation import settings_from
from infra.local import Stack
from infra.settings import Settings
from query.retrieval.fusion import fuse
from schemas.search import RRF_K, Candidates, HybridSearch
from streams.core.invalidation.compiling import compile_loops
from streams.core.invalidation.evidence import Passage
from streams.core.invalidation.exact import Exact

POLICIES: Final = ("exact", *SIMPLE)

_TOP_K: Final = 5
_SKEW: Final = 1.0
_SEED: Final = 1
_CHANGES_BETWEEN_SAMPLES: Final = 20
_QUESTIONS_PER_SAMPLE: Final = 25
_DOCUMENTS_PER_REPORT: Final = 200

Say = Callable[[str, str], None]


async def bench_cache(
    stack: Stack,
    events: Path,
    questions: Sequence[Path],
    *,
    policies: Sequence[str] = POLICIES,
    edits: int | None = None,
    minutes: float | None = None,
    requests: int = 10_000,
    timing: SimulationTiming | None = None,
    say: Say,
) -> list[dict[str, Any]]:
    """Replay a history. One object of figures per policy.

    Args:
        stack: a running stack.
        events: the history; its leading creations are the snapshot.
        questions: JSON Lines files with ``text``; .jsonl or .jsonl.gz.
        policies: names out of ``POLICIES``.
        edits: number of events after the snapshot; all by default.
        minutes: time limit of the replay without the snapshot; ``edits`` in the figures is the number replayed.
        requests: questions asked over the whole history, Zipf-distributed.
        timing: of the simulated traffic.
        say: reports progress.

    Raises:
        BenchmarkFailed: the files cannot be used.
        BadEventFile: a line is no event.
    """
    compile_loops()
    timing = timing or SimulationTiming()
    texts = read_questions(questions)
    snapshot, history = parts_of(events, edits)
    settings = settings_from(stack.environment() | {"FRESHLINE_NAMESPACE": f"bench-{secrets.token_hex(4)}"})
    async with Corpus.opened(settings) as corpus:
        say("snapshot", f"{len(snapshot)} documents, {len(texts)} questions")
        replay = _Replay(
            settings,
            corpus=corpus,
            texts=texts,
            analyzed=[await corpus.question(text) for text in texts],
            policies=policies,
            timing=timing,
            requests=requests,
            lasts_s=(len(history) + 1) * timing.change_every_s,
        )
        for number, event in enumerate(snapshot, start=1):
            replay.apply(await corpus.change(event))
            if number % _DOCUMENTS_PER_REPORT == 0:
                say("snapshot", f"{number} of {len(snapshot)} documents")
        replay.begin()
        began_s = time.monotonic()
        for number, event in enumerate(history, start=1):
            replay.step(number, await corpus.change(event))
            last = number == len(history) or (minutes is not None and time.monotonic() - began_s >= minutes * 60)
            if number % _CHANGES_BETWEEN_SAMPLES == 0 or last:
                await replay.sample()
                say(f"edit {number} of {len(history)}", replay.progress())
            if last:
                replay.ask((number + 1) * timing.change_every_s)
                break
    return replay.figures(documents=len(snapshot), edits_of=len(history), replay_s=round(time.monotonic() - began_s, 1))


class _Replay:
    """The ground truth, and the caches of every policy in the steady state and in simulated traffic."""

    def __init__(
        self,
        settings: Settings,
        *,
        corpus: Corpus,
        texts: Sequence[str],
        analyzed: Sequence[AnalyzedQuestion],
        policies: Sequence[str],
        timing: SimulationTiming,
        requests: int,
        lasts_s: float,
    ) -> None:
        query = settings.query
        self._corpus = corpus
        self._texts = texts
        self._analyzed = analyzed
        self._timing = timing
        self._kept, self._fused, self._rrf_k = query.candidates_kept, query.candidates, RRF_K
        self._truth = GroundTruth(analyzed, fused=self._fused, kept=self._kept, top_k=_TOP_K, rrf_k=self._rrf_k)
        self._passages: dict[str, Passage] = {}
        self._added_in: dict[Source, int] = {}
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._results: list[GroundTruthResult] = []
        self._evidence_cache: dict[tuple[str, bool], DocumentEvidence] = {}
        names = list(dict.fromkeys(policies))
        self._steady = {name: SteadyStateCache(self._evaluator(name)) for name in names}
        self._traffic = {name: SimulatedTraffic(self._evaluator(name), timing) for name in names}
        # References for hit rates: no invalidation, and exactly the needed invalidations.
        self._never = SimulatedTraffic(self._evaluator("none"), timing)
        self._ideal = SimulatedTraffic(OracleEvaluator(SIMPLE["none"](), uses_candidates=False), timing)
        self._requests = _zipf(texts, requests, lasts_s)
        self._next = next(self._requests, None)
        self._rng = random.Random(_SEED)  # noqa: S311 - a sample
        self._sampled = 0
        self._agreed = 0
        self._source_overlap = 0.0
        self._curve: list[dict[str, float]] = []

    def _evaluator(self, name: str) -> PolicyEvaluator:
        if name != "exact":
            return PolicyEvaluator(SIMPLE[name](), uses_candidates=False)
        dimension = len(self._analyzed[0].vector)
        return PolicyEvaluator(
            Exact(dimension=dimension, kept=self._kept, fused=self._fused, rrf_k=self._rrf_k), uses_candidates=True
        )

    def apply(self, change: DocumentChange, number: int = 0) -> None:
        """Apply a change to the ground truth."""
        ids = [passage.chunk.chunk_id for passage in change.added]
        removed = [chunk_id for chunk_id in (*change.removed, *ids) if chunk_id in self._passages]
        for chunk_id in removed:
            chunk = self._passages.pop(chunk_id).chunk
            del self._added_in[chunk_id, chunk.version]
        added = {passage.chunk.chunk_id: passage for passage in change.added}
        self._passages |= added
        self._added_in |= {(chunk_id, one.chunk.version): number for chunk_id, one in added.items()}
        self._truth.change(removed, {name: (one.vector, one.terms.frequencies) for name, one in added.items()})

    def begin(self) -> None:
        """Fill one answer per question."""
        snapshot = self._now(0)
        for answers in self._steady.values():
            for text in self._texts:
                answers.fill(text, snapshot)
        for traffic in (*self._traffic.values(), self._never, self._ideal):
            traffic.begin(snapshot)

    def step(self, number: int, change: DocumentChange) -> None:
        """Ask until the change is searchable; then evaluate it with all policies and compare all answers."""
        at_s = number * self._timing.change_every_s
        self.ask(at_s)
        # Fills due before the change reflect the state before it.
        for traffic in (*self._traffic.values(), self._never, self._ideal):
            traffic.until(at_s)
        self.apply(change, number)
        snapshot = self._now(number)
        for answers in self._steady.values():
            answers.change(change, snapshot)
        for traffic in (*self._traffic.values(), self._never, self._ideal):
            traffic.change(change, snapshot, at_s)
        self._curve.append({name: answers.stale_rate() for name, answers in self._steady.items()})

    def ask(self, until_s: float) -> None:
        """Ask the questions due before ``until_s``."""
        while self._next is not None and self._next[0] < until_s:
            for traffic in (*self._traffic.values(), self._never, self._ideal):
                traffic.ask(self._next[1], self._next[0])
            self._next = next(self._requests, None)

    async def sample(self) -> None:
        """Compare searches of the real index with the ground truth, for a sample of the questions."""
        for number in self._rng.sample(range(len(self._texts)), min(_QUESTIONS_PER_SAMPLE, len(self._texts))):
            candidates = await self._corpus.search(self._search(self._texts[number]))
            fused = Candidates(candidates.vector[: self._fused], candidates.lexical[: self._fused])
            real = {one.hit.chunk_id for one in fuse(fused, k=self._rrf_k)[:_TOP_K]}
            true = set(self._results[number].top)
            self._sampled += 1
            self._agreed += real == true
            self._source_overlap += len(real & true) / max(len(true), 1)

    def progress(self) -> str:
        """Progress."""
        rates = ", ".join(f"{name} {answers.stale_rate():.2%}" for name, answers in self._steady.items())
        return f"{len(self._passages)} passages; content-stale: {rates}"

    def figures(self, **besides: Any) -> list[dict[str, Any]]:
        """One object per policy, each with the items of ``besides``."""
        never, ideal = (traffic.figures()["hit_rate"] for traffic in (self._never, self._ideal))
        return [
            {
                "policy": name,
                **answers.figures(),
                **(simulated := self._traffic[name].figures()),
                "hit_rate_loss_vs_none": never - simulated["hit_rate"],
                "hit_rate_loss_vs_ideal": ideal - simulated["hit_rate"],
                "distinct_questions": len(self._texts),
                "zipf_s": _SKEW,
                **asdict(self._timing),
                "edits": len(self._curve),
                "passages": len(self._passages),
                "real_searches": self._sampled,
                "real_search_agreement_rate": self._agreed / self._sampled,
                "real_search_source_overlap": self._source_overlap / self._sampled,
                **besides,
                "stale_rate_after_each_edit": [round(rates[name], 5) for rates in self._curve],
            }
            for name, answers in self._steady.items()
        ]

    def _now(self, number: int) -> TruthSnapshot:
        self._results = self._truth.find()
        self._evidence_cache.clear()
        return TruthSnapshot(
            number=number,
            fresh={text: self._sources(found) for text, found in zip(self._texts, self._results, strict=True)},
            evidence=self._evidence,
            born=self._added_in,
            frequencies=self._truth.frequencies(),
            document_count=len(self._truth),
            total_length=self._truth.total_length,
        )

    def _sources(self, found: GroundTruthResult) -> tuple[Source, ...]:
        return tuple((chunk_id, self._passages[chunk_id].chunk.version) for chunk_id in found.top)

    def _evidence(self, text: str, uses_candidates: bool) -> DocumentEvidence:  # noqa: FBT001 - the snapshot's own signature
        evidence = self._evidence_cache.get((text, uses_candidates))
        if evidence is None:
            number = self._numbers[text]
            found = self._results[number]
            lexical = found.lexical.window() if uses_candidates else ()
            evidence = self._evidence_cache[text, uses_candidates] = DocumentEvidence(
                key=text,
                search=self._search(text),
                terms=self._analyzed[number].terms,
                top_k=_TOP_K,
                sources=self._sources(found),
                documents=frozenset(self._passages[chunk_id].chunk.document_id for chunk_id in found.top),
                vector_candidates=found.vector.window() if uses_candidates else (),
                lexical_candidates=tuple((chunk_id, self._passages[chunk_id].terms) for chunk_id, _ in lexical),
            )
        return evidence

    def _search(self, text: str) -> HybridSearch:
        return HybridSearch(text, self._analyzed[self._numbers[text]].vector, ACCESS, self._kept)


def _zipf(texts: Sequence[str], requests: int, lasts_s: float) -> Iterator[tuple[float, str]]:
    """Zipf-distributed questions with their times, a Poisson process over ``lasts_s``."""
    rng = random.Random(_SEED)  # noqa: S311 - a sample
    ranked = rng.sample(texts, len(texts))
    weights = list(accumulate(rank**-_SKEW for rank in range(1, len(ranked) + 1)))
    for at_s in sorted(rng.uniform(0, lasts_s) for _ in range(requests)):
        yield at_s, rng.choices(ranked, cum_weights=weights)[0]
