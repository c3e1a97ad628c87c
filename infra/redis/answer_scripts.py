"""What is done to a slice of answers, each operation one Lua script: Redis runs one script at a time.

Every script has the keys ``state``, ``changes``, ``fills``, ``drops`` of one slice, and those of answers after them.
All lie in one cluster slot.
"""

from dataclasses import dataclass, field
from hashlib import sha1
from typing import Final


@dataclass(frozen=True, slots=True)
class Script:
    """Lua source with the name under which Redis remembers it."""

    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # SHA-1 is how Redis names scripts.
        object.__setattr__(self, "sha", sha1(self.source.encode(), usedforsecurity=False).hexdigest())


# An epoch comes from the server's clock in microseconds, so that one made after Redis lost the slice is none that a
# fill still under way began with. Lua numbers hold it exactly (below 2^53), but their default text does not.
_SLICE: Final = """
local STATE, CHANGES, FILLS, DROPS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local DROPS_REMEMBERED = 1000
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
-- What is applied: offsets by partition, and the partitions in the order in which they came. It is one field, so that
-- a lookup reads and sends one thing where it would be one for each partition.
local function applied(and_these)
  local order, offsets = {}, {}
  local all = (state('positions') or '') .. ' ' .. and_these
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
  local order, offsets = applied(positions)
  for at, partition in ipairs(order) do
    order[at] = partition .. ':' .. offsets[partition]
  end
  redis.call('HSET', STATE, 'positions', table.concat(order, ' '))
end
-- Positions of the changes after an epoch, up to another; they are reflected as soon as the answers are judged.
local function advance_to(after, to)
  local all = {}
  for _, change in ipairs(redis.call('XRANGE', CHANGES, '(' .. after .. '-0', to)) do
    all[#all + 1] = change[2][4]
  end
  local positions = table.concat(all, ' ')
  advance(positions)
  return positions
end
local function remember_drop(keys, why)
  redis.call('XADD', DROPS, 'MAXLEN', '~', DROPS_REMEMBERED, '*', 'keys', keys, 'why', why)
end
-- Every answer is gone, and with them the need to judge: an answer of an epoch below the floor does not count.
local function drop_everything(why)
  local positions = advance_to(state('judged') or '0', '+')
  if redis.call('XLEN', FILLS) > 0 then
    remember_drop('*', why)
  end
  local epoch = new_epoch()
  redis.call('HSET', STATE, 'judged', epoch, 'floor', epoch, 'waiting', 0)
  -- Numbers of announcements begin where no earlier ones of a slice that was lost can be.
  redis.call('HSETNX', STATE, 'told', epoch)
  redis.call('DEL', CHANGES, FILLS)
  return epoch, positions
end
local function epoch_now()
  return state('epoch') or (drop_everything(''))
end
-- WHERE is the channel, the tenant and the number of the slice. What is dropped: '-', '*', or keys, commas between.
local function announce(where, dropped, positions)
  local told = string.format('%.0f', redis.call('HINCRBY', STATE, 'told', 1))
  local channel, slice = string.match(where, '^(%S+) (%S+ %S+)$')
  redis.call('PUBLISH', channel, slice .. ' ' .. told .. ' ' .. dropped .. ' ' .. positions)
end
"""

# Changes are judged, and what they alter is dropped, also where Redis has no room left; only fills are refused.
_ALSO_WHEN_FULL: Final = "#!lua flags=allow-oom\n"

# ARGV: milliseconds of a lease, or 0; 'whole' if more than hits need is wanted. KEYS: the answer, its lease.
LOOKUP: Final = Script(
    _SLICE
    + """
local FIELDS = {'epoch', 'floor', 'positions', 'whole', 'told'}
local slice = redis.call('HMGET', STATE, unpack(FIELDS))
if not slice[1] then
  drop_everything('')
  slice = redis.call('HMGET', STATE, unpack(FIELDS))
end
local function found(entry, ends_ms, leased)
  return {slice[1], slice[3] or '', slice[4] and 1 or 0, slice[5] or '0', entry, ends_ms, leased}
end
local answer = redis.call('HMGET', KEYS[5], 'epoch', 'entry')
if answer[1] and tonumber(answer[1]) >= tonumber(slice[2]) then
  local entry = answer[2]
  if ARGV[2] == 'whole' then
    entry = entry .. redis.call('HGET', KEYS[5], 'rest')
  end
  return found(entry, redis.call('PTTL', KEYS[5]), 0)
end
-- A Redis without room gives no lease: that is no reason to answer nothing.
local leased = ARGV[1] == '0' or redis.pcall('SET', KEYS[6], '1', 'NX', 'PX', ARGV[1])
return found(false, 0, leased and 1 or 0)
"""
)

# ARGV: where, epoch, entry, seconds to live, key, what keys of answers begin with, most answers, what only judges need
# of the entry. KEYS: the answer, its lease.
STORE: Final = Script(
    _SLICE
    + """
redis.call('DEL', KEYS[6])
if state('epoch') ~= ARGV[2] then
  return 0
end
local given_up = {}
local earlier = redis.call('HGET', KEYS[5], 'fill')
if earlier then
  redis.call('XDEL', FILLS, earlier .. '-0')
  given_up[1] = ARGV[5]
end
local fill = redis.call('HINCRBY', STATE, 'fills', 1)
redis.call('HSET', KEYS[5], 'epoch', ARGV[2], 'entry', ARGV[3], 'rest', ARGV[8], 'fill', fill)
redis.call('EXPIRE', KEYS[5], ARGV[4])
redis.call('XADD', FILLS, fill .. '-0', 'key', ARGV[5])
-- Answers end in the order in which they came: a look at the oldest now and then keeps the list as long as they are.
for _, oldest in ipairs(redis.call('XRANGE', FILLS, '-', '+', 'COUNT', 4)) do
  local answer = ARGV[6] .. oldest[2][2]
  local there = (redis.call('HGET', answer, 'fill') or '') .. '-0' == oldest[1]
  if there then
    if redis.call('XLEN', FILLS) <= tonumber(ARGV[7]) then
      break
    end
    redis.call('DEL', answer)
    given_up[#given_up + 1] = oldest[2][2]
  end
  redis.call('XDEL', FILLS, oldest[1])
end
-- Copies of what is no longer here would not be judged any more.
if #given_up > 0 then
  announce(ARGV[1], table.concat(given_up, ','), '')
end
return 1
"""
)

# ARGV: where, positions, 'drop' | 'keep' | 'seed' | a change, most changes to remember, why.
CHANGE: Final = Script(
    _ALSO_WHEN_FULL
    + _SLICE
    + """
local where, positions, effect, most, why = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local epoch = epoch_now()
local before, _, offsets = {}, applied('')
for partition in string.gmatch(positions, '(%d+):') do
  before[#before + 1] = offsets[partition] or false
end
if effect == 'seed' and redis.call('HSETNX', STATE, 'whole', '1') == 0 then
  return {epoch, 0, before}
end
if effect == 'keep' and state('judged') == epoch then
  advance(positions)
  announce(where, '-', positions)
  return {epoch, 0, before}
end
-- Where no answer is kept there is nothing to judge; fills under way are refused by the new epoch. Where judging has
-- fallen behind by as much as is remembered, answers are dropped rather than a change forgotten.
local behind = tonumber(state('waiting')) >= tonumber(most)
if effect == 'drop' or effect == 'seed' or behind or redis.call('XLEN', FILLS) == 0 then
  local earlier
  epoch, earlier = drop_everything(why)
  advance(positions)
  announce(where, '*', earlier .. ' ' .. positions)
  return {epoch, 0, before}
end
local previous = epoch
epoch = new_epoch()
redis.call('HINCRBY', STATE, 'waiting', 1)
local change = {'previous', previous, 'positions', positions, 'change', effect}
redis.call('XADD', CHANGES, 'MAXLEN', most, epoch .. '-0', unpack(change))
return {epoch, 1, before}
"""
)

# ARGV: epoch that is known, number of the last fill that is known.
PENDING: Final = Script(
    _SLICE
    + """
epoch_now()
local oldest = redis.call('XRANGE', FILLS, '-', '+', 'COUNT', 1)[1]
return {
  redis.call('HMGET', STATE, 'epoch', 'judged', 'floor'),
  redis.call('XRANGE', CHANGES, '(' .. ARGV[1] .. '-0', '+'),
  redis.call('XRANGE', FILLS, '(' .. ARGV[2] .. '-0', '+'),
  oldest and oldest[1] or false  -- a nil would end the reply before it
}
"""
)

# ARGV: where, epoch judged before, epoch judged now, why, keys of the answers to drop with commas between, and for each
# of them the number of its fill. KEYS: those answers.
SETTLE: Final = Script(
    _ALSO_WHEN_FULL
    + _SLICE
    + """
if state('judged') ~= ARGV[2] then
  return 0
end
for number = 5, #KEYS do
  local fill = ARGV[number + 1]
  if redis.call('HGET', KEYS[number], 'fill') == fill then
    redis.call('DEL', KEYS[number])
  end
  redis.call('XDEL', FILLS, fill .. '-0')
end
local waiting = #redis.call('XRANGE', CHANGES, '(' .. ARGV[3] .. '-0', '+')
redis.call('HSET', STATE, 'judged', ARGV[3], 'waiting', waiting)
local dropped = #KEYS > 4
if dropped then
  remember_drop(ARGV[5], ARGV[4])
end
announce(ARGV[1], dropped and ARGV[5] or '-', advance_to(ARGV[2], ARGV[3] .. '-0'))
return 1
"""
)
