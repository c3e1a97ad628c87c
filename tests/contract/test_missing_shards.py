"""A search with unassigned shards is unavailable, although OpenSearch returns no error for it."""

import httpx
import pytest
from index_servers import DIMENSION, small

from infra.opensearch.client import connect
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.index_bodies import chunks_index_body
from infra.opensearch.port import IndexUnavailable
from infra.opensearch.provision import create_indices
from infra.opensearch.terms import OpenSearchTerms
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.search import Access, HybridSearch

pytestmark = pytest.mark.stack

SHARDS = 4


@pytest.fixture
async def half(settings: Settings):
    """Settings of an index of which only half of the shards are assigned."""
    settings_of_half = small(settings)
    name = settings_of_half.names.chunks_index(settings_of_half.generation)
    layout = chunks_index_body(
        shards=SHARDS, replicas=0, dimension=DIMENSION, engine=settings_of_half.opensearch.engine
    )
    layout["settings"]["index"]["routing.allocation.total_shards_per_node"] = SHARDS // 2
    async with httpx.AsyncClient(base_url=settings_of_half.opensearch.url, timeout=30) as client:
        (await client.put(f"/{name}", json=layout, params={"wait_for_active_shards": 0})).raise_for_status()
        await create_indices(settings_of_half)
        assigned = {"wait_for_active_shards": SHARDS // 2, "wait_for_no_initializing_shards": "true"}
        (await client.get(f"/_cluster/health/{name}", params=assigned)).raise_for_status()
    return settings_of_half


async def test_a_search_with_missing_shards_is_unavailable(half):
    index = OpenSearchIndex.open(half)
    try:
        vector = [1.0] + [0.0] * (DIMENSION - 1)
        with pytest.raises(IndexUnavailable, match="shards"):
            await index.search([HybridSearch("hotel", vector, Access("acme"), 10)])
        with pytest.raises(IndexUnavailable):
            [_ async for _ in index.scan_chunks()]
    finally:
        await index.close()


async def test_reads_of_a_document_are_unavailable_if_its_shard_is_missing(half):
    """Documents on assigned shards are readable."""
    index = OpenSearchIndex.open(half)
    client = connect(half.opensearch)
    try:
        terms = OpenSearchTerms(client, half)
        unavailable = dict.fromkeys(range(40), 0)
        for number in unavailable:
            key = DocumentKey("acme", f"{number}.md")
            for read in (index.chunk_ids, terms.chunk_ids, index.count_chunks):
                try:
                    assert not await read(key)
                except IndexUnavailable:
                    unavailable[number] += 1
        assert set(unavailable.values()) == {0, 3}
    finally:
        await index.close()
        await client.close()
