"""The benchmark of the cache: a truth computed by hand, the definitions, and a mistake that the figures must show."""

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
from bench.installation import BenchmarkFailed
from bench.plot import stale_shares
from bench.staleness import Answers, Judge, Moment, State, state_of
from bench.traffic import Pace, Traffic
from bench.truth import Question, Truth, coarse_length
from schemas.index import StoredChunk
from schemas.search import Access, HybridSearch
from streams.core.invalidation.bm25 import LENGTHS, length_code
from streams.core.invalidation.evidence import Change, Evidence, Passage, TermCounts
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.policy import SIMPLE, Verdict

ACCESS = Access("bench")
FUSED, KEPT, TOP_K, K = 4, 60, 2, 60


def unit(*numbers):
    vector = np.array(numbers, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def test_scores_and_order_by_hand():
    truth = Truth([Question(unit(1, 0), {"leave": 2, "visa": 1})], fused=3, kept=3, top_k=3, rrf_k=60)
    truth.change((), {"a": (unit(0, 1), {"leave": 1, "paid": 3}), "b": (unit(1, 0), {"desk": 2})})
    truth.change((), {"c": (unit(3, 4), {"leave": 2})})
    [found] = truth.find()
    assert found.vector.window() == (("b", 1.0), ("c", pytest.approx(0.8)), ("a", 0.5))
    # Three passages of 4, 2 and 2 terms, two of which hold "leave": idf ln(1 + 1.5 / 2.5), average 8/3, twice asked.
    idf = math.log(1 + 1.5 / 2.5)
    a = 2 * idf * 1 / (1 + 1.2 * (0.25 + 0.75 * 4 / (8 / 3)))
    c = 2 * idf * 2 / (2 + 1.2 * (0.25 + 0.75 * 2 / (8 / 3)))
    assert found.lexical.window() == (("c", pytest.approx(c)), ("a", pytest.approx(a)))
    # By places: second and first, third and second, first alone.
    assert found.top == ("c", "a", "b")
    assert truth.frequencies() == {"leave": 2, "visa": 0}
    truth.change(["c"], {})
    assert truth.find()[0].top == ("a", "b")
    assert (len(truth), truth.total_length) == (2, 6)


def test_of_equal_scores_the_older_passage_comes_first():
    truth = Truth([Question(unit(1, 0), {})], fused=2, kept=2, top_k=2, rrf_k=60)
    truth.change((), {name: (unit(1, 1), {}) for name in ("z", "y", "x")})
    assert [name for name, _ in truth.find()[0].vector.window()] == ["z", "y"]


def test_lengths_lose_what_lucene_loses():
    for length in range(5_000):
        assert coarse_length(length) == LENGTHS[length_code(length)]


@pytest.mark.parametrize(
    ("cached", "fresh", "state"),
    [
        ([("a", 1), ("b", 1)], [("a", 1), ("b", 1)], State.TRUE),
        ([("a", 1), ("b", 1)], [("b", 1), ("a", 1)], State.DRIFTED),
        ([("a", 1), ("b", 1)], [("a", 1), ("old", 1)], State.DRIFTED),
        ([("a", 1), ("b", 1)], [("a", 1), ("new", 9)], State.STALE),
        ([("a", 1), ("gone", 1)], [("a", 1), ("b", 1)], State.STALE),
        ([("again", 1)], [("again", 9)], State.STALE),
        ([], [("new", 9)], State.STALE),
    ],
)
def test_what_is_stale_and_what_has_drifted(cached, fresh, state):
    born = {("a", 1): 0, ("b", 1): 0, ("old", 1): 2, ("new", 9): 4, ("again", 9): 4}
    assert state_of(cached, fresh, 3, born) is state


class IgnoresWhatIsAdded(Exact):
    """The mistake of every cache that looks at cited passages alone."""

    def judge(self, change, statistics):
        return super().judge(Change(change.documents, change.removed, ()), statistics)


class IgnoresWords(Exact):
    """One leg of the two: what is added enters the vector windows alone."""

    def _find_by_terms(self, _passages, _new, _fusion, count):
        return count


class NeverAsksAgain(Exact):
    """Windows that have run short are taken for whole."""

    def judge(self, change, statistics):
        return replace(super().judge(change, statistics), recheck=frozenset())


class DropsTooMuch(Exact):
    """Whatever a change comes near is dropped."""

    def judge(self, change, statistics):
        keys = frozenset(self._rows)
        super().judge(change, statistics)
        return Verdict(drop=keys)


PACE = Pace(change_every_s=2.0, ttl_s=1e9)


def figures(policy, *, edits=60, kept=KEPT, asked_between=10):
    """Figures of a policy along a random history; windows of ``KEPT`` hold all there is."""
    rng = random.Random(3)
    asked = {
        f"q{number}": Question(unit(*(rng.gauss(0, 1) for _ in range(6))), Counter({rng.choice("abcd"): 1}))
        for number in range(20)
    }
    truth = Truth(list(asked.values()), fused=FUSED, kept=kept, top_k=TOP_K, rrf_k=K)
    passages, born = {}, {}
    simple = not isinstance(policy(), Exact)
    answers = Answers(Judge(policy(), windows=not simple))
    traffic = Traffic(Judge(policy(), windows=not simple), PACE)

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
        return Change(frozenset((name, *removed)), frozenset(removed), (passage,))

    def moment(number):
        found = dict(zip(asked, truth.find(), strict=True))
        fresh = {key: tuple((name, passages[name].chunk.version) for name in one.top) for key, one in found.items()}

        def evidence(key, windows):
            lexical = found[key].lexical.window() if windows else ()
            return Evidence(
                key=key,
                search=HybridSearch(key, asked[key].vector, ACCESS, kept),
                terms=asked[key].terms,
                top_k=TOP_K,
                sources=fresh[key],
                documents=frozenset(name for name, _ in fresh[key]),
                vector_window=found[key].vector.window() if windows else (),
                lexical_window=tuple((name, passages[name].terms) for name, _ in lexical),
            )

        return Moment(number, fresh, evidence, dict(born), truth.frequencies(), len(truth), truth.total_length)

    for number in range(31):
        apply(number)
    now = moment(30)
    for key in asked:
        answers.fill(key, now)
    traffic.begin(now)
    for number in range(31, 31 + edits):
        at_s = number * PACE.change_every_s
        traffic.until(at_s)
        change = apply(number)
        now = moment(number)
        answers.change(change, now)
        traffic.change(change, now, at_s)
        for asked_s in sorted(rng.uniform(at_s, at_s + PACE.change_every_s) for _ in range(asked_between)):
            traffic.ask(rng.choice(sorted(asked)), asked_s)
    return answers.figures() | traffic.figures()


def made(kind, *, kept=KEPT):
    return lambda: kind(dimension=6, kept=kept, fused=FUSED, rrf_k=K)


def test_exact_invalidation_drops_what_is_needed_and_nothing_else():
    told = figures(made(Exact))
    assert told["needed"] > 40
    assert (told["recall"], told["precision"], told["content_stale_share"]) == (1, 1, 0)
    assert told["drops_per_needed"] == 1
    assert told["served_past_objective"] == 0


def test_windows_that_run_short_are_asked_for_again_and_stay_right():
    told = figures(made(Exact, kept=6), kept=6)
    assert told["rechecks"] > 10
    assert (told["recall"], told["content_stale_share"]) == (1, 0)


@pytest.mark.parametrize(("mistake", "kept"), [(IgnoresWhatIsAdded, KEPT), (IgnoresWords, KEPT), (NeverAsksAgain, 6)])
def test_a_planted_mistake_is_shown_by_the_figures(mistake, kept):
    wrong = figures(made(mistake, kept=kept), kept=kept)
    assert wrong["recall"] < 0.98
    assert wrong["content_stale_share"] > 0.005
    assert wrong["served_past_objective"] > 0


@pytest.mark.parametrize("mistake", [IgnoresWhatIsAdded, IgnoresWords, NeverAsksAgain, DropsTooMuch])
def test_a_planted_mistake_replaces_what_is_there(mistake):
    for name, planted in vars(mistake).items():
        if inspect.isfunction(planted):
            replaced = getattr(Exact, name)
            wanted, given = (
                [one.lstrip("_") for one in inspect.signature(each).parameters] for each in (replaced, planted)
            )
            assert given == wanted


def test_dropping_too_much_is_shown_by_the_figures():
    wrong = figures(made(DropsTooMuch))
    assert (wrong["recall"], wrong["content_stale_share"]) == (1, 0)
    assert wrong["precision"] < 0.5
    assert wrong["drops_per_needed"] > 5
    assert wrong["hit_share"] < figures(made(Exact))["hit_share"]


def test_flushing_is_never_stale_and_never_invalidating_never_drops():
    all_, none = figures(SIMPLE["all"]), figures(SIMPLE["none"])
    assert (all_["content_stale_share"], all_["recall"], all_["rank_drift_share"]) == (0, 1, 0)
    assert all_["drops"] == all_["refills"] == 60 * 20
    assert all_["precision"] < 0.5
    assert (none["drops"], none["precision"], none["recall"]) == (0, None, 0)
    assert none["content_stale_share"] > 0.5
    assert none["hit_share"] > all_["hit_share"]
    assert none["served_past_objective"] > 0 == all_["served_past_objective"]


class Told:
    """One question whose answer changes when it is told so."""

    def __init__(self, policy, **pace):
        self.traffic = Traffic(Judge(SIMPLE[policy](), windows=False), Pace(**pace))
        self.number = 0
        self.born = {}
        self.traffic.begin(self.moment())

    def moment(self):
        self.born = {("p", self.number): self.number}
        fresh, number = {"q": (("p", self.number),)}, self.number

        def evidence(key, _windows):
            search = HybridSearch(key, unit(1), ACCESS, 1)
            return Evidence(key, search, {}, 1, (("p", number),), frozenset(("d",)), (), ())

        return Moment(number, fresh, evidence, self.born, {}, 1, 1)

    def change(self, at_s):
        self.number += 1
        chunk = StoredChunk(
            chunk_id="p", tenant="bench", document_id="d", version=self.number, position="documents.v1-0:0",
            text="", text_sha256="", start=0, end=0,
        )  # fmt: skip
        change = Change(frozenset("d"), frozenset(), (Passage(chunk, unit(1), TermCounts.of({})),))
        self.traffic.until(at_s)
        self.traffic.change(change, self.moment(), at_s)

    def ask(self, *times_s):
        for at_s in times_s:
            self.traffic.ask("q", at_s)
        told = self.traffic.figures()
        hits = round(told["hit_share"] * told["requests"])
        return hits, told["served_stale_within_objective"], told["served_past_objective"]


def test_a_hit_is_past_the_objective_when_its_answer_has_been_stale_for_longer():
    told = Told("none", objective_s=1.0, fill_s=0.01)
    assert told.ask(1.0) == (0, 0, 0)
    told.change(2.0)
    assert told.ask(2.5) == (1, 1, 0)
    told.change(2.9)
    assert told.ask(3.0) == (2, 2, 0), "a second change does not make it younger or older"
    assert told.ask(3.1, 9.0) == (4, 2, 2)


def test_a_drop_takes_its_time_and_the_next_question_fills_again():
    told = Told("cited_chunk", drop_after_s=0.2, fill_s=0.01)
    told.ask(1.0)
    told.change(2.0)
    assert told.ask(2.1) == (1, 1, 0), "not dropped yet"
    assert told.ask(2.3) == (1, 1, 0), "retrieved anew"
    assert told.ask(2.305) == (1, 1, 0), "waits for that"
    assert told.ask(2.4) == (2, 1, 0)


def test_a_fill_that_a_change_overtakes_is_not_stored():
    told = Told("cited_chunk", drop_after_s=0.05, fill_s=0.2)
    told.ask(1.95)
    told.change(2.0)
    assert told.ask(2.3, 2.45) == (0, 0, 0), "what was retrieved before the change is gone; the next is on its way"
    assert told.ask(2.6) == (1, 0, 0)


def test_an_answer_ends_with_its_time():
    told = Told("none", ttl_s=10.0, fill_s=0.01)
    assert told.ask(1.0, 10.9) == (1, 0, 0)
    assert told.ask(11.1) == (1, 0, 0)
    assert told.ask(11.2) == (2, 0, 0)


def test_questions_are_read_once_each(tmp_path):
    file, more = tmp_path / "questions.jsonl", tmp_path / "more.jsonl"
    file.write_text('{"text": "How  long?", "_id": "1"}\n{"text": "how long?"}\n{"text": "Who?"}\n')
    more.write_text('{"text": "Who?"}\n{"text": "Where?"}\n')
    assert read_questions([file, more]) == ["how long?", "who?", "where?"]
    for broken in ("", '{"question": "x"}\n', '{"text": " "}\n', "no json\n", "[1]\n"):
        file.write_text(broken)
        with pytest.raises(BenchmarkFailed, match=r"questions\.jsonl"):
            read_questions([file])


def test_the_picture_has_a_line_for_each_policy():
    figures = [{"policy": "exact", "stale_share_after_each_edit": [0.0] * 700}]
    figures.append({"policy": "none", "stale_share_after_each_edit": [n / 700 for n in range(700)]})
    drawn = stale_shares(figures).decode()
    assert ">exact<" in drawn
    assert ">none<" in drawn
    assert len(drawn) < 60_000


def test_help_has_examples_and_an_unknown_policy_is_misuse(tmp_path):
    assert "freshline bench cache --events" in CliRunner().invoke(app, ["cache", "--help"]).output
    file = tmp_path / "x"
    file.write_text("")
    told = CliRunner().invoke(app, ["cache", "--events", str(file), "--questions", str(file), "--policy", "magic"])
    assert told.exit_code == 2
    assert "magic" in told.stderr
