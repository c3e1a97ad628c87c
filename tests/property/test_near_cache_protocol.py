"""All orders of looks, announcements, drops, losses and broken subscriptions: no copy is served that should be gone.

The content of the index is a number; an answer is the content that it was retrieved from, and the number of its fill. A
change raises the content, is announced on position ``{0: content}``, and drops the answer in Redis.
"""

import asyncio
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import pytest

from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.port import Applied, Lookup
from query.cache.near_cache import NearCache

TENANT, KEY = "acme", "k"
STEP_S = 0.001


def run(call):
    """The value of a coroutine that waits for nothing."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waited")


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self):
        return self.now_s


@dataclass
class World:
    """One process that keeps copies; planted mistakes override single steps."""

    clock: Clock = field(default_factory=Clock)
    near_class: type = NearCache
    near: NearCache | None = None
    cache: MemoryAnswerCache | None = None
    content: int = 0
    queue: list[Applied] | None = None
    looks: list[tuple[Lookup, float]] = field(default_factory=list)
    fills: int = 0
    # Moment at which an answer was gone from Redis.
    gone_s: dict[bytes, float] = field(default_factory=dict)
    left: dict[str, int] = field(
        default_factory=lambda: {"change": 2, "fill": 2, "look": 2, "subscribe": 2, "lose": 1, "evict": 1, "prove": 1}
    )

    def __post_init__(self):
        self.cache = MemoryAnswerCache(lambda: 1_000_000 + int(self.clock.now_s * 1_000_000))
        self.near = self.near_class(slices=1, max_bytes=10_000, monotonic_s=self.clock, now_ms=self.clock)
        self.take("fill", 0)

    def steps(self) -> Iterator[tuple[str, int]]:
        for name in ("change", "lose"):
            if self.left[name]:
                yield name, 0
        if self.left["fill"]:
            yield "fill", 0
        if run(self.cache.lookup(TENANT, KEY)).entry is not None:
            for name in ("look", "evict"):
                if self.left[name]:
                    yield name, 0
        yield from self._steps_of_the_subscription()
        for number in range(len(self.looks)):
            yield "arrive", number

    def _steps_of_the_subscription(self):
        if self.queue is None:
            if self.left["subscribe"]:
                yield "subscribe", 0
        else:
            yield "sever", 0
            if self.queue:
                yield "hear", 0
            elif self.left["prove"]:
                yield "prove", 0

    def take(self, step, number):
        self.clock.now_s += STEP_S
        if step in self.left:
            self.left[step] -= 1
        announced = self._announcements()
        getattr(self, step)(number)
        if self.queue is not None and step != "subscribe":
            self.queue += announced()

    def _announcements(self):
        inbox: asyncio.Queue = asyncio.Queue()
        self.cache._subscribers.add(inbox)

        def taken():
            self.cache._subscribers.discard(inbox)
            return [inbox.get_nowait() for _ in range(inbox.qsize())]

        return taken

    def change(self, _):
        self._gone()
        self.content += 1
        judged = run(self.cache.lookup(TENANT, KEY)).epoch
        if run(self.cache.append(TENANT, 0, {0: self.content}, b"change")).waits:
            pending = run(self.cache.pending(TENANT, 0, known=0, fill=0))
            drop = [(fill, key) for fill, key in pending.fills if key == KEY]
            assert run(self.cache.settle(TENANT, 0, judged=judged, epoch=pending.epoch, drop=drop))

    def fill(self, _):
        """Another process stores an answer, in the place of one that is there."""
        self._gone()
        self.fills += 1
        epoch = run(self.cache.lookup(TENANT, KEY)).epoch
        run(self.cache.store(TENANT, KEY, b"%d %d" % (self.content, self.fills), epoch=epoch, ttl_s=60))

    def evict(self, _):
        """Room is made: the answer is gone although nothing changed, and is not judged from here on."""
        self._gone()
        place = self.cache._slice(TENANT, 0)
        del place.answers[KEY]
        self.cache._announce(TENANT, 0, place, {}, {KEY})

    def lose(self, _):
        """All data, on a connection that lives; and somebody stores another answer."""
        self.cache._slices.clear()
        epoch = run(self.cache.lookup(TENANT, "other")).epoch
        run(self.cache.store(TENANT, "other", b"other", epoch=epoch, ttl_s=60))

    def look(self, _):
        self.looks.append((run(self.cache.lookup(TENANT, KEY)), self.clock.now_s))

    def arrive(self, number):
        look, looked_s = self.looks.pop(number)
        self.near.put(TENANT, KEY, look, look.entry, looked_s=looked_s)

    def subscribe(self, _):
        self.queue = []
        self.near.subscribed()

    def sever(self, _):
        self.queue = None
        self.near.lost()

    def hear(self, _):
        self.near.heard(self.queue.pop(0))

    def prove(self, _):
        """Nothing is on its way: all that was announced was heard."""
        self.near.complete(self.clock.now_s)

    def _gone(self):
        look = run(self.cache.lookup(TENANT, KEY))
        if look.entry is not None:
            self.gone_s[look.entry] = self.clock.now_s

    def check(self):
        hit = self.near.get(KEY)
        if hit is None:
            return
        content = int(hit.body.split()[0])
        assert hit.positions.get(0, 0) <= content, f"served {content} as true for {hit.positions}"
        # Proven up to a moment: what was gone before it has been heard of.
        gone_s = self.gone_s.get(hit.body)
        assert gone_s is None or gone_s > self.near._proven_s, f"served {hit.body}, gone before the last proof"


def explore(first, depth):
    """Every order of at most ``depth`` steps; how many were taken."""
    taken = 0
    front = [first]
    for _ in range(depth):
        following = {}
        for world in front:
            for step, number in world.steps():
                after = deepcopy(world)
                after.take(step, number)
                after.check()
                taken += 1
                following[_fingerprint(after)] = after
        front = list(following.values())
    return taken


def _fingerprint(world):
    """States that differ in times and numbers only by how they were reached are one."""
    near = world.near
    place = world.cache._slices.get((TENANT, 0))
    told = place.told if place else 0
    known = near._places.get((TENANT, 0))
    copy = near._copies.get(KEY)
    return repr(
        (
            sorted(world.left.items()),
            world.content,
            place and ({key: one.entry for key, one in place.answers.items()}, place.positions),
            world.queue and [(one.told - told, one.positions, one.dropped) for one in world.queue],
            world.queue is None,
            [(look.told - told, look.entry, look.positions, at < (near._since_s or 0)) for look, at in world.looks],
            known and (known.told and known.told - told, known.positions, known.heard),
            copy and (copy.body, copy.positions, copy.heard),
            {content: at > near._proven_s for content, at in world.gone_s.items()},
            near._proven_s > 0,
        )
    )


DEPTH = 7


def test_no_order_serves_a_copy_that_is_gone():
    assert explore(World(), DEPTH) > 10_000


class KeepsWhatWasReadBeforeTheSubscription(NearCache):
    def put(self, tenant, key, look, body, *, looked_s):
        return super().put(tenant, key, look, body, looked_s=max(looked_s, self._since_s or 0))


class KeepsWhatWasDroppedMeanwhile(NearCache):
    def put(self, tenant, key, look, body, *, looked_s):
        place = self._place(tenant, 0)
        told, place.told = place.told, None
        kept = super().put(tenant, key, look, body, looked_s=looked_s)
        place.told = told
        return kept


class OverlooksGaps(NearCache):
    def heard(self, announced):
        self._place(announced.tenant, announced.number).told = announced.told - 1
        super().heard(announced)


class ForgetsNothing(NearCache):
    def lost(self):
        self._since_s = None


@pytest.mark.parametrize(
    "mistake",
    [
        KeepsWhatWasReadBeforeTheSubscription,
        KeepsWhatWasDroppedMeanwhile,
        OverlooksGaps,
        ForgetsNothing,
    ],
)
def test_the_model_catches(mistake):
    with pytest.raises(AssertionError, match="served"):
        explore(World(near_class=mistake), DEPTH)
