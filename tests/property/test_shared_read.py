"""What an answer that several share is said to be true for: what its retrieval found, and what each of them saw."""

from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from query.cache.freshness import ReadSnapshot, SharedRead
from schemas.positions import AsOf


@dataclass
class Tenant:
    """Two partitions whose changes become searchable, and are applied to cached answers later."""

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

    def look(self, kind):
        self.now_ms += 1
        positions = self.searchable if kind == "index" else self.applied
        as_of = AsOf(positions=dict(positions), checked_ms=self.now_ms)
        return ReadSnapshot(None if kind == "index" else self.epoch, as_of, b"cached" if kind == "cached" else None)


PARTITION = st.integers(0, 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(("change", "apply")), PARTITION),
        st.tuples(st.just("come"), st.sampled_from(("cache", "index"))),
        st.tuples(st.just("look"), st.sampled_from(("cache", "index"))),
        st.tuples(st.just("join"), st.integers(0, 9)),
        st.tuples(st.just("begin"), st.booleans()),
        st.tuples(st.just("found"), st.none()),
    ),
    max_size=40,
)


def covers(positions, others):
    return all(positions.get(partition, -1) >= offset for partition, offset in others.items())


@dataclass
class World:
    """Those who share an answer, one after the other, and what its retrieval finds."""

    tenant: Tenant
    first: ReadSnapshot
    found: dict[int, int] | None = None

    def __post_init__(self):
        self.shared, self.looks, self.sharers = SharedRead(self.first), [self.first], [self.first]

    def take(self, step, what):
        match step:
            case "change" | "apply":
                getattr(self.tenant, step)(what)
            case "come":
                self.join(self.tenant.look(what))
            case "look":
                self.looks.append(self.tenant.look(what))
            case "join":
                self.join(self.looks[what % len(self.looks)])  # it may have looked long before it comes to join
            case "begin" if self.found is None:
                self.shared.begin(searchable=self.tenant.searchable if what else {})
                self.found = dict(self.tenant.searchable)
            case "found" if self.found is None and self.shared.found(self.tenant.look("cached")):
                self.found = dict(self.tenant.applied)
                event("found")

    def join(self, one):
        if self.shared.join(one):
            self.sharers.append(one)
            event(f"joined, begun: {self.found is not None}")
        else:
            assert self.found is not None


@settings(max_examples=500)
@given(first=st.sampled_from(("cache", "index")), steps=STEPS)
def test_nobody_is_promised_more_than_the_retrieval_finds_nor_less_than_they_saw(first, steps):
    tenant = Tenant()
    world = World(tenant, tenant.look(first))
    for step, what in steps:
        world.take(step, what)
    for one in world.sharers if world.found is not None else ():
        seen = world.shared.seen_by(one)
        assert covers(world.found, seen.as_of.positions)
        assert covers(seen.as_of.positions, one.as_of.positions)
        assert seen.as_of.checked_ms >= one.as_of.checked_ms
        assert seen.cached == world.shared.standing.cached


@given(steps=STEPS)
def test_an_answer_is_kept_under_an_epoch_that_was_seen_before_its_search(steps):
    tenant = Tenant()
    shared = SharedRead(tenant.look("cache"))
    epochs = {1}
    for step, what in steps:
        match step:
            case "change" | "apply":
                getattr(tenant, step)(what)
            case "look" | "come":
                one = tenant.look("cache")
                shared.join(one)
                epochs.add(one.epoch)
            case "begin":
                shared.begin(searchable=tenant.searchable)
                break
    assert shared.standing.epoch == max(epochs)
