"""The lag of steps."""

import asyncio
from types import SimpleNamespace

from infra.kafka.port import StreamUnavailable
from infra.settings import Settings
from streams import watchdog
from streams.topology import StepName


class Admin:
    """Answers as listed, one after the other; the last answer is repeated."""

    answers = ()

    def __init__(self, settings):
        del settings

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None

    async def lag(self, topic, group):
        del topic, group
        answer = Admin.answers.pop(0) if len(Admin.answers) > 1 else Admin.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return [SimpleNamespace(partition=partition, records=lag) for partition, lag in answer.items()]


async def test_an_unknown_lag_is_not_reported_as_zero(monkeypatch):
    monkeypatch.setattr(watchdog, "StreamAdmin", Admin)
    monkeypatch.setattr(watchdog, "LAG_EVERY_S", 0)
    Admin.answers = [{0: 3, 1: 4, 2: 5}, StreamUnavailable("no broker"), {0: 1, 1: 0, 2: 9}]
    reported, enough = [], asyncio.Event()

    def report(step, lag):
        reported.append((step, lag))
        if len(reported) == 2:
            enough.set()

    step = SimpleNamespace(name=StepName.INDEX, consumer=SimpleNamespace(assigned={0, 1}))
    settings = Settings(streams={"metrics_port": 1}, _env_file=None)
    measuring = asyncio.create_task(watchdog.measure_lag(settings, [step], report))
    async with asyncio.timeout(10):
        await enough.wait()
    measuring.cancel()
    await asyncio.gather(measuring, return_exceptions=True)
    assert reported == [(StepName.INDEX, 7), (StepName.INDEX, 1)]
