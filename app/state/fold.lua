-- Writes events of one subject to the log and folds them into the subject's state, in one atomic step.
-- The twin of `fold` in events.py; tests/test_store.py holds the two together.
--
-- KEYS: the state, the log, then each event's dedupe keys, first the one under which it is remembered.
-- ARGV: subject, window, lifetime of the state in ms (0: for good), dedupe window in ms, exclusion kind by event
--       type (one byte each, 0: none), then for each event: how many dedupe keys it has, payload, EVENT records.
-- Returns one character an event: 1 new, 0 seen before.

local EVENT, EXCLUSION = 32, 9
local byte, char, find, sub = string.byte, string.char, string.find, string.sub

-- A double does not hold 64 bits, and comparing strings follows the locale: keys are compared by halves.
local function before(a, b)
  local a_low, a_high, a_event_low, a_event_high = struct.unpack('<I4i4I4I4', a)
  local b_low, b_high, b_event_low, b_event_high = struct.unpack('<I4i4I4I4', b)
  if a_high ~= b_high then return a_high < b_high end
  if a_low ~= b_low then return a_low < b_low end
  if a_event_high ~= b_event_high then return a_event_high < b_event_high end
  return a_event_low < b_event_low
end

-- A match that does not begin at `offset` of a record is a coincidence across fields.
local function has(list, bytes, size, offset)
  local at = find(list, bytes, 1, true)
  while at and (at - 1) % size ~= offset do at = find(list, bytes, at + 1, true) end
  return at ~= nil
end

local function insert(events, record)
  if has(events, sub(record, 9, 16), EVENT, 8) then return events end
  if #events == 0 or before(sub(events, -EVENT), record) then return events .. record end
  local low, high = 0, #events / EVENT - 1 -- the first record after the new one is in low..high
  while low < high do
    local middle = math.floor((low + high) / 2)
    if before(record, sub(events, middle * EVENT + 1, middle * EVENT + EVENT)) then
      high = middle
    else
      low = middle + 1
    end
  end
  return sub(events, 1, low * EVENT) .. record .. sub(events, low * EVENT + 1)
end

local state, log, subject, kinds = KEYS[1], KEYS[2], ARGV[1], ARGV[5]
local window, lifetime_ms, dedupe_ms = ARGV[2] * EVENT, tonumber(ARGV[3]), ARGV[4]
local stored = redis.call('HMGET', state, 'e', 'x')
local events, exclusions = stored[1] or '', stored[2] or ''
local answer = {}
local key = 3
for arg = 6, #ARGV, 3 do
  local keys, payload, records = tonumber(ARGV[arg]), ARGV[arg + 1], ARGV[arg + 2]
  local new = redis.call('EXISTS', unpack(KEYS, key, key + keys - 1)) == 0
  if new then
    -- The log first: if it refuses, nothing has been written and the event may come again.
    redis.call('XADD', log, '*', 'subject', subject, 'event', payload)
    redis.call('SET', KEYS[key], '', 'PX', dedupe_ms)
    for at = 1, #records, EVENT do
      local record = sub(records, at, at + EVENT - 1)
      events = sub(insert(events, record), -window)
      local kind = byte(kinds, byte(record, 31) + 1) or 0
      local exclusion = sub(record, 17, 24) .. char(kind)
      if kind > 0 and not has(exclusions, exclusion, EXCLUSION, 0) then exclusions = exclusions .. exclusion end
    end
  end
  answer[#answer + 1] = new and '1' or '0'
  key = key + keys
end
if #events > 0 and events ~= (stored[1] or '') then redis.call('HSET', state, 'e', events) end
if exclusions ~= (stored[2] or '') then redis.call('HSET', state, 'x', exclusions) end
if lifetime_ms > 0 then redis.call('PEXPIRE', state, lifetime_ms) end
return table.concat(answer)
