"""Clients of the real read path. The invariants are checked for each of their answers."""

import asyncio
from typing import TYPE_CHECKING

import orjson
from prometheus_client import CollectorRegistry
from shaky_twins import ROOM

from freshline.verify.served import served_passages
from infra.generation.extractive import ExtractiveGenerator
from infra.opensearch.port import IndexUnavailable
from query.answers.answer import AnswerService
from query.answers.fill import AnswerFill, AnswerStore
from query.cache.freshness import FreshnessReader, FreshnessSources
from query.cache.key import AnswerMaker
from query.cache.near_cache import NearCache
from query.cache.subscription import InvalidationSubscription
from query.retrieval.retrieve import FusionPolicy
from query.telemetry.metrics import QueryMetrics
from schemas.queries import QueryRequest
from schemas.search import Access

if TYPE_CHECKING:
    from world import World

GROUPS = ("hr",)


class Reader:
    """A query process and its clients."""

    def __init__(self, world: "World") -> None:
        self._world = world
        loop = asyncio.get_running_loop()
        metrics = QueryMetrics(CollectorRegistry())
        near = NearCache(slices=world.cache.count, max_bytes=1_000_000, monotonic_s=loop.time)
        self._watch = watch = InvalidationSubscription(world.cache, near)
        freshness = FreshnessReader(
            FreshnessSources(world.cache, near, world.index, watch),
            metrics=metrics,
            wait_s=1,
            monotonic_s=loop.time,
        )
        fill = AnswerFill(
            freshness=freshness,
            retrieval=world.parts.retrieval(
                index=world.index,
                embedder=world.embedder,
                metrics=metrics,
                policy=FusionPolicy(candidates=ROOM, kept=ROOM, rrf_k=60),
            ),
            generator=ExtractiveGenerator(),
            store=AnswerStore(world.cache, ttl_s=3_600),
            metrics=metrics,
        )
        maker = AnswerMaker("g1", world.embedder.model.fingerprint, "none", "rrf")
        self._answering = AnswerService(freshness=freshness, fill=fill, maker=maker, metrics=metrics)

    async def ask_until_cancelled(self) -> None:
        """Ask a few questions repeatedly, so that many answers are cached."""
        watching = asyncio.create_task(self._watch.run())
        try:
            await self._ask_on()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _ask_on(self) -> None:
        rng, index = self._world.rng, self._world.index
        while True:
            await asyncio.sleep(rng.expovariate(self._world.parts.asks_per_s))
            if rng.random() < 0.5:
                # The refresh of another document affects whole shards: partial changes become searchable.
                index._refresh(list(self._world.observed.accepted))
            tenant = rng.choice(self._world.tenants)
            await self._ask(rng.choice(("hotels", "leave")), Access(tenant, rng.choice(((), GROUPS))))

    async def _ask(self, question: str, access: Access) -> None:
        try:
            body = await self._answering.answer(QueryRequest(query=question, top_k=ROOM), access)
        except IndexUnavailable:
            return
        answer = orjson.loads(body)
        as_of = {int(partition): offset for partition, offset in answer["as_of"]["positions"].items()}
        served = served_passages(answer["results"], access.tenant)
        observed = self._world.observed
        for key, passages in served.items():
            observed.answered(as_of, access.tenant, access.groups, key, passages)
        if access.groups == GROUPS:
            for key in list(observed.accepted):
                if key.tenant == access.tenant:
                    observed.answered_whole(as_of, key, served.get(key, {}))
