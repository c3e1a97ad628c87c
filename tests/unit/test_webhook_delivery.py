"""Webhooks: signatures, permitted addresses, health, and delivery at least once."""

import asyncio
import ipaddress
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from infra.opensearch.port import IndexUnavailable
from infra.settings import WebhookSettings
from infra.webhooks.memory import MemoryWebhooks
from infra.webhooks.port import NotDelivered
from infra.webhooks.signing import key_of, made_secret, signed
from infra.webhooks.targets import TargetRefused, checked_url, permitted
from schemas.documents import EventStatus, Outcome, Stage
from schemas.events import EventEnded
from schemas.webhooks import KeptWebhook, WebhookState
from streams.core import webhook_health
from streams.core.outcomes import Finished
from streams.runner import Task
from streams.steps.notify import Notify
from streams.webhook_delivery import PARALLEL, WebhookDelivery
from streams.webhook_retries import BATCH, WebhookRetries

SECRET = made_secret(bytes(range(32)))
SETTINGS = WebhookSettings(
    refresh_s=0, receiver_wait_s=0.05, timeout_s=5, retry_first_s=1, retry_max_s=60, disable_after_s=600, max_pending=20
)
DOCS = Path(__file__).parents[2] / "docs"


# Signatures


def test_signatures_are_those_of_the_standard():
    # The example of https://github.com/standard-webhooks/standard-webhooks, whose key is in its specification.
    secret, body = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_!!!", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_"), SECRET * 2]
)
def test_what_is_no_secret_is_refused_without_being_reported(secret):
    with pytest.raises(ValueError, match="whsec_ and 24 to 64 bytes") as refused:
        key_of(secret)
    assert not secret or secret == "whsec_" or secret not in str(refused.value)


def is_genuine(*request):
    """The lines that the documentation gives to receivers."""
    [code] = re.findall(r"```python\n(.*?)```", (DOCS / "webhooks.md").read_text(encoding="utf-8"), re.DOTALL)
    reported: dict = {}
    exec(code, reported)
    return reported["is_genuine"](*request)


def test_the_documented_lines_report_genuine_messages_from_others(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1_000_000.0)
    body = b'{"type":"event.done"}'
    headers = dict(signed(SECRET, "e1", 1_000_000, body))
    assert is_genuine(SECRET, headers, body)
    assert not is_genuine(SECRET, headers, body + b" ")
    assert not is_genuine(made_secret(bytes(32)), headers, body)
    assert not is_genuine(SECRET, headers | {"webhook-id": "e2"}, body)
    assert not is_genuine(SECRET, headers | {"webhook-timestamp": "1000001"}, body)
    old = dict(signed(SECRET, "e1", 1_000_000 - 400, body))
    assert not is_genuine(SECRET, old, body)
    assert is_genuine(SECRET, headers | {"webhook-signature": f"v1,other {headers['webhook-signature']}"}, body)


# Where they may lead


@pytest.mark.parametrize(
    ("url", "targets"),
    [
        ("https://example.com/hook?x=1", "public"),
        ("https://example.com:8443/hook", "public"),
        ("https://8.8.8.8/", "public"),
        ("https://10.0.0.7/", "private"),
        ("https://[fd00::1]/", "private"),
        ("http://localhost:9000/", "local"),
        ("http://127.0.0.1:9000/", "local"),
        ("http://[::1]:9000/", "local"),
    ],
)
def test_a_webhook_may_lead_there(url, targets):
    assert checked_url(url, targets).host


@pytest.mark.parametrize(
    ("url", "targets"),
    [
        ("", "local"),
        ("example.com", "local"),
        ("https://", "local"),
        ("ftp://example.com", "local"),
        ("https://user:secret@example.com/", "local"),
        ("https://example.com/#part", "local"),
        ("http://example.com/", "local"),
        ("http://10.0.0.7/", "local"),
        ("http://localhost/", "private"),
        ("https://localhost/", "public"),
        ("https://127.0.0.1/", "private"),
        ("https://10.0.0.7/", "public"),
        ("https://169.254.169.254/latest/meta-data/", "local"),
        ("https://[fe80::1]/", "local"),
        ("https://[::ffff:127.0.0.1]/", "private"),
        ("https://[64:ff9b::7f00:1]/", "private"),
        ("https://[2002:7f00:1::]/", "private"),
        ("https://0.0.0.0/", "local"),
    ],
)
def test_a_webhook_may_not_lead_there(url, targets):
    with pytest.raises(TargetRefused):
        checked_url(url, targets)


def test_names_are_evaluated_by_the_addresses_that_they_lead_to():
    assert permitted(ipaddress.ip_address("93.184.216.34"), "public")
    for address in ("10.1.2.3", "192.168.0.1", "127.0.0.1", "::1", "169.254.169.254", "fd00::1", "224.0.0.1"):
        assert not permitted(ipaddress.ip_address(address), "public")


# How they are doing


def webhook(number=0, tenant="acme", **reported):
    return KeptWebhook(
        webhook_id=f"{number:016x}",
        tenant=tenant,
        url="https://example.com/",
        secret=SECRET,
        outcomes=reported.pop("outcomes", tuple(Outcome)),
        created_ms=number,
        **reported,
    )


def test_a_secret_is_not_reported_by_accident():
    assert SECRET not in repr(webhook())
    assert SECRET not in webhook().shown(0).model_dump_json()


def test_pauses_double_up_to_a_bound():
    pauses = [webhook_health.pause_ms(count, first_ms=1_000, longest_ms=10_000, jitter=1) for count in range(1, 7)]
    assert pauses == [1_000, 2_000, 4_000, 8_000, 10_000, 10_000]
    assert webhook_health.pause_ms(10_000, first_ms=1_000, longest_ms=10_000, jitter=0.5) == 5_000


def test_a_webhook_fails_recovers_and_is_given_up():
    def failing(one, now_ms):
        return webhook_health.failed(
            one, "the receiver responded with 500", now_ms=now_ms, pause_ms=1_000, give_up_ms=60_000
        )

    first = failing(webhook(), 1_000)
    assert (first.state, first.failures, first.next_try_ms) == (WebhookState.FAILING, 1, 2_000)
    assert not webhook_health.is_due(first, now_ms=1_999)
    assert webhook_health.is_due(first, now_ms=2_000)
    assert webhook_health.delivered(first) == webhook()
    later = failing(first, 61_000)
    assert (later.state, later.next_try_ms) == (WebhookState.DISABLED, None)
    assert not webhook_health.is_due(later, now_ms=10**9)
    gone = webhook_health.failed(webhook(), "410", now_ms=1, pause_ms=1, give_up_ms=60_000, is_gone=True)
    assert gone.state is WebhookState.DISABLED


# Delivery


class Receivers:
    """Receivers by webhook id: what they have taken, and what is wrong with them."""

    def __init__(self):
        self.taken: dict[str, list[str]] = {}
        self.wrong: dict[str, NotDelivered] = {}
        self.slow: dict[str, asyncio.Event] = {}
        self.requests = 0
        self.at_a_time = self.most = 0

    async def send(self, one, message):
        self.requests += 1
        self.at_a_time += 1
        self.most = max(self.most, self.at_a_time)
        await asyncio.sleep(0)
        self.at_a_time -= 1
        if one.webhook_id in self.slow:
            await self.slow[one.webhook_id].wait()
        if one.webhook_id in self.wrong:
            return self.wrong[one.webhook_id]
        self.taken.setdefault(one.webhook_id, []).append(message.message_id)
        return None


class World:
    def __init__(self, *webhooks):
        self.store, self.receivers, self.now_ms = MemoryWebhooks(), Receivers(), 1_000_000.0
        self.store._webhooks = {one.webhook_id: one for one in webhooks}
        self.counted: dict[str, int] = {}
        self.sender = WebhookDelivery(self.store, self.receivers, SETTINGS, self._count, now_ms=lambda: self.now_ms)
        self.step, self.redelivery = Notify(self.sender), WebhookRetries(self.sender)

    def _count(self, result, count):
        self.counted[result] = self.counted.get(result, 0) + count

    async def report(self, *ends):
        tasks = [Task(end, 0, at, None) for at, end in enumerate(ends)]
        return [outcome async for some in self.step.run(tasks) for outcome in some]

    async def lookup(self):
        await self.redelivery.start_due()
        await self.redelivery.wait()

    def state(self, number=0):
        return self.store._webhooks[f"{number:016x}"].state


def end(number, tenant="acme", outcome=Outcome.DONE):
    status = EventStatus(
        event_id=f"e{number}",
        document_id="travel.md",
        version=number,
        position=f"documents.v1-0:{number}",
        stage=Stage.PURGED,
        outcome=outcome,
        accepted_ms=1_000.0 * number,
        stages_ms={Stage.ACCEPTED: 0.0, Stage.PURGED: 125.0},
    )
    return EventEnded(tenant=tenant, status=status)


ID = f"{0:016x}"
OTHER = f"{1:016x}"


async def test_each_end_is_reported_to_the_webhooks_of_its_tenant_that_want_it():
    world = World(webhook(), webhook(1, tenant="umbrella"), webhook(2, outcomes=(Outcome.DEAD_LETTER,)))
    ends = [end(1), end(2, outcome=Outcome.DEAD_LETTER), end(3, tenant="umbrella"), end(1)]
    assert await world.report(*ends) == [Finished()] * 4
    assert {name: sorted(taken) for name, taken in world.receivers.taken.items()} == {
        ID: ["e1", "e2"],
        OTHER: ["e3"],
        f"{2:016x}": ["e2"],
    }
    assert await world.store.waiting() == {}


async def test_a_message_names_what_the_events_status_states():
    world = World(webhook())
    sent = []

    async def send(_webhook, message):
        sent.append(json.loads(message.body))

    world.receivers.send = send
    await world.report(end(7))
    [message] = sent
    assert message["type"] == "event.done"
    assert message["timestamp"] == "1970-01-01T00:00:07.125+00:00"
    assert message["tenant"] == "acme"
    assert EventStatus.model_validate(message["data"]) == end(7).status


async def test_nothing_is_sent_where_no_caller_asked():
    world = World()
    assert await world.report(end(1)) == [Finished()]
    assert world.receivers.requests == 0


async def test_what_a_receiver_does_not_take_waits_and_holds_back_no_caller():
    world = World(webhook(), webhook(1))
    world.receivers.wrong[ID] = NotDelivered("the receiver responded with 500")
    assert await world.report(*(end(number) for number in range(5))) == [Finished()] * 5
    assert len(world.receivers.taken[OTHER]) == 5
    assert world.receivers.requests == 5 + 1, "one that is away costs one request, not many"
    assert await world.store.waiting() == {ID: 5}
    assert world.state() is WebhookState.FAILING
    await world.report(end(9))
    assert await world.store.waiting() == {ID: 6}
    assert world.receivers.requests == 7
    await world.lookup()
    assert world.receivers.requests == 7, "its pause is not over"
    del world.receivers.wrong[ID]
    world.now_ms += 1_001
    await world.lookup()
    assert sorted(world.receivers.taken[ID]) == ["e0", "e1", "e2", "e3", "e4", "e9"]
    assert await world.store.waiting() == {}
    assert world.state() is WebhookState.ACTIVE
    assert world.counted == {"delivered": 12, "failed": 1, "kept": 6}


async def test_a_slow_receiver_keeps_neither_the_stream_nor_other_receivers_waiting():
    world = World(webhook(), webhook(1), webhook(2))
    answers = world.receivers.slow[ID] = asyncio.Event()
    world.receivers.wrong[OTHER] = NotDelivered("the receiver responded with 500")
    assert await world.report(end(1), end(2)) == [Finished()] * 2
    assert await world.store.waiting() == {ID: 2, OTHER: 2}
    assert world.state() is WebhookState.ACTIVE, "slow is not failing"
    requests = world.receivers.requests
    await world.report(end(3))
    assert world.receivers.requests == requests + 1, "only the third is asked while something waits"
    assert await world.store.waiting() == {ID: 3, OTHER: 3}

    del world.receivers.wrong[OTHER]
    world.now_ms += 1_001
    await world.redelivery.start_due()
    async with asyncio.timeout(5):
        while OTHER in await world.store.waiting():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)
    assert sorted(world.receivers.taken[OTHER]) == ["e1", "e2", "e3"]
    assert ID not in world.receivers.taken
    await world.redelivery.start_due()
    assert world.receivers.requests == requests + 1 + 3 + 1, "it is not asked twice at a time"

    answers.set()
    await world.redelivery.wait()
    assert sorted(world.receivers.taken[ID]) == ["e1", "e2", "e3"]
    assert await world.store.waiting() == {}
    await world.report(end(4))
    assert await world.store.waiting() == {}, "the stream delivers it again"


async def test_all_that_waits_for_a_receiver_is_sent_in_one_go():
    world = World(webhook())
    answers = world.receivers.slow[ID] = asyncio.Event()
    await world.report(*(end(number) for number in range(3 * BATCH)))
    answers.set()
    await world.lookup()
    assert len(world.receivers.taken[ID]) == 3 * BATCH


async def test_a_receiver_gets_several_requests_at_a_time_but_not_too_many():
    world = World(webhook())
    await world.report(*(end(number) for number in range(40)))
    assert len(world.receivers.taken[ID]) == 40
    assert 1 < world.receivers.most <= PARALLEL


async def test_pauses_grow_while_it_fails_and_it_is_given_up_in_the_end():
    world = World(webhook())
    world.receivers.wrong[ID] = NotDelivered("no answer")
    await world.report(end(1))
    tries = []
    while world.state() is WebhookState.FAILING:
        before = world.receivers.requests
        world.now_ms += 100
        await world.lookup()
        if world.receivers.requests > before:
            tries.append(world.now_ms)
    pauses = [later - earlier for earlier, later in pairwise(tries)]
    assert pauses[0] < 3_000 < max(pauses) <= 60_100
    assert tries[-1] - 1_000_000 >= 600_000
    await world.report(end(2))
    assert await world.store.waiting() == {ID: 1}, "nothing is kept for one that is disabled"
    assert world.counted["dropped"] == 1


async def test_one_that_is_gone_or_for_which_too_much_waits_is_disabled():
    world = World(webhook(), webhook(1))
    world.receivers.wrong = {
        ID: NotDelivered("the receiver responded with 410", is_gone=True),
        OTHER: NotDelivered("no answer"),
    }
    await world.report(*(end(number) for number in range(SETTINGS.max_pending + 1)))
    assert world.state() is WebhookState.DISABLED
    assert world.state(1) is WebhookState.FAILING
    await world.lookup()
    assert world.state(1) is WebhookState.DISABLED


async def test_what_waits_for_a_webhook_that_was_removed_is_removed():
    world = World(webhook())
    world.receivers.wrong[ID] = NotDelivered("no answer")
    await world.report(end(1))
    del world.store._webhooks[ID]
    await world.lookup()
    assert await world.store.waiting() == {}


async def test_only_one_of_several_workers_tries_a_webhook():
    world = World(webhook())
    world.receivers.wrong[ID] = NotDelivered("no answer")
    await world.report(end(1))
    del world.receivers.wrong[ID]
    world.now_ms += 1_001
    several = [WebhookRetries(world.sender) for _ in range(4)]
    await asyncio.gather(*(one.start_due() for one in several))
    await asyncio.gather(*(one.wait() for one in several))
    assert world.receivers.taken[ID] == ["e1"]


async def test_a_store_that_fails_ends_nothing_and_no_caller_is_reported_twice_by_the_same_worker():
    world = World(webhook(), webhook(1))
    world.receivers.wrong[ID] = NotDelivered("no answer")
    keep = world.store.keep

    async def fail(_messages):
        raise IndexUnavailable("down")

    world.store.keep = fail
    with pytest.raises(IndexUnavailable):
        await world.report(end(1))
    assert world.receivers.taken[OTHER] == ["e1"]
    world.store.keep = keep
    assert await world.report(end(1)) == [Finished()]
    assert world.receivers.taken[OTHER] == ["e1"]
    assert await world.store.waiting() == {ID: 1}


def test_tries_report_the_reason_once():
    tried = webhook_health.failed(webhook(), "no answer", now_ms=1, pause_ms=1, give_up_ms=9)
    assert tried.shown(3).last_failure == "no answer"
    assert tried.shown(3).waiting == 3
