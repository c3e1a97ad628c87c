"""Faust's own commit bookkeeping loses records in three ways; ours in none. Both are shown on the real classes."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
from faust.transport.consumer import Consumer
from faust.types import TP

from streams.core.commit_guard import LaneCommits
from streams.faust_app import GuardedConsumer

LANE = TP("documents.v1", 0)


def stock(committed: int | None) -> Consumer:
    consumer = GuardedConsumer.__new__(GuardedConsumer)
    consumer._acked = defaultdict(list)
    consumer._acked_index = defaultdict(set)
    consumer._gap = defaultdict(list)
    consumer._committed_offset = defaultdict(lambda: None, {LANE: committed})
    return consumer


def guarded() -> GuardedConsumer:
    consumer = GuardedConsumer.__new__(GuardedConsumer)
    consumer.lanes = defaultdict(LaneCommits)
    consumer._unacked_messages = set()
    return consumer


def message(offset: int) -> SimpleNamespace:
    return SimpleNamespace(tp=LANE, offset=offset, acked=False)


def deliver(consumer: GuardedConsumer, *offsets: int) -> dict[int, SimpleNamespace]:
    for offset in offsets:
        consumer.lanes[LANE].deliver(offset)
    return {offset: message(offset) for offset in offsets}


class Unhashed(SimpleNamespace):
    __hash__ = object.__hash__


def finish(consumer: GuardedConsumer, *messages: SimpleNamespace) -> None:
    for one in messages:
        consumer.ack(Unhashed(**vars(one)))


def test_first_record_after_the_committed_offset_still_open():
    theirs = stock(committed=2585)
    theirs._acked[LANE] = [2586, 2587, 2588, 2589]
    assert Consumer._new_offset(theirs, LANE) == 2590  # 2585 would be lost by a restart

    ours = guarded()
    sent = deliver(ours, 2585, 2586, 2587, 2588, 2589)
    finish(ours, *(sent[offset] for offset in (2586, 2587, 2588, 2589)))
    assert ours._new_offset(LANE) is None
    finish(ours, sent[2585])
    assert ours._new_offset(LANE) == 2590


def test_very_first_record_still_open():
    theirs = stock(committed=None)
    theirs._acked[LANE] = [1, 2, 3]
    assert Consumer._new_offset(theirs, LANE) == 4  # 0 would be lost

    ours = guarded()
    sent = deliver(ours, 0, 1, 2, 3)
    finish(ours, sent[1], sent[2], sent[3])
    assert ours._new_offset(LANE) is None
    finish(ours, sent[0])
    assert ours._new_offset(LANE) == 4


async def refuses(_offsets):
    return False


async def takes(_offsets):
    return True


async def test_failed_commit_is_tried_again():
    ours = guarded()
    ours.assignment = lambda: {LANE}
    sent = deliver(ours, 0, 1)
    finish(ours, sent[0], sent[1])
    ours._commit = refuses
    assert not await ours._commit_offsets({LANE: 2})
    assert ours._new_offset(LANE) == 2
    ours._commit = takes
    assert await ours._commit_offsets({LANE: 2})
    assert ours._new_offset(LANE) is None


async def test_stock_bookkeeping_takes_a_failed_commit_for_done():
    theirs = stock(committed=0)
    theirs.assignment = lambda: {LANE}
    theirs._commit = refuses
    flushed = SimpleNamespace(flush=lambda: takes(None))
    monitor = SimpleNamespace(on_tp_commit=lambda _offsets: None)
    theirs.app = SimpleNamespace(producer=flushed, monitor=monitor, tables=SimpleNamespace(on_commit=lambda _o: None))
    theirs.in_transaction = False
    theirs.log = SimpleNamespace(dev=lambda *_: None, info=lambda *_: None)
    recorder = pytest.MonkeyPatch()
    recorder.setattr("faust.transport.consumer.flight_recorder", _Recorder)
    try:
        assert not await Consumer._commit_offsets(theirs, {LANE: 2})
    finally:
        recorder.undo()
    assert theirs._committed_offset[LANE] == 2  # it will never commit 2 again


class _Recorder:
    def __init__(self, *_args, **_options):
        pass

    def __enter__(self):
        return SimpleNamespace(info=lambda *_: None)

    def __exit__(self, *_error):
        return None


async def test_partition_that_went_to_another_worker_is_not_committed():
    ours = guarded()
    ours.assignment = set
    deliver(ours, 0)
    ours._commit = takes
    assert not await ours._commit_offsets({LANE: 1})
