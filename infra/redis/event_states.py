"""Event states in Redis: one hash per event, to which every process adds fields in any order."""

from collections.abc import Mapping, Sequence
from typing import Final

import orjson
from redis.asyncio import Redis
from typing_extensions import override

from infra.redis.connect import redis_errors
from infra.redis.port import EventStates, Progress
from schemas.documents import EventStatus, Outcome, Stage
from schemas.names import Names

EVENT_TTL_S: Final = 7 * 86_400

_STAGE: Final = "at:"
_END: Final = "end"


class RedisEventStates(EventStates):
    """Event states in Redis. The first write of a field wins, so no process overwrites another's fields."""

    def __init__(self, client: Redis, names: Names) -> None:
        self._client = client
        self._names = names

    @override
    async def begin(self, tenant: str, status: EventStatus) -> None:

        await self._add([(self._key(tenant, status.event_id), acceptance_fields(status))])

    @override
    async def advance(self, progress: Sequence[Progress]) -> None:

        await self._add([(self._key(step.tenant, step.event_id), progress_fields(step)) for step in progress])

    @override
    async def get(self, tenant: str, event_id: str) -> EventStatus | None:

        with redis_errors():
            raw = await self._client.hgetall(self._key(tenant, event_id))
        return _status(event_id, raw)

    @override
    async def get_many(self, tenant: str, event_ids: Sequence[str]) -> dict[str, EventStatus]:

        if not event_ids:
            return {}
        with redis_errors():
            async with self._client.pipeline(transaction=False) as pipe:
                for event_id in event_ids:
                    pipe.hgetall(self._key(tenant, event_id))
                found = await pipe.execute()
        statuses = (_status(event_id, raw) for event_id, raw in zip(event_ids, found, strict=True))
        return {status.event_id: status for status in statuses if status is not None}

    def _key(self, tenant: str, event_id: str) -> str:
        return f"{self._names.tenant_slice(tenant)}:event:{event_id}"

    async def _add(self, additions: Sequence[tuple[str, Mapping[str, str]]]) -> None:
        if not additions:
            return
        with redis_errors():
            async with self._client.pipeline(transaction=False) as pipe:
                for key, fields in additions:
                    for name, value in fields.items():
                        pipe.hsetnx(key, name, value)
                    pipe.expire(key, EVENT_TTL_S)
                await pipe.execute()


def acceptance_fields(status: EventStatus) -> dict[str, str]:
    """Fields that ``begin`` adds."""
    fields = {
        "document_id": status.document_id,
        "version": str(status.version),
        "accepted_ms": repr(status.accepted_ms),
    }
    if status.position is not None:
        fields["position"] = status.position
    for stage, after_ms in status.stages_ms.items():
        fields[f"{_STAGE}{stage}"] = repr(status.accepted_ms + after_ms)
    return fields


def progress_fields(progress: Progress) -> dict[str, str]:
    """Fields that ``advance`` adds for one event."""
    fields = {f"{_STAGE}{progress.stage}": repr(progress.at_ms)}
    if progress.outcome is not None:
        # One field, so that outcome and reason always belong together.
        fields[_END] = orjson.dumps([progress.outcome, progress.reason, progress.passages]).decode()
    return fields


def read_status(event_id: str, fields: Mapping[str, str]) -> EventStatus | None:
    """The status from stored fields; None before acceptance is recorded."""
    if "accepted_ms" not in fields:
        return None
    accepted_ms = float(fields["accepted_ms"])
    # Clocks of different machines may place a stage before acceptance.
    stages_ms = {
        stage: max(0.0, float(fields[f"{_STAGE}{stage}"]) - accepted_ms)
        for stage in Stage
        if f"{_STAGE}{stage}" in fields
    }
    # Older records lack the number of passages.
    outcome, reason, passages = (*(orjson.loads(fields[_END]) if _END in fields else ()), None, None, None)[:3]
    return EventStatus(
        event_id=event_id,
        document_id=fields["document_id"],
        version=int(fields["version"]),
        position=fields.get("position"),
        stage=max(stages_ms, key=list(Stage).index, default=Stage.ACCEPTED),
        outcome=None if outcome is None else Outcome(outcome),
        reason=reason,
        passages=passages,
        accepted_ms=accepted_ms,
        stages_ms=stages_ms,
    )


def _status(event_id: str, raw: Mapping[bytes | str, bytes | str]) -> EventStatus | None:
    return read_status(event_id, {_text(name): _text(value) for name, value in raw.items()})


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw
