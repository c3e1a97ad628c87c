"""Outcomes are returned in the order of their records."""

from schemas.records import Record
from streams.core.in_order import OrderedOutcomes
from streams.core.outcomes import DeadLetter, Finished

OWN = Finished((Record("topic", b"key", b"own"),))


def test_an_outcome_waits_for_those_of_earlier_records():
    outcomes = OrderedOutcomes()
    outcomes.add({1: OWN})
    assert 1 in outcomes
    assert outcomes.ready() == []
    outcomes.add({0: Finished(), 3: OWN})
    assert outcomes.ready() == [Finished(), OWN]
    assert outcomes.ready() == []
    outcomes.add({2: DeadLetter("failed", "why")})
    assert outcomes.ready() == [DeadLetter("failed", "why"), OWN]
