"""Creation and deletion of indices. An alias selects the serving generation."""

from typing import Any

from opensearchpy import AsyncOpenSearch
from opensearchpy.exceptions import RequestError

from infra.opensearch.client import connect, opensearch_errors
from infra.opensearch.index_bodies import (
    chunks_index_body,
    keys_index_body,
    manifests_index_body,
    vectors_index_body,
    waiting_index_body,
    webhooks_index_body,
)
from infra.settings import Settings
from schemas.index import LAYOUT, MANIFESTS_REFRESH


class IndexMismatch(Exception):
    """An existing index has another layout than configured."""


async def create_indices(settings: Settings) -> None:
    """Create missing indices of the configured generation. Without a serving generation, this one becomes it.

    Raises:
        IndexMismatch: the chunk index has another layout, or vectors of another length.
    """
    names, opensearch = settings.names, settings.opensearch
    chunks, manifests = names.chunks_index(settings.generation), names.manifests_index(settings.generation)
    dimension = settings.embedding.dimension
    layout = chunks_index_body(
        shards=opensearch.shards, replicas=opensearch.replicas, dimension=dimension, engine=opensearch.engine
    )
    client = connect(opensearch)
    try:
        with opensearch_errors():
            await _create(client, manifests, manifests_index_body(replicas=opensearch.replicas))
            # An existing index may be of a release with a longer refresh interval.
            await client.indices.put_settings(index=manifests, body={"index": {"refresh_interval": MANIFESTS_REFRESH}})
            # It may also lack fields by which documents are listed.
            await client.indices.put_mapping(
                index=manifests, body={"properties": manifests_index_body(replicas=0)["mappings"]["properties"]}
            )
            await _create(client, names.vectors_index, vectors_index_body(replicas=opensearch.replicas))
            await _create(client, names.keys_index, keys_index_body(replicas=opensearch.replicas))
            await _create(client, names.webhooks_index, webhooks_index_body(replicas=opensearch.replicas))
            await _create(client, names.waiting_index, waiting_index_body(replicas=opensearch.replicas))
            await _create(client, chunks, layout)
            mappings = (await client.indices.get_mapping(index=chunks))[chunks]["mappings"]
            if (laid_out := mappings.get("_meta", {}).get("layout")) != LAYOUT:
                raise IndexMismatch(
                    f"{chunks} has layout {laid_out}, this release requires {LAYOUT}: build a new generation "
                    "(FRESHLINE_GENERATION) by a replay, or start with an empty data directory"
                )
            found = mappings["properties"]["vector"]["dimension"]
            if found != dimension:
                raise IndexMismatch(
                    f"{chunks} has vectors of length {found}, the model produces {dimension}: "
                    "build a new generation (FRESHLINE_GENERATION) by a replay"
                )
            if not await client.indices.exists_alias(name=names.chunks_alias):
                await client.indices.put_alias(index=chunks, name=names.chunks_alias)
    finally:
        await client.close()


async def create_keys_index(settings: Settings) -> None:
    """Create the index of API keys if missing: keys may be issued before the first worker runs."""
    client = connect(settings.opensearch)
    try:
        with opensearch_errors():
            await _create(client, settings.names.keys_index, keys_index_body(replicas=settings.opensearch.replicas))
    finally:
        await client.close()


async def delete_indices(settings: Settings) -> None:
    """Delete all indices of the namespace."""
    names = settings.names
    client = connect(settings.opensearch)
    try:
        with opensearch_errors():
            present = await client.indices.get(index=f"{names.namespace}-*", params={"expand_wildcards": "all"})
            for name in filter(names.owns_index, present):
                await client.indices.delete(index=name)
    finally:
        await client.close()


async def _create(client: AsyncOpenSearch, name: str, body: dict[str, Any]) -> None:
    try:
        await client.indices.create(index=name, body=body)
    except RequestError as error:
        if error.error != "resource_already_exists_exception":
            raise
