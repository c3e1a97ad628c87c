"""Lua scripts of the answer cache. Redis runs scripts atomically, so each operation on a slice is one script.

The keys of every script are ``state``, ``changes``, ``fills`` and ``drops`` of one slice, followed by keys of answers.
All of them are in one cluster slot.
"""

from dataclasses import dataclass, field
from hashlib import sha1
from typing import Final


@dataclass(frozen=True, slots=True)
class Script:
    """Lua source and the SHA-1 by which Redis caches it."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", sha1(self.source.encode(), usedforsecurity=False).hexdigest())


# Epochs are microseconds of the server's clock. So after Redis has lost a slice, its new epoch differs from that of
# every fill in progress. Lua numbers represent them exactly (below 2^53), but their default text format does not.
_SLICE: Final = """
local STATE, CHANGES, FILLS, DROPS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local MAX_DROPS = 1000
local function state(name)
  return redis.call('HGET', STATE, name)
end
local function new_epoch()
  local time = redis.call('TIME')
  local now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
  local epoch = string.format('%.0f', math.max(now_us, tonumber(state('epoch') or '0') + 1))
  redis.call('HSET', STATE, 'epoch', epoch)
  return epoch
end
-- Applied positions merged with others: partitions in order of first occurrence, and partition -> highest offset.
-- All positions are one field, so that a lookup reads one value instead of one per partition.
local function merge_positions(others)
  local order, offsets = {}, {}
  local all = (state('positions') or '') .. ' ' .. others
  for partition, offset in string.gmatch(all, '(%d+):(%d+)') do
    if not offsets[partition] then
      order[#order + 1] = partition
    end
    if not offsets[partition] or tonumber(offsets[partition]) < tonumber(offset) then
      offsets[partition] = offset
    end
  end
  return order, offsets
end
local function advance(positions)
  if positions == '' then
    return
  end
  local order, offsets = merge_positions(positions)
  for at, partition in ipairs(order) do
    order[at] = partition .. ':' .. offsets[partition]
  end
  redis.call('HSET', STATE, 'positions', table.concat(order, ' '))
end
-- Advances to the positions of the changes in (after, to], which the answers now reflect. Returns these positions.
local function advance_to(after, to)
  local all = {}
  for _, change in ipairs(redis.call('XRANGE', CHANGES, '(' .. after .. '-0', to)) do
    all[#all + 1] = change[2][4]
  end
  local positions = table.concat(all, ' ')
  advance(positions)
  return positions
end
local function record_drop(keys, reason)
  redis.call('XADD', DROPS, 'MAXLEN', '~', MAX_DROPS, '*', 'keys', keys, 'reason', reason)
end
-- Drops all answers of the slice, so no change is left to evaluate. Answers of an epoch below the floor are invalid.
local function drop_slice(reason)
  local positions = advance_to(state('evaluated') or '0', '+')
  if redis.call('XLEN', FILLS) > 0 then
    record_drop('*', reason)
  end
  local epoch = new_epoch()
  redis.call('HSET', STATE, 'evaluated', epoch, 'floor', epoch, 'pending', 0)
  -- Sequence numbers start at the epoch, above all numbers used before Redis lost the slice.
  redis.call('HSETNX', STATE, 'sequence', epoch)
  redis.call('DEL', CHANGES, FILLS)
  return epoch, positions
end
local function epoch_now()
  return state('epoch') or (drop_slice(''))
end
-- Publishes an invalidation message. target: 'CHANNEL TENANT SLICE'. dropped: '-' for none, '*' for all answers, or
-- comma-separated keys.
local function publish(target, dropped, positions)
  local sequence = string.format('%.0f', redis.call('HINCRBY', STATE, 'sequence', 1))
  local channel, slice = string.match(target, '^(%S+) (%S+ %S+)$')
  redis.call('PUBLISH', channel, slice .. ' ' .. sequence .. ' ' .. dropped .. ' ' .. positions)
end
"""

# Invalidation must also work when Redis is out of memory. Only fills are rejected then.
_ALLOW_OOM: Final = "#!lua flags=allow-oom\n"

# ARGV: duration of the fill lease in milliseconds, or 0; 'evidence' to return the evidence too. KEYS: answer, lease.
LOOKUP: Final = Script(
    _SLICE
    + """
local FIELDS = {'epoch', 'floor', 'positions', 'seeded', 'sequence'}
local slice = redis.call('HMGET', STATE, unpack(FIELDS))
if not slice[1] then
  drop_slice('')
  slice = redis.call('HMGET', STATE, unpack(FIELDS))
end
local function result(entry, ttl_ms, leased)
  return {slice[1], slice[3] or '', slice[4] and 1 or 0, slice[5] or '0', entry, ttl_ms, leased}
end
local answer = redis.call('HMGET', KEYS[5], 'epoch', 'entry')
if answer[1] and tonumber(answer[1]) >= tonumber(slice[2]) then
  local entry = answer[2]
  if ARGV[2] == 'evidence' then
    entry = entry .. redis.call('HGET', KEYS[5], 'evidence')
  end
  return result(entry, redis.call('PTTL', KEYS[5]), 0)
end
-- pcall: without memory Redis grants no lease, but the lookup must not fail.
local leased = ARGV[1] == '0' or redis.pcall('SET', KEYS[6], '1', 'NX', 'PX', ARGV[1])
return result(false, 0, leased and 1 or 0)
"""
)

# ARGV: target, epoch, entry, TTL in seconds, key, prefix of answer keys, maximum number of answers, evidence.
# KEYS: answer, lease.
STORE: Final = Script(
    _SLICE
    + """
redis.call('DEL', KEYS[6])
if state('epoch') ~= ARGV[2] then
  return 0
end
local evicted = {}
local earlier = redis.call('HGET', KEYS[5], 'fill')
if earlier then
  redis.call('XDEL', FILLS, earlier .. '-0')
  evicted[1] = ARGV[5]
end
local fill = redis.call('HINCRBY', STATE, 'fills', 1)
redis.call('HSET', KEYS[5], 'epoch', ARGV[2], 'entry', ARGV[3], 'evidence', ARGV[8], 'fill', fill)
redis.call('EXPIRE', KEYS[5], ARGV[4])
redis.call('XADD', FILLS, fill .. '-0', 'key', ARGV[5])
-- Answers expire in the order of their fills, so checking a few of the oldest per fill bounds the stream.
for _, oldest in ipairs(redis.call('XRANGE', FILLS, '-', '+', 'COUNT', 4)) do
  local answer = ARGV[6] .. oldest[2][2]
  local exists = (redis.call('HGET', answer, 'fill') or '') .. '-0' == oldest[1]
  if exists then
    if redis.call('XLEN', FILLS) <= tonumber(ARGV[7]) then
      break
    end
    redis.call('DEL', answer)
    evicted[#evicted + 1] = oldest[2][2]
  end
  redis.call('XDEL', FILLS, oldest[1])
end
-- Evicted answers are no longer evaluated, so near caches must drop their copies.
if #evicted > 0 then
  publish(ARGV[1], table.concat(evicted, ','), '')
end
return 1
"""
)

# ARGV: target, positions, 'drop' | 'keep' | 'seed' | an encoded change, maximum number of pending changes, reason.
CHANGE: Final = Script(
    _ALLOW_OOM
    + _SLICE
    + """
local target, positions, effect, max_pending, reason = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local epoch = epoch_now()
local before, _, offsets = {}, merge_positions('')
for partition in string.gmatch(positions, '(%d+):') do
  before[#before + 1] = offsets[partition] or false
end
if effect == 'seed' and redis.call('HSETNX', STATE, 'seeded', '1') == 0 then
  return {epoch, 0, before}
end
if effect == 'keep' and state('evaluated') == epoch then
  advance(positions)
  publish(target, '-', positions)
  return {epoch, 0, before}
end
-- Without answers there is nothing to evaluate, and the new epoch rejects fills in progress. If the maximum number of
-- changes is pending, all answers are dropped, because no change may be lost.
local overflow = tonumber(state('pending')) >= tonumber(max_pending)
if effect == 'drop' or effect == 'seed' or overflow or redis.call('XLEN', FILLS) == 0 then
  local earlier
  epoch, earlier = drop_slice(reason)
  advance(positions)
  publish(target, '*', earlier .. ' ' .. positions)
  return {epoch, 0, before}
end
local previous = epoch
epoch = new_epoch()
redis.call('HINCRBY', STATE, 'pending', 1)
local change = {'previous', previous, 'positions', positions, 'change', effect}
redis.call('XADD', CHANGES, 'MAXLEN', max_pending, epoch .. '-0', unpack(change))
return {epoch, 1, before}
"""
)

# ARGV: epoch and fill number after which to read.
PENDING: Final = Script(
    _SLICE
    + """
epoch_now()
local oldest = redis.call('XRANGE', FILLS, '-', '+', 'COUNT', 1)[1]
return {
  redis.call('HMGET', STATE, 'epoch', 'evaluated', 'floor'),
  redis.call('XRANGE', CHANGES, '(' .. ARGV[1] .. '-0', '+'),
  redis.call('XRANGE', FILLS, '(' .. ARGV[2] .. '-0', '+'),
  oldest and oldest[1] or false  -- nil would truncate the reply
}
"""
)

# ARGV: target, epoch evaluated so far, epoch evaluated now, reason, comma-separated keys of the answers to drop, and
# the fill number of each. KEYS: these answers.
COMMIT: Final = Script(
    _ALLOW_OOM
    + _SLICE
    + """
if state('evaluated') ~= ARGV[2] then
  return 0
end
for number = 5, #KEYS do
  local fill = ARGV[number + 1]
  if redis.call('HGET', KEYS[number], 'fill') == fill then
    redis.call('DEL', KEYS[number])
  end
  redis.call('XDEL', FILLS, fill .. '-0')
end
local pending = #redis.call('XRANGE', CHANGES, '(' .. ARGV[3] .. '-0', '+')
redis.call('HSET', STATE, 'evaluated', ARGV[3], 'pending', pending)
local dropped = #KEYS > 4
if dropped then
  record_drop(ARGV[5], ARGV[4])
end
publish(ARGV[1], dropped and ARGV[5] or '-', advance_to(ARGV[2], ARGV[3] .. '-0'))
return 1
"""
)
