"""Alerts: when notifications are due, and their delivery over real connections."""

import asyncio
import json
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from infra.alerts.factory import open_channels
from infra.alerts.port import Alert, AlertNotSent
from infra.settings import AlertSettings
from query.operations import alerting as alerting_module
from query.operations.alert_rules import AlertEvaluator, Measurement
from query.operations.alerting import Alerting
from query.operations.endpoints import Dependency, Operations
from query.telemetry.metrics import QueryMetrics
from query.telemetry.rolling_stats import RequestOutcome, RollingStats
from schemas.alerts import Severity

ALERT = Alert("errors", Severity.CRITICAL, "9 % <b>failed</b>", "query on x", 1_800_000_000_000.0)


def measurement(value, name="errors"):
    return Measurement(name, value, 1.0, 5.0, f"is {value}")


def notified(evaluator, *values, now_s=0.0):
    evaluations = [evaluator.evaluate([measurement(value)], now_s=now_s) for value in values]
    return [(notification.severity, notification.text) for due in evaluations for notification in due]


def test_a_change_of_severity_needs_two_evaluations():
    evaluator = AlertEvaluator(repeat_s=3_600)
    assert notified(evaluator, 2, 0, 2, 0) == []
    assert notified(evaluator, 2, 2) == [("warning", "is 2")]


def test_a_persistent_condition_is_notified_again_after_the_repeat_interval():
    evaluator = AlertEvaluator(repeat_s=100)
    assert notified(evaluator, 2, 2) == [("warning", "is 2")]
    assert notified(evaluator, *[3] * 50, now_s=99) == []
    assert notified(evaluator, 3, 3, now_s=100) == [("warning", "is 3")]
    assert notified(evaluator, 3, now_s=150) == []


def test_escalation_and_resolution_are_notified():
    evaluator = AlertEvaluator(repeat_s=3_600)
    assert notified(evaluator, 2, 2, 6, 6, 2, 2, 0, 0, 0) == [
        ("warning", "is 2"),
        ("critical", "is 6"),
        ("warning", "is 2"),
        ("resolved", "is 0"),
    ]


def test_flapping_is_not_notified():
    evaluator = AlertEvaluator(repeat_s=3_600)
    notified(evaluator, 2, 2)
    assert notified(evaluator, *[0, 2] * 20) == []


def test_a_condition_without_a_measurement_is_resolved():
    evaluator = AlertEvaluator(repeat_s=3_600)
    notified(evaluator, 6, 6)
    assert evaluator.evaluate([], now_s=0) == []
    assert [notification.severity for notification in evaluator.evaluate([], now_s=0)] == ["resolved"]


class Channel:
    name = "test"

    def __init__(self, failures=0):
        self.failures = failures
        self.sent = []

    async def send(self, alert):
        if self.failures:
            self.failures -= 1
            raise AlertNotSent("no")
        self.sent.append((alert.name, alert.severity))

    async def close(self):
        pass


class World:
    def __init__(self, channel, *, memory_limit_bytes=None):
        self.fault = None
        self.rolling_stats = RollingStats()
        self.registry = CollectorRegistry()

        async def check():
            if self.fault:
                raise self.fault

        operations = Operations(
            {"index": Dependency(check, required=True), "redis": Dependency(check, required=False)},
            self.rolling_stats,
            memory_limit_bytes=memory_limit_bytes,
        )
        self.alerting = Alerting(
            operations, [channel], AlertSettings(), metrics=QueryMetrics(self.registry), source="x"
        )

    async def evaluate(self, times=2):
        for _ in range(times):
            await self.alerting.evaluate()


@pytest.fixture
def channel():
    return Channel()


async def test_unavailable_dependencies_are_notified_by_their_importance(channel):
    world = World(channel)
    await world.evaluate()
    world.fault = ConnectionError("connection refused")
    await world.evaluate(5)
    world.fault = None
    await world.evaluate(5)
    assert channel.sent == [
        ("dependency index", "critical"),
        ("dependency redis", "warning"),
        ("dependency index", "resolved"),
        ("dependency redis", "resolved"),
    ]


async def test_errors_rejections_and_latency_are_notified(channel):
    world = World(channel)
    now_s = alerting_module.time.monotonic()
    for _ in range(60):
        world.rolling_stats.record_request(RequestOutcome.ANSWERED, 2_000.0, now_s=now_s)
    for outcome in (RequestOutcome.INTERNAL, RequestOutcome.UNAVAILABLE):
        for _ in range(20):
            world.rolling_stats.record_request(outcome, 1.0, now_s=now_s)
    await world.evaluate()
    assert channel.sent == [("errors", "critical"), ("rejections", "warning"), ("latency", "warning")]


async def test_a_few_requests_are_not_evaluated(channel):
    world = World(channel)
    for _ in range(5):
        world.rolling_stats.record_request(RequestOutcome.INTERNAL, 1.0, now_s=alerting_module.time.monotonic())
    await world.evaluate()
    assert channel.sent == []


async def test_memory_near_its_limit_is_notified(channel):
    await World(channel, memory_limit_bytes=1).evaluate()
    assert channel.sent == [("memory", "critical")]


async def test_a_failed_notification_is_retried_and_then_counted(monkeypatch):
    monkeypatch.setattr(alerting_module, "_BACKOFF_S", 0.0)
    channel = Channel(failures=2)
    world = World(channel, memory_limit_bytes=1)
    await world.evaluate()
    assert channel.sent == [("memory", "critical")]
    channel = Channel(failures=3)
    world = World(channel, memory_limit_bytes=1)
    await world.evaluate()
    labels = {"channel": "test", "severity": "not_sent"}
    assert (channel.sent, world.registry.get_sample_value("freshline_alerts_total", labels)) == ([], 1)


@pytest.fixture
def hook():
    """An HTTP server that records requests."""
    posted, answer = [], {"status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(answer["status"])
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", posted, answer
        server.shutdown()
        thread.join()


async def test_webhooks_are_posted_and_errors_do_not_contain_the_url(hook):
    url, posted, answer = hook
    settings = AlertSettings(slack_url=SecretStr(f"{url}/slack-secret"), webhook_url=SecretStr(f"{url}/hook-secret"))
    channels = open_channels(settings)
    for channel in channels:
        await channel.send(ALERT)
    (slack_path, slack), (_, generic) = posted
    assert slack_path == "/slack-secret"
    assert "*critical* errors: 9 % &lt;b&gt;failed&lt;/b&gt;" in slack["text"]
    assert generic == {
        "name": "errors",
        "severity": "critical",
        "text": ALERT.text,
        "source": ALERT.source,
        "at_ms": ALERT.at_ms,
    }
    answer["status"] = 500
    for channel in channels:
        with pytest.raises(AlertNotSent) as raised:
            await channel.send(ALERT)
        assert "secret" not in str(raised.value)
        await channel.close()


async def smtp_session(reader, writer, received):
    """The part of SMTP that a delivery without authentication needs."""

    async def send(line):
        writer.write(f"{line}\r\n".encode())
        await writer.drain()

    await send("220 test")
    while line := (await reader.readline()).strip():
        received.append(line)
        if line.lower() == b"data":
            await send("354 go on")
            received.append((await reader.readuntil(b"\r\n.\r\n")).removesuffix(b".\r\n"))
        await send("221 bye" if line.lower() == b"quit" else "250 ok")
        if line.lower() == b"quit":
            break
    writer.close()


async def test_mail_reaches_a_server():
    received = []
    server = await asyncio.start_server(lambda *ends: smtp_session(*ends, received), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = AlertSettings(
        smtp_url=SecretStr(f"smtp://127.0.0.1:{port}"), mail_from="freshline@example.org", mail_to="a@x.org, b@x.org"
    )
    [channel] = open_channels(settings)
    async with server:
        await channel.send(ALERT)
    assert [line for line in received if line.startswith(b"rcpt TO")] == [b"rcpt TO:<a@x.org>", b"rcpt TO:<b@x.org>"]
    message = message_from_bytes(received[-2], policy=policy.default)
    assert message["Subject"] == "[critical] errors on query on x"
    assert ALERT.text in message.get_content()
    with pytest.raises(AlertNotSent):
        await channel.send(ALERT)


def test_a_mail_server_needs_addresses_and_an_smtp_url():
    with pytest.raises(ValueError, match="MAIL_FROM"):
        open_channels(AlertSettings(smtp_url=SecretStr("smtp://x")))
    with pytest.raises(ValueError, match="SMTP_URL"):
        open_channels(AlertSettings(smtp_url=SecretStr("http://x"), mail_from="a@x.org", mail_to="b@x.org"))
