"""Versions assigned in Redis: one counter per document, shared by all ingest replicas."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from redis.asyncio import Redis
from typing_extensions import override

from infra.redis.connect import redis_errors
from infra.redis.port import Versions
from schemas.documents import DocumentKey
from schemas.names import Names

VERSION_TTL_S: Final = 2 * 86_400
"""How long a document's last version is remembered. Past it the index knows: by then it has long applied the event."""

_ASSIGN: Final = """
-- KEYS: a tenant's version keys. ARGV: now_us, ttl_s, then for each key its floor or ''.
-- Doubles hold every integer up to 2^53 exactly, and versions stay below.
local now, ttl = tonumber(ARGV[1]), ARGV[2]
local versions = {}
for i, key in ipairs(KEYS) do
  local last = tonumber(redis.call('GET', key) or '')
  local floor = tonumber(ARGV[i + 2])
  if last or floor then
    local version = math.max(now, (last or -1) + 1, (floor or -1) + 1)
    redis.call('SET', key, string.format('%.0f', version), 'EX', ttl)
    versions[i] = version
  else
    versions[i] = false
  end
end
return versions
"""


class RedisVersions(Versions):
    """See ``Versions``: a version is the largest of the time in microseconds, the last version + 1, and the floor + 1.

    The time makes versions tell when they were assigned; the other two make them grow even if clocks disagree.
    """

    def __init__(self, client: Redis, names: Names) -> None:
        self._names = names
        self._assign = client.register_script(_ASSIGN)

    @override
    async def assign(
        self, keys: Sequence[DocumentKey], *, now_us: int, floors: Mapping[DocumentKey, int]
    ) -> list[int | None]:
        """Assign a version to each key, in order; see ``Versions``. One call per tenant, whose keys share a slot."""
        places: dict[str, list[int]] = defaultdict(list)
        for place, key in enumerate(keys):
            places[key.tenant].append(place)
        versions: list[int | None] = [None] * len(keys)

        async def of_tenant(tenant: str, mine: list[int]) -> None:
            names = [f"{self._names.tenant_slice(tenant)}:version:{keys[place].document_id}" for place in mine]
            known = [str(floors.get(keys[place], "")) for place in mine]
            with redis_errors():
                assigned = await self._assign(keys=names, args=[now_us, VERSION_TTL_S, *known])
            for place, version in zip(mine, assigned, strict=True):
                versions[place] = version

        await asyncio.gather(*(of_tenant(tenant, mine) for tenant, mine in places.items()))
        return versions
