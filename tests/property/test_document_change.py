"""Stops anywhere, deliveries again, writers that come late: the newest version is what is searchable in the end."""

from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.documents import LifeState
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent
from streams.core.document_change import AlreadyDone, Superseded, Write, completed, decide, supersede_within

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


def named(passages: list[str], title: str, rewritten_at: int | None = None) -> list[str]:
    """Ids of passages: another title gives them others, and a rewrite gives them new ones."""
    suffix = "" if rewritten_at is None else f"@{rewritten_at}"
    return [f"{passage}/{title}{suffix}" for passage in passages]


def steps(index: Index, version: int, passages: list[str] | None, title: str, rewritten_at: int | None = None):
    """The index step as single actions; it may be left off after any of them."""
    one = plan(version, passages, title, rewritten_at)
    done = False
    while not done:
        standing = index.manifest
        yield
        decision = decide(one, named(passages or [], title, rewritten_at), standing, now_ms=0)
        if not isinstance(decision, Write):
            return
        yield
        if index.put_manifest(decision.claim, standing):
            yield from written(index, decision, title)
            done = index.put_manifest(completed(decision.claim, now_ms=0), decision.claim)


def written(index: Index, decision: Write, title: str):
    for number in decision.add:
        yield
        index.put(decision.claim.chunks[number], decision.claim.write_version, title)
    for passage in decision.remove:
        yield
        index.remove(passage, decision.claim.write_version)
    yield


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
    assert index.passages == dict.fromkeys(named(passages or [], title), title)
    assert index.manifest.version == len(versions)
    assert index.manifest.complete
    assert (index.manifest.state is LifeState.DELETED) == (passages is None)


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
    assert index.passages == dict.fromkeys(named(passages or [], "t", 20), "t")
    assert (index.manifest.position, index.manifest.complete) == ("documents.v1-0:20", True)


@given(PASSAGES)
def test_same_event_again_is_known(passages):
    first = decide(plan(3, passages), passages, None, now_ms=0)
    assert isinstance(first, Write)
    done = completed(first.claim, now_ms=0)
    assert decide(plan(3, passages), passages, done, now_ms=9) == AlreadyDone(done)
    assert decide(plan(2, passages), passages, done, now_ms=9) == Superseded(3)


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


def test_a_claim_names_what_serves_until_it_is_complete():
    first = decide(plan(1, ["a"]), ["a"], None, now_ms=0)
    second = decide(plan(2, ["b"]), ["b"], completed(first.claim, now_ms=0), now_ms=0)
    assert (first.claim.before, second.claim.before) == ((), (("a",),))
    third = decide(plan(3, ["c"]), ["c"], second.claim, now_ms=0)
    again = decide(plan(3, ["c"]), ["c"], third.claim, now_ms=0)
    assert third.claim.before == (("a",), ("b",)), "its writer may have been stopped before or behind its last write"
    assert again.claim.before == (("a",), ("b",), ("c",))
    once_more = decide(plan(3, ["c"]), ["c"], again.claim, now_ms=0)
    assert once_more.claim.before == again.claim.before
    assert completed(once_more.claim, now_ms=0).before == ()


@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 4))))
def test_of_events_on_their_way_together_one_for_each_document_is_processed(events):
    superseded = supersede_within(events)
    for key in {key for key, _ in events}:
        kept = [number for number, (one, _) in enumerate(events) if one == key and superseded[number] is None]
        newest = max(version for one, version in events if one == key)
        assert [events[number][1] for number in kept] == [newest]
        assert kept[0] == events.index((key, newest))
