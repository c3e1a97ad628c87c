"""A model of filling and invalidating: no answer is older than the positions it is served with (I4), in any order.

Not sampled but complete within its bounds: from each state every step that may come next is taken. A crash needs no
step of its own, as what crashed simply takes no further steps; a change that crashed is delivered again. What a fill
retrieves is modelled as how many changes were searchable at that instant. Mistakes planted on purpose show that the
model can fail.
"""

from collections.abc import Coroutine, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.redis.memory_answers import MemoryAnswerCache

TENANT, KEY = "acme", "question"


def run(call: Coroutine[Any, Any, Any]) -> Any:
    """The twin never waits, so the first step of its coroutine is all of it."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the twin gave way")


def an_instant() -> int:
    return 1_000_000


@dataclass
class Fill:
    """A reader that missed: it holds an epoch, and later what it retrieved."""

    epoch: int
    retrieved: int | None = None


@dataclass
class Judgement:
    """A worker that has read a slice, and not settled yet."""

    evaluated: int
    epoch: int
    drop: tuple[tuple[int, str], ...]


@dataclass
class World:
    """The protocol as it is meant, on one lane of the stream; planted mistakes override single steps."""

    cache: MemoryAnswerCache = field(default_factory=lambda: MemoryAnswerCache(an_instant), repr=False)
    searchable: int = 0
    appended: int = 0
    fills: list[Fill] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    fills_left: int = 1
    changes_left: int = 2
    losses_left: int = 1
    deliveries_left: int = 1
    judgements_left: int = 2

    def steps(self) -> Iterator[tuple[str, int]]:
        """Every step that may come next, with the number of the fill, seed or judgement that takes it."""
        if self.changes_left:
            yield "make_searchable", 0
        if self.may_append():
            yield "append", 0
        if self.deliveries_left and self.appended:
            yield "deliver_again", 0
        if self.losses_left:
            yield "lose_everything", 0
        yield from self._steps_of_judges()
        if self.fills_left:
            yield "look_up", 0
        for number, fill in enumerate(self.fills):
            yield "retrieve", number
            if fill.retrieved is not None:
                yield "store", number
        for number in range(len(self.seeds)):
            yield "seed", number

    def _steps_of_judges(self) -> Iterator[tuple[str, int]]:
        if self.judgements_left and self.appended:
            yield "read", 0
        for number in range(len(self.judgements)):
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
        """What a judge that knows nothing does: all changes that are remembered, all answers that are there."""
        self.judgements_left -= 1
        pending = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0))
        [stored] = run(self.cache.entries(TENANT, 0, [KEY]))
        newest = max((int(change.change or 0) for change in pending.changes), default=0)
        altered = stored is not None and int(stored.entry) < newest
        drop = ((stored.fill, KEY),) if altered else ()
        self.judgements.append(Judgement(pending.evaluated, pending.epoch, drop))

    def commit(self, number: int) -> None:
        told = self.judgements.pop(number)
        run(self.cache.commit(TENANT, 0, evaluated=told.evaluated, epoch=told.epoch, drop=told.drop))

    def deliver_again(self, _: int) -> None:
        self.deliveries_left -= 1
        self.appended -= 1

    def look_up(self, _: int) -> None:
        self.fills_left -= 1
        look = run(self.cache.lookup(TENANT, KEY))
        self.fills.append(Fill(look.epoch))
        if not look.seeded:
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
        if (TENANT, 0) in self.cache._slices:  # a lookup would make one
            look = run(self.cache.lookup(TENANT, KEY))
            if look.entry is not None:
                assert int(look.entry) > look.positions.get(0, -1), f"served {look}"

    def fingerprint(self) -> str:
        return repr((self, self.cache._slices, self.cache._last_epoch))


def explore(start: World) -> int:
    """Take every step from every state; the number of states."""
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
    """The drop is not read again after the epoch moved: an answer stored between is never looked at."""

    def read(self, _):
        super().read(_)
        self.judgements[-1].epoch = 0

    def commit(self, number):
        if not self.judgements[number].epoch:
            self.judgements[number].epoch = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0)).epoch
        super().commit(number)


class SettlesWhereverTheSliceIs(World):
    """Another worker evaluated meanwhile, and this one goes back behind it, or skips what it did not read."""

    def commit(self, number):
        pending = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0))
        self.judgements[number].evaluated = pending.evaluated
        self.judgements[number].epoch = pending.epoch
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
        self.judgements[number].drop = ()
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
        SettlesWhereverTheSliceIs,
        ReadsTheEpochAfterRetrieving,
        DropsNothing,
        SeedsWithoutADrop,
        UsesAnEpochAgain,
    ],
)
def test_the_model_catches(mistake):
    with pytest.raises(AssertionError, match="served"):
        [explore(mistake(**bounds)) for bounds in BOUNDS]
