"""The contract of the store of webhooks and waiting messages, run on the twin and on an OpenSearch server."""

import asyncio

import pytest

from infra.opensearch.client import connect
from infra.opensearch.port import IndexUnavailable
from infra.opensearch.provision import create_indices
from infra.opensearch.webhooks import OpenSearchWebhooks
from infra.settings import OpenSearchSettings
from infra.webhooks.memory import MemoryWebhooks
from schemas.documents import Outcome
from schemas.names import Names
from schemas.webhooks import KeptWebhook, WaitingMessage


def webhook(number, **fields):
    return KeptWebhook(
        webhook_id=f"{number:016x}",
        tenant="acme",
        url="https://example.com/",
        secret="whsec_" + "a" * 32,
        outcomes=tuple(Outcome),
        created_ms=1_000.0 + number,
        **fields,
    )


def message(number, to=1):
    return WaitingMessage(
        webhook_id=f"{to:016x}", message_id=f"e{number}", body=f'{{"n":{number}}}', ended_ms=100.0 - number
    )


@pytest.fixture(params=["memory", pytest.param("opensearch", marks=pytest.mark.stack)])
def server(request):
    return None if request.param == "memory" else request.getfixturevalue("settings")


@pytest.fixture
async def store(server):
    if server is None:
        yield MemoryWebhooks()
        return
    await create_indices(server)
    client = connect(server.opensearch)
    try:
        yield OpenSearchWebhooks(client, server.names)
    finally:
        await client.close()


async def seen(store, count):
    """Waiting messages once ``count`` are searchable, which takes up to a second."""
    async with asyncio.timeout(10):
        while sum((await store.waiting()).values()) != count:  # noqa: ASYNC110 - the state is in a server
            await asyncio.sleep(0.05)
    return await store.waiting()


async def test_webhooks_are_listed_oldest_first(store):
    assert await store.webhooks() == []
    for number in (2, 1):
        await store.add(webhook(number, description=f"{number}"))
    assert list(await store.webhooks()) == [webhook(1, description="1"), webhook(2, description="2")]


async def test_concurrent_changes_are_all_kept(store):
    await store.add(webhook(1))

    def once_more(known):
        return known.model_copy(update={"failures": known.failures + 1})

    await asyncio.gather(*(store.change(webhook(1).webhook_id, once_more) for _ in range(8)))
    [found] = await store.webhooks()
    assert found.failures == 8
    assert await store.change(webhook(1).webhook_id, lambda _known: None) is None
    assert await store.change("f" * 16, once_more) is None


async def test_messages_wait_in_the_order_of_their_events_until_they_are_deleted(store):
    await store.keep([message(number) for number in range(4)])
    await store.keep([message(1), message(9, to=2)])
    assert await seen(store, 5) == {message(0).webhook_id: 4, message(9, to=2).webhook_id: 1}
    assert [one.message_id for one in await store.oldest(message(0).webhook_id, 3)] == ["e3", "e2", "e1"]
    await store.forget([message(3), message(2), message(7)])
    assert list(await store.oldest(message(0).webhook_id, 9)) == [message(1), message(0)]
    await store.keep([])
    await store.forget([])


async def test_deleting_a_webhook_deletes_its_waiting_messages(store):
    await store.add(webhook(1))
    await store.keep([message(0), message(1), message(2, to=2)])
    await seen(store, 3)
    await store.remove(webhook(1).webhook_id)
    assert await store.webhooks() == []
    assert await store.waiting() == {message(2, to=2).webhook_id: 1}
    await store.remove(webhook(1).webhook_id)


@pytest.mark.stack
async def test_the_store_is_empty_before_its_indices_exist(settings):
    client = connect(settings.opensearch)
    try:
        store = OpenSearchWebhooks(client, settings.names)
        assert (list(await store.webhooks()), dict(await store.waiting())) == ([], {})
    finally:
        await client.close()


async def test_an_unreachable_store_is_unavailable():
    unreachable = OpenSearchSettings(url="http://127.0.0.1:9", timeout_s=1)
    client = connect(unreachable)
    twin = MemoryWebhooks()
    twin.available = False
    try:
        for store in (OpenSearchWebhooks(client, Names("n")), twin):
            with pytest.raises(IndexUnavailable):
                await store.webhooks()
            with pytest.raises(IndexUnavailable):
                await store.keep([message(1)])
    finally:
        await client.close()
