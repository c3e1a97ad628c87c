"""In-memory event states and versions, for tests and simulation."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from typing_extensions import override

from infra.redis.event_states import acceptance_fields, progress_fields, read_status
from infra.redis.port import CacheUnavailable, EventStates, Progress, Versions
from schemas.documents import DocumentKey, EventStatus


class _Unreliable:
    """Attributes: ``available``: while False, every call raises ``CacheUnavailable``."""

    def __init__(self) -> None:
        self.available = True

    def _check_available(self) -> None:
        if not self.available:
            raise CacheUnavailable("the store was made unavailable")


class MemoryVersions(_Unreliable, Versions):
    """In-memory versions."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[DocumentKey, int] = {}

    @override
    async def assign(
        self, keys: Sequence[DocumentKey], *, now_us: int, floors: Mapping[DocumentKey, int]
    ) -> list[int | None]:
        self._check_available()
        return [self._next(key, now_us, floors.get(key)) for key in keys]

    def _next(self, key: DocumentKey, now_us: int, floor: int | None) -> int | None:
        known = [version for version in (self._last.get(key), floor) if version is not None]
        if not known:
            return None
        self._last[key] = max(now_us, max(known) + 1)
        return self._last[key]


class MemoryEventStates(_Unreliable, EventStates):
    """In-memory event states."""

    def __init__(self) -> None:
        super().__init__()
        self._fields: defaultdict[tuple[str, str], dict[str, str]] = defaultdict(dict)

    @override
    async def begin(self, tenant: str, status: EventStatus) -> None:

        self._add(tenant, status.event_id, acceptance_fields(status))

    @override
    async def advance(self, progress: Sequence[Progress]) -> None:

        for step in progress:
            self._add(step.tenant, step.event_id, progress_fields(step))

    @override
    async def get(self, tenant: str, event_id: str) -> EventStatus | None:

        self._check_available()
        return read_status(event_id, self._fields.get((tenant, event_id), {}))

    @override
    async def get_many(self, tenant: str, event_ids: Sequence[str]) -> dict[str, EventStatus]:

        statuses = [await self.get(tenant, event_id) for event_id in event_ids]
        return {status.event_id: status for status in statuses if status is not None}

    def _add(self, tenant: str, event_id: str, fields: Mapping[str, str]) -> None:
        self._check_available()
        known = self._fields[tenant, event_id]
        for name, value in fields.items():
            known.setdefault(name, value)
