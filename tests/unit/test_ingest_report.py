"""How sent events ended: who is asked how often, what is made of it, and the exit code."""

import pytest

from freshline.cli.ingest_report import Report
from ingest.connectors.client import Failure, SentEvent, Summary
from ingest.connectors.outcomes import EndedEvent, EventOutcomes, classify, wait_for_outcomes
from schemas.documents import MAX_EVENTS_PER_REQUEST, EventStatus, Outcome, Stage
from schemas.positions import Position

MANY = 3 * MAX_EVENTS_PER_REQUEST


def event(number: int, document_id: str | None = None, *, deleted: bool = False) -> SentEvent:
    return SentEvent(f"event-{number}", document_id or f"{number}.md", number, Position(number % 3, number), deleted)


def ended(number: int, document_id: str, outcome: Outcome, passages: int | None = None, **given) -> EndedEvent:
    return EndedEvent(event(number, document_id, **given), outcome, None, passages)


class Reader:
    """Outcomes that a test sets; all other events are in progress."""

    def __init__(self, done):
        self.done = set(done)
        self.requests: list[int] = []

    async def statuses(self, events):
        self.requests.append(len(events))
        assert len(events) <= MAX_EVENTS_PER_REQUEST
        return {
            one.event_id: EventStatus(
                event_id=one.event_id,
                document_id=one.document_id,
                version=one.version,
                position=str(one.position),
                stage=Stage.PURGED,
                outcome=Outcome.DONE if one.event_id in self.done else None,
                accepted_ms=0,
                stages_ms={},
            )
            for one in events
        }


async def waited(reader, events, timeout_s):
    outcomes = EventOutcomes()
    outcomes.expect(events)
    await wait_for_outcomes(reader, outcomes, timeout_s=timeout_s)
    return outcomes


async def test_thousands_that_have_ended_cost_a_request_for_each_thousand():
    events = [event(number) for number in range(MANY)]
    reader = Reader(one.event_id for one in events)
    outcomes = await waited(reader, events, 10)
    assert [one.event for one in outcomes.ended] == events
    assert reader.requests == [MAX_EVENTS_PER_REQUEST] * 3


async def test_events_that_remain_still_hide_no_other():
    events = [event(number) for number in range(MANY)]
    still = events[: MAX_EVENTS_PER_REQUEST + 7]
    outcomes = await waited(Reader(one.event_id for one in events[len(still) :]), events, 0.1)
    assert {one.event for one in outcomes.ended} == set(events[len(still) :])
    assert outcomes.in_progress == sorted(still, key=lambda one: one.position)


async def test_a_wait_of_no_time_asks_for_every_event_once():
    events = [event(number) for number in range(MANY)]
    reader = Reader([events[-1].event_id])
    outcomes = await waited(reader, events, 0)
    assert [one.event for one in outcomes.ended] == [events[-1]]


async def test_of_nothing_no_caller_is_asked():
    reader = Reader([])
    await waited(reader, [], 10)
    assert reader.requests == []


def names(some):
    return [one.event.event_id for one in some]


def test_outcomes_are_sorted_out_document_by_document():
    found = classify(
        [
            ended(1, "a.md", Outcome.SUPERSEDED),
            ended(2, "a.md", Outcome.DONE, 0),
            ended(3, "a.md", Outcome.DONE, 2),
            ended(4, "b.md", Outcome.SUPERSEDED),
            ended(5, "c.md", Outcome.DONE, 0),
            ended(6, "d.md", Outcome.DONE, 0, deleted=True),
            ended(7, "e.md", Outcome.DEAD_LETTER),
            ended(8, "e.md", Outcome.DONE, 1),
            ended(9, "f.md", Outcome.SUPERSEDED),
            ended(10, "f.md", Outcome.DEAD_LETTER),
            ended(11, "g.md", Outcome.DONE),
        ]
    )
    assert names(found.failed) == ["event-7", "event-10"]
    assert names(found.superseded) == ["event-4", "event-9"]
    assert names(found.replaced) == ["event-1"]
    assert names(found.empty) == ["event-5"]


FOUND = ended(1, "a.md", Outcome.DONE, 3)
BROKEN = ended(2, "b.md", Outcome.DEAD_LETTER)
EMPTY = ended(3, "c.md", Outcome.DONE, 0)
OLD = ended(4, "d.md", Outcome.SUPERSEDED)
REFUSED = {"failed": [Failure("e.md", "too large")]}
PICTURE = {"ignored_files": {"f.png": "files named .png are not supported"}}
OPEN = [event(9)]


@pytest.mark.parametrize(
    ("known", "in_progress", "summary", "code", "searchable"),
    [
        ([FOUND], [], {}, 0, True),
        ([], [], {}, 0, True),
        ([FOUND, BROKEN], [], {}, 1, False),
        ([FOUND], [], REFUSED, 1, False),
        ([FOUND, BROKEN, EMPTY], OPEN, PICTURE, 1, False),
        ([FOUND, EMPTY], OPEN, PICTURE, 3, False),
        ([FOUND, EMPTY], [], {}, 4, False),
        ([FOUND, OLD], [], {}, 4, False),
        ([FOUND], [], PICTURE, 4, True),
    ],
)
def test_exit_code_and_claim_follow_from_what_happened(known, in_progress, summary, code, searchable):
    outcomes = EventOutcomes(list(known))
    outcomes.expect(in_progress)
    report = Report(Summary(sent=2, **summary), outcomes, 10.0)
    assert report.exit_code() == code
    assert report.exit_code(allow_partial=True) == (0 if code == 4 else code)
    assert (report.is_searchable, report.as_json()["searchable"]) == (searchable, searchable)


def test_without_a_wait_nothing_is_claimed_of_outcomes(capsys):
    report = Report(Summary(sent=2), EventOutcomes(), None)
    report.show_counts()
    assert report.exit_code() == 0
    assert not report.is_searchable
    assert "did not wait for outcomes" in capsys.readouterr().out


def test_a_long_list_is_cut_on_the_terminal_and_whole_in_the_json(capsys):
    broken = [ended(number, f"{number}.pdf", Outcome.DEAD_LETTER) for number in range(30)]
    report = Report(Summary(sent=30), EventOutcomes(broken), 10.0)
    report.show_findings()
    message = capsys.readouterr().err
    assert message.count("not processed: ") == 20
    assert "… and 10 more" in message
    assert len(report.as_json()["failures"]) == report.as_json()["failed"] == 30
