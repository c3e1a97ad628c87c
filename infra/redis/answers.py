"""Cached answers in Redis, filled and dropped without locks.

A tenant's slice is one linearisation point: each operation is one script, and Redis runs one script at a time.

- A change is made searchable first; ``apply`` then moves the slice to a new epoch, advances the positions and
  announces them.
- A fill looks up the epoch first, retrieves, and may store its answer only while that epoch stands.

So an answer that a lookup returns was retrieved after every change at or before the positions of the same lookup: the
change was searchable before its epoch began, and the fill began in this epoch or its answer would not be valid in it.

``apply`` drops by epoch, all answers of the tenant at once. Judging each answer by the change goes in its place: only
``_APPLY`` says what a change does to entries.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from infra.redis.connect import redis_errors
from infra.redis.port import Applied, CacheUnavailable, Lookup
from schemas.cache_keys import AnswerKeys
from schemas.names import Names

HEARTBEAT_S: Final = 1.0
"""A silent subscription is asked for a sign of life after this, and counts as broken after twice this."""


@dataclass(frozen=True, slots=True)
class _Script:
    """Lua source with the name under which Redis remembers it."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # SHA-1 is how Redis names scripts.
        object.__setattr__(self, "sha", sha1(self.source.encode(), usedforsecurity=False).hexdigest())


# An epoch comes from the server's clock in microseconds, so that one made after Redis lost the slice is none that a
# fill still under way began with. Lua numbers hold it exactly (below 2^53), but their default text does not.
_NEW_EPOCH: Final = """
local function new_epoch()
  local time = redis.call('TIME')
  local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
  local old = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
  local epoch = string.format('%.0f', math.max(now_us, old + 1))
  redis.call('HSET', KEYS[1], 'epoch', epoch)
  return epoch
end
"""

_LOOKUP: Final = _Script(
    _NEW_EPOCH
    + """
local epoch = redis.call('HGET', KEYS[1], 'epoch') or new_epoch()
local answer = redis.call('HMGET', KEYS[2], 'epoch', 'entry')
return {redis.call('HGETALL', KEYS[1]), answer[1] == epoch and answer[2]}
"""
)

_STORE: Final = _Script(
    """
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'entry', ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""
)

# ARGV: channel, announcement, 'drop' | 'keep' | 'seed', then partition and offset of each position.
_APPLY: Final = _Script(
    _NEW_EPOCH
    + """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if ARGV[3] == 'seed' and redis.call('HSETNX', KEYS[1], 'seeded', '1') == 0 then
  return epoch
end
if ARGV[3] ~= 'keep' or not epoch then
  epoch = new_epoch()
end
for i = 4, #ARGV, 2 do
  local offset = redis.call('HGET', KEYS[1], ARGV[i])
  if not offset or tonumber(offset) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
redis.call('PUBLISH', ARGV[1], epoch .. ' ' .. ARGV[2])
return epoch
"""
)


class RedisAnswerCache:
    """See ``AnswerCache``. Every method raises CacheUnavailable where Redis cannot serve.

    Args:
        client: whose replies are bytes.
        names: of this installation.
    """

    def __init__(self, client: Redis, names: Names) -> None:
        self._client = client
        self._names = names

    async def lookup(self, tenant: str, key: str) -> Lookup:
        """See ``AnswerCache``."""
        keys = AnswerKeys.of(self._names, tenant)
        fields, entry = await self._run(_LOOKUP, (keys.state, keys.answer(key)))
        state = dict(zip(fields[::2], fields[1::2], strict=True))
        return Lookup(int(state[b"epoch"]), _positions(state), entry, seeded=b"seeded" in state)

    async def store(self, tenant: str, key: str, entry: bytes, *, epoch: int, ttl_s: int) -> bool:
        """See ``AnswerCache``."""
        keys = AnswerKeys.of(self._names, tenant)
        return bool(await self._run(_STORE, (keys.state, keys.answer(key)), epoch, entry, ttl_s))

    async def apply(self, tenant: str, positions: Mapping[int, int], *, drop: bool) -> int:
        """See ``AnswerCache``."""
        return await self._apply(tenant, positions, "drop" if drop else "keep")

    async def positions(self, tenant: str) -> Mapping[int, int]:
        """See ``AnswerCache``."""
        with redis_errors():
            state: dict[Any, Any] = await self._client.hgetall(AnswerKeys.of(self._names, tenant).state)
        return _positions(state)

    async def seed(self, tenant: str, positions: Mapping[int, int]) -> None:
        """See ``AnswerCache``."""
        await self._apply(tenant, positions, "seed")

    async def applied(self, *, subscribed: asyncio.Event | None = None) -> AsyncGenerator[Applied, None]:
        """See ``AnswerCache``."""
        with redis_errors():
            async with self._client.pubsub() as channel:
                await channel.subscribe(self._names.applied_channel)
                confirmed = asked = False
                while True:
                    message = await channel.get_message(timeout=HEARTBEAT_S)
                    if message is None:
                        if asked:
                            raise CacheUnavailable(f"Redis: the subscription was silent for {2 * HEARTBEAT_S:g} s")
                        asked = True
                        await channel.ping()
                        continue
                    asked = False
                    if message["type"] == "message":
                        yield _parse_announcement(message["data"])
                    elif message["type"] == "subscribe":
                        # The client connects and subscribes again by itself; what was announced between is lost.
                        if confirmed:
                            raise CacheUnavailable("Redis: the subscription was interrupted")
                        confirmed = True
                        if subscribed is not None:
                            subscribed.set()

    async def _apply(self, tenant: str, positions: Mapping[int, int], effect: str) -> int:
        numbers = [number for position in positions.items() for number in position]
        reply = await self._run(
            _APPLY,
            (AnswerKeys.of(self._names, tenant).state,),
            self._names.applied_channel,
            _announcement(tenant, positions),
            effect,
            *numbers,
        )
        return int(reply)

    async def _run(self, script: _Script, keys: tuple[str, ...], *arguments: str | bytes | int) -> Any:
        with redis_errors():
            try:
                return await self._client.evalsha(script.sha, len(keys), *keys, *arguments)
            except NoScriptError:  # this server has not seen it yet, or has forgotten it
                return await self._client.eval(script.source, len(keys), *keys, *arguments)


def _positions(state: Mapping[bytes, bytes]) -> dict[int, int]:
    """The positions in a slice's state, which holds an epoch and a mark beside them."""
    return {int(name): int(value) for name, value in state.items() if name not in {b"epoch", b"seeded"}}


def _announcement(tenant: str, positions: Mapping[int, int]) -> str:
    """``TENANT PARTITION:OFFSET …``; the script puts the epoch before it."""
    return " ".join((tenant, *(f"{partition}:{offset}" for partition, offset in positions.items())))


def _parse_announcement(data: bytes) -> Applied:
    epoch, tenant, *positions = data.decode().split(" ")
    pairs = (position.split(":") for position in positions)
    return Applied(tenant, int(epoch), {int(partition): int(offset) for partition, offset in pairs})
