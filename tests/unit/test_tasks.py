"""How tasks are ended."""

import asyncio

from infra import tasks
from infra.tasks import cancel_and_wait


async def deaf(cancellations, most):
    """Takes no notice of as many cancellations."""
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancellations.append(1)
            if len(cancellations) > most:
                raise


async def test_what_takes_no_notice_of_the_first_cancellation_is_ended_all_the_same(monkeypatch):
    monkeypatch.setattr(tasks, "_RETRY_S", 0.01)
    received = [[], []]
    running = [asyncio.create_task(deaf(cancellations, most)) for most, cancellations in enumerate(received)]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel_and_wait(*running)
    assert [task.cancelled() for task in running] == [True, True]
    assert [len(cancellations) for cancellations in received] == [1, 2]


async def test_what_has_failed_is_left_to_be_reported():
    async def failing():
        raise LookupError("lost")

    task = asyncio.create_task(failing())
    await asyncio.sleep(0)
    await cancel_and_wait(task)
    assert isinstance(task.exception(), LookupError)
