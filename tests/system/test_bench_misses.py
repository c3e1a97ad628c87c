"""The benchmark of misses measures the service, a usual search service, and the index alone."""

import httpx
import pytest
from rooms import write_questions, write_rooms

from bench.baseline_server import baseline_server
from bench.misses import bench_misses
from bench.preloaded import BenchmarkSetup, preloaded

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

ROOMS = 12


async def test_every_answer_is_a_miss_and_all_three_are_measured(stack, tmp_path):
    questions = write_questions(tmp_path / "questions.txt", ROOMS)
    setup = BenchmarkSetup(stack, write_rooms(tmp_path / "history.jsonl", ROOMS), lambda _what, _state: None)
    [found] = (await bench_misses(setup, questions, in_flight=(2,), seconds=1.0, warm_s=0.5))["misses"]
    assert (found["in_flight"], found["success_rate"], found["hit_rate"]) == (2, 1, 0)
    for other in ("index_alone", "usual_service"):
        assert found[other]["success_rate"] == 1, found[other]["first_failure"]
    assert found["ratio_to_usual"] == pytest.approx(
        found["answers_per_s"] / found["usual_service"]["answers_per_s"], abs=0.001
    )
    # The usual service does less: one retriever of two, without freshness information.
    assert 0 < found["ratio_to_index"] < found["ratio_to_usual"]
    assert 0 < found["answers_per_s"] < found["max_answers_per_s"]


async def test_the_usual_service_finds_the_same_passage(stack, tmp_path):
    setup = BenchmarkSetup(stack, write_rooms(tmp_path / "history.jsonl", ROOMS), lambda _what, _state: None)
    async with (
        preloaded(setup, "final") as installation,
        baseline_server("vectors", installation) as (usual, _),
        httpx.AsyncClient(timeout=30) as client,
    ):
        response = await client.post(usual.url, json={"query": "Which team booked room 5?", "top_k": 3})
        results = response.json()["results"]
    assert len(results) == 3
    assert "team 35" in {one["document_id"]: one["text"] for one in results}["5.md"]
    assert [one["score"] for one in results] == sorted((one["score"] for one in results), reverse=True)
