"""The cache benchmark: ground truth against manual calculations, its definitions, and planted mistakes."""

import inspect
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.corpus import read_questions
from bench.ground_truth import AnalyzedQuestion, GroundTruth, coarse_length
from bench.installation import BenchmarkFailed
from bench.plot import stale_rates
from bench.policies import SIMPLE, DocumentChange, DocumentEvidence
from bench.staleness import EntryState, PolicyEvaluator, SteadyStateCache, TruthSnapshot, state_of
from bench.traffic import SimulatedTraffic, SimulationTiming
from schemas.index import StoredChunk
from schemas.search import Access, HybridSearch
from streams.core.invalidation.bm25 import LENGTHS, length_code
from streams.core.invalidation.evidence import Change, Evaluation, Passage, TermCounts
from streams.core.invalidation.exact import Exact

ACCESS = Access("bench")
FUSED, KEPT, TOP_K, K = 4, 60, 2, 60


def unit(*numbers):
    vector = np.array(numbers, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def test_scores_and_order_by_hand():
    truth = GroundTruth([AnalyzedQuestion(unit(1, 0), {"leave": 2, "visa": 1})], fused=3, kept=3, top_k=3, rrf_k=60)
    truth.change((), {"a": (unit(0, 1), {"leave": 1, "paid": 3}), "b": (unit(1, 0), {"desk": 2})})
    truth.change((), {"c": (unit(3, 4), {"leave": 2})})
    [found] = truth.find()
    assert found.vector.window() == (("b", 1.0), ("c", pytest.approx(0.8)), ("a", 0.5))
    # Three passages of 4, 2 and 2 terms, two of which hold "leave": idf ln(1 + 1.5 / 2.5), average 8/3, twice asked.
    idf = math.log(1 + 1.5 / 2.5)
    a = 2 * idf * 1 / (1 + 1.2 * (0.25 + 0.75 * 4 / (8 / 3)))
    c = 2 * idf * 2 / (2 + 1.2 * (0.25 + 0.75 * 2 / (8 / 3)))
    assert found.lexical.window() == (("c", pytest.approx(c)), ("a", pytest.approx(a)))
    # By rank: second and first, third and second, first alone.
    assert found.top == ("c", "a", "b")
    assert truth.frequencies() == {"leave": 2, "visa": 0}
    truth.change(["c"], {})
    assert truth.find()[0].top == ("a", "b")
    assert (len(truth), truth.total_length) == (2, 6)


def test_the_older_of_equal_scores_ranks_first():
    truth = GroundTruth([AnalyzedQuestion(unit(1, 0), {})], fused=2, kept=2, top_k=2, rrf_k=60)
    truth.change((), {name: (unit(1, 1), {}) for name in ("z", "y", "x")})
    assert [name for name, _ in truth.find()[0].vector.window()] == ["z", "y"]


def test_lengths_lose_what_lucene_loses():
    for length in range(5_000):
        assert coarse_length(length) == LENGTHS[length_code(length)]


@pytest.mark.parametrize(
    ("cached", "fresh", "state"),
    [
        ([("a", 1), ("b", 1)], [("a", 1), ("b", 1)], EntryState.FRESH),
        ([("a", 1), ("b", 1)], [("b", 1), ("a", 1)], EntryState.DRIFTED),
        ([("a", 1), ("b", 1)], [("a", 1), ("old", 1)], EntryState.DRIFTED),
        ([("a", 1), ("b", 1)], [("a", 1), ("new", 9)], EntryState.STALE),
        ([("a", 1), ("gone", 1)], [("a", 1), ("b", 1)], EntryState.STALE),
        ([("again", 1)], [("again", 9)], EntryState.STALE),
        ([], [("new", 9)], EntryState.STALE),
    ],
)
def test_stale_and_drifted_answers(cached, fresh, state):
    born = {("a", 1): 0, ("b", 1): 0, ("old", 1): 2, ("new", 9): 4, ("again", 9): 4}
    assert state_of(cached, fresh, 3, born) is state


class IgnoresAddedPassages(Exact):
    """A policy that considers cited passages only."""

    def evaluate(self, change, statistics):
        return super().evaluate(Change(change.removed, ()), statistics)


class IgnoresLexicalRetriever(Exact):
    """Only the vector retriever notices added passages."""

    def _find_lexical_insertions(self, _passages, _additions, _scoring, count):
        return count


class NeverRechecks(Exact):
    """Answers with too few remaining candidates are kept."""

    def evaluate(self, change, statistics):
        return replace(super().evaluate(change, statistics), recheck=frozenset())


class InvalidatesEverything(Exact):
    """Every answer is invalidated by every change."""

    def evaluate(self, change, statistics):
        keys = frozenset(self._rows)
        super().evaluate(change, statistics)
        return Evaluation(drop=keys)


TIMING = SimulationTiming(change_every_s=2.0, ttl_s=1e9)


def figures(policy, *, edits=60, kept=KEPT, asked_between=10):
    """Figures of a policy along a random history; ``KEPT`` candidates are all passages."""
    rng = random.Random(3)
    asked = {
        f"q{number}": AnalyzedQuestion(unit(*(rng.gauss(0, 1) for _ in range(6))), Counter({rng.choice("abcd"): 1}))
        for number in range(20)
    }
    truth = GroundTruth(list(asked.values()), fused=FUSED, kept=kept, top_k=TOP_K, rrf_k=K)
    passages, born = {}, {}
    simple = not isinstance(policy(), Exact)
    answers = SteadyStateCache(PolicyEvaluator(policy(), uses_candidates=not simple))
    traffic = SimulatedTraffic(PolicyEvaluator(policy(), uses_candidates=not simple), TIMING)

    def apply(number):
        removed = rng.sample(sorted(passages), 1) if len(passages) > 30 else []
        name = f"p{number:03}"
        chunk = StoredChunk(
            chunk_id=name, tenant="bench", document_id=name, version=number, position="documents.v1-0:0",
            text="", text_sha256="", start=0, end=0,
        )  # fmt: skip
        terms = Counter(rng.choices("abcdefgh", k=rng.randint(5, 30)))
        passage = Passage(chunk, unit(*(rng.gauss(0, 1) for _ in range(6))), TermCounts.of(terms))
        for gone in removed:
            del born[gone, passages.pop(gone).chunk.version]
        passages[name] = passage
        born[name, number] = number
        truth.change(removed, {name: (passage.vector, terms)})
        return DocumentChange(frozenset(removed), (passage,), frozenset((name, *removed)))

    def snapshot(number):
        found = dict(zip(asked, truth.find(), strict=True))
        fresh = {key: tuple((name, passages[name].chunk.version) for name in one.top) for key, one in found.items()}

        def evidence(key, uses_candidates):
            lexical = found[key].lexical.window() if uses_candidates else ()
            return DocumentEvidence(
                key=key,
                search=HybridSearch(key, asked[key].vector, ACCESS, kept),
                terms=asked[key].terms,
                top_k=TOP_K,
                sources=fresh[key],
                documents=frozenset(name for name, _ in fresh[key]),
                vector_candidates=found[key].vector.window() if uses_candidates else (),
                lexical_candidates=tuple((name, passages[name].terms) for name, _ in lexical),
            )

        return TruthSnapshot(number, fresh, evidence, dict(born), truth.frequencies(), len(truth), truth.total_length)

    for number in range(31):
        apply(number)
    now = snapshot(30)
    for key in asked:
        answers.fill(key, now)
    traffic.begin(now)
    for number in range(31, 31 + edits):
        at_s = number * TIMING.change_every_s
        traffic.until(at_s)
        change = apply(number)
        now = snapshot(number)
        answers.change(change, now)
        traffic.change(change, now, at_s)
        for asked_s in sorted(rng.uniform(at_s, at_s + TIMING.change_every_s) for _ in range(asked_between)):
            traffic.ask(rng.choice(sorted(asked)), asked_s)
    return answers.figures() | traffic.figures()


def made(kind, *, kept=KEPT):
    return lambda: kind(dimension=6, kept=kept, fused=FUSED, rrf_k=K)


def test_exact_invalidation_makes_needed_invalidations_only():
    results = figures(made(Exact))
    assert results["needed_invalidations"] > 40
    assert (results["recall"], results["precision"], results["content_stale_rate"]) == (1, 1, 0)
    assert results["invalidations_per_needed"] == 1
    assert results["slo_violations"] == 0


def test_answers_with_too_few_candidates_are_retrieved_again():
    results = figures(made(Exact, kept=6), kept=6)
    assert results["rechecks"] > 10
    assert (results["recall"], results["content_stale_rate"]) == (1, 0)


@pytest.mark.parametrize(
    ("mistake", "kept"), [(IgnoresAddedPassages, KEPT), (IgnoresLexicalRetriever, KEPT), (NeverRechecks, 6)]
)
def test_figures_reveal_a_planted_mistake(mistake, kept):
    wrong = figures(made(mistake, kept=kept), kept=kept)
    assert wrong["recall"] < 0.98
    assert wrong["content_stale_rate"] > 0.005
    assert wrong["slo_violations"] > 0


@pytest.mark.parametrize(
    "mistake", [IgnoresAddedPassages, IgnoresLexicalRetriever, NeverRechecks, InvalidatesEverything]
)
def test_a_planted_mistake_overrides_an_existing_method(mistake):
    for name, planted in vars(mistake).items():
        if inspect.isfunction(planted):
            replaced = getattr(Exact, name)
            wanted, given = (
                [one.lstrip("_") for one in inspect.signature(each).parameters] for each in (replaced, planted)
            )
            assert given == wanted


def test_figures_reveal_needless_invalidations():
    wrong = figures(made(InvalidatesEverything))
    assert (wrong["recall"], wrong["content_stale_rate"]) == (1, 0)
    assert wrong["precision"] < 0.5
    assert wrong["invalidations_per_needed"] > 5
    assert wrong["hit_rate"] < figures(made(Exact))["hit_rate"]


def test_flushing_is_never_stale_and_never_invalidating_never_drops():
    all_, none = figures(SIMPLE["all"]), figures(SIMPLE["none"])
    assert (all_["content_stale_rate"], all_["recall"], all_["rank_drift_rate"]) == (0, 1, 0)
    assert all_["invalidations"] == all_["replacements"] == 60 * 20
    assert all_["precision"] < 0.5
    assert (none["invalidations"], none["precision"], none["recall"]) == (0, None, 0)
    assert none["content_stale_rate"] > 0.5
    assert none["hit_rate"] > all_["hit_rate"]
    assert none["slo_violations"] > 0 == all_["slo_violations"]


class SingleQuestion:
    """One question, whose answer changes with each change."""

    def __init__(self, policy, **pace):
        self.traffic = SimulatedTraffic(
            PolicyEvaluator(SIMPLE[policy](), uses_candidates=False), SimulationTiming(**pace)
        )
        self.number = 0
        self.born = {}
        self.traffic.begin(self.snapshot())

    def snapshot(self):
        self.born = {("p", self.number): self.number}
        fresh, number = {"q": (("p", self.number),)}, self.number

        def evidence(key, _candidates):
            search = HybridSearch(key, unit(1), ACCESS, 1)
            return DocumentEvidence(key, search, {}, 1, (("p", number),), (), (), frozenset(("d",)))

        return TruthSnapshot(number, fresh, evidence, self.born, {}, 1, 1)

    def change(self, at_s):
        self.number += 1
        chunk = StoredChunk(
            chunk_id="p", tenant="bench", document_id="d", version=self.number, position="documents.v1-0:0",
            text="", text_sha256="", start=0, end=0,
        )  # fmt: skip
        change = DocumentChange(frozenset(), (Passage(chunk, unit(1), TermCounts.of({})),), frozenset("d"))
        self.traffic.until(at_s)
        self.traffic.change(change, self.snapshot(), at_s)

    def ask(self, *times_s):
        for at_s in times_s:
            self.traffic.ask("q", at_s)
        results = self.traffic.figures()
        hits = round(results["hit_rate"] * results["requests"])
        return hits, results["stale_within_slo"], results["slo_violations"]


def test_a_hit_violates_the_slo_when_its_answer_has_been_stale_for_longer_than_the_objective():
    results = SingleQuestion("none", objective_s=1.0, fill_s=0.01)
    assert results.ask(1.0) == (0, 0, 0)
    results.change(2.0)
    assert results.ask(2.5) == (1, 1, 0)
    results.change(2.9)
    assert results.ask(3.0) == (2, 2, 0), "a second change does not affect the start of staleness"
    assert results.ask(3.1, 9.0) == (4, 2, 2)


def test_an_invalidation_takes_effect_after_its_delay_and_the_next_question_fills_the_answer():
    results = SingleQuestion("cited_chunk", invalidation_delay_s=0.2, fill_s=0.01)
    results.ask(1.0)
    results.change(2.0)
    assert results.ask(2.1) == (1, 1, 0), "not invalidated yet"
    assert results.ask(2.3) == (1, 1, 0), "retrieved again"
    assert results.ask(2.305) == (1, 1, 0), "waits for the pending fill"
    assert results.ask(2.4) == (2, 1, 0)


def test_a_fill_that_loses_the_race_against_a_change_is_not_stored():
    results = SingleQuestion("cited_chunk", invalidation_delay_s=0.05, fill_s=0.2)
    results.ask(1.95)
    results.change(2.0)
    assert results.ask(2.3, 2.45) == (0, 0, 0), "the fill from before the change was not stored; the next is pending"
    assert results.ask(2.6) == (1, 0, 0)


def test_an_answer_expires_after_its_ttl():
    results = SingleQuestion("none", ttl_s=10.0, fill_s=0.01)
    assert results.ask(1.0, 10.9) == (1, 0, 0)
    assert results.ask(11.1) == (1, 0, 0)
    assert results.ask(11.2) == (2, 0, 0)


def test_questions_are_distinct(tmp_path):
    file, more = tmp_path / "questions.jsonl", tmp_path / "more.jsonl"
    file.write_text('{"text": "How  long?", "_id": "1"}\n{"text": "how long?"}\n{"text": "Who?"}\n')
    more.write_text('{"text": "Who?"}\n{"text": "Where?"}\n')
    assert read_questions([file, more]) == ["how long?", "who?", "where?"]
    for broken in ("", '{"question": "x"}\n', '{"text": " "}\n', "no json\n", "[1]\n"):
        file.write_text(broken)
        with pytest.raises(BenchmarkFailed, match=r"questions\.jsonl"):
            read_questions([file])


def test_the_plot_has_a_line_for_each_policy():
    figures = [{"policy": "exact", "stale_rate_after_each_edit": [0.0] * 700}]
    figures.append({"policy": "none", "stale_rate_after_each_edit": [n / 700 for n in range(700)]})
    svg = stale_rates(figures).decode()
    assert ">exact<" in svg
    assert ">none<" in svg
    assert len(svg) < 60_000


def test_help_has_examples_and_an_unknown_policy_is_a_usage_error(tmp_path):
    assert "freshline bench cache --events" in CliRunner().invoke(app, ["cache", "--help"]).output
    file = tmp_path / "x"
    file.write_text("")
    results = CliRunner().invoke(app, ["cache", "--events", str(file), "--questions", str(file), "--policy", "magic"])
    assert results.exit_code == 2
    assert "magic" in results.stderr
