"""What invalidation is worth: cached answers under several policies along one recorded history, against the truth.

Real: the contents are parsed, split and embedded by the product's code, and written to an OpenSearch index of this
run's own, whose analyser makes the terms of passages and questions; the policies are those of the last step of the
stream.

Computed: fresh retrievals, of which there is one for each question after each change, to fill answers and to compare
them all with (``truth``); and with them the term statistics that the policies are told. On a sample of them the real
index is searched too, and the share of equal sources is told: what differs are the graph of approximate k-NN,
statistics that count removed passages, and ties.

Each policy is measured twice. *At rest* there is one answer to each question, filled again when it is dropped, and all
are compared after every change (``staleness``). *In traffic* questions are asked with Zipf's skew of a cache that is
empty at first, on a clock of its own on which drops and fills take their time (``traffic``).

Memory: all passages that are there, with sixteen bytes for each pair of passage and question; a few kB for each answer
of each policy.
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
from bench.staleness import Answers, Judge, Moment, Oracle, Source
from bench.traffic import Pace, Traffic
from bench.truth import Found, Question, Truth
from freshline.installation import settings_from
from infra.local import Stack
from infra.settings import Settings
from query.retrieval.fusion import fuse
from schemas.search import HybridSearch, Windows
from streams.core.invalidation.compiling import compile_loops
from streams.core.invalidation.evidence import Change, Evidence, Passage
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.policy import SIMPLE

POLICIES: Final = ("exact", *SIMPLE)

_TOP_K: Final = 5
_SKEW: Final = 1.0
_SEED: Final = 1
_CHANGES_BETWEEN_LOOKS: Final = 20
_QUESTIONS_OF_A_LOOK: Final = 25
_DOCUMENTS_BETWEEN_NEWS: Final = 200

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
    pace: Pace | None = None,
    say: Say,
) -> list[dict[str, Any]]:
    """Replay a history; one object of figures for each policy.

    Args:
        stack: a running stack.
        events: the history; the creations at its start are the snapshot.
        questions: files with a JSON object with ``text`` on each line; .jsonl or .jsonl.gz.
        policies: names out of ``POLICIES``.
        edits: how many events after the snapshot; all by default.
        minutes: the replay, without its snapshot, stops after so long; ``edits`` tells how far it came.
        requests: asked over the whole history, with Zipf's skew.
        pace: of the clock of the traffic.
        say: told what is being done.

    Raises:
        BenchmarkFailed: the files are of no use.
        BadEventFile: see there.
    """
    compile_loops()
    pace = pace or Pace()
    texts = read_questions(questions)
    snapshot, history = parts_of(events, edits)
    settings = settings_from(stack.environment() | {"FRESHLINE_NAMESPACE": f"bench-{secrets.token_hex(4)}"})
    async with Corpus.opened(settings) as corpus:
        say("snapshot", f"{len(snapshot)} documents, {len(texts)} questions")
        replay = _Replay(
            settings,
            corpus=corpus,
            texts=texts,
            asked=[await corpus.question(text) for text in texts],
            policies=policies,
            pace=pace,
            requests=requests,
            lasts_s=(len(history) + 1) * pace.change_every_s,
        )
        for number, event in enumerate(snapshot, start=1):
            replay.apply(await corpus.change(event))
            if number % _DOCUMENTS_BETWEEN_NEWS == 0:
                say("snapshot", f"{number} of {len(snapshot)} documents")
        replay.begin()
        began_s = time.monotonic()
        for number, event in enumerate(history, start=1):
            replay.step(number, await corpus.change(event))
            last = number == len(history) or (minutes is not None and time.monotonic() - began_s >= minutes * 60)
            if number % _CHANGES_BETWEEN_LOOKS == 0 or last:
                await replay.look()
                say(f"edit {number} of {len(history)}", replay.standing())
            if last:
                replay.ask((number + 1) * pace.change_every_s)
                break
    return replay.figures(documents=len(snapshot), edits_of=len(history), replay_s=round(time.monotonic() - began_s, 1))


class _Replay:
    """The truth, and the answers of every policy, at rest and in traffic."""

    def __init__(
        self,
        settings: Settings,
        *,
        corpus: Corpus,
        texts: Sequence[str],
        asked: Sequence[Question],
        policies: Sequence[str],
        pace: Pace,
        requests: int,
        lasts_s: float,
    ) -> None:
        query = settings.query
        self._corpus = corpus
        self._texts = texts
        self._asked = asked
        self._pace = pace
        self._kept, self._fused, self._rrf_k = query.window_kept, query.window, query.rrf_k
        self._truth = Truth(asked, fused=self._fused, kept=self._kept, top_k=_TOP_K, rrf_k=self._rrf_k)
        self._passages: dict[str, Passage] = {}
        self._born: dict[Source, int] = {}
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._found: list[Found] = []
        self._made: dict[tuple[str, bool], Evidence] = {}
        names = list(dict.fromkeys(policies))
        self._rest = {name: Answers(self._judge(name)) for name in names}
        self._traffic = {name: Traffic(self._judge(name), pace) for name in names}
        # What hit shares are compared with: a cache that never drops, and one that drops what it must.
        self._never = Traffic(self._judge("none"), pace)
        self._ideal = Traffic(Oracle(SIMPLE["none"](), windows=False), pace)
        self._requests = _zipf(texts, requests, lasts_s)
        self._next = next(self._requests, None)
        self._rng = random.Random(_SEED)  # noqa: S311 - a sample
        self._looked = 0
        self._agreed = 0
        self._same_share = 0.0
        self._curve: list[dict[str, float]] = []

    def _judge(self, name: str) -> Judge:
        if name != "exact":
            return Judge(SIMPLE[name](), windows=False)
        dimension = len(self._asked[0].vector)
        return Judge(Exact(dimension=dimension, kept=self._kept, fused=self._fused, rrf_k=self._rrf_k), windows=True)

    def apply(self, change: Change, number: int = 0) -> None:
        """Let the truth follow a change."""
        ids = [passage.chunk.chunk_id for passage in change.added]
        gone = [chunk_id for chunk_id in (*change.removed, *ids) if chunk_id in self._passages]
        for chunk_id in gone:
            chunk = self._passages.pop(chunk_id).chunk
            del self._born[chunk_id, chunk.version]
        added = {passage.chunk.chunk_id: passage for passage in change.added}
        self._passages |= added
        self._born |= {(chunk_id, one.chunk.version): number for chunk_id, one in added.items()}
        self._truth.change(gone, {name: (one.vector, one.terms.frequencies) for name, one in added.items()})

    def begin(self) -> None:
        """Fill one answer for each question."""
        moment = self._now(0)
        for answers in self._rest.values():
            for text in self._texts:
                answers.fill(text, moment)
        for traffic in (*self._traffic.values(), self._never, self._ideal):
            traffic.begin(moment)

    def step(self, number: int, change: Change) -> None:
        """Ask until the change is searchable; then all policies judge it, and all answers are compared."""
        at_s = number * self._pace.change_every_s
        self.ask(at_s)
        # What is due before the change is made of what was found before it.
        for traffic in (*self._traffic.values(), self._never, self._ideal):
            traffic.until(at_s)
        self.apply(change, number)
        moment = self._now(number)
        for answers in self._rest.values():
            answers.change(change, moment)
        for traffic in (*self._traffic.values(), self._never, self._ideal):
            traffic.change(change, moment, at_s)
        self._curve.append({name: answers.stale_share() for name, answers in self._rest.items()})

    def ask(self, until_s: float) -> None:
        """Ask what is asked by then."""
        while self._next is not None and self._next[0] < until_s:
            for traffic in (*self._traffic.values(), self._never, self._ideal):
                traffic.ask(self._next[1], self._next[0])
            self._next = next(self._requests, None)

    async def look(self) -> None:
        """Search the real index for some questions, and see whether it finds what the truth says."""
        for number in self._rng.sample(range(len(self._texts)), min(_QUESTIONS_OF_A_LOOK, len(self._texts))):
            windows = await self._corpus.search(self._search(self._texts[number]))
            fused = Windows(windows.vector[: self._fused], windows.lexical[: self._fused])
            real = {one.hit.chunk_id for one in fuse(fused, k=self._rrf_k)[:_TOP_K]}
            true = set(self._found[number].top)
            self._looked += 1
            self._agreed += real == true
            self._same_share += len(real & true) / max(len(true), 1)

    def standing(self) -> str:
        """For the progress line."""
        shares = ", ".join(f"{name} {answers.stale_share():.2%}" for name, answers in self._rest.items())
        return f"{len(self._passages)} passages; content-stale now: {shares}"

    def figures(self, **besides: Any) -> list[dict[str, Any]]:
        """One object for each policy; ``besides`` in each."""
        never, ideal = (traffic.figures()["hit_share"] for traffic in (self._never, self._ideal))
        return [
            {
                "policy": name,
                **answers.figures(),
                **(asked := self._traffic[name].figures()),
                "hit_share_behind_none": never - asked["hit_share"],
                "hit_share_behind_ideal": ideal - asked["hit_share"],
                "distinct_questions": len(self._texts),
                "zipf_s": _SKEW,
                **asdict(self._pace),
                "edits": len(self._curve),
                "passages": len(self._passages),
                "real_searches": self._looked,
                "real_searches_agree_share": self._agreed / self._looked,
                "real_searches_same_sources_share": self._same_share / self._looked,
                **besides,
                "stale_share_after_each_edit": [round(shares[name], 5) for shares in self._curve],
            }
            for name, answers in self._rest.items()
        ]

    def _now(self, number: int) -> Moment:
        self._found = self._truth.find()
        self._made.clear()
        return Moment(
            number=number,
            fresh={text: self._sources(found) for text, found in zip(self._texts, self._found, strict=True)},
            evidence=self._evidence,
            born=self._born,
            frequencies=self._truth.frequencies(),
            document_count=len(self._truth),
            total_length=self._truth.total_length,
        )

    def _sources(self, found: Found) -> tuple[Source, ...]:
        return tuple((chunk_id, self._passages[chunk_id].chunk.version) for chunk_id in found.top)

    def _evidence(self, text: str, windows: bool) -> Evidence:  # noqa: FBT001 - the moment's own signature
        made = self._made.get((text, windows))
        if made is None:
            number = self._numbers[text]
            found = self._found[number]
            lexical = found.lexical.window() if windows else ()
            made = self._made[text, windows] = Evidence(
                key=text,
                search=self._search(text),
                terms=self._asked[number].terms,
                top_k=_TOP_K,
                sources=self._sources(found),
                documents=frozenset(self._passages[chunk_id].chunk.document_id for chunk_id in found.top),
                vector_window=found.vector.window() if windows else (),
                lexical_window=tuple((chunk_id, self._passages[chunk_id].terms) for chunk_id, _ in lexical),
            )
        return made

    def _search(self, text: str) -> HybridSearch:
        return HybridSearch(text, self._asked[self._numbers[text]].vector, ACCESS, self._kept)


def _zipf(texts: Sequence[str], requests: int, lasts_s: float) -> Iterator[tuple[float, str]]:
    """So many questions, with the times at which they are asked, by Poisson's law over ``lasts_s``.

    The question at rank r comes with weight r to the power of minus the skew.
    """
    rng = random.Random(_SEED)  # noqa: S311 - a sample
    ranked = rng.sample(texts, len(texts))
    weights = list(accumulate(rank**-_SKEW for rank in range(1, len(ranked) + 1)))
    for at_s in sorted(rng.uniform(0, lasts_s) for _ in range(requests)):
        yield at_s, rng.choices(ranked, cum_weights=weights)[0]
