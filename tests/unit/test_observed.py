"""The history of observations: for each invariant, one history that keeps it and one that violates it."""

import pytest

from freshline.verify.invariants import Version
from freshline.verify.observed import Harm, ObservedHistory
from schemas.documents import DocumentKey, Outcome
from schemas.positions import Position

KEY = DocumentKey("acme", "travel.md")
A, B, C = "passage-a", "passage-b", "passage-c"


def version(number: int, *passages: str, place: int | None = None, readable: bool = True, **more) -> Version:
    place = number if place is None else place
    return Version(number, place, readable, deleted=not passages and readable, passages=frozenset(passages), **more)


def observed(*versions: Version, done: int = 0) -> ObservedHistory:
    """A history of one document whose first ``done`` versions are completed."""
    history = ObservedHistory()
    for one in versions:
        history.accept(Position(0, one.place), KEY, one)
    for one in versions[:done]:
        history.record_outcome(Position(0, one.place), Outcome.DONE)
    return history


def broken(history: ObservedHistory) -> list[tuple[str, Harm]]:
    return [(violation.invariant, violation.harm) for violation in history.violations]


@pytest.mark.parametrize(
    ("searchable", "violations"),
    [
        ({B: 2}, []),
        ({A: 1}, [("I1", Harm.LOST), ("I1", Harm.STALE)]),
        ({}, [("I1", Harm.LOST)]),
        ({A: 1, B: 2}, [("I1", Harm.STALE)]),
    ],
)
def test_when_idle_only_the_newest_version_is_searchable(searchable, violations):
    history = observed(version(1, A), version(2, B), done=2)
    history.rested({KEY: searchable})
    assert broken(history) == violations


def test_a_passage_after_a_delete_is_a_resurrection():
    history = observed(version(1, A), version(2), done=2)
    history.searchable(KEY, {A: 1}, after=history.done[KEY])
    history.rested({KEY: {A: 1}})
    assert broken(history) == [("I2", Harm.RESURRECTED), ("I1", Harm.RESURRECTED)]


def test_a_passage_of_a_newer_version_is_no_resurrection():
    history = observed(version(1, A), version(2), version(3, A), done=2)
    history.searchable(KEY, {A: 3}, after=history.done[KEY])
    assert broken(history) == []


@pytest.mark.parametrize(
    ("searchable", "harmed"), [({A: 1}, False), ({B: 2}, False), ({A: 1, B: 2}, False), ({}, True), ({C: 1}, True)]
)
def test_the_old_version_is_searchable_until_the_new_one_is(searchable, harmed):
    history = observed(version(1, A), version(2, B), done=1)
    history.searchable(KEY, searchable, after=history.done[KEY])
    assert broken(history) == ([("I3", Harm.LOST)] if harmed else [])


def test_a_completed_version_has_removed_the_passages_it_replaced():
    history = observed(version(1, A), version(2, B))
    history.record_outcome(Position(0, 2), Outcome.DONE, {A: 1, B: 2})
    assert broken(history) == [("I3", Harm.STALE)]


@pytest.mark.parametrize(("as_of", "harmed"), [({}, False), ({0: 1}, False), ({0: 2}, True), ({0: 9, 1: 9}, True)])
def test_an_answer_has_no_passage_that_its_positions_exclude(as_of, harmed):
    history = observed(version(1, A), version(2, B), done=2)
    history.answered(as_of, "acme", (), KEY, {A: 1})
    assert broken(history) == ([("I4", Harm.STALE)] if harmed else [])


def test_an_answer_has_passages_of_one_version():
    history = observed(version(1, A, B), version(2, B, C), done=1)
    history.answered({0: 1}, "acme", (), KEY, {A: 1, B: 1})
    history.answered({0: 1}, "acme", (), KEY, {B: 1, C: 2})
    assert broken(history) == []
    history.answered({0: 1}, "acme", (), KEY, {A: 1, C: 2})
    assert broken(history) == [("I3", Harm.STALE)]


def test_an_answer_with_enough_results_has_all_passages_of_the_document():
    history = observed(version(1, A, B), done=1)
    history.answered_whole({0: 0}, KEY, {})
    history.answered_whole({0: 1}, KEY, {A: 1, B: 1})
    assert broken(history) == []
    history.answered_whole({0: 1}, KEY, {A: 1})
    assert broken(history) == [("I3", Harm.LOST)]


def test_commits_do_not_pass_incomplete_records():
    history = ObservedHistory()
    history.committed("prepare 0", 3, {0, 1, 2, 7})
    assert broken(history) == []
    history.committed("prepare 0", 3, {0, 2})
    assert broken(history) == [("I5", Harm.LOST)]


@pytest.mark.parametrize(
    ("outcomes", "violations"),
    [
        ((Outcome.DONE, Outcome.DONE), []),
        ((Outcome.SUPERSEDED, Outcome.DONE), []),
        ((Outcome.DONE, Outcome.SUPERSEDED), [("I5", Harm.MISREPORTED)]),
        ((Outcome.DEAD_LETTER, Outcome.DONE), [("I5", Harm.MISREPORTED)]),
        ((None, Outcome.DONE), [("I5", Harm.LOST)]),
    ],
)
def test_every_event_has_the_right_outcome(outcomes, violations):
    history = observed(version(1, A), version(2, B))
    for place, outcome in enumerate(outcomes, start=1):
        if outcome:
            history.record_outcome(Position(0, place), outcome)
    history.rested({KEY: {B: 2}})
    assert broken(history) == violations


def test_an_unreadable_version_keeps_the_previous_one():
    history = observed(version(1, A), version(2, readable=False), done=1)
    history.record_outcome(Position(0, 2), Outcome.DEAD_LETTER)
    history.rested({KEY: {A: 1}})
    assert broken(history) == []


def test_the_first_of_equal_versions_wins():
    history = observed(version(1, A, place=0), version(1, B, place=1), done=1)
    history.record_outcome(Position(0, 1), Outcome.SUPERSEDED)
    history.rested({KEY: {A: 1}})
    assert broken(history) == []


def test_the_first_outcome_counts():
    history = observed(version(1, A), done=1)
    history.record_outcome(Position(0, 1), Outcome.SUPERSEDED)
    history.outcome_reported_again(Position(0, 1), Outcome.DONE)
    assert broken(history) == []
    history.outcome_reported_again(Position(0, 1), Outcome.SUPERSEDED)
    assert broken(history) == [("I5", Harm.MISREPORTED)]


def test_a_replay_changes_nothing():
    history = observed(version(1, A), done=1)
    history.replayed({KEY: {A: 1}}, {KEY: {A: 1}})
    assert broken(history) == []
    history.replayed({KEY: {A: 1}}, {KEY: {A: 2}})
    history.replayed({}, {KEY: {A: 1}})
    assert broken(history) == [("I6", Harm.STALE), ("I6", Harm.RESURRECTED)]


def test_readers_see_only_their_tenant_and_groups():
    history = observed(version(1, A, groups=frozenset({"board"})), done=1)
    history.answered({0: 1}, "acme", ("board",), KEY, {A: 1})
    assert broken(history) == []
    history.answered({0: 1}, "acme", ("staff",), KEY, {A: 1})
    history.answered({0: 1}, "umbrella", ("board",), KEY, {A: 1})
    assert broken(history) == [("I7", Harm.LEAKED), ("I7", Harm.LEAKED)]


def test_later_answers_respect_new_groups():
    history = observed(version(1, A), version(2, A, groups=frozenset({"board"})), done=2)
    history.answered({0: 1}, "acme", (), KEY, {A: 1})
    assert broken(history) == []
    history.answered({0: 2}, "acme", (), KEY, {A: 1})
    assert broken(history) == [("I7", Harm.LEAKED)]


def test_versions_never_decrease():
    history = observed(version(1, A))
    for seen in (1, 1, 4, 3):
        history.manifest(KEY, seen)
    for assigned in (7, 8, 8):
        history.assigned(KEY, assigned)
    assert broken(history) == [("I1", Harm.STALE), ("I1", Harm.STALE)]
