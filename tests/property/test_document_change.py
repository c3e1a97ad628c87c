"""Stops anywhere, deliveries again, writers that come late: the newest version is what is searchable in the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.documents import LifeState
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent
from schemas.index import MAX_FAILED_VERSIONS, MAX_GONE, original_id
from streams.core.document_change import (
    AlreadyDone,
    AlreadyFailed,
    Superseded,
    Write,
    closed,
    completed,
    decide,
    rolled_back,
    rolled_forward,
    supersede_within,
    taken_over,
)

PASSAGES = st.lists(st.sampled_from("abcde"), max_size=4, unique=True)


def plan(version: int, passages: list[str] | None, title: str = "t", rewritten_at: int | None = None) -> ChunkPlan:
    deleted = passages is None
    event = DocumentEvent(
        event_id=f"e{version}",
        tenant="local",
        document_id="d",
        version=version,
        change=Change.DELETED if deleted else Change.UPSERTED,
        accepted_ms=0,
        content=None if deleted else BlobRef(sha256="0" * 64, size_bytes=1),
        rewrite=rewritten_at is not None,
    )
    offset = version if rewritten_at is None else rewritten_at
    return ChunkPlan(event=event, position=f"documents.v1-0:{offset}", profile="p", chunked_ms=0, title=title)


class Index:
    """Manifests replace what was read; passages have external versions, of which older ones do nothing."""

    def __init__(self):
        self.manifest = None
        self.passages = {}
        self.versions = {}

    def put_manifest(self, manifest, replaces) -> bool:
        if self.manifest is not replaces:
            return False
        self.manifest = manifest
        return True

    def contents(self):
        """Original id → title; a copy beside what it is a copy of would be too much."""
        found = {original_id(passage): title for passage, title in self.passages.items()}
        assert len(found) == len(self.passages)
        return found

    def put(self, passage, version, title):
        if version >= self.versions.get(passage, 0):
            self.versions[passage], self.passages[passage] = version, title

    def remove(self, passage, version):
        if version >= self.versions.get(passage, 0):
            self.versions[passage] = version
            self.passages.pop(passage, None)

    def damage(self, passages):
        """Something else removes passages, under versions of its own."""
        for passage in passages:
            del self.passages[passage]
            self.versions[passage] += 1_000


def named(passages: list[str], title: str) -> list[str]:
    """Ids of passages: another title gives them others."""
    return [f"{passage}/{title}" for passage in passages]


def steps(index: Index, version: int, passages: list[str] | None, title: str, rewritten_at: int | None = None):
    """The index step as single actions; it may be left off after any of them."""
    one = plan(version, passages, title, rewritten_at)
    done = False
    while not done:
        standing = replaced = index.manifest
        yield
        if standing is not None and not standing.complete:
            replaced = taken_over(standing, "w")
            if not index.put_manifest(replaced, standing):
                continue
            standing = yield from settled(index, replaced)
        decision = decide(one, named(passages or [], title), standing, now_ms=0)
        if not isinstance(decision, Write):
            done = replaced is standing or index.put_manifest(standing, replaced)
            continue
        yield
        if not index.put_manifest(decision.claim, replaced):
            continue
        refused = yield from written(index, decision, title, refuse=title == REFUSED)
        if refused:
            manifest = closed(decision.claim.previous, one, "refused", "it is", now_ms=0, refused=decision.claim)
        else:
            manifest = completed(decision.claim, now_ms=0)
        done = index.put_manifest(manifest, decision.claim)


def settled(index: Index, claim):
    """A claim that stands, rolled back or forward (``streams.recovery``)."""
    for _ in range(9):
        yield
        old = {passage: index.passages[passage] for passage in claim.removed if passage in index.passages}
        if len(old) == len(claim.removed):
            break
        yield
        new = {passage: index.passages[passage] for passage in claim.added if passage in index.passages}
        if len(new) == len(claim.added):
            yield from enforced(index, new, claim.removed, claim.write_version)
            return rolled_forward(claim, now_ms=0)
    yield from enforced(index, old, claim.added, claim.write_version)
    return rolled_back(claim, now_ms=0)


def enforced(index: Index, put, remove, version):
    for passage, title in put.items():
        yield
        index.put(passage, version, title)
    for passage in remove:
        yield
        index.remove(passage, version)


def written(index: Index, decision: Write, title: str, *, refuse: bool):
    version = decision.claim.write_version
    for number in decision.add:
        yield
        index.put(decision.claim.chunks[number], version, title)
    refuse = refuse and bool(decision.add)
    for passage in decision.claim.added if refuse else decision.remove:
        yield
        index.remove(passage, version)
    yield
    return refuse


REFUSED = "refused"
VERSIONS = st.lists(st.tuples(PASSAGES | st.none(), st.sampled_from(["t", "u"])), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(versions=VERSIONS, data=st.data())
def test_newest_version_stands_whatever_happens(versions, data):
    index = Index()
    running = []
    for number, (passages, title) in enumerate(versions, start=1):
        # Each version is tried once or more; all but the last try stop somewhere, and stopped ones may go on later
        # (a worker that lost its partition and does not know). Such a worker may also be ahead of the others.
        for ahead in data.draw(st.lists(st.integers(number, len(versions)), max_size=2)):
            zombie = steps(index, ahead, *versions[ahead - 1])
            for _ in range(data.draw(st.integers(0, 6))):
                next(zombie, None)
            running.append(zombie)
        for _ in steps(index, number, passages, title):
            for zombie in data.draw(st.lists(st.sampled_from(running), max_size=2)) if running else []:
                next(zombie, None)
    for zombie in running:
        for _ in zombie:
            pass
    passages, title = versions[-1]
    assert index.contents() == dict.fromkeys(named(passages or [], title), title)
    assert index.manifest.version == len(versions)
    assert index.manifest.complete
    assert (index.manifest.state is LifeState.DELETED) == (passages is None)


@settings(max_examples=400, deadline=None)
@given(
    versions=st.lists(st.tuples(PASSAGES | st.none(), st.sampled_from(["t", "u", REFUSED])), min_size=2, max_size=6),
    data=st.data(),
)
def test_versions_that_are_refused_leave_the_newest_that_is_not_whoever_stops_where(versions, data):
    """Versions come in any order. Each is tried once or more, and only its last try is sure to come to its end."""
    index, running = Index(), []
    order = data.draw(st.permutations(range(len(versions))))
    for number in order:
        for _ in range(data.draw(st.integers(0, 2))):
            stopped = steps(index, number, *versions[number])
            for _ in range(data.draw(st.integers(0, 12))):
                next(stopped, None)
            running.append(stopped)
        for _ in steps(index, number, *versions[number]):
            for late in data.draw(st.lists(st.sampled_from(running), max_size=1)) if running else []:
                next(late, None)
    for late in running:
        for _ in late:
            pass
    taken = [number for number, (passages, title) in enumerate(versions) if title != REFUSED]
    # Of what is not refused in whole nothing is: passages that stand as they are need not be written.
    empty = [number for number, (passages, title) in enumerate(versions) if title == REFUSED and not passages]
    newest = max((*taken, *empty), default=None)
    assert index.manifest.complete
    passages, title = versions[newest] if newest is not None else (None, "t")
    assert index.contents() == dict.fromkeys(named(passages or [], title), title)
    assert index.manifest.version == (-1 if newest is None else newest)


@settings(max_examples=400, deadline=None)
@given(passages=PASSAGES | st.none(), rewrites=st.integers(1, 4), data=st.data())
def test_rewrite_stands_whatever_was_damaged_and_whoever_comes_late(passages, rewrites, data):
    """Writers of the version's first writing and of earlier rewrites go on in between, and after all is done."""
    index = Index()
    late = []

    def write(offset):
        for _ in steps(index, 1, passages, "t", offset):
            for zombie in data.draw(st.lists(st.sampled_from(late), max_size=2)) if late else []:
                next(zombie, None)

    for offset in (None, *range(10, 10 + rewrites)):
        for _ in range(data.draw(st.integers(0, 2))):
            zombie = steps(index, 1, passages, "t", offset)
            late.append(zombie)
            for _ in range(data.draw(st.integers(0, 6))):
                next(zombie, None)
        write(offset)
        index.damage(data.draw(st.sets(st.sampled_from(sorted(index.passages)))) if index.passages else ())
    write(20)
    for zombie in late:
        for _ in zombie:
            pass
    assert index.contents() == dict.fromkeys(named(passages or [], "t"), "t")
    assert (index.manifest.position, index.manifest.complete) == ("documents.v1-0:20", True)


@given(PASSAGES)
def test_same_event_again_is_known(passages):
    first = decide(plan(3, passages), passages, None, now_ms=0)
    assert isinstance(first, Write)
    done = completed(first.claim, now_ms=0)
    assert decide(plan(3, passages), passages, done, now_ms=9) == AlreadyDone(done)
    assert decide(plan(2, passages), passages, done, now_ms=9) == Superseded(done)


def test_unchanged_passages_are_not_written_again():
    first = decide(plan(1, ["a", "b", "c"]), ["a", "b", "c"], None, now_ms=0)
    second = decide(plan(2, ["a", "x", "c"]), ["a", "x", "c"], completed(first.claim, now_ms=0), now_ms=0)
    assert second.add == (1,)
    assert second.remove == ("b",)


def test_changed_attribute_writes_all_passages_again():
    first = decide(plan(1, ["a", "b"]), named(["a", "b"], "t"), None, now_ms=0)
    second = decide(plan(2, ["a", "b"], title="u"), named(["a", "b"], "u"), completed(first.claim, now_ms=0), now_ms=0)
    assert second.add == (0, 1)
    assert second.remove == ("a/t", "b/t")


@pytest.mark.parametrize("rewritten_at", [None, 9], ids=["over a lost manifest", "rewrite"])
def test_what_is_not_trusted_is_replaced_by_copies(rewritten_at):
    lost = rewritten_at is None
    first = completed(decide(plan(1, ["a", "b"]), ["a", "b"], None, now_ms=0).claim, now_ms=0)
    second = decide(plan(1, ["a", "b"], rewritten_at=rewritten_at), ["a", "b"], first, now_ms=0, lost=lost)
    assert second.add == (0, 1)
    assert second.remove == ("a", "b"), "what stands is not touched before all copies are in"
    assert [original_id(name) for name in second.claim.chunks] == ["a", "b"]
    assert set(second.claim.chunks).isdisjoint("ab")
    third = decide(plan(3, ["b", "c"]), ["b", "c"], completed(second.claim, now_ms=0), now_ms=0)
    assert third.claim.chunks == (second.claim.chunks[1], "c"), "a copy is as good as what it is a copy of"
    assert third.add == (1,)


def test_a_failed_version_is_known_again_and_supersedes_nothing():
    first = completed(decide(plan(1, ["a"]), ["a"], None, now_ms=0).claim, now_ms=0)
    after = closed(first, plan(5, ["b"]), "refused", "it is \ud800", now_ms=9)
    assert (after.version, after.chunks, after.newest_version, after.updated_ms) == (1, ("a",), 5, 0)
    again = decide(plan(5, ["b"]), ["b"], after, now_ms=0)
    assert isinstance(again, AlreadyFailed)
    assert again.failure.reason == "it is ?"
    assert isinstance(decide(plan(3, ["c"]), ["c"], after, now_ms=0), Write)
    rewritten = decide(plan(5, ["b"], rewritten_at=9), ["b"], after, now_ms=0)
    assert completed(rewritten.claim, now_ms=0).failed == ()


def test_a_document_that_fails_again_and_again_has_a_manifest_of_bounded_size():
    manifest = None
    for version in range(3 * MAX_FAILED_VERSIONS):
        claim = decide(plan(version, ["a"]), ["a"], manifest, now_ms=0).claim
        claim = claim.model_copy(update={"added": tuple(f"{version}-{number}" for number in range(5_000))})
        manifest = closed(manifest, plan(version, ["a"]), "refused", "it is", now_ms=0, refused=claim)
    assert len(manifest.failed) == MAX_FAILED_VERSIONS
    assert len(manifest.failed[-1].removed) == 5_000
    assert sum(len(one.removed) for one in manifest.failed[:-1]) <= MAX_GONE
    assert manifest.newest_version == 3 * MAX_FAILED_VERSIONS - 1


@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 4))))
def test_of_events_on_their_way_together_one_for_each_document_is_processed(events):
    superseded = supersede_within(events)
    for key in {key for key, _ in events}:
        kept = [number for number, (one, _) in enumerate(events) if one == key and superseded[number] is None]
        newest = max(version for one, version in events if one == key)
        assert [events[number][1] for number in kept] == [newest]
        assert kept[0] == events.index((key, newest))
