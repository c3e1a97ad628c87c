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
class World:
    """The protocol as it is meant, on one lane of the stream; planted mistakes override single steps."""

    cache: MemoryAnswerCache = field(default_factory=lambda: MemoryAnswerCache(an_instant), repr=False)
    searchable: int = 0
    applied: int = 0
    fills: list[Fill] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    fills_left: int = 2
    changes_left: int = 2
    losses_left: int = 1
    deliveries_left: int = 1

    def steps(self) -> Iterator[tuple[str, int]]:
        """Every step that may come next, with the number of the fill or seed that takes it."""
        if self.changes_left:
            yield "make_searchable", 0
        if self.may_apply():
            yield "apply", 0
        if self.deliveries_left and self.applied:
            yield "deliver_again", 0
        if self.losses_left:
            yield "lose_everything", 0
        if self.fills_left:
            yield "look_up", 0
        for number, fill in enumerate(self.fills):
            yield "retrieve", number
            if fill.retrieved is not None:
                yield "store", number
        for number in range(len(self.seeds)):
            yield "seed", number

    def may_apply(self) -> bool:
        return self.applied < self.searchable

    def make_searchable(self, _: int) -> None:
        self.changes_left -= 1
        self.searchable += 1

    def apply(self, _: int) -> None:
        run(self.cache.apply(TENANT, {0: self.applied}, drop=True))
        self.applied += 1

    def deliver_again(self, _: int) -> None:
        self.deliveries_left -= 1
        self.applied -= 1

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
        if TENANT in self.cache._slices:  # a lookup would make one
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


class AppliesBeforeSearchable(World):
    def may_apply(self):
        return self.applied <= self.searchable


class ReadsTheEpochAfterRetrieving(World):
    def retrieve(self, number):
        super().retrieve(number)
        self.fills[number].epoch = 0

    def store(self, number):
        if self.fills[number].epoch:
            super().store(number)
        else:
            self.fills[number].epoch = run(self.cache.lookup(TENANT, "another")).epoch


class ChangesWithoutADrop(World):
    def apply(self, _):
        run(self.cache.apply(TENANT, {0: self.applied}, drop=False))
        self.applied += 1


class SeedsWithoutADrop(World):
    def seed(self, number):
        if searchable := self.seeds.pop(number):
            run(self.cache.apply(TENANT, {0: searchable - 1}, drop=False))


class UsesAnEpochAgain(World):
    def lose_everything(self, _):
        super().lose_everything(_)
        self.cache._last_epoch = 0


def test_no_order_serves_an_answer_older_than_its_positions():
    assert explore(World()) > 1_000


@pytest.mark.parametrize(
    "mistake",
    [
        StoresWithoutTheEpochCheck,
        AppliesBeforeSearchable,
        ReadsTheEpochAfterRetrieving,
        ChangesWithoutADrop,
        SeedsWithoutADrop,
        UsesAnEpochAgain,
    ],
)
def test_the_model_catches(mistake):
    with pytest.raises(AssertionError, match="served"):
        explore(mistake())
