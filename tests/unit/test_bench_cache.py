"""The benchmark of the cache: a truth computed by hand, the definitions, and a mistake that the figures must show."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from typer.testing import CliRunner

from freshline.bench.cache import read_questions
from freshline.bench.cli import app
from freshline.bench.installation import BenchmarkFailed
from freshline.bench.staleness import Answers, Moment, State, state_of
from freshline.bench.truth import Question, Truth, coarse_length
from infra.opensearch.port import Access, HybridSearch
from schemas.index import StoredChunk
from streams.core.invalidation.bm25 import LENGTHS, length_code
from streams.core.invalidation.evidence import Change, Evidence, Passage, TermCounts
from streams.core.invalidation.exact import Exact
from streams.core.invalidation.policy import SIMPLE

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


def figures(policy, *, edits=60):
    """Figures of a policy along a random history; windows hold all there is, so exact invalidation knows it all."""
    rng = random.Random(3)
    asked = {
        f"q{number}": Question(unit(*(rng.gauss(0, 1) for _ in range(6))), Counter({rng.choice("abcd"): 1}))
        for number in range(20)
    }
    truth = Truth(list(asked.values()), fused=FUSED, kept=KEPT, top_k=TOP_K, rrf_k=K)
    passages, born = {}, {}
    answers, traffic = Answers(policy(), refills_at_once=True), Answers(policy(), refills_at_once=False)

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

        def evidence(key):
            return Evidence(
                key=key,
                search=HybridSearch(key, asked[key].vector, ACCESS, KEPT),
                terms=asked[key].terms,
                top_k=TOP_K,
                sources=fresh[key],
                documents=frozenset(name for name, _ in fresh[key]),
                vector_window=found[key].vector.window(),
                lexical_window=tuple((name, passages[name].terms) for name, _ in found[key].lexical.window()),
            )

        return Moment(number, fresh, evidence, born, truth.frequencies(), len(truth), truth.total_length)

    for number in range(31):
        apply(number)
    now = moment(30)
    for key in asked:
        answers.fill(now.evidence(key), 30)
    for number in range(31, 31 + edits):
        change = apply(number)
        now = moment(number)
        for one in (answers, traffic):
            one.change(change, now)
        for key in rng.choices(sorted(asked), k=10):
            traffic.ask(key, now)
    return answers.at_rest() | traffic.in_traffic()


def exact():
    return Exact(dimension=6, kept=KEPT, fused=FUSED, rrf_k=K)


def test_a_policy_that_ignores_added_passages_is_shown_by_the_figures():
    right = figures(exact)
    wrong = figures(lambda: IgnoresWhatIsAdded(dimension=6, kept=KEPT, fused=FUSED, rrf_k=K))
    assert right["needed"] > 40
    assert (right["recall"], right["content_stale_share"], right["served_past_objective"]) == (1, 0, 0)
    assert wrong["recall"] < 0.8
    assert wrong["content_stale_share"] > 0.1
    assert wrong["served_past_objective"] > 0


def test_flushing_is_never_stale_and_never_invalidating_never_drops():
    all_, none = figures(SIMPLE["all"]), figures(SIMPLE["none"])
    assert (all_["content_stale_share"], all_["recall"], all_["rank_drift_share"]) == (0, 1, 0)
    assert all_["drops"] == all_["refills"] == 60 * 20
    assert all_["precision"] < 0.5
    assert (none["drops"], none["precision"], none["recall"]) == (0, None, 0)
    assert none["content_stale_share"] > 0.5
    assert none["hit_share"] > all_["hit_share"]
    assert none["served_past_objective"] > 0 == all_["served_past_objective"]


def test_questions_are_read_once_each(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"text": "How  long?", "_id": "1"}\n{"text": "how long?"}\n{"text": "Who?"}\n')
    assert read_questions(file) == ["how long?", "who?"]
    for broken in ("", '{"question": "x"}\n', '{"text": " "}\n', "no json\n", "[1]\n"):
        file.write_text(broken)
        with pytest.raises(BenchmarkFailed, match=r"questions\.jsonl"):
            read_questions(file)


def test_help_has_examples_and_an_unknown_policy_is_misuse(tmp_path):
    assert "freshline bench cache --events" in CliRunner().invoke(app, ["cache", "--help"]).output
    file = tmp_path / "x"
    file.write_text("")
    told = CliRunner().invoke(app, ["cache", "--events", str(file), "--questions", str(file), "--policy", "magic"])
    assert told.exit_code == 2
    assert "magic" in told.stderr
