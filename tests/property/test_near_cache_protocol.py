"""Model check of the near cache: no order of reads, messages, evictions and failures serves an invalidated answer.

The content of the index is a number. An answer is the content that it was retrieved from, and the number of its fill. A
change increments the content, is published with position ``{0: content}``, and invalidates the answer in Redis.
"""

import asyncio
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import pytest

from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.port import InvalidationMessage, Lookup
from query.cache.near_cache import NearCache

TENANT, KEY = "acme", "k"
STEP_S = 0.001


def run(call):
    """The result of a coroutine that never suspends."""
    try:
        call.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it suspended")


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self):
        return self.now_s


@dataclass
class World:
    """One process with a near cache. Planted mistakes override methods of the cache."""

    clock: Clock = field(default_factory=Clock)
    near_class: type = NearCache
    near: NearCache | None = None
    cache: MemoryAnswerCache | None = None
    content: int = 0
    queue: list[InvalidationMessage] | None = None
    reads: list[tuple[Lookup, float]] = field(default_factory=list)
    fills: int = 0
    # Time at which an answer was removed from Redis.
    removed_s: dict[bytes, float] = field(default_factory=dict)
    left: dict[str, int] = field(
        default_factory=lambda: {
            "change": 2,
            "fill": 2,
            "read": 2,
            "subscribe": 2,
            "lose": 1,
            "evict": 1,
            "heartbeat": 1,
        }
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
            for name in ("read", "evict"):
                if self.left[name]:
                    yield name, 0
        yield from self._subscription_steps()
        for number in range(len(self.reads)):
            yield "arrive", number

    def _subscription_steps(self):
        if self.queue is None:
            if self.left["subscribe"]:
                yield "subscribe", 0
        else:
            yield "disconnect", 0
            if self.queue:
                yield "receive", 0
            elif self.left["heartbeat"]:
                yield "heartbeat", 0

    def take(self, step, number):
        self.clock.now_s += STEP_S
        if step in self.left:
            self.left[step] -= 1
        published = self._capture_messages()
        getattr(self, step)(number)
        if self.queue is not None and step != "subscribe":
            self.queue += published()

    def _capture_messages(self):
        inbox: asyncio.Queue = asyncio.Queue()
        self.cache._subscribers.add(inbox)

        def messages():
            self.cache._subscribers.discard(inbox)
            return [inbox.get_nowait() for _ in range(inbox.qsize())]

        return messages

    def change(self, _):
        self._note_removal()
        self.content += 1
        evaluated = run(self.cache.lookup(TENANT, KEY)).epoch
        if run(self.cache.append(TENANT, 0, {0: self.content}, b"change")).needs_evaluation:
            pending = run(self.cache.pending(TENANT, 0, after_epoch=0, after_fill=0))
            drop = [(fill, key) for fill, key in pending.fills if key == KEY]
            assert run(self.cache.commit(TENANT, 0, evaluated=evaluated, epoch=pending.epoch, drop=drop))

    def fill(self, _):
        """Another process stores an answer, and replaces the existing one."""
        self._note_removal()
        self.fills += 1
        epoch = run(self.cache.lookup(TENANT, KEY)).epoch
        run(self.cache.store(TENANT, KEY, b"%d %d" % (self.content, self.fills), epoch=epoch, ttl_s=60))

    def evict(self, _):
        """The answer is evicted without a change. Later changes are not evaluated for it."""
        self._note_removal()
        state = self.cache._slice(TENANT, 0)
        del state.answers[KEY]
        self.cache._publish(TENANT, 0, state, {}, {KEY})

    def lose(self, _):
        """Redis loses all data without closing the connection, and another answer is stored."""
        self.cache._slices.clear()
        epoch = run(self.cache.lookup(TENANT, "other")).epoch
        run(self.cache.store(TENANT, "other", b"other", epoch=epoch, ttl_s=60))

    def read(self, _):
        self.reads.append((run(self.cache.lookup(TENANT, KEY)), self.clock.now_s))

    def arrive(self, number):
        lookup, read_s = self.reads.pop(number)
        self.near.put(TENANT, KEY, lookup, lookup.entry, read_s=read_s)

    def subscribe(self, _):
        self.queue = []
        self.near.on_subscribed()

    def disconnect(self, _):
        self.queue = None
        self.near.on_disconnected()

    def receive(self, _):
        self.near.on_message(self.queue.pop(0))

    def heartbeat(self, _):
        """No message is in flight: every published one has been received."""
        self.near.on_heartbeat(self.clock.now_s)

    def _note_removal(self):
        lookup = run(self.cache.lookup(TENANT, KEY))
        if lookup.entry is not None:
            self.removed_s[lookup.entry] = self.clock.now_s

    def check(self):
        hit = self.near.get(KEY)
        if hit is None:
            return
        content = int(hit.body.split()[0])
        assert hit.positions.get(0, 0) <= content, f"served {content} with positions {hit.positions}"
        # Every invalidation before the last heartbeat has been received.
        removed_s = self.removed_s.get(hit.body)
        assert removed_s is None or removed_s > self.near._heartbeat_s, (
            f"served {hit.body}, removed before the last heartbeat"
        )


def explore(first, depth):
    """Explore every order of at most ``depth`` steps; returns the number of steps taken."""
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
    """Equal for states that differ only in absolute times and sequence numbers."""
    near = world.near
    stored = world.cache._slices.get((TENANT, 0))
    sequence = stored.sequence if stored else 0
    state = near._slices.get((TENANT, 0))
    entry = near._entries.get(KEY)
    return repr(
        (
            sorted(world.left.items()),
            world.content,
            stored and ({key: answer.entry for key, answer in stored.answers.items()}, stored.positions),
            world.queue
            and [(message.sequence - sequence, message.positions, message.dropped) for message in world.queue],
            world.queue is None,
            [
                (lookup.sequence - sequence, lookup.entry, lookup.positions, read_s < (near._subscribed_s or 0))
                for lookup, read_s in world.reads
            ],
            state and (state.sequence and state.sequence - sequence, state.positions, state.generation),
            entry and (entry.body, entry.positions, entry.generation),
            {content: at > near._heartbeat_s for content, at in world.removed_s.items()},
            near._heartbeat_s > 0,
        )
    )


DEPTH = 7


def test_no_order_serves_an_invalidated_answer():
    assert explore(World(), DEPTH) > 10_000


class StoresReadsFromBeforeTheSubscription(NearCache):
    def put(self, tenant, key, lookup, body, *, read_s):
        return super().put(tenant, key, lookup, body, read_s=max(read_s, self._subscribed_s or 0))


class StoresAnswersInvalidatedSinceTheRead(NearCache):
    def put(self, tenant, key, lookup, body, *, read_s):
        state = self._slice(tenant, 0)
        sequence, state.sequence = state.sequence, None
        is_stored = super().put(tenant, key, lookup, body, read_s=read_s)
        state.sequence = sequence
        return is_stored


class IgnoresSequenceGaps(NearCache):
    def on_message(self, message):
        self._slice(message.tenant, message.number).sequence = message.sequence - 1
        super().on_message(message)


class KeepsEntriesOnDisconnect(NearCache):
    def on_disconnected(self):
        self._subscribed_s = None


@pytest.mark.parametrize(
    "mistake",
    [
        StoresReadsFromBeforeTheSubscription,
        StoresAnswersInvalidatedSinceTheRead,
        IgnoresSequenceGaps,
        KeepsEntriesOnDisconnect,
    ],
)
def test_the_model_detects_a_planted_mistake(mistake):
    with pytest.raises(AssertionError, match="served"):
        explore(World(near_class=mistake), DEPTH)
