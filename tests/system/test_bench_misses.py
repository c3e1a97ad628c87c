"""The benchmark of misses asks the service, the usual way to search by vectors, and the index alone."""

import httpx
import pytest
from rooms import write_questions, write_rooms

from bench.beside import beside
from bench.loaded import Ground, loaded
from bench.misses import bench_misses

pytestmark = [pytest.mark.stack, pytest.mark.timeout(240)]

ROOMS = 12


async def test_every_answer_is_a_miss_and_all_three_are_asked(stack, tmp_path):
    questions = write_questions(tmp_path / "questions.txt", ROOMS)
    ground = Ground(stack, write_rooms(tmp_path / "history.jsonl", ROOMS), lambda _what, _state: None)
    [found] = (await bench_misses(ground, questions, in_flight=(2,), seconds=1.0, warm_s=0.5))["misses"]
    assert (found["in_flight"], found["success_share"], found["hit_share"]) == (2, 1, 0)
    for other in ("index_alone", "usual_service"):
        assert found[other]["success_share"] == 1, found[other]["first_failure"]
    assert found["ratio_to_usual"] == pytest.approx(
        found["answers_per_s"] / found["usual_service"]["answers_per_s"], abs=0.001
    )
    # One leg of two, and nothing known of its age, is less than what the service does.
    assert 0 < found["ratio_to_index"] < found["ratio_to_usual"]
    assert 0 < found["answers_per_s"] < found["most_answers_per_s"]


async def test_the_usual_way_finds_what_the_service_finds(stack, tmp_path):
    ground = Ground(stack, write_rooms(tmp_path / "history.jsonl", ROOMS), lambda _what, _state: None)
    async with (
        loaded(ground, "last") as installation,
        beside("vectors", installation) as (usual, _),
        httpx.AsyncClient(timeout=30) as client,
    ):
        response = await client.post(usual.url, json={"query": "Which team booked room 5?", "top_k": 3})
        results = response.json()["results"]
    assert len(results) == 3
    assert "team 35" in {one["document_id"]: one["text"] for one in results}["5.md"]
    assert [one["score"] for one in results] == sorted((one["score"] for one in results), reverse=True)
