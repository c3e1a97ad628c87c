"""What the steps make of single situations that are rare, and that random histories seldom reach."""

import asyncio
from contextlib import aclosing, suppress
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from infra.blobs.memory import MemoryBlobStore
from infra.blobs.port import ref_of
from infra.embedding.hashing import HashingEmbedder
from infra.embedding.port import EmbeddingError
from infra.kafka.codec import decode
from infra.opensearch.memory import MemoryIndex, _Deleted
from infra.opensearch.port import IndexUnavailable
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates
from infra.settings import AnswerSettings
from schemas.documents import DocumentKey, LifeState, Outcome, Stage
from schemas.events import Change, ChunkPlan, DocumentEvent, EventEnded, IndexChange, PlannedChunk, StageTimes
from schemas.topics import MAX_RECORD_BYTES
from streams.core.outcomes import DeadLetter, Finished
from streams.core.planned_chunks import load_chunks
from streams.core.splitting import embedding_text
from streams.evaluation import FusionParameters, SliceEvaluator
from streams.parsing.emptiness import why_empty
from streams.parsing.parse import ParsedDocument
from streams.parsing.sandbox import ParseFailed
from streams.runner import Task
from streams.slice_evaluators import SliceEvaluators
from streams.steps.index import Index
from streams.steps.invalidate import Invalidate, ended
from streams.steps.prepare import Prepare

KEY = DocumentKey("acme", "a.md")
DIMENSION = 16


class Progress:
    def __init__(self):
        self.stages = []

    def reached(self, event, stage, _at_ms):
        self.stages.append((event.event_id, stage))


class CountingEmbedder(HashingEmbedder):
    def __init__(self):
        super().__init__(DIMENSION)
        self.texts = []

    async def embed_passages(self, texts):
        self.texts += texts
        return await super().embed_passages(texts)


class Parsers:
    async def parse(self, content, _content_type, _file_name):
        if content == b"broken":
            raise ParseFailed("broken", "it has no end")
        return ParsedDocument(content.decode(), None, "text/plain")


class Lines:
    def split(self, text, title):
        return passages(text.splitlines(), title)


def passages(lines, title=None):
    bare = [PlannedChunk(text=line, start=0, end=len(line), text_sha256="") for line in lines]
    return tuple(
        one.model_copy(update={"text_sha256": sha256(embedding_text(title, one).encode()).hexdigest()}) for one in bare
    )


def event(version, content=b"text", document_id=KEY.document_id, **fields):
    deleted = content is None
    return DocumentEvent(
        event_id=f"e{version}",
        tenant=KEY.tenant,
        document_id=document_id,
        version=version,
        change=Change.DELETED if deleted else Change.UPSERTED,
        accepted_ms=1.0,
        content=None if deleted else ref_of(content),
        **fields,
    )


def task(message, offset=None):
    version = message.event.version if isinstance(message, ChunkPlan) else message.version
    return Task(message, 1, version if offset is None else offset, None)


async def outcomes_of(step, *messages):
    return [outcome async for some in step.run([task(one) for one in messages]) for outcome in some]


# prepare


@pytest.fixture
def blobs():
    return MemoryBlobStore()


@pytest.fixture
def prepare(blobs):
    return Prepare(blobs, Parsers(), Lines(), "profile", Progress())


def plans_in(outcome):
    return [decode(ChunkPlan, record.value, record.headers) for record in outcome.emit]


async def prepared(prepare, *events):
    """Each event's outcome, and the plan that it led to."""
    outcomes = await outcomes_of(prepare, *events)
    plans = {plan.event.version: plan for outcome in outcomes for plan in plans_in(outcome)}
    return [(outcome, plans[one.version]) for outcome, one in zip(outcomes, events, strict=True)]


class SlowParsers(Parsers):
    """Parses content that begins with "slow" when the test permits it."""

    def __init__(self):
        self.reported = asyncio.Event()

    async def parse(self, content, content_type, file_name):
        if content.startswith(b"slow"):
            await self.reported.wait()
        return await super().parse(content, content_type, file_name)


async def test_what_was_read_continues_on_while_the_rest_is_read(blobs):
    for content in (b"text", b"slow"):
        await blobs.put(content)
    parsers = SlowParsers()
    step = Prepare(blobs, parsers, Lines(), "profile", Progress())
    events = (event(1), event(2, document_id="b.md"), event(3, b"slow", "c.md"), event(4, document_id="d.md"))
    async with asyncio.timeout(5), aclosing(step.run([task(one) for one in events])) as results:
        outcomes = await anext(results)
        while len(outcomes) < 2:
            outcomes += await anext(results)
        assert [plan.event.version for outcome in outcomes for plan in plans_in(outcome)] == [1, 2]
        parsers.reported.set()
        assert len([outcome async for some in results for outcome in some]) == 2


async def test_nothing_is_read_on_when_a_batch_is_given_up(blobs):
    await blobs.put(b"slow")
    step = Prepare(blobs, SlowParsers(), Lines(), "profile", Progress())
    running = asyncio.create_task(
        outcomes_of(step, event(1, b"slow"), event(2, b"lost", "b.md"), event(3, b"slow", "c"))
    )
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert [one for one in asyncio.all_tasks() if one.get_name() == "read-content"] == []


async def test_no_version_gives_way_to_one_that_the_index_may_still_refuse(prepare, blobs):
    for one in (b"text", b"broken"):
        await blobs.put(one)
    events = (event(1), event(3), event(2, None), event(4, b"broken"), event(7, document_id="other.md"))
    reported = await prepared(prepare, *events)
    assert [type(outcome) for outcome, _ in reported] == [Finished, Finished, Finished, DeadLetter, Finished]
    assert [plan.outcome for _, plan in reported] == [None, None, None, Outcome.DEAD_LETTER, None]
    assert (reported[3][0].kind, reported[3][1].reason) == ("broken", "it has no end")
    assert [[plan.event.version for plan in plans_in(outcome)] for outcome, _ in reported] == [[1], [3], [2], [4], [7]]
    assert [plan.position for _, plan in reported] == [f"documents.v1-1:{offset}" for offset in (1, 3, 2, 4, 7)]
    assert all(record.partition == 1 for outcome, _ in reported for record in outcome.emit)


async def test_a_plan_without_passages_gives_the_reason(prepare, blobs):
    for content in (b"", b"text"):
        await blobs.put(content)
    reported = await prepared(prepare, event(1, b""), event(2, b"text", "b.md"), event(3, None, "c.md"))
    assert [plan.outcome for _, plan in reported] == [None] * 3
    assert [plan.reason for _, plan in reported] == ["the document is empty", None, None]


@pytest.mark.parametrize(
    ("content", "media_type", "expected"),
    [
        (b"%PDF-", "application/pdf", "no text layer"),
        (
            b"PK",
            "application/vnd.openxmlformats-officedocument.presentationml.presentation",
            "text in images is not recognised",
        ),
        (b" ", "text/html", "no text"),
        (b"", "application/pdf", "is empty"),
    ],
)
def test_why_a_document_has_no_passages_depends_on_its_kind(content, media_type, expected):
    assert expected in why_empty(content, media_type)


async def test_content_that_is_lost_is_a_dead_letter_with_advice(prepare):
    [(outcome, plan)] = await prepared(prepare, event(1))
    assert (outcome.kind, plan.outcome) == ("content-lost", Outcome.DEAD_LETTER)
    assert "upload the content again" in plan.reason


async def test_a_plan_too_large_for_a_record_travels_by_reference(prepare, blobs):
    content = b"\n".join(b"%08d" % number + b"x" * 992 for number in range(1_000))
    await blobs.put(content)
    [(outcome, plan)] = await prepared(prepare, event(1, content, metadata={f"m{n}": "ä" * 1_000 for n in range(64)}))
    assert len(outcome.emit[0].value) < MAX_RECORD_BYTES
    assert plan.chunks == ()
    assert load_chunks(await blobs.get(plan.chunks_blob)) == passages(content.decode().splitlines())


async def test_more_passages_than_one_index_change_can_name_are_a_dead_letter(prepare, blobs):
    content = b"\n".join(b"line %09d" % number for number in range(8_001))
    await blobs.put(content)
    [(outcome, plan)] = await prepared(prepare, event(1, content))
    assert outcome.kind == "too-large"
    assert plan.reason == "the document has 8001 passages, the limit is 8000: split it"


# index


def longer(write):
    return replace(write, vector=np.append(write.vector, np.float32(0)))


def changes_in(outcome):
    return [decode(IndexChange, record.value, record.headers) for record in outcome.emit]


class Bench:
    """The step on a twin on which something may happen before any single write."""

    def __init__(self, blobs):
        self.before_write = []
        self.index = MemoryIndex(DIMENSION, pause=self._pause)
        self.embedder = CountingEmbedder()
        self.step = Index(self.index, self.embedder, blobs, "g1", 8, Progress())

    async def _pause(self):
        if self.before_write and (happens := self.before_write.pop(0)):
            await happens()

    async def run(self, *plans):
        """Each plan's outcome, and the change that it led to."""
        outcomes = await outcomes_of(self.step, *plans)
        reported = {change.position: change for outcome in outcomes for change in changes_in(outcome)}
        return [(one, reported[plan.position]) for one, plan in zip(outcomes, plans, strict=True)]

    async def refuse(self, changes):
        """What ``apply`` does where the index takes none of the passages."""
        return await MemoryIndex.apply(self.index, [replace(one, put=tuple(map(longer, one.put))) for one in changes])

    async def refuse_last(self, changes):
        """What ``apply`` does where the index takes all passages but the last."""
        wrong = [replace(one, put=(*one.put[:-1], longer(one.put[-1]))) for one in changes]
        return await MemoryIndex.apply(self.index, wrong)

    def searchable(self):
        """Text → groups, and the version that wrote it."""
        chunks = [one.chunk for one in self.index._searchable.values()]
        return {one.text: (one.groups, one.version) for one in chunks}

    async def texts(self):
        fetched = {one.chunk.chunk_id: one.chunk for one in self.index._searchable.values()}
        return sorted(one.text for one in fetched.values())

    async def manifest(self):
        return (await self.index.manifests([KEY]))[KEY]


@pytest.fixture
def bench(blobs):
    return Bench(blobs)


def plan(version, *lines, deleted=False, position=None, **fields):
    return ChunkPlan(
        event=event(version, None if deleted else b"text", **fields),
        position=f"documents.v1-1:{version if position is None else position}",
        profile="profile",
        chunked_ms=2.0,
        chunks=passages(lines),
    )


async def test_a_version_that_another_worker_completes_meanwhile_is_reported_as_done(bench):
    """Reported as superseded, its change would drop no cached answer."""
    one = plan(1, "a")

    async def other_worker():
        await bench.run(one)

    bench.before_write = [other_worker]
    [(_, change)] = await bench.run(one)
    assert change.outcome is Outcome.DONE
    assert change.added == (await bench.manifest()).chunks != ()


async def test_a_version_that_a_newer_one_supersedes_is_reported_as_superseded(bench):
    async def other_worker():
        await bench.run(plan(2, "b"))

    bench.before_write = [other_worker]
    reported = await bench.run(plan(1, "a"), plan(5, "z", document_id="other.md"))
    assert [change.outcome for _, change in reported] == [Outcome.SUPERSEDED, Outcome.DONE]
    assert reported[0][1].reason == "version 1 is not newer than version 2"
    assert await bench.texts() == ["b", "z"]


@pytest.mark.parametrize("writes", range(7))
async def test_a_stop_before_any_write_is_made_good_by_the_next_version(bench, writes):
    await bench.run(plan(1, "a", "b"))

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None] * writes + [stop]
    with suppress(IndexUnavailable):
        await bench.run(plan(2, "b", "c"))
    bench.before_write = []
    [(_, change)] = await bench.run(plan(3, "a", "c"))
    assert change.outcome is Outcome.DONE
    assert await bench.texts() == ["a", "c"]
    assert set(bench.index._written) >= {*(await bench.manifest()).chunks}


async def test_a_text_that_was_embedded_before_is_not_embedded_again(bench):
    await bench.run(plan(1, "a", "b"))
    assert bench.embedder.texts == ["a", "b"]
    await bench.run(plan(2, "b", "c"))
    await bench.run(plan(3, "a", "b"))
    await bench.run(plan(1, "a", "c", document_id="copy.md"))
    assert bench.embedder.texts == ["a", "b", "c"]


async def test_refused_content_is_a_dead_letter_each_time_and_the_old_passages_stay(bench, monkeypatch):
    await bench.run(plan(1, "a", "b"))
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse)
        [(first, change)] = await bench.run(plan(2, "b", "c"))
    [(again, repeated)] = await bench.run(plan(2, "b", "c"))
    assert [type(one) for one in (first, again)] == [DeadLetter, DeadLetter]
    assert (change.outcome, change.added) == (Outcome.DEAD_LETTER, ())
    assert len(change.removed) == 1, "a search may have found it, and an answer have it"
    assert repeated.removed == change.removed
    assert "vector has shape" in change.reason
    assert (again.kind, again.reason) == (first.kind, first.reason) == ("refused", change.reason)
    assert await bench.texts() == ["a", "b"]
    manifest = await bench.manifest()
    assert (manifest.version, manifest.complete, manifest.state) == (1, True, LifeState.LIVE)
    assert manifest.newest_version == 2
    await bench.run(plan(3, "b", "d"))
    assert await bench.texts() == ["b", "d"]


async def test_refused_content_with_other_attributes_leaves_the_old_ones_each_time(bench, monkeypatch):
    await bench.run(plan(1, "a", "b", groups=("hr",)))
    before = bench.searchable()
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse_last)
        for version in (2, 3):
            [(outcome, _)] = await bench.run(plan(version, "b", "a", "c", groups=("sales",)))
            assert isinstance(outcome, DeadLetter)
            assert bench.searchable() == before == dict.fromkeys(("a", "b"), (("hr",), 1))
            manifest = await bench.manifest()
            assert (manifest.newest_version, manifest.groups, len(manifest.chunks)) == (version, ("hr",), 2)
    await bench.run(plan(4, "b", "c", groups=("sales",)))
    assert bench.searchable() == dict.fromkeys(("b", "c"), (("sales",), 4))


@pytest.mark.parametrize("first", [1, 3], ids=["older first", "newer first"])
async def test_of_versions_that_come_together_the_newest_that_does_not_fail_is_done(bench, monkeypatch, first):
    """And those before it are superseded; none is lost for one that is refused."""
    apply = bench.index.apply

    async def refuse_third(changes):
        return await (bench.refuse if changes[0].put[0].chunk.version == 3 else apply)(changes)

    monkeypatch.setattr(bench.index, "apply", refuse_third)
    together = [plan(version, f"text {version}", position=first * version) for version in (0, 1, 2)]
    together.insert(len(together) if first == 1 else 0, plan(3, "text 3", position=99))
    reported = {change.version: change for _, change in await bench.run(*together)}
    outcomes = [reported[version].outcome for version in range(4)]
    assert outcomes == [Outcome.SUPERSEDED, Outcome.SUPERSEDED, Outcome.DONE, Outcome.DEAD_LETTER]
    assert reported[1].reason == "version 1 is not newer than version 2"
    assert await bench.texts() == ["text 2"]


async def test_what_is_refused_for_its_owner_supersedes_nothing_and_the_next_run_waits_for_the_one_before(
    bench, monkeypatch
):
    """Of the first run the newest version is refused by the index, so the one before it makes ``mine`` the owner."""
    apply = bench.index.apply

    async def refuse_second(changes):
        return await (bench.refuse if changes[0].put and changes[0].put[0].chunk.version == 2 else apply)(changes)

    monkeypatch.setattr(bench.index, "apply", refuse_second)
    reported = await bench.run(
        plan(1, "a", connector="mine"),
        plan(2, "b", connector="mine"),
        plan(3, "c", connector="other"),
        plan(4, "d", connector="other"),
        plan(5, "e", connector="other", take_over=True),
        plan(6, "f", connector="mine"),
    )
    assert [getattr(outcome, "kind", None) for outcome, _ in reported] == [
        None,
        "refused",
        "owned-by-other",
        "owned-by-other",
        None,
        "owned-by-other",
    ]
    assert [change.outcome for _, change in reported if change.outcome is not Outcome.DEAD_LETTER] == [Outcome.DONE] * 2
    assert await bench.texts() == ["e"]
    manifest = await bench.manifest()
    assert (manifest.version, manifest.connector) == (5, "other")
    assert await bench.index.positions(KEY.tenant) == {1: 6}


async def test_who_is_refused_by_a_claim_that_arrives_to_nothing_is_not_refused(bench):
    await bench.run(plan(1, "a", connector="mine"))

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None, stop]
    with suppress(IndexUnavailable):
        await bench.run(plan(3, "b", connector="other", take_over=True))
    bench.before_write = []
    claim = await bench.manifest()
    assert (claim.complete, claim.connector, claim.listed.connector) == (False, "other", "mine")
    [(_, change)] = await bench.run(plan(2, "c", connector="mine"))
    assert (change.outcome, await bench.texts()) == (Outcome.DONE, ["c"])


async def test_an_older_version_that_arrives_after_a_failed_one_is_done(bench, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse)
        await bench.run(plan(5, "a"))
    manifest = await bench.manifest()
    assert (manifest.version, manifest.newest_version, manifest.state) == (-1, 5, LifeState.DELETED)
    [(_, change)] = await bench.run(plan(2, "b", position=9))
    assert change.outcome is Outcome.DONE
    assert await bench.texts() == ["b"]
    [(outcome, _)] = await bench.run(plan(5, "a"))
    assert (outcome.kind, await bench.texts()) == ("refused", ["b"]), "read again, it is what it was"


@pytest.mark.parametrize("writes", range(1, 12))
async def test_a_stop_anywhere_in_an_update_that_is_then_refused_leaves_the_old_or_the_new(bench, monkeypatch, writes):
    await bench.run(plan(1, "a", "b", groups=("hr",)))

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None] * writes + [stop]
    with suppress(IndexUnavailable):
        await bench.run(plan(2, "b", "a", "c", groups=("sales",)))
    bench.before_write = []
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse_last)
        [(outcome, change)] = await bench.run(plan(2, "b", "a", "c", groups=("sales",)))
    old, new = dict.fromkeys("ab", (("hr",), 1)), dict.fromkeys("abc", (("sales",), 2))
    assert bench.searchable() == (old if isinstance(outcome, DeadLetter) else new)
    assert change.outcome is (Outcome.DEAD_LETTER if isinstance(outcome, DeadLetter) else Outcome.DONE)
    await bench.run(plan(3, deleted=True))
    assert bench.searchable() == {}
    assert [one for one in bench.index._written.values() if not isinstance(one, _Deleted)] == []


@pytest.mark.parametrize("writes", range(1, 10))
async def test_a_refusal_after_a_stopped_update_takes_nothing_from_the_version_that_serves(bench, monkeypatch, writes):
    """What is refused has passages of both versions, of which one serves: which of them may be written again?"""
    await bench.run(plan(1, "a", "b"))

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None] * writes + [stop]
    with suppress(IndexUnavailable):
        await bench.run(plan(2, "b", "c"))
    bench.before_write = []
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse_last)
        [(outcome, _)] = await bench.run(plan(3, "a", "b", "c", "d"))
    assert isinstance(outcome, DeadLetter)
    served = bench.searchable()
    assert served in ({"a": ((), 1), "b": ((), 1)}, {"b": ((), 1), "c": ((), 2)})
    assert (await bench.manifest()).version == max(version for _, version in served.values())
    [(_, change)] = await bench.run(plan(2, "b", "c"))
    assert change.outcome is Outcome.DONE
    assert bench.searchable() == {"b": ((), 1), "c": ((), 2)}
    await bench.run(plan(4, deleted=True))
    assert [one for one in bench.index._written.values() if not isinstance(one, _Deleted)] == []


async def test_another_workers_claim_supersedes_nothing_and_is_committed(bench):
    """Its writer has stopped, and reports nothing of what it began."""
    await bench.run(plan(1, "a"))
    other = replace(bench.step, writer="another")

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None, None, stop]
    with suppress(IndexUnavailable):
        await outcomes_of(other, plan(5, "b", position=9))
    bench.before_write = []
    [(_, change)] = await bench.run(plan(2, "c"))
    assert change.outcome is Outcome.DONE
    assert await bench.texts() == ["c"]
    [(_, change)] = await bench.run(plan(5, "b", position=9))
    assert (change.outcome, await bench.texts()) == (Outcome.DONE, ["b"])


async def test_giving_up_closes_the_claim_and_advances_the_position(bench, monkeypatch):
    await bench.run(plan(1, "a"))
    with monkeypatch.context() as patched:
        patched.setattr(
            bench.index, "apply", lambda _changes: (_ for _ in ()).throw(ValueError("the client is broken"))
        )
        with pytest.raises(ValueError, match="broken"):
            await bench.run(plan(2, "b", position=16))
    assert not (await bench.manifest()).complete
    assert await bench.index.positions(KEY.tenant) == {1: 1}
    outcome = await bench.step.close(task(plan(2, "b", position=16)), "failed", "failed 5 times")
    assert (outcome.kind, outcome.reason) == ("failed", "failed 5 times")
    manifest = await bench.manifest()
    assert (manifest.version, manifest.complete, manifest.newest_version) == (1, True, 2)
    assert await bench.index.positions(KEY.tenant) == {1: 16}
    [(again, _)] = await bench.run(plan(2, "b", position=16))
    assert (again.kind, await bench.texts()) == ("failed", ["a"])


async def test_giving_up_what_is_done_after_all_reports_that(bench):
    await bench.run(plan(1, "a"))
    reported = await bench.step.close(task(plan(1, "a")), "failed", "failed 5 times")
    [change] = changes_in(reported)
    assert (change.outcome, change.added) == (Outcome.DONE, (await bench.manifest()).chunks)


async def test_positions_cover_what_ended_in_whatever_way(bench):
    ended = plan(3, position=30).model_copy(update={"outcome": Outcome.DEAD_LETTER, "reason": "it has no end"})
    await bench.run(plan(2, "a", position=10), plan(1, "b", position=20), ended)
    assert await bench.index.positions(KEY.tenant) == {1: 30}


@pytest.mark.parametrize("refused", [False, True])
async def test_a_delete_after_an_upload_over_a_lost_manifest_leaves_nothing(bench, monkeypatch, refused):
    await bench.run(plan(1, "a", "b"))
    del bench.index._manifests[KEY]
    with monkeypatch.context() as patched:
        if refused:
            patched.setattr(bench.index, "apply", bench.refuse_last)
        [(_, change)] = await bench.run(plan(2, "a", "c", groups=("hr",)))
    if refused:
        assert change.outcome is Outcome.DEAD_LETTER
        assert bench.searchable() == dict.fromkeys("ab", ((), 1)), "what was there is known again"
    else:
        assert bench.searchable() == dict.fromkeys("ac", (("hr",), 2))
    await bench.run(plan(3, deleted=True))
    assert bench.searchable() == {}


async def test_a_version_older_than_what_remains_without_a_manifest_is_superseded(bench):
    await bench.run(plan(5, "a"))
    del bench.index._manifests[KEY]
    [(_, change)] = await bench.run(plan(4, "b", position=9))
    assert (change.outcome, await bench.texts()) == (Outcome.SUPERSEDED, ["a"])
    [(_, change)] = await bench.run(plan(5, "a"))
    assert (change.outcome, await bench.texts()) == (Outcome.DONE, ["a"]), "its manifest is there again"
    assert (await bench.manifest()).version == 5


async def test_content_refused_upon_a_claim_left_half_done_hides_nothing_from_the_next_version(bench, monkeypatch):
    await bench.run(plan(1, "a"))

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None, None, stop]
    with pytest.raises(IndexUnavailable):
        await bench.run(plan(2, "b", "c"))
    bench.before_write = []

    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse)
        await bench.run(plan(3, "d"))
    await bench.run(plan(4, "b", "c"))
    assert await bench.texts() == ["b", "c"]


async def test_an_event_that_ended_before_is_reported_onward_untouched(bench):
    ended = plan(3).model_copy(update={"outcome": Outcome.DEAD_LETTER, "reason": "it has no end"})
    [(outcome, change)] = await bench.run(ended)
    assert isinstance(outcome, Finished), "its dead letter was written by the step that gave it up"
    assert (change.outcome, change.reason, change.added) == (Outcome.DEAD_LETTER, "it has no end", ())
    assert await bench.index.manifests([KEY]) == {}


async def test_a_vector_that_is_no_number_is_never_written(bench, monkeypatch):
    async def broken(texts):
        return np.full((len(texts), DIMENSION), np.nan, np.float32)

    monkeypatch.setattr(bench.embedder, "embed_passages", broken)
    with pytest.raises(ValueError, match="not all finite"):
        await bench.run(plan(1, "a"))
    assert await bench.texts() == []
    assert await bench.index.manifests([KEY]) == {}, "nor is there a claim that would never be completed"


async def test_a_version_that_cannot_be_embedded_leaves_the_document_as_it_was(bench, monkeypatch):
    await bench.run(plan(1, "a"))
    current = await bench.index.manifests([KEY])

    async def refusing(_texts):
        raise EmbeddingError("the model refuses this text")

    monkeypatch.setattr(bench.embedder, "embed_passages", refusing)
    with pytest.raises(EmbeddingError):
        await bench.run(plan(2, "b"))
    assert await bench.texts() == ["a"]
    assert await bench.index.manifests([KEY]) == current


async def test_one_group_is_embedded_while_another_is_written_and_each_is_reported_when_searchable(bench, monkeypatch):
    """Groups of at most 8 passages here: the first two documents, then the third."""
    plans = [plan(1, *lines, document_id=f"{lines}.md") for lines in ("abc", "defgh", "ijklmnop")]

    all_embedded, embed = asyncio.Event(), bench.embedder.embed_passages

    async def noting(texts):
        vectors = await embed(texts)
        if "p" in texts:
            all_embedded.set()
        return vectors

    monkeypatch.setattr(bench.embedder, "embed_passages", noting)
    bench.before_write = [all_embedded.wait]
    async with asyncio.timeout(10), aclosing(bench.step.run([task(one) for one in plans])) as results:
        assert len(await anext(results)) == 2
        assert await bench.texts() == list("abcdefgh")
        assert len(await anext(results)) == 1
    assert await bench.texts() == list("abcdefghijklmnop")
    assert bench.embedder.texts == list("abcdefghijklmnop")


async def test_a_superseded_version_ends_in_its_turn_with_the_passages_of_the_newer_one(bench):
    """Its position is reached with its own index change, so other events between the two do not reach it before."""
    plans = (
        plan(1, "a", position=1),
        plan(3, "i", document_id="other.md", position=2),
        plan(5, *"abcdefgh", position=3),
        plan(2, "b", position=4),
    )
    outcomes = await outcomes_of(bench.step, *plans)
    first, other, newest, last = (change for outcome in outcomes for change in changes_in(outcome))
    assert [one.version for one in (first, other, newest, last)] == [1, 3, 5, 2]
    assert first.outcome is last.outcome is Outcome.SUPERSEDED
    assert first.added == newest.added != ()
    assert last.added == ()


async def test_outcomes_that_are_known_are_returned_while_others_are_written(bench):
    plans = plan(1, "a"), plan(5, *"abcdefgh"), plan(3, "i", document_id="other.md"), plan(2, "b")
    async with aclosing(bench.step.run([task(one) for one in plans])) as results:
        returned = [[[change.version for change in changes_in(one)] for one in some] async for some in results]
    assert returned == [[[1], [5]], [[3], [2]]]


async def test_an_event_that_arrives_twice_is_reported_once_and_does_not_supersede_itself(bench):
    twice = plan(1, "a"), plan(1, "a")
    outcomes = [outcome async for some in bench.step.run([task(one) for one in twice]) for outcome in some]
    reported = [[change.outcome for change in changes_in(one)] for one in outcomes]
    assert reported == [[Outcome.DONE], []]


async def test_report_that_arrives_twice_is_reported_once_and_ends(bench):
    """An event that ended before this step; left without an outcome, the batch would be retried without end."""
    ended = plan(3).model_copy(update={"outcome": Outcome.DEAD_LETTER, "reason": "broken"})
    outcomes = [outcome async for some in bench.step.run([task(ended), task(ended)]) for outcome in some]
    reported = [[change.outcome for change in changes_in(one)] for one in outcomes]
    assert reported == [[Outcome.DEAD_LETTER], []]


async def test_replacing_a_version_without_an_index_change_also_names_the_passages_that_it_removed(bench):
    await bench.run(plan(1, "a"))
    first = (await bench.manifest()).chunks
    await bench.run(plan(2, "b"))  # completed, and stopped before its index change was produced
    second = (await bench.manifest()).chunks
    [(_, superseded), (_, change)] = await bench.run(plan(2, "b"), plan(3, "c"))
    assert (superseded.outcome, change.outcome) == (Outcome.SUPERSEDED, Outcome.DONE)
    assert set(change.removed) == {*first, *second}


async def test_replacing_a_refused_version_without_an_index_change_also_names_its_passages(bench, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse_last)
        [(_, refused)] = await bench.run(plan(1, "a", "b"))
    assert refused.removed
    [(_, superseded), (_, change)] = await bench.run(plan(1, "a", "b"), plan(2, "c"))
    assert (superseded.outcome, change.outcome) == (Outcome.SUPERSEDED, Outcome.DONE)
    assert set(change.removed) >= set(refused.removed)


async def test_a_superseded_version_names_the_passages_of_a_newer_one_that_follows_in_the_stream(bench):
    await bench.run(plan(1, "a"))
    [(_, change)] = await bench.run(plan(3, "b"))
    [(_, followed)] = await bench.run(plan(2, "c"))
    [(_, preceded)] = await bench.run(plan(2, "c", position=9))
    assert (followed.outcome, preceded.outcome) == (Outcome.SUPERSEDED, Outcome.SUPERSEDED)
    assert (followed.added, followed.removed) == (change.added, change.removed)
    assert (preceded.added, preceded.removed) == ((), ())


async def test_nothing_is_embedded_on_when_a_batch_fails(bench):
    embedding = asyncio.Event()

    async def slow(_texts):
        embedding.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            embedding.clear()
            raise

    async def stop():
        bench.embedder.embed_passages = slow
        await asyncio.wait_for(embedding.wait(), 10)
        raise IndexUnavailable("stopped")

    bench.before_write = [stop]
    with pytest.raises(IndexUnavailable):
        await bench.run(plan(1, *"abcdefgh"), plan(1, "i", document_id="other.md"))
    assert not embedding.is_set()


async def test_a_delete_takes_away_the_passages_of_a_document_whose_manifest_was_lost(bench):
    await bench.run(plan(1, "a", "b"), plan(1, "z", document_id="other.md"))
    ids = (await bench.manifest()).chunks
    bench.index._manifests.pop(KEY)
    [(_, change)] = await bench.run(plan(2, deleted=True))
    assert (change.outcome, change.removed) == (Outcome.DONE, ids)
    assert await bench.texts() == ["z"]
    assert (await bench.manifest()).state is LifeState.DELETED


async def test_a_delete_counts_as_a_change_though_nothing_is_known_of_the_document(bench):
    """Where index and manifest were lost, cached answers may be based on passages that the delete cannot name."""
    for again in range(2):
        [(_, change)] = await bench.run(plan(5, deleted=True))
        assert (change.outcome, change.removed, change.changes_answers) == (Outcome.DONE, (), True), again
    for position, changes_answers in ((4, True), (9, False)):  # before and after the delete in the stream
        [(_, change)] = await bench.run(plan(4, deleted=True, position=position))
        assert (change.outcome, change.changes_answers) == (Outcome.SUPERSEDED, changes_answers)


async def test_an_end_has_the_passages_of_the_version_and_why_there_are_none(bench):
    first, second = plan(1, "a", "b", "c"), plan(2, "a", "b", "d")
    empty = plan(3).model_copy(update={"reason": "no text"})
    reported = [
        (await bench.run(one))[0][1] for one in (first, second, second, empty, empty, first, plan(4, deleted=True))
    ]
    assert [(change.outcome, change.passages, change.reason) for change in reported] == [
        (Outcome.DONE, 3, None),
        (Outcome.DONE, 3, None),  # all that can be found, not what was added
        (Outcome.DONE, 3, None),
        (Outcome.DONE, 0, "no text"),
        (Outcome.DONE, 0, "no text"),
        (Outcome.SUPERSEDED, None, "version 1 is not newer than version 3"),
        (Outcome.DONE, 0, None),
    ]


# invalidate


def changed(offset, outcome=Outcome.DONE, *, tenant="acme", added=("x",), partition=0):
    return IndexChange(
        event_id=f"{tenant}-{offset}",
        tenant=tenant,
        document_id="a.md",
        version=offset,
        position=f"documents.v1-{partition}:{offset}",
        generation="g1",
        outcome=outcome,
        added=added,
        times=StageTimes(accepted_ms=1.0, chunked_ms=2.0, searchable_ms=3.0),
    )


def invalidating(cache, states):
    index = MemoryIndex(DIMENSION)
    evaluators = SliceEvaluators(
        cache, index, index, fusion=FusionParameters(DIMENSION, 12, 5, 60), settings=AnswerSettings()
    )
    return Invalidate(cache, evaluators, states)


def ends(outcome):
    """The status in a record of an end."""
    [record] = outcome.emit
    end = decode(EventEnded, record.value, record.headers)
    return end.tenant, end.status.position, end.status.outcome, end.status.stage


async def test_answers_are_dropped_where_something_changed_and_positions_advance_in_any_case():
    cache = MemoryAnswerCache()
    step = invalidating(cache, MemoryEventStates())
    for tenant in ("acme", "umbrella"):
        epoch = (await cache.lookup(tenant, "q")).epoch
        assert await cache.store(tenant, "q", b"answer", epoch=epoch, ttl_s=60)
    messages = [
        changed(4),
        changed(3),
        changed(9, partition=2),
        changed(7, Outcome.SUPERSEDED, tenant="umbrella", added=()),
    ]
    assert [ends(outcome) for outcome in await outcomes_of(step, *messages)] == [
        ("acme", "documents.v1-0:4", Outcome.DONE, Stage.PURGED),
        ("acme", "documents.v1-0:3", Outcome.DONE, Stage.PURGED),
        ("acme", "documents.v1-2:9", Outcome.DONE, Stage.PURGED),
        ("umbrella", "documents.v1-0:7", Outcome.SUPERSEDED, Stage.CHUNKED),
    ]
    acme, umbrella = [await cache.lookup(tenant, "q") for tenant in ("acme", "umbrella")]
    assert (acme.entry, acme.positions) == (None, {0: 4, 2: 9})
    assert (umbrella.entry, umbrella.positions) == (b"answer", {0: 7})


async def test_an_event_that_did_not_become_searchable_is_not_reported_as_purged():
    states = MemoryEventStates()
    await outcomes_of(invalidating(MemoryAnswerCache(), states), changed(1, Outcome.DEAD_LETTER), changed(2))
    recorded = [states._fields["acme", f"acme-{offset}"] for offset in (1, 2)]
    assert Stage.PURGED not in str(recorded[0])
    assert Stage.PURGED in str(recorded[1])


async def test_the_passages_of_a_version_are_reported_to_those_who_ask_and_to_the_stream():
    states = MemoryEventStates()
    done = changed(1).model_copy(update={"passages": 0, "reason": "no text"})
    status = ended(done, 9.0).status
    await states.begin("acme", status.model_copy(update={"outcome": None, "stage": Stage.ACCEPTED, "stages_ms": {}}))
    [outcome] = await outcomes_of(invalidating(MemoryAnswerCache(), states), done)
    end = decode(EventEnded, outcome.emit[0].value, outcome.emit[0].headers).status
    assert (end.passages, end.reason) == (0, "no text")
    recorded = await states.get("acme", done.event_id)
    assert (recorded.passages, recorded.reason) == (0, "no text")


async def test_an_event_that_is_reported_twice_ended_as_it_was_reported_first():
    """A worker that dies after it has produced a change leaves it to another, which finds a newer version."""
    states = MemoryEventStates()
    step = invalidating(MemoryAnswerCache(), states)
    done = changed(4)
    again = done.model_copy(update={"outcome": Outcome.SUPERSEDED, "added": ()})
    status = ended(done, 9.0).status
    await states.begin("acme", status.model_copy(update={"outcome": None, "stage": Stage.ACCEPTED, "stages_ms": {}}))
    await outcomes_of(step, done, again)
    assert (await states.get("acme", done.event_id)).outcome is Outcome.DONE


async def test_states_out_of_reach_do_not_hold_back_invalidation():
    """Unrecorded outcomes are read from the stream of ends: reported again, they may differ."""
    cache, states = MemoryAnswerCache(), MemoryEventStates()
    step, done = invalidating(cache, states), changed(1)
    status = ended(done, 9.0).status
    await states.begin("acme", status.model_copy(update={"outcome": None, "stage": Stage.ACCEPTED, "stages_ms": {}}))
    states.available = False
    assert len(await outcomes_of(step, done)) == 1
    assert (await cache.lookup("acme", "q")).positions == {0: 1}
    states.available = True
    await outcomes_of(step, done.model_copy(update={"outcome": Outcome.SUPERSEDED, "added": ()}))
    assert (await states.get("acme", done.event_id)).outcome is None


async def test_evidence_is_read_ahead_also_after_a_mistake(monkeypatch):
    index = MemoryIndex(DIMENSION)
    evaluators = SliceEvaluators(
        MemoryAnswerCache(), index, index, fusion=FusionParameters(DIMENSION, 12, 5, 60), settings=AnswerSettings()
    )
    await evaluators.catch_up("acme", 0)
    lookups, went_on = [], asyncio.Event()

    async def looked(_evaluator):
        lookups.append(True)
        if len(lookups) == 1:
            raise ValueError("a mistake")
        went_on.set()

    monkeypatch.setattr(SliceEvaluator, "catch_up", looked)
    following = asyncio.create_task(evaluators.follow())
    try:
        async with asyncio.timeout(5):
            await went_on.wait()
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await evaluators.close()


# rewriting a version


def lose(bench, text):
    """Remove a passage as something else than Freshline would; the index remembers that as a later version."""
    [chunk_id] = [one.chunk.chunk_id for one in bench.index._searchable.values() if one.chunk.text == text]
    del bench.index._searchable[chunk_id]
    bench.index._written[chunk_id] = _Deleted(version=99, at_s=bench.index._now_s())
    return chunk_id


async def test_version_that_is_written_again_has_all_its_passages_again(bench):
    await bench.run(plan(1, "a", "b", position=5))
    lost = lose(bench, "a")
    [(_, change)] = await bench.run(plan(1, "a", "b", position=9, rewrite=True))
    assert change.outcome is Outcome.DONE
    assert await bench.texts() == ["a", "b"]
    manifest = await bench.manifest()
    assert (manifest.version, manifest.complete, manifest.position) == (1, True, "documents.v1-1:9")
    assert lost not in manifest.chunks
    assert len(change.added) == len(change.removed) == 2
    assert bench.embedder.texts == ["a", "b"]
    # The same record once more, and the next edit.
    [(_, again)] = await bench.run(plan(1, "a", "b", position=9, rewrite=True))
    assert (again.outcome, again.added) == (Outcome.DONE, change.added)
    await bench.run(plan(2, "b", "c", position=10))
    assert await bench.texts() == ["b", "c"]


@pytest.mark.parametrize("writes", range(8))
async def test_rewrite_that_is_stopped_before_any_write_is_made_good_when_it_arrives_again(bench, writes):
    await bench.run(plan(1, "a", "b", position=5))
    lose(bench, "a")

    async def stop():
        raise IndexUnavailable("stopped")

    bench.before_write = [None] * writes + [stop]
    with suppress(IndexUnavailable):
        await bench.run(plan(1, "a", "b", position=9, rewrite=True))
    bench.before_write = []
    # The whole log again, from its beginning.
    [(_, first)] = await bench.run(plan(1, "a", "b", position=5))
    was = (await bench.manifest()).position
    [(_, second)] = await bench.run(plan(1, "a", "b", position=9, rewrite=True))
    assert second.outcome is Outcome.DONE
    assert first.outcome is (Outcome.SUPERSEDED if was.endswith(":9") else Outcome.DONE)
    assert await bench.texts() == ["a", "b"]
    assert (await bench.manifest()).position == "documents.v1-1:9"


async def test_of_several_rewrites_the_last_remains_and_a_newer_version_supersedes_all(bench):
    await bench.run(plan(1, "a", position=5))
    await bench.run(plan(1, "a", position=9, rewrite=True))
    await bench.run(plan(1, "a", position=12, rewrite=True))
    [(_, earlier)] = await bench.run(plan(1, "a", position=9, rewrite=True))
    assert earlier.outcome is Outcome.SUPERSEDED
    assert (await bench.manifest()).position == "documents.v1-1:12"
    await bench.run(plan(2, deleted=True, position=13))
    [(_, late)] = await bench.run(plan(1, "a", position=14, rewrite=True))
    assert (late.outcome, late.reason) == (Outcome.SUPERSEDED, "version 1 is not newer than version 2")
    assert await bench.texts() == []


async def test_refused_version_is_taken_when_it_is_written_again(bench, monkeypatch):
    await bench.run(plan(1, "a"))
    with monkeypatch.context() as patched:
        patched.setattr(bench.index, "apply", bench.refuse)
        [(refusal, _)] = await bench.run(plan(2, "b"))
    assert isinstance(refusal, DeadLetter)
    [(_, change)] = await bench.run(plan(2, "b", position=9, rewrite=True))
    assert change.outcome is Outcome.DONE
    assert await bench.texts() == ["b"]


@pytest.mark.parametrize("vector", [np.ones(3, np.float32), np.full(DIMENSION, np.nan, np.float32)])
async def test_stored_vector_that_is_none_of_the_model_is_embedded_again(bench, vector):
    [one] = passages(["a"])
    await bench.index.store_vectors({f"{bench.embedder.model.fingerprint}:{one.text_sha256}": vector})
    [(outcome, _)] = await bench.run(plan(1, "a"))
    assert isinstance(outcome, Finished)
    assert bench.embedder.texts == ["a"]


async def test_plan_whose_passages_are_lost_is_a_dead_letter(bench):
    lost = plan(1).model_copy(update={"chunks_blob": ref_of(b"never stored")})
    [(outcome, change)] = await bench.run(lost)
    assert (outcome.kind, change.outcome) == ("content-lost", Outcome.DEAD_LETTER)


# Owners


async def test_an_event_of_another_connector_is_a_dead_letter_and_supersedes_nothing(bench):
    first = plan(1, "a", connector="first")
    second = plan(2, "b", connector="second")
    reported = await bench.run(first, second)
    assert [change.outcome for _, change in reported] == [Outcome.DONE, Outcome.DEAD_LETTER]
    assert reported[1][0].kind == "owned-by-other"
    for way in ("'first'", "--prefix", "--name", "--take-over"):
        assert way in reported[1][1].reason
    assert (await bench.texts(), (await bench.manifest()).connector) == (["a"], "first")
    reported = await bench.run(plan(3, deleted=True, connector="second"))
    assert (reported[0][1].outcome, await bench.texts()) == (Outcome.DEAD_LETTER, ["a"])
    # Again, as after a crash: the same.
    reported = await bench.run(first, second)
    assert [change.outcome for _, change in reported] == [Outcome.DONE, Outcome.DEAD_LETTER]


async def test_each_event_of_a_batch_meets_the_owner_that_those_before_it_left(bench):
    await bench.run(plan(1, "a", connector="first"))
    reported = await bench.run(
        plan(2, "b", connector="second", take_over=True), plan(3, "c", connector="second"), plan(4, "d")
    )
    assert [change.outcome for _, change in reported] == [Outcome.DONE] * 3
    assert (await bench.texts(), (await bench.manifest()).connector) == (["d"], None)


async def test_a_later_version_does_not_give_way_for_one_between_that_is_refused(bench):
    """Were the first superseded by the third unseen, the second would find no owner, and own the document."""
    reported = await bench.run(
        plan(1, "a", connector="first"),
        plan(2, "b", connector="second"),
        plan(3, "c", connector="first"),
        plan(4, "d", connector="first"),
    )
    assert [change.outcome for _, change in reported] == [
        Outcome.DONE,
        Outcome.DEAD_LETTER,
        Outcome.SUPERSEDED,
        Outcome.DONE,
    ]
    assert await bench.texts() == ["d"]


@pytest.mark.parametrize("fields", [{"connector": "first"}, {"connector": "second", "take_over": True}, {}])
async def test_who_may_change_an_owned_document(bench, fields):
    await bench.run(plan(1, "a", connector="first"))
    [(_, change)] = await bench.run(plan(2, "b", **fields))
    assert (change.outcome, (await bench.manifest()).connector) == (Outcome.DONE, fields.get("connector"))
    [(_, change)] = await bench.run(plan(3, deleted=True, **fields))
    assert (change.outcome, await bench.texts()) == (Outcome.DONE, [])
    # A deleted document has no owner.
    [(_, change)] = await bench.run(plan(4, "c", connector="third"))
    assert (change.outcome, (await bench.manifest()).connector) == (Outcome.DONE, "third")


async def test_events_of_two_connectors_are_both_prepared(prepare, blobs):
    await blobs.put(b"text")
    reported = await prepared(prepare, event(1, connector="first"), event(2, connector="second"), event(3))
    assert [plan.outcome for _, plan in reported] == [None, None, None]
