"""A worker process around the real runner, without Faust."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from faults import RUNNING
from receivers import webhook_delivery
from shaky_twins import DIMENSION, PARTITIONS, ROOM, Parsers, Splitter

from infra.settings import AnswerSettings, StreamSettings
from streams.evaluation import FusionParameters
from streams.progress import EventStateProgress
from streams.runner import Delivery, Step
from streams.slice_evaluators import SliceEvaluators
from streams.topology import TOPOLOGY, StepName
from streams.webhook_retries import WebhookRetries

if TYPE_CHECKING:
    from world import World


class Worker:
    """One worker of one step.

    Attributes:
        dead: set when the process has stopped, with everything that it started.
        gone: set when another worker owns its partitions: it is dead, or has not noticed yet.
    """

    def __init__(self, world: "World", step: StepName) -> None:
        self._world = world
        self._step = step
        self._owner = True
        self.dead = False
        self.gone = asyncio.Event()
        self._lanes = {number: world.parts.lane() for number in range(PARTITIONS)}
        settings = StreamSettings(
            batch_events=world.rng.choice((1, 2, 8)), attempts=2, retry_first_ms=10, retry_max_ms=500
        )
        self._runner = world.parts.runner(self._made(step), world.streams, settings, on_finished=lambda *_: None)
        token = RUNNING.set(self)  # inherited by all tasks that it starts
        living = [self._runner.run(), self._read(), self._commit()]
        if step is StepName.NOTIFY:
            living.append(WebhookRetries(webhook_delivery(world)).run())
        self._tasks = [asyncio.create_task(one) for one in living]
        RUNNING.reset(token)

    def lose_partitions(self) -> None:
        """Another worker takes over: this one continues with its records, but reads no more and cannot commit."""
        self._owner = False
        self.gone.set()

    def die(self) -> None:
        """Stop each task at its current await."""
        self.dead = True
        for task in self._tasks:
            task.cancel()
        self.gone.set()

    async def end(self) -> None:
        """Stop; raises the error of a task that failed before."""
        self.die()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                raise ended

    def _made(self, step: StepName) -> Step:
        world = self._world
        parts, progress = world.parts, EventStateProgress(world.states)
        if step is StepName.PREPARE:
            return parts.prepare(world.blobs, Parsers(), Splitter(), "profile", progress)
        if step is StepName.INDEX:
            return parts.step(world.index, world.embedder, world.blobs, "g1", 3, progress)
        if step is StepName.NOTIFY:
            return parts.notify(webhook_delivery(world))
        fusion = FusionParameters(DIMENSION, kept=ROOM, fused=ROOM, rrf_k=60)
        evaluators = SliceEvaluators(world.cache, world.index, world.index, fusion=fusion, settings=AnswerSettings())
        return parts.invalidate(world.cache, evaluators, world.states)

    async def _read(self) -> None:
        world, topic = self._world, TOPOLOGY[self._step].reads.name
        offsets = {number: world.committed[self._step, number] for number in range(PARTITIONS)}
        while self._owner:
            for partition in world.rng.sample(range(PARTITIONS), PARTITIONS):
                lane = world.streams.log[topic, partition]
                for record in lane[offsets[partition] : offsets[partition] + world.rng.randint(0, 4)]:
                    offset = offsets[partition]
                    offsets[partition] += 1
                    self._lanes[partition].deliver(offset)
                    done = partial(self._lanes[partition].finish, offset)
                    await self._runner.take(Delivery(partition, offset, record.key, record.value, record.headers, done))
            await asyncio.sleep(world.rng.uniform(0.01, 0.2))
        await asyncio.Event().wait()

    async def _commit(self) -> None:
        world = self._world
        while True:
            await asyncio.sleep(world.rng.uniform(0.02, 0.5))
            for partition, lane in self._lanes.items():
                offset = lane.committable()
                refused = not self._owner or (not world.faults.calm and world.rng.random() < 0.2)
                if offset is not None and not refused:
                    world.commit(self._step, partition, offset)
                    lane.committed(offset)
