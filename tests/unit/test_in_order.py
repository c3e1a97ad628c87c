"""Outcomes are told in order, and none before the one that carries its news."""

from schemas.records import Record
from streams.core.in_order import OrderedOutcomes
from streams.core.outcomes import DeadLetter, Finished

NEWS = Record("topic", b"key", b"news")
OWN = Finished((Record("topic", b"key", b"own"),))


def test_what_ends_out_of_order_waits_for_what_is_before_it():
    told = OrderedOutcomes()
    told.add({1: OWN})
    assert told.ready() == []
    told.add({0: Finished(), 3: OWN})
    assert told.ready() == [Finished(), OWN]
    assert told.ready() == []
    told.add({2: DeadLetter("failed", "why")})
    assert told.ready() == [DeadLetter("failed", "why"), OWN]


def test_an_older_version_waits_for_the_newer_one_behind_it():
    told = OrderedOutcomes()
    told.add({0: OWN, 2: OWN})
    told.add_with(1, 2, NEWS)
    assert told.ready() == [OWN, Finished(), OWN.followed_by(NEWS)]


def test_of_two_that_wait_for_each_other_none_is_told_alone():
    told = OrderedOutcomes()
    told.add({3: OWN})
    told.add_with(0, 3, NEWS)
    told.add({1: OWN})
    assert told.ready() == []
    told.add({2: OWN})
    assert told.ready() == [Finished(), OWN, OWN, OWN.followed_by(NEWS)]


def test_a_newer_version_that_came_first_is_told_at_once_and_the_older_carries_its_own_news():
    told = OrderedOutcomes()
    told.add({0: OWN})
    told.add_with(2, 0, NEWS)
    assert 2 in told
    assert told.ready() == [OWN]
    told.add({1: OWN})
    assert told.ready() == [OWN, Finished((NEWS,))]
