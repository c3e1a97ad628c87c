"""The contract of the API key store, run on the twin and on an OpenSearch server."""

import asyncio

import pytest

from infra.credentials.api_keys import ID_BYTES, SECRET_BYTES, issue, revoked
from infra.credentials.memory_keys import MemoryKeys
from infra.credentials.port import CredentialsUnavailable
from infra.opensearch.client import connect
from infra.opensearch.keys import OpenSearchKeys
from infra.opensearch.provision import create_keys_index
from schemas.credentials import Scope


@pytest.fixture
async def opensearch_keys(settings):
    client = connect(settings.opensearch)
    store = OpenSearchKeys(client, settings.names)
    assert await store.keys() == []  # before there is an index
    await create_keys_index(settings)
    await create_keys_index(settings)
    yield store
    await client.close()


@pytest.fixture(params=["memory", pytest.param("opensearch", marks=pytest.mark.stack)])
def store(request):
    return MemoryKeys() if request.param == "memory" else request.getfixturevalue("opensearch_keys")


def key(number: int):
    return issue(
        number.to_bytes(ID_BYTES + SECRET_BYTES, "little"),
        label=f"number {number}",
        tenant="acme",
        groups=("staff",),
        scopes=(Scope.QUERY, Scope.ADMIN),
        now_ms=float(number),
        expires_ms=None,
    )[0]


async def test_an_added_key_is_readable_immediately(store):
    keys = [key(number) for number in range(1, 4)]
    for one in reversed(keys):
        await store.add(one)
        assert one in await store.keys()
    assert await store.keys() == keys


async def test_a_change_replaces_the_key(store):
    await store.add(key(1))
    ended = await store.change(key(1).key_id, lambda one: revoked(one, now_ms=7))
    assert ended == revoked(key(1), now_ms=7)
    assert await store.keys() == [ended]


async def test_an_unknown_key_is_not_changed(store):
    assert await store.change("0" * 16, lambda one: one) is None


async def test_concurrent_changes_are_all_kept(store):
    await store.add(key(1))

    async def append(mark):
        await store.change(key(1).key_id, lambda one: one.model_copy(update={"groups": (*one.groups, mark)}))

    marks = [f"g{number}" for number in range(8)]
    await asyncio.gather(*(append(mark) for mark in marks))
    [changed] = await store.keys()
    assert set(changed.groups) == {"staff", *marks}


@pytest.mark.stack
async def test_keys_are_read_over_several_pages(settings):
    await create_keys_index(settings)
    client = connect(settings.opensearch)
    try:
        lines = []
        for number in range(1, 1_203):
            one = key(number)
            body = {"key_id": one.key_id, "created_ms": 1.0, "key": one.model_dump(mode="json")}
            lines += [{"create": {"_id": one.key_id}}, body]
        await client.bulk(index=settings.names.keys_index, body=lines, params={"refresh": "true"})
        assert len({one.key_id for one in await OpenSearchKeys(client, settings.names).keys()}) == 1_202
    finally:
        await client.close()


@pytest.mark.stack
async def test_an_unreachable_cluster_is_unavailable(settings):
    client = connect(settings.opensearch.model_copy(update={"url": "http://127.0.0.1:1"}))
    store = OpenSearchKeys(client, settings.names)
    try:
        for call in (store.keys(), store.add(key(1)), store.change("0" * 16, lambda one: one)):
            with pytest.raises(CredentialsUnavailable):
                await call
    finally:
        await client.close()
