"""The load generator: draws, think time, statistics and reports."""

import asyncio
import gzip
import json
import time
from collections import Counter

import pytest

from bench.users import other_questions
from freshline.loadtest.connection import TRANSPORT_FAILED, Exchange, Target
from freshline.loadtest.edits import final_state_of, history_of, snapshot_of
from freshline.loadtest.generator import run_arrivals, run_users
from freshline.loadtest.load_statistics import FreshnessSlo, LoadStatistics
from freshline.loadtest.questions import BadQuestionFile, Zipf, read_questions
from freshline.loadtest.report import markdown, plot, write_report
from freshline.loadtest.run import UserLoad, run_load
from schemas.positions import Position


class Server:
    """Answers every request with the same body, after a while."""

    def __init__(self, *, status=200, body=b"{}", after_s=0.0, keeps=True):
        self.status, self.body, self.after_s, self.keeps = status, body, after_s, keeps
        self.requests = 0
        self.connected_s = []

    @property
    def connections(self):
        return len(self.connected_s)

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return Target(f"http://127.0.0.1:{port}/v1/query", {"X-API-Key": "k"})

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connected_s.append(time.perf_counter())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"X-API-Key: k\r\n" in head
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                self.requests += 1
                await asyncio.sleep(self.after_s)
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (self.status, len(self.body)) + self.body)
                if not self.keeps:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def answer(positions, *, cached=True, checked_ms=0.0):
    return json.dumps({"cached": cached, "as_of": {"positions": positions, "checked_ms": checked_ms}}).encode()


def test_questions_are_read_from_json_lines_and_plain_lines(tmp_path):
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": " a "}\n{"text": "b"}\n\n{"text": "a"}\n'))
    assert read_questions(packed) == ["a", "b"]
    plain = tmp_path / "q.txt"
    plain.write_text("one?\ntwo?\n")
    assert read_questions(plain) == ["one?", "two?"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"question": "b"}\n')
    with pytest.raises(BadQuestionFile, match="line 2"):
        read_questions(bad)
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(BadQuestionFile, match="no questions"):
        read_questions(tmp_path / "none.txt")


def test_draws_follow_zipf():
    items = [b"%d" % number for number in range(100)]
    draw = Zipf(items, skew=1.0, seed=3)
    counts = sorted(Counter(draw() for _ in range(40_000)).values(), reverse=True)
    total = sum(1 / rank for rank in range(1, 101))
    assert counts[0] / 40_000 == pytest.approx(1 / total, rel=0.1)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.25)
    even = Zipf(items, skew=0.0, seed=3)
    assert max(Counter(even() for _ in range(40_000)).values()) < 2 * 400


def test_a_response_without_a_change_that_is_searchable_for_longer_than_the_objective_violates_the_slo():
    slo = FreshnessSlo(objective_s=1.0)
    slo.note_searchable(Position(3, 8), 2_000.0)
    slo.note_searchable(Position(3, 7), 1_000.0)
    assert not slo.is_violated({}, 1_999.0)
    assert slo.is_violated({"3": 6}, 2_001.0)
    assert not slo.is_violated({"3": 7}, 2_999.0)
    assert slo.is_violated({"3": 7, "4": 99}, 3_001.0)
    assert not slo.is_violated({"3": 9}, 3_001.0)


def test_statistics_report_latency_hits_rejections_and_slo_violations():
    slo = FreshnessSlo()
    slo.note_searchable(Position(0, 5), 0.0)
    statistics = LoadStatistics(slo)
    began_s = statistics.began_s
    statistics.record(Exchange(200, answer({"0": 5}), began_s, 0.010))
    statistics.record(Exchange(200, answer({"0": 4}, cached=False), began_s + 9.0, 0.030))
    statistics.record(Exchange(503, b"busy", began_s, 0.001))
    statistics.record(Exchange(TRANSPORT_FAILED, b"lost", began_s, 0.5))
    found = statistics.figures(10.0)
    assert (found["requests"], found["success_rate"], found["answers_per_s"]) == (4, 0.5, 0.2)
    assert (found["mean_ms"], found["max_ms"]) == (20.0, 30.0)
    assert (found["hit_rate"], found["hit_rate_second_half"]) == (0.5, 0.0)
    assert found["slo_violations"] == 1
    assert found["statuses"] == {"0": 1, "200": 2, "503": 1}
    assert found["first_failure"] == "503: busy"
    statistics.record(Exchange(200, answer({"0": 4}), began_s + 70.0, 0.005))
    first, second = statistics.minutes(100.0)
    assert (first["answers"], first["rejected"], first["slo_violations"], first["hit_rate"]) == (2, 2, 1, 0.5)
    assert (second["answers"], second["rejected"], second["slo_violations"], second["max_ms"]) == (1, 0, 1, 5.0)
    assert LoadStatistics().figures(1.0)["mean_ms"] is None


async def test_users_think_before_the_next_question():
    server, statistics = Server(), []
    async with server as target:
        body = target.request(b"{}")
        await run_users(target, lambda: body, statistics.append, users=40, think_s=0.2, seconds=2.0)
    # 40 users with a mean of 0.2 s ask about 200 times in a second; without thinking it would be thousands.
    assert 200 < len(statistics) < 700
    assert {one.status for one in statistics} == {200}
    assert server.connections == 40


async def test_an_unreadable_response_ends_the_run():
    async with Server(body=b"no answer") as target:
        load = UserLoad(users=3, think_s=0.01, seconds=60.0)
        with pytest.raises(json.JSONDecodeError):
            await run_load(load, target, Zipf([target.request(b"{}")], skew=1.0, seed=0), LoadStatistics())


async def test_users_start_evenly_over_the_ramp():
    server, statistics, began_s = Server(body=answer({})), LoadStatistics(), time.perf_counter()
    async with server as target:
        load = UserLoad(users=50, think_s=0.01, seconds=2.0, ramp_s=1.0)
        figures = await run_load(load, target, Zipf([target.request(b"{}")], skew=1.0, seed=0), statistics)
    assert figures["minutes"][0]["answers"] == figures["requests"] > 100
    assert server.connections > 25
    # A stalled machine delays users; it never makes them early.
    for number, connected_s in enumerate(server.connected_s):
        assert connected_s - began_s >= number / 50 * 0.99


async def test_arrivals_are_independent_of_responses_and_latency_counts_from_the_due_time():
    statistics = []
    async with Server(after_s=0.3) as target:
        body = target.request(b"{}")
        await run_arrivals(target, lambda: body, statistics.append, rate_per_s=100, seconds=1.0, connections=10)
    statuses = Counter(one.status for one in statistics)
    assert 60 < len(statistics) < 150
    assert statuses[200] >= 20
    assert statuses[TRANSPORT_FAILED] > 20  # no waiting for a free connection
    assert all(one.took_s >= 0.29 for one in statistics if one.status == 200)


async def test_closed_connections_are_reopened():
    server, statistics = Server(keeps=False), []
    async with server as target:
        body = target.request(b"{}")
        await run_users(target, lambda: body, statistics.append, users=2, think_s=0.05, seconds=0.5)
    assert server.connections == server.requests == len(statistics)


async def test_an_unreachable_server_counts_as_failed():
    statistics = []
    async with Server() as target:
        pass
    await run_users(target, lambda: target.request(b"{}"), statistics.append, users=1, think_s=0.05, seconds=0.3)
    assert statistics
    assert {one.status for one in statistics} == {TRANSPORT_FAILED}


def test_a_history_has_a_snapshot_edits_and_a_final_state(tmp_path):
    lines = [
        {"seq": 0, "type": "created", "doc_id": "a", "path": "a.md", "content": "1"},
        {"seq": 1, "type": "created", "doc_id": "b", "path": "b.md", "content": "1"},
        {"seq": 2, "type": "updated", "doc_id": "a", "path": "a.md", "content": "2"},
        {"seq": 3, "type": "created", "doc_id": "c", "path": "c.md", "content": "1"},
        {"seq": 4, "type": "deleted", "doc_id": "b", "path": "b.md"},
    ]
    file = tmp_path / "h.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert [event.seq for event in snapshot_of(file)] == [0, 1]
    assert [event.seq for event in history_of(file)] == [2, 3, 4]
    assert [event.seq for event in history_of(file, after=3)] == [4]
    assert [(event.doc_id, event.content) for event in final_state_of(file)] == [("a", "2"), ("c", "1")]


def test_a_report_has_a_table_and_a_plot(tmp_path):
    step = {
        "users": 1_000,
        "success_rate": 1.0,
        "answers_per_s": 99.5,
        "mean_ms": 8.2,
        "p50_ms": 4.0,
        "p95_ms": 20.0,
        "p99_ms": 40.0,
        "hit_rate": 0.8,
        "staleness_p50_ms": 90.0,
        "staleness_p99_ms": None,
        "slo_violations": 0,
    }
    report = {
        "questions": 7_179,
        "skew": 1.0,
        "think_s": 10.0,
        "step_s": 60.0,
        "steps": [step],
        "edits": 60,
        "stopped": "at 1000 users 90.0% of the requests succeeded",
    }
    text = markdown(report)
    assert "| 1,000 | 1.0 | 99.5 | 8.2 |" in text
    assert "Ended early: at 1000 users" in text
    assert b"<svg" in plot([step])
    assert b'href="http' not in plot([step])  # nothing is loaded from elsewhere
    written = write_report(tmp_path / "out", report, b"{}")
    assert [file.name for file in written] == ["loadtest.json", "loadtest.md", "loadtest.svg"]


def test_warm_up_questions_are_not_asked_afterwards():
    asked = ["when did the war end", "who wrote the song", "days?"]
    others = other_questions(asked, 200)
    assert others
    assert not set(others) & set(asked)
    assert {word for one in others for word in one.split()} <= {word for one in asked for word in one.split()}
