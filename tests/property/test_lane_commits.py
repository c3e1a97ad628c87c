"""Whatever the order in which records end, nothing beyond an unfinished one is committable."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streams.core.commit_guard import LaneCommits


class Lane(RuleBasedStateMachine):
    """A log with gaps, a consumer that reads on or again, records that end in any order, commits that may fail."""

    def __init__(self):
        super().__init__()
        self.lane = LaneCommits()
        self.position = 5
        self.broker = 5  # what a restart would begin from
        self.open = set()
        self.ended = set()

    @rule(gap=st.integers(0, 3))
    def deliver(self, gap):
        self.position += gap
        self.lane.deliver(self.position)
        self.open.add(self.position)
        self.ended.discard(self.position)
        self.position += 1

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def finish(self, data):
        offset = data.draw(st.sampled_from(sorted(self.open)))
        self.lane.finish(offset)
        self.open.discard(offset)
        self.ended.add(offset)

    @rule(taken=st.booleans())
    def commit(self, taken):
        offset = self.lane.committable()
        if offset is not None and taken:
            self.lane.committed(offset)
            self.broker = offset

    @rule()
    def read_again_from_the_broker(self):
        # A rebalance: everything from the committed offset on is delivered anew.
        self.position = self.broker

    @invariant()
    def nothing_beyond_an_open_record_is_committable(self):
        offset = self.lane.committable()
        if offset is not None:
            assert all(offset <= one for one in self.open if one >= self.broker)
            assert offset <= max([*self.open, *self.ended]) + 1

    def teardown(self):
        for offset in sorted(self.open):
            self.lane.finish(offset)
        if self.position > self.broker and (self.open or self.ended):
            last = self.position
            assert self.lane.committable() in {None, last}


TestLane = Lane.TestCase
