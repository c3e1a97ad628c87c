"""Where a shard has no copy that can be asked, nothing found is no answer: OpenSearch does not call that a failure."""

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
    """Settings of an index of which only half of the shards find a node to be on."""
    told = small(settings)
    name = told.names.chunks_index(told.generation)
    layout = chunks_index_body(shards=SHARDS, replicas=0, dimension=DIMENSION, engine=told.opensearch.engine)
    layout["settings"]["index"]["routing.allocation.total_shards_per_node"] = SHARDS // 2
    async with httpx.AsyncClient(base_url=told.opensearch.url, timeout=30) as client:
        (await client.put(f"/{name}", json=layout, params={"wait_for_active_shards": 0})).raise_for_status()
        await create_indices(told)
        there = {"wait_for_active_shards": SHARDS // 2, "wait_for_no_initializing_shards": "true"}
        (await client.get(f"/_cluster/health/{name}", params=there)).raise_for_status()
    return told


async def test_a_search_is_refused(half):
    index = OpenSearchIndex.open(half)
    try:
        vector = [1.0] + [0.0] * (DIMENSION - 1)
        with pytest.raises(IndexUnavailable, match="shards"):
            await index.search([HybridSearch("hotel", vector, Access("acme"), 10)])
        with pytest.raises(IndexUnavailable):
            [_ async for _ in index.scan_chunks()]
    finally:
        await index.close()


async def test_what_is_read_of_one_document_is_refused_where_its_shard_is_missing(half):
    """And answered where it is there."""
    index = OpenSearchIndex.open(half)
    client = connect(half.opensearch)
    try:
        terms = OpenSearchTerms(client, half)
        refused = dict.fromkeys(range(40), 0)
        for number in refused:
            key = DocumentKey("acme", f"{number}.md")
            for read in (index.chunk_ids, terms.chunk_ids, index.count_chunks):
                try:
                    assert not await read(key)
                except IndexUnavailable:
                    refused[number] += 1
        assert set(refused.values()) == {0, 3}
    finally:
        await index.close()
        await client.close()
