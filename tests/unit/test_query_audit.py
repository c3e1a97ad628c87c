"""Audits of cache hits: sampling, verdicts, and staleness of invalidated answers."""

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
from query.operations.answer_records import AnswerRecords
from query.operations.auditor import QUEUE_SIZE, Auditor, AuditPolicy, ServedHit
from query.retrieval.fusion import FusedHit
from query.retrieval.retrieve import Retrieved
from query.telemetry.audit_verdicts import AuditVerdict, SourceChange, difference, evaluate
from query.telemetry.metrics import QueryMetrics
from schemas.documents import DocumentKey, EventStatus, Stage
from schemas.index import StoredChunk
from schemas.positions import Position
from schemas.search import Access, Candidates, Hit, HybridSearch

OLD, KEPT, NEW = ("old", 1), ("kept", 1), ("new", 2)
SERVED, FILLED_AT, AS_OF = (OLD, KEPT), {0: 10}, {0: 20, 1: 5}
SERVED_MS = 10_000.0


def change_of(source, *, added, offset, partition=0, searchable_ms=None):
    position = Position(partition, offset) if offset is not None else None
    return SourceChange(source, f"{source[0]}.md", added, position, searchable_ms)


def audited(fresh, *changes):
    return evaluate(SERVED, fresh, changes, as_of=AS_OF, filled_at=FILLED_AT, served_ms=SERVED_MS)


def test_equal_sources_are_the_same_and_another_order_is_drift():
    assert audited(SERVED).verdict is AuditVerdict.SAME
    assert audited((KEPT, OLD)).verdict is AuditVerdict.DRIFT


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (change_of(NEW, added=True, offset=10), AuditVerdict.DRIFT),
        (change_of(NEW, added=True, offset=11), AuditVerdict.VIOLATION),
        (change_of(NEW, added=True, offset=20), AuditVerdict.VIOLATION),
        (change_of(NEW, added=True, offset=21), AuditVerdict.NEWER),
        (change_of(NEW, added=True, offset=5, partition=1), AuditVerdict.VIOLATION),
        (change_of(NEW, added=True, offset=6, partition=1), AuditVerdict.NEWER),
        (change_of(NEW, added=True, offset=0, partition=2), AuditVerdict.NEWER),
        # A passage removed before the fill cannot be among its sources.
        (change_of(OLD, added=False, offset=9), AuditVerdict.VIOLATION),
        (change_of(OLD, added=False, offset=20), AuditVerdict.VIOLATION),
        (change_of(OLD, added=False, offset=21), AuditVerdict.NEWER),
        (change_of(OLD, added=False, offset=None), AuditVerdict.VIOLATION),
    ],
)
def test_positions_decide_which_changes_an_answer_must_reflect(change, verdict):
    result = audited((NEW, KEPT), change)
    assert result.verdict is verdict
    assert result.changes == (() if verdict is AuditVerdict.DRIFT else (change,))


def test_a_passage_that_only_ranks_lower_is_drift():
    assert difference(SERVED, (NEW, KEPT)) == ([OLD], [NEW])
    assert audited((NEW, KEPT), change_of(NEW, added=True, offset=3)).verdict is AuditVerdict.DRIFT


def test_a_violation_outweighs_newer_changes_and_determines_the_staleness():
    newer = change_of(NEW, added=True, offset=21, searchable_ms=1_000.0)
    violation = change_of(OLD, added=False, offset=15, searchable_ms=SERVED_MS - 300)
    result = audited((NEW, KEPT), newer, violation)
    assert (result.verdict, result.changes, result.staleness_ms) == (AuditVerdict.VIOLATION, (violation,), 300.0)


def test_a_change_searchable_after_the_response_does_not_make_it_stale():
    result = audited((NEW, KEPT), change_of(NEW, added=True, offset=21, searchable_ms=SERVED_MS + 1))
    assert (result.verdict, result.staleness_ms) == (AuditVerdict.NEWER, None)


class NoCapacity:
    has_spare_capacity = False


def auditor_of(metrics, cache=None, states=None, *, sample_rate=1.0, **collaborators):
    cache = cache or MemoryAnswerCache()
    defaults = {"index": None, "retrieval": NoCapacity()}
    return Auditor(
        AuditPolicy(sample_rate, per_s=1_000.0),
        records=AnswerRecords(cache, cache, states),
        metrics=metrics,
        **(defaults | collaborators),
    )


def test_the_sample_rate_holds():
    registry = CollectorRegistry()
    auditor = auditor_of(QueryMetrics(registry), sample_rate=0.1, rng=random.Random(7))
    for _ in range(10_000):
        auditor.on_hit("acme", "k", b"", {})
    skipped = registry.get_sample_value("freshline_audits_skipped_total", {"reason": "queue_full"})
    assert QUEUE_SIZE + skipped == pytest.approx(1_000, rel=0.1)


def test_a_sample_rate_of_zero_samples_nothing():
    auditor = auditor_of(QueryMetrics(CollectorRegistry()), sample_rate=0.0)
    for _ in range(1_000):
        auditor.on_hit("acme", "k", b"", {})
    assert auditor._queue.empty()


async def test_audits_are_skipped_without_spare_capacity():
    registry = CollectorRegistry()
    auditor = auditor_of(QueryMetrics(registry))
    auditor.on_hit("acme", "k", b"", {})
    running = asyncio.create_task(auditor.run())
    async with asyncio.timeout(10):
        while not registry.get_sample_value("freshline_audits_skipped_total", {"reason": "busy"}):  # noqa: ASYNC110
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize(("stale_ms", "violations"), [(400.0, 0.0), (1_600.0, 1.0)])
async def test_the_staleness_of_an_invalidated_answer_is_bounded_by_the_events_that_invalidated_it(
    stale_ms, violations
):
    registry, cache, states = CollectorRegistry(), MemoryAnswerCache(), MemoryEventStates()
    key, tenant = "0" * 32, "acme"
    epoch = (await cache.lookup(tenant, key)).epoch
    assert await cache.store(tenant, key, b"entry", epoch=epoch, ttl_s=60)
    await cache.append(tenant, 0, {0: 1}, b"change")
    pending = await cache.pending(tenant, 0, after_epoch=-1, after_fill=0)
    reason = orjson.dumps({"events": ["e1"], "documents": ["a.md"]})
    assert await cache.commit(
        tenant, 0, evaluated=pending.evaluated, epoch=pending.epoch, drop=[(pending.fills[0][0], key)], reason=reason
    )
    [drop] = await cache.drops(tenant, 0, key)
    searchable_ms, served_ms = drop.at_ms - 2_000.0, drop.at_ms - 2_000.0 + stale_ms
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
    result = await auditor.audit(ServedHit(tenant, key, b"body", {0: 0}, served_ms))
    assert result.verdict is AuditVerdict.GONE
    assert result.staleness_ms == pytest.approx(stale_ms)
    assert registry.get_sample_value("freshline_audited_slo_violations_total") == violations
    assert registry.get_sample_value("freshline_audited_staleness_seconds_count") == 1


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


class ApproximateRetrieval:
    """Returns a passage added since the fill; ``exactly`` for exact searches."""

    def __init__(self, search, exactly):
        self.search = search
        self.exactly = exactly

    async def retrieve(self, _text, _access, *, exact=False, **_how):
        sources = self.exactly if exact else (NEW, KEPT)
        hits = tuple(Hit(chunk_id, DocumentKey("acme", f"{chunk_id}.md"), 1.0) for chunk_id, _ in sources)
        passages = tuple((FusedHit(hit, 1.0, 1, 1), chunk(source)) for hit, source in zip(hits, sources, strict=True))
        return Retrieved(self.search, Candidates(hits, hits), passages)


@pytest.mark.parametrize(("exactly", "verdict"), [(SERVED, AuditVerdict.SAME), ((NEW, KEPT), AuditVerdict.VIOLATION)])
async def test_a_violation_is_confirmed_by_an_exact_search(exactly, verdict):
    cache, key = MemoryAnswerCache(), "0" * 32
    search = HybridSearch("hotel", np.ones(2, dtype=np.float32), Access("acme"), 5)
    window = tuple(Hit(chunk_id, DocumentKey("acme", f"{chunk_id}.md"), 1.0) for chunk_id, _ in SERVED)
    entry = Entry(
        response=b"body",
        search=search,
        top_k=2,
        sources=SERVED,
        vector_candidates=window,
        lexical_candidates=window,
        filled_ms=0,
        positions=FILLED_AT,
    )
    first, evidence = entry.encode()
    epoch = (await cache.lookup("acme", key)).epoch
    assert await cache.store("acme", key, first, epoch=epoch, ttl_s=60, evidence=evidence)
    auditor = auditor_of(
        QueryMetrics(CollectorRegistry()), cache, retrieval=ApproximateRetrieval(search, exactly), index=MemoryIndex(2)
    )
    result = await auditor.audit(ServedHit("acme", key, b"body", AS_OF, SERVED_MS))
    assert result.verdict is verdict
