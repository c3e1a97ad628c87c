"""Interrupted, redelivered and late writes: in the end, the newest version is searchable."""

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
    """Manifests are written conditionally; passages have external versions, and writes of older ones are ignored."""

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
        """Original id → title. A copy and its original are never both stored."""
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
        """Remove passages as an external program does, with versions of its own."""
        for passage in passages:
            del self.passages[passage]
            self.versions[passage] += 1_000


def named(passages: list[str], title: str) -> list[str]:
    """Ids of passages, which depend on the title."""
    return [f"{passage}/{title}" for passage in passages]


def steps(index: Index, version: int, passages: list[str] | None, title: str, rewritten_at: int | None = None):
    """The index step as single actions. It may be interrupted after any of them."""
    one = plan(version, passages, title, rewritten_at)
    done = False
    while not done:
        current = claimed = index.manifest
        yield
        if current is not None and not current.complete:
            claimed = taken_over(current, "w")
            if not index.put_manifest(claimed, current):
                continue
            current = yield from recovered(index, claimed)
        decision = decide(one, named(passages or [], title), current, now_ms=0)
        if not isinstance(decision, Write):
            done = claimed is current or index.put_manifest(current, claimed)
            continue
        yield
        if not index.put_manifest(decision.claim, claimed):
            continue
        is_rejected = yield from written(index, decision, title, refuse=title == REJECTED)
        if is_rejected:
            manifest = closed(decision.claim.previous, one, "refused", "it is", now_ms=0, refused=decision.claim)
        else:
            manifest = completed(decision.claim, now_ms=0)
        done = index.put_manifest(manifest, decision.claim)


def recovered(index: Index, claim):
    """An incomplete claim, rolled back or forward (``streams.recovery``)."""
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


REJECTED = "refused"
VERSIONS = st.lists(st.tuples(PASSAGES | st.none(), st.sampled_from(["t", "u"])), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(versions=VERSIONS, data=st.data())
def test_the_newest_version_is_current_after_any_interruptions(versions, data):
    index = Index()
    running = []
    for number, (passages, title) in enumerate(versions, start=1):
        # Each version is attempted at least once. All attempts but the last are interrupted, and may resume later (a
        # worker that has lost its partition without noticing). Such a worker may also be ahead of the others.
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
    versions=st.lists(st.tuples(PASSAGES | st.none(), st.sampled_from(["t", "u", REJECTED])), min_size=2, max_size=6),
    data=st.data(),
)
def test_the_newest_accepted_version_is_current_after_any_interruptions(versions, data):
    """Versions arrive in any order. Each is attempted at least once, and only the last attempt is certain to finish."""
    index, running = Index(), []
    order = data.draw(st.permutations(range(len(versions))))
    for number in order:
        for _ in range(data.draw(st.integers(0, 2))):
            stopped = steps(index, number, *versions[number])
            for _ in range(data.draw(st.integers(0, 12))):
                next(stopped, None)
            running.append(stopped)
        for _ in steps(index, number, *versions[number]):
            for resumed in data.draw(st.lists(st.sampled_from(running), max_size=1)) if running else []:
                next(resumed, None)
    for resumed in running:
        for _ in resumed:
            pass
    taken = [number for number, (passages, title) in enumerate(versions) if title != REJECTED]
    # The index rejects single passages only: a version without passages cannot be rejected.
    empty = [number for number, (passages, title) in enumerate(versions) if title == REJECTED and not passages]
    newest = max((*taken, *empty), default=None)
    assert index.manifest.complete
    passages, title = versions[newest] if newest is not None else (None, "t")
    assert index.contents() == dict.fromkeys(named(passages or [], title), title)
    assert index.manifest.version == (-1 if newest is None else newest)


@settings(max_examples=400, deadline=None)
@given(passages=PASSAGES | st.none(), rewrites=st.integers(1, 4), data=st.data())
def test_a_rewrite_restores_the_document_after_any_damage_and_late_writes(passages, rewrites, data):
    """The first write of the version and earlier rewrites resume in between and after the end."""
    index = Index()
    resumed = []

    def write(offset):
        for _ in steps(index, 1, passages, "t", offset):
            for zombie in data.draw(st.lists(st.sampled_from(resumed), max_size=2)) if resumed else []:
                next(zombie, None)

    for offset in (None, *range(10, 10 + rewrites)):
        for _ in range(data.draw(st.integers(0, 2))):
            zombie = steps(index, 1, passages, "t", offset)
            resumed.append(zombie)
            for _ in range(data.draw(st.integers(0, 6))):
                next(zombie, None)
        write(offset)
        index.damage(data.draw(st.sets(st.sampled_from(sorted(index.passages)))) if index.passages else ())
    write(20)
    for zombie in resumed:
        for _ in zombie:
            pass
    assert index.contents() == dict.fromkeys(named(passages or [], "t"), "t")
    assert (index.manifest.position, index.manifest.complete) == ("documents.v1-0:20", True)


@given(PASSAGES)
def test_a_redelivered_event_is_already_done(passages):
    first = decide(plan(3, passages), passages, None, now_ms=0)
    assert isinstance(first, Write)
    done = completed(first.claim, now_ms=0)
    assert decide(plan(3, passages), passages, done, now_ms=9) == AlreadyDone(done)
    assert decide(plan(2, passages), passages, done, now_ms=9) == Superseded(done)


def test_unchanged_passages_are_not_rewritten():
    first = decide(plan(1, ["a", "b", "c"]), ["a", "b", "c"], None, now_ms=0)
    second = decide(plan(2, ["a", "x", "c"]), ["a", "x", "c"], completed(first.claim, now_ms=0), now_ms=0)
    assert second.add == (1,)
    assert second.remove == ("b",)


def test_a_changed_attribute_rewrites_all_passages():
    first = decide(plan(1, ["a", "b"]), named(["a", "b"], "t"), None, now_ms=0)
    second = decide(plan(2, ["a", "b"], title="u"), named(["a", "b"], "u"), completed(first.claim, now_ms=0), now_ms=0)
    assert second.add == (0, 1)
    assert second.remove == ("a/t", "b/t")


@pytest.mark.parametrize("rewritten_at", [None, 9], ids=["over a lost manifest", "rewrite"])
def test_passages_without_a_trusted_manifest_are_replaced_by_copies(rewritten_at):
    lost = rewritten_at is None
    first = completed(decide(plan(1, ["a", "b"]), ["a", "b"], None, now_ms=0).claim, now_ms=0)
    second = decide(plan(1, ["a", "b"], rewritten_at=rewritten_at), ["a", "b"], first, now_ms=0, lost=lost)
    assert second.add == (0, 1)
    assert second.remove == ("a", "b"), "stored passages are not touched before all copies are written"
    assert [original_id(name) for name in second.claim.chunks] == ["a", "b"]
    assert set(second.claim.chunks).isdisjoint("ab")
    third = decide(plan(3, ["b", "c"]), ["b", "c"], completed(second.claim, now_ms=0), now_ms=0)
    assert third.claim.chunks == (second.claim.chunks[1], "c"), "an unchanged copy is kept"
    assert third.add == (1,)


def test_a_redelivered_failed_version_has_already_failed_and_supersedes_nothing():
    first = completed(decide(plan(1, ["a"]), ["a"], None, now_ms=0).claim, now_ms=0)
    after = closed(first, plan(5, ["b"]), "refused", "it is \ud800", now_ms=9)
    assert (after.version, after.chunks, after.newest_version, after.updated_ms) == (1, ("a",), 5, 0)
    again = decide(plan(5, ["b"]), ["b"], after, now_ms=0)
    assert isinstance(again, AlreadyFailed)
    assert again.failure.reason == "it is ?"
    assert isinstance(decide(plan(3, ["c"]), ["c"], after, now_ms=0), Write)
    rewritten = decide(plan(5, ["b"], rewritten_at=9), ["b"], after, now_ms=0)
    assert completed(rewritten.claim, now_ms=0).failed == ()


def test_the_manifest_of_a_document_that_fails_repeatedly_is_bounded():
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
def test_only_the_newest_event_of_each_document_in_a_batch_is_processed(events):
    superseded = supersede_within(events)
    for key in {key for key, _ in events}:
        kept = [number for number, (one, _) in enumerate(events) if one == key and superseded[number] is None]
        newest = max(version for one, version in events if one == key)
        assert [events[number][1] for number in kept] == [newest]
        assert kept[0] == events.index((key, newest))
