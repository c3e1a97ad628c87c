"""What waits behind the batch of a step, and what is embedded of it while that batch is written."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, NamedTuple

import structlog

from infra.embedding.port import Vector
from schemas.events import ChunkPlan
from streams.core.document_change import supersede_within

log = structlog.get_logger(__name__)


class Embedded(NamedTuple):
    """Vectors for passages to be written.

    Attributes:
        vectors: by ``text_sha256``.
        fresh: those of them that were embedded and are not stored yet, by storage key.
    """

    vectors: dict[str, Vector]
    fresh: dict[str, Vector]


class Ahead:
    """Embeds for the next batch while the model would wait for the index.

    All of it may be lost, or have been in vain: what a change needs is decided when its turn comes, and what is not
    here then is embedded then. A vector depends on its text alone, so none can be wrong.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, ChunkPlan] = {}
        self._under_way: asyncio.Task[Embedded] | None = None

    def expect(self, plan: ChunkPlan) -> None:
        """It will come in a later batch."""
        self._waiting[plan.position] = plan

    def came(self, plans: Iterable[ChunkPlan]) -> None:
        """They wait no longer."""
        for plan in plans:
            self._waiting.pop(plan.position, None)

    def waiting(self, *, most_chunks: int) -> list[ChunkPlan]:
        """The first of those that wait and will be written, of at most so many passages together."""
        plans = [plan for plan in self._waiting.values() if plan.outcome is None and plan.chunks_blob is None]
        newer = supersede_within([(plan.event.key, plan.event.version) for plan in plans])
        found, chunks = [], 0
        for plan, version in zip(plans, newer, strict=True):
            if version is None:
                chunks += len(plan.chunks)
                if chunks > most_chunks:
                    break
                found.append(plan)
        return found

    def begin(self, embedding: Coroutine[Any, Any, Embedded]) -> None:
        """Embed; what was not taken of an earlier call is let go."""
        if self._under_way is not None:
            self._under_way.cancel()
        self._under_way = asyncio.create_task(embedding, name="embed-ahead")
        self._under_way.add_done_callback(_heard)

    async def take(self) -> Embedded:
        """What was embedded, once; nothing where that failed, as whoever needs it meets what was wrong himself."""
        embedding, self._under_way = self._under_way, None
        if embedding is None:
            return Embedded({}, {})
        try:
            [told] = await asyncio.gather(embedding, return_exceptions=True)
        finally:
            embedding.cancel()
        if isinstance(told, BaseException):
            log.info("not_embedded_ahead", reason=str(told))
            return Embedded({}, {})
        return told

    async def close(self) -> None:
        """End what is under way."""
        embedding, self._under_way = self._under_way, None
        if embedding is not None:
            embedding.cancel()
            await asyncio.gather(embedding, return_exceptions=True)


def _heard(embedding: asyncio.Task[Embedded]) -> None:
    """Nobody may come for it, and asyncio complains of errors nobody looked at."""
    if not embedding.cancelled():
        embedding.exception()
