"""Positions of a shared answer: at most what its search returned, at least what each request read."""

from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from query.cache.freshness import ReadSnapshot, SharedRead
from schemas.positions import AsOf


@dataclass
class Tenant:
    """Two partitions. Changes become searchable first, and are applied to cached answers later."""

    searchable: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    applied: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    epoch: int = 1
    now_ms: float = 0.0

    def change(self, partition):
        self.searchable[partition] += 1

    def apply(self, partition):
        if self.applied[partition] < self.searchable[partition]:
            self.applied[partition] = self.searchable[partition]
            self.epoch += 1

    def read(self, kind):
        self.now_ms += 1
        positions = self.searchable if kind == "index" else self.applied
        as_of = AsOf(positions=dict(positions), checked_ms=self.now_ms)
        return ReadSnapshot(None if kind == "index" else self.epoch, as_of, b"cached" if kind == "cached" else None)


PARTITION = st.integers(0, 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(("change", "apply")), PARTITION),
        st.tuples(st.just("read and join"), st.sampled_from(("cache", "index"))),
        st.tuples(st.just("read"), st.sampled_from(("cache", "index"))),
        st.tuples(st.just("join"), st.integers(0, 9)),
        st.tuples(st.just("start search"), st.booleans()),
        st.tuples(st.just("resolve"), st.none()),
    ),
    max_size=40,
)


def covers(positions, others):
    return all(positions.get(partition, -1) >= offset for partition, offset in others.items())


@dataclass
class World:
    """Requests that join one flight, and the positions that its answer reflects."""

    tenant: Tenant
    first: ReadSnapshot
    reflected: dict[int, int] | None = None

    def __post_init__(self):
        self.shared, self.reads, self.joined = SharedRead(self.first), [self.first], [self.first]

    def take(self, step, what):
        match step:
            case "change" | "apply":
                getattr(self.tenant, step)(what)
            case "read and join":
                self.join(self.tenant.read(what))
            case "read":
                self.reads.append(self.tenant.read(what))
            case "join":
                self.join(self.reads[what % len(self.reads)])  # a read may be older than the join
            case "start search" if self.reflected is None:
                self.shared.start_search(searchable=self.tenant.searchable if what else {})
                self.reflected = dict(self.tenant.searchable)
            case "resolve" if self.reflected is None and self.shared.resolve(self.tenant.read("cached")):
                self.reflected = dict(self.tenant.applied)
                event("resolved")

    def join(self, snapshot):
        if self.shared.join(snapshot):
            self.joined.append(snapshot)
            event(f"joined, search started: {self.reflected is not None}")
        else:
            assert self.reflected is not None


@settings(max_examples=500)
@given(first=st.sampled_from(("cache", "index")), steps=STEPS)
def test_positions_are_at_most_what_the_answer_reflects_and_at_least_what_was_read(first, steps):
    tenant = Tenant()
    world = World(tenant, tenant.read(first))
    for step, what in steps:
        world.take(step, what)
    for snapshot in world.joined if world.reflected is not None else ():
        seen = world.shared.seen_by(snapshot)
        assert covers(world.reflected, seen.as_of.positions)
        assert covers(seen.as_of.positions, snapshot.as_of.positions)
        assert seen.as_of.checked_ms >= snapshot.as_of.checked_ms
        assert seen.cached == world.shared.snapshot.cached


@given(steps=STEPS)
def test_the_epoch_of_a_fill_was_read_before_its_search(steps):
    tenant = Tenant()
    shared = SharedRead(tenant.read("cache"))
    epochs = {1}
    for step, what in steps:
        match step:
            case "change" | "apply":
                getattr(tenant, step)(what)
            case "read" | "read and join":
                snapshot = tenant.read("cache")
                shared.join(snapshot)
                epochs.add(snapshot.epoch)
            case "start search":
                shared.start_search(searchable=tenant.searchable)
                break
    assert shared.snapshot.epoch == max(epochs)
