"""Model check of fills and invalidation: in no order is an answer older than the positions it is served with (I4).

The check is exhaustive within its bounds: from each state, every possible next step is taken. A crash needs no step of
its own: a crashed process takes no further steps, and its change is delivered again. The content that a fill retrieves
is modelled as the number of searchable changes. Planted mistakes show that the check can fail.
"""

from collections.abc import Coroutine, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.redis.memory_answers import MemoryAnswerCache

TENANT, KEY = "acme", "question"


def run(call: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never suspends."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the twin suspended")


def an_instant() -> int:
    return 1_000_000


@dataclass
class Fill:
    """A reader after a cache miss: the epoch that it read, and what it has retrieved since."""

    epoch: int
    retrieved: int | None = None


@dataclass
class Evaluation:
    """A worker that has read a slice and has not committed its evaluation."""

    evaluated: int
    epoch: int
    drop: tuple[tuple[int, str], ...]


@dataclass
class World:
    """The protocol on one partition. Planted mistakes override single steps."""

    cache: MemoryAnswerCache = field(default_factory=lambda: MemoryAnswerCache(an_instant), repr=False)
    searchable: int = 0
    appended: int = 0
    fills: list[Fill] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    fills_left: int = 1
    changes_left: int = 2
    losses_left: int = 1
    deliveries_left: int = 1
    evaluations_left: int = 2

    def steps(self) -> Iterator[tuple[str, int]]:
        """Every possible next step, with the number of the fill, seed or evaluation that takes it."""
        if self.changes_left:
            yield "make_searchable", 0
        if self.may_append():
            yield "append", 0
        if self.deliveries_left and self.appended:
            yield "deliver_again", 0
        if self.losses_left:
            yield "lose_everything", 0
        yield from self._steps_of_workers()
        if self.fills_left:
            yield "look_up_answer", 0
        for number, fill in enumerate(self.fills):
            yield "retrieve", number
            if fill.retrieved is not None:
                yield "store", number
        for number in range(len(self.seeds)):
            yield "seed", number

    def _steps_of_workers(self) -> Iterator[tuple[str, int]]:
        if self.evaluations_left and self.appended:
            yield "read", 0
        for number in range(len(self.evaluations)):
            yield "commit", number

    def may_append(self) -> bool:
        return self.appended < self.searchable

    def make_searchable(self, _: int) -> None:
        self.changes_left -= 1
        self.searchable += 1

    def append(self, _: int) -> None:
        run(self.cache.append(TENANT, 0, {0: self.appended}, b"%d" % (self.appended + 1)))
        self.appended += 1

    def read(self, _: int) -> None:
        """A worker with empty state reads the complete change log and all answers."""
        self.evaluations_left -= 1
        pending = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0))
        [stored] = run(self.cache.entries(TENANT, 0, [KEY]))
        newest = max((int(change.change or 0) for change in pending.changes), default=0)
        altered = stored is not None and int(stored.entry) < newest
        drop = ((stored.fill, KEY),) if altered else ()
        self.evaluations.append(Evaluation(pending.evaluated, pending.epoch, drop))

    def commit(self, number: int) -> None:
        evaluation = self.evaluations.pop(number)
        run(self.cache.commit(TENANT, 0, evaluated=evaluation.evaluated, epoch=evaluation.epoch, drop=evaluation.drop))

    def deliver_again(self, _: int) -> None:
        self.deliveries_left -= 1
        self.appended -= 1

    def look_up_answer(self, _: int) -> None:
        self.fills_left -= 1
        lookup = run(self.cache.lookup(TENANT, KEY))
        self.fills.append(Fill(lookup.epoch))
        if not lookup.seeded:
            self.seeds.append(self.searchable)

    def retrieve(self, number: int) -> None:
        self.fills[number].retrieved = self.searchable

    def store(self, number: int) -> None:
        fill = self.fills.pop(number)
        run(self.cache.store(TENANT, KEY, b"%d" % fill.retrieved, epoch=fill.epoch, ttl_s=1))

    def seed(self, number: int) -> None:
        if searchable := self.seeds.pop(number):
            run(self.cache.seed(TENANT, {0: searchable - 1}))

    def lose_everything(self, _: int) -> None:
        self.losses_left -= 1
        self.cache.lose_everything()

    def check(self) -> None:
        if (TENANT, 0) in self.cache._slices:  # a lookup would create the slice
            lookup = run(self.cache.lookup(TENANT, KEY))
            if lookup.entry is not None:
                assert int(lookup.entry) > lookup.positions.get(0, -1), f"served {lookup}"

    def fingerprint(self) -> str:
        return repr((self, self.cache._slices, self.cache._last_epoch))


def explore(start: World) -> int:
    """Take every step from every state; returns the number of states."""
    seen: set[str] = set()
    frontier = [start]
    while frontier:
        world = frontier.pop()
        for step, number in world.steps():
            after = deepcopy(world)
            getattr(after, step)(number)
            after.check()
            if (fingerprint := after.fingerprint()) not in seen:
                seen.add(fingerprint)
                frontier.append(after)
    return len(seen)


class StoresWithoutTheEpochCheck(World):
    def store(self, number):
        self.fills[number].epoch = run(self.cache.lookup(TENANT, "another")).epoch
        super().store(number)


class AppendsBeforeSearchable(World):
    """The epoch moves before the refresh."""

    def may_append(self):
        return self.appended <= self.searchable


class ReadsTheAnswersBeforeTheEpoch(World):
    """The answers are not read again after the epoch moved: an answer stored in between is never evaluated."""

    def read(self, _):
        super().read(_)
        self.evaluations[-1].epoch = 0

    def commit(self, number):
        if not self.evaluations[number].epoch:
            self.evaluations[number].epoch = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0)).epoch
        super().commit(number)


class CommitsWithoutCheckingTheSlice(World):
    """Another worker has committed meanwhile; this one reverts its progress, or skips changes that it has not read."""

    def commit(self, number):
        pending = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0))
        self.evaluations[number].evaluated = pending.evaluated
        self.evaluations[number].epoch = pending.epoch
        super().commit(number)


class ReadsTheEpochAfterRetrieving(World):
    def retrieve(self, number):
        super().retrieve(number)
        self.fills[number].epoch = 0

    def store(self, number):
        if self.fills[number].epoch:
            super().store(number)
        else:
            self.fills[number].epoch = run(self.cache.lookup(TENANT, "another")).epoch


class DropsNothing(World):
    def commit(self, number):
        self.evaluations[number].drop = ()
        super().commit(number)


class SeedsWithoutADrop(World):
    def seed(self, number):
        if searchable := self.seeds.pop(number):
            run(self.cache.apply(TENANT, {0: searchable - 1}, drop=False))


class UsesAnEpochAgain(World):
    def lose_everything(self, _):
        super().lose_everything(_)
        self.cache._last_epoch = 0


BOUNDS = ({}, {"fills_left": 2, "losses_left": 0, "deliveries_left": 0})


@pytest.mark.parametrize("bounds", BOUNDS)
def test_no_order_serves_an_answer_older_than_its_positions(bounds):
    assert explore(World(**bounds)) > 1_000


@pytest.mark.parametrize(
    "mistake",
    [
        StoresWithoutTheEpochCheck,
        AppendsBeforeSearchable,
        ReadsTheAnswersBeforeTheEpoch,
        CommitsWithoutCheckingTheSlice,
        ReadsTheEpochAfterRetrieving,
        DropsNothing,
        SeedsWithoutADrop,
        UsesAnEpochAgain,
    ],
)
def test_the_model_detects_a_planted_mistake(mistake):
    with pytest.raises(AssertionError, match="served"):
        [explore(mistake(**bounds)) for bounds in BOUNDS]
