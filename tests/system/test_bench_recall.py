"""The recall benchmark compares the vector retriever with an exact search."""

import pytest
from rooms import write_questions, write_rooms

from bench.preloaded import BenchmarkSetup
from bench.recall import bench_recall

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

ROOMS = 30


async def test_more_candidates_than_passages_have_full_recall(stack, tmp_path):
    events = write_rooms(tmp_path / "history.jsonl", ROOMS)
    questions = write_questions(tmp_path / "questions.txt", 8)
    narrow = {"FRESHLINE_QUERY__CANDIDATES": "5", "FRESHLINE_QUERY__CANDIDATES_KEPT": "5"}
    setup = BenchmarkSetup(stack, events, lambda _what, _state: None, narrow)
    found = await bench_recall(setup, questions, candidate_counts=(1, 800), sample=5)
    assert [(one["ef_search"], one["questions"]) for one in found] == [(1, 5), (800, 5)]
    assert found[1]["recall_at_5"] == 1
    assert 0 < found[0]["recall_at_5"] <= 1
    assert all(one["ms"]["min"] > 0 < one["exact_ms"]["min"] for one in found)
