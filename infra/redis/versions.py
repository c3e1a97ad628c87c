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
"""Retention of a document's last version. Later it is read from the index, which has long applied the event."""

_ASSIGN: Final = """
-- KEYS: version keys of one tenant. ARGV: now_us, ttl_s, and for each key its floor or ''.
-- Doubles represent every integer up to 2^53 exactly; versions are smaller.
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
    """Versions in Redis: the maximum of epoch microseconds, last version + 1, and floor + 1.

    The time makes versions comparable across documents; the other terms make them increase even if clocks differ.
    """

    def __init__(self, client: Redis, names: Names) -> None:
        self._names = names
        self._assign = client.register_script(_ASSIGN)

    @override
    async def assign(
        self, keys: Sequence[DocumentKey], *, now_us: int, floors: Mapping[DocumentKey, int]
    ) -> list[int | None]:
        # One script run per tenant: the keys of a tenant are in one cluster slot.
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, key in enumerate(keys):
            numbers[key.tenant].append(number)
        versions: list[int | None] = [None] * len(keys)

        async def assign_of_tenant(tenant: str, own: list[int]) -> None:
            names = [f"{self._names.tenant_slice(tenant)}:version:{keys[number].document_id}" for number in own]
            own_floors = [str(floors.get(keys[number], "")) for number in own]
            with redis_errors():
                assigned = await self._assign(keys=names, args=[now_us, VERSION_TTL_S, *own_floors])
            for number, version in zip(own, assigned, strict=True):
                versions[number] = version

        await asyncio.gather(*(assign_of_tenant(tenant, own) for tenant, own in numbers.items()))
        return versions
