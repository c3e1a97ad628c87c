"""What a second look at a cached answer says, which hits get one, and what is told of those that are gone."""

import asyncio
import random

import numpy as np
import orjson
import pytest
from prometheus_client import CollectorRegistry

from infra.opensearch.memory import MemoryIndex
from infra.redis.entry import Entry
from infra.redis.memory_answers import MemoryAnswerCache
from infra.redis.memory_states import MemoryEventStates
from infra.redis.port import Progress
from query.operations.auditor import WAITING, Auditor, Seen
from query.retrieval.fusion import Candidate
from query.retrieval.retrieve import Retrieved
from query.telemetry.audit_verdicts import Altered, Verdict, difference, judged
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey, EventStatus, Stage
from schemas.index import StoredChunk
from schemas.positions import Position
from schemas.search import Access, Hit, HybridSearch, Windows

OLD, KEPT, NEW = ("old", 1), ("kept", 1), ("new", 2)
SERVED, FILLED_AT, AS_OF = (OLD, KEPT), {0: 10}, {0: 20, 1: 5}
SERVED_MS = 10_000.0


def altered(source, *, added, offset, partition=0, searchable_ms=None):
    position = Position(partition, offset) if offset is not None else None
    return Altered(source, f"{source[0]}.md", added, position, searchable_ms)


def look(fresh, *changes):
    return judged(SERVED, fresh, changes, as_of=AS_OF, filled_at=FILLED_AT, served_ms=SERVED_MS)


def test_the_same_sources_are_the_same_and_their_order_is_drift():
    assert look(SERVED).verdict is Verdict.SAME
    assert look((KEPT, OLD)).verdict is Verdict.DRIFT


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (altered(NEW, added=True, offset=10), Verdict.DRIFT),
        (altered(NEW, added=True, offset=11), Verdict.VIOLATION),
        (altered(NEW, added=True, offset=20), Verdict.VIOLATION),
        (altered(NEW, added=True, offset=21), Verdict.NEWER),
        (altered(NEW, added=True, offset=5, partition=1), Verdict.VIOLATION),
        (altered(NEW, added=True, offset=6, partition=1), Verdict.NEWER),
        (altered(NEW, added=True, offset=0, partition=2), Verdict.NEWER),
        # What was gone before the fill cannot have been found by it.
        (altered(OLD, added=False, offset=9), Verdict.VIOLATION),
        (altered(OLD, added=False, offset=20), Verdict.VIOLATION),
        (altered(OLD, added=False, offset=21), Verdict.NEWER),
        (altered(OLD, added=False, offset=None), Verdict.VIOLATION),
    ],
)
def test_positions_tell_what_an_answer_should_have_known(change, verdict):
    finding = look((NEW, KEPT), change)
    assert finding.verdict is verdict
    assert finding.because == (() if verdict is Verdict.DRIFT else (change,))


def test_a_passage_that_only_lost_its_place_is_drift():
    assert difference(SERVED, (NEW, KEPT)) == ([OLD], [NEW])
    assert look((NEW, KEPT), altered(NEW, added=True, offset=3)).verdict is Verdict.DRIFT


def test_one_violation_outweighs_what_is_newer_and_counts_from_its_own_moment():
    newer = altered(NEW, added=True, offset=21, searchable_ms=1_000.0)
    violation = altered(OLD, added=False, offset=15, searchable_ms=SERVED_MS - 300)
    finding = look((NEW, KEPT), newer, violation)
    assert (finding.verdict, finding.because, finding.stale_ms) == (Verdict.VIOLATION, (violation,), 300.0)


def test_what_became_searchable_after_the_answer_went_out_made_nothing_stale():
    finding = look((NEW, KEPT), altered(NEW, added=True, offset=21, searchable_ms=SERVED_MS + 1))
    assert (finding.verdict, finding.stale_ms) == (Verdict.NEWER, None)


class NoRoom:
    has_room = False


def auditor_of(metrics, cache=None, states=None, **given):
    cache = cache or MemoryAnswerCache()
    parts = {"index": None, "retrieval": NoRoom(), "states": states, "metrics": metrics}
    return Auditor(**{"share": 1.0, "per_s": 1_000.0, "cache": cache, "slices": cache} | parts | given)


def test_as_many_hits_are_drawn_as_the_share_says():
    registry = CollectorRegistry()
    auditor = auditor_of(QueryMetrics(registry), share=0.1, rng=random.Random(7))
    for _ in range(10_000):
        auditor.saw("acme", "k", b"", {})
    let_go = registry.get_sample_value("freshline_audits_skipped_total", {"reason": "full"})
    assert WAITING + let_go == pytest.approx(1_000, rel=0.1)


def test_a_share_of_none_draws_none():
    auditor = auditor_of(QueryMetrics(CollectorRegistry()), share=0.0)
    for _ in range(1_000):
        auditor.saw("acme", "k", b"", {})
    assert auditor._waiting.empty()


async def test_while_the_index_is_busy_nothing_is_asked_of_it():
    registry = CollectorRegistry()
    auditor = auditor_of(QueryMetrics(registry))
    auditor.saw("acme", "k", b"", {})
    running = asyncio.create_task(auditor.run())
    async with asyncio.timeout(10):
        while not registry.get_sample_value("freshline_audits_skipped_total", {"reason": "busy"}):  # noqa: ASYNC110
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize(("late_ms", "past"), [(400.0, 0.0), (1_600.0, 1.0)])
async def test_an_answer_that_is_gone_is_judged_by_the_events_that_dropped_it(late_ms, past):
    registry, cache, states = CollectorRegistry(), MemoryAnswerCache(), MemoryEventStates()
    key, tenant = "0" * 32, "acme"
    epoch = (await cache.lookup(tenant, key)).epoch
    assert await cache.store(tenant, key, b"entry", epoch=epoch, ttl_s=60)
    await cache.append(tenant, 0, {0: 1}, b"change")
    pending = await cache.pending(tenant, 0, known=-1, fill=0)
    why = orjson.dumps({"events": ["e1"], "documents": ["a.md"]})
    assert await cache.settle(
        tenant, 0, judged=pending.judged, epoch=pending.epoch, drop=[(pending.fills[0][0], key)], why=why
    )
    [drop] = await cache.drops(tenant, 0, key)
    searchable_ms, served_ms = drop.at_ms - 2_000.0, drop.at_ms - 2_000.0 + late_ms
    status = EventStatus(
        event_id="e1",
        document_id="a.md",
        version=1,
        position="documents.v1-0:1",
        stage=Stage.ACCEPTED,
        outcome=None,
        reason=None,
        accepted_ms=searchable_ms - 50,
        stages_ms={},
    )
    await states.begin(tenant, status)
    await states.advance([Progress(tenant, "e1", Stage.SEARCHABLE, searchable_ms)])
    auditor = auditor_of(QueryMetrics(registry), cache, states)
    finding = await auditor.audit(Seen(tenant, key, b"body", {0: 0}, served_ms))
    assert finding.verdict is Verdict.GONE
    assert finding.stale_ms == pytest.approx(late_ms)
    assert registry.get_sample_value("freshline_audited_past_objective_total") == past
    assert registry.get_sample_value("freshline_audited_stale_seconds_count") == 1


def chunk(source):
    chunk_id, version = source
    return StoredChunk(
        chunk_id=chunk_id,
        tenant="acme",
        document_id=f"{chunk_id}.md",
        version=version,
        position="documents.v1-0:15",
        text="",
        text_sha256="",
        start=0,
        end=0,
    )


class Walks:
    """Finds what came since the fill, unless every passage is scored: then ``exactly``."""

    def __init__(self, search, exactly):
        self.search = search
        self.exactly = exactly

    async def retrieve(self, _text, _access, *, exact=False, **_how):
        sources = self.exactly if exact else (NEW, KEPT)
        hits = tuple(Hit(chunk_id, DocumentKey("acme", f"{chunk_id}.md"), 1.0) for chunk_id, _ in sources)
        passages = tuple((Candidate(hit, 1.0, 1, 1), chunk(source)) for hit, source in zip(hits, sources, strict=True))
        return Retrieved(self.search, Windows(hits, hits), passages)


@pytest.mark.parametrize(("exactly", "verdict"), [(SERVED, Verdict.SAME), ((NEW, KEPT), Verdict.VIOLATION)])
async def test_an_answer_is_stale_only_if_an_exact_search_says_so_too(exactly, verdict):
    cache, key = MemoryAnswerCache(), "0" * 32
    search = HybridSearch("hotel", np.ones(2, dtype=np.float32), Access("acme"), 5)
    window = tuple(Hit(chunk_id, DocumentKey("acme", f"{chunk_id}.md"), 1.0) for chunk_id, _ in SERVED)
    entry = Entry(
        response=b"body",
        search=search,
        top_k=2,
        sources=SERVED,
        vector_window=window,
        lexical_window=window,
        filled_ms=0,
        positions=FILLED_AT,
    )
    first, rest = entry.encode()
    epoch = (await cache.lookup("acme", key)).epoch
    assert await cache.store("acme", key, first, epoch=epoch, ttl_s=60, rest=rest)
    auditor = auditor_of(
        QueryMetrics(CollectorRegistry()), cache, retrieval=Walks(search, exactly), index=MemoryIndex(2)
    )
    finding = await auditor.audit(Seen("acme", key, b"body", AS_OF, SERVED_MS))
    assert finding.verdict is verdict
