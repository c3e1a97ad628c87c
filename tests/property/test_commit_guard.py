"""The commit guard, in every order: nothing unfinished is committed past, everything finished is committed (I5)."""

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from streams.core.commit_guard import LaneCommits


class Partition(RuleBasedStateMachine):
    """One partition of a broker, its consumer, and processing that finishes records in any order."""

    lane_type = LaneCommits

    def __init__(self):
        super().__init__()
        self.lane = self.lane_type()
        self.log: list[int] = []
        self.read = 0  # index in the log of the record to deliver next
        self.committed = 0  # committed offset, at the broker
        self.in_flight: set[int] = set()
        self.open: set[int] = set()  # delivered or redelivered, and not finished since
        self.finished: set[int] = set()

    @rule(gap=st.sampled_from([0, 0, 0, 1, 7]))
    def produce(self, gap):
        self.log.append((self.log[-1] + 1 if self.log else 0) + gap)

    @precondition(lambda self: self.read < len(self.log))
    @rule(count=st.integers(1, 5))
    def deliver(self, count):
        for offset in self.log[self.read : self.read + count]:
            self.lane.deliver(offset)
            self.open.add(offset)
            self.in_flight.add(offset)
            self.read += 1

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def finish(self, data):
        offset = data.draw(st.sampled_from(sorted(self.in_flight)))
        self.in_flight.discard(offset)
        self.open.discard(offset)
        self.lane.finish(offset)
        self.finished.add(offset)

    @rule(data=st.data(), taken=st.booleans())
    def commit(self, data, taken):
        offset = self.lane.committable()
        if offset is None:
            return
        if taken:
            # While the commit was in flight, more records may have finished.
            if self.in_flight and data.draw(st.booleans()):
                self.finish(data)
            assert offset > self.committed, "the committed offset never decreases"
            self.committed = offset
            self.lane.committed(offset)

    @rule()
    def seek_to_committed(self):
        """A rebalance: the lane is replaced, and records in flight finish without its knowledge."""
        self.lane = self.lane_type()
        self.read = sum(offset < self.committed for offset in self.log)
        self.open.clear()

    @rule()
    def read_from_committed_again(self):
        """The same without a notification: the lane receives an offset below the last one."""
        self.read = min(self.read, sum(offset < self.committed for offset in self.log))

    @invariant()
    def nothing_unfinished_is_below_a_commit(self):
        below = {offset for offset in self.log if offset < max(self.committed, self.lane.committable() or 0)}
        assert below <= self.finished
        offset = self.lane.committable()
        assert offset is None or not any(unfinished < offset for unfinished in self.open)

    def teardown(self):
        """Once all records are delivered and finished, all are committed."""
        for offset in self.log[self.read :]:
            self.lane.deliver(offset)
        for offset in self.log:
            self.lane.finish(offset)
        assert self.lane.open_count == 0
        first = self.lane.committable()
        offset = self.lane.committable()
        assert offset == first, "the broker rejected the commit, so it is retried"
        if offset is not None:
            self.committed = offset
            self.lane.committed(offset)
        assert self.committed >= (self.log[-1] + 1 if self.log else 0)
        assert self.lane.committable() is None


TestPartition = Partition.TestCase
TestPartition.settings = hypothesis_settings(max_examples=300, stateful_step_count=40, deadline=None)


class CommitsTheHighestFinished(LaneCommits):
    """Behaviour of Faust's bookkeeping while the first records are still in flight."""

    def __init__(self):
        super().__init__()
        self._highest = None

    def finish(self, offset):
        super().finish(offset)
        self._highest = max(offset, self._highest or 0)

    def committable(self):
        return None if self._highest is None or self._highest < self._committed else self._highest + 1


class CountsAFailedCommitAsDone(LaneCommits):
    def committable(self):
        offset = super().committable()
        if offset is not None:
            self.committed(offset)
        return offset


@pytest.mark.parametrize("planted", [CommitsTheHighestFinished, CountsAFailedCommitAsDone])
def test_the_model_detects_a_planted_mistake(planted):
    mistaken = type("Mistaken", (Partition,), {"lane_type": planted})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            mistaken,
            settings=hypothesis_settings(
                max_examples=300, deadline=None, derandomize=True, database=None, report_multiple_bugs=False
            ),
        )


def test_rereading_earlier_offsets_holds_commits_until_they_are_finished_again():
    lane = LaneCommits()
    for offset in range(3, 7):
        lane.deliver(offset)
    for offset in (3, 4, 6):
        lane.finish(offset)
    assert lane.committable() == 5
    lane.deliver(2)
    lane.finish(2)
    assert lane.committable() is None, "5 is open, but 3 and 4 are delivered again first, and 3 is committed"
    lane.deliver(3)
    lane.finish(3)
    assert lane.committable() == 4
    lane.deliver(4)
    lane.finish(4)
    assert lane.committable() == 5
