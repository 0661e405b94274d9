"""The work queue in Redis: a stream with a consumer group, for workers on many nodes.

    {prefix}todo         stream of item ids; a claim is an entry that its consumer has not acknowledged
    {prefix}items        item id -> the item, JSON
    {prefix}tries        item id -> claims so far
    {prefix}done         item id -> its result, JSON
    {prefix}quarantined  item id -> tries and reason of a quarantined item, JSON
    {prefix}tokens       total, over

Every step that changes two keys is one Lua script, so a killed client leaves no partial change. Leases are based on the
idle times that Redis measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import redis

from hyperagent.errors import ServiceError
from hyperagent.populate.queue import VANISHED, Claim, Finished, Quarantined, QueueCounts, WorkItem

_GROUP = "teachers"
_ITEMS_PER_CALL = 1000
_KEYS = ("todo", "items", "tries", "done", "quarantined", "tokens")

# Begins a new round if all items are finished or quarantined.
_BEGIN = """
if redis.call('HLEN', KEYS[2]) <= redis.call('HLEN', KEYS[4]) + redis.call('HLEN', KEYS[5]) then
  redis.call('DEL', unpack(KEYS))
  redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
end
"""
# Arguments: id, item and tokens of each candidate.
_ADD = """
for i = 1, #ARGV, 3 do
  if redis.call('HSETNX', KEYS[2], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('HINCRBY', KEYS[6], 'total', ARGV[i + 2])
    redis.call('XADD', KEYS[1], '*', 'id', ARGV[i])
  end
end
"""
# Arguments: group, entry, worker. Checks whether the worker holds the entry.
_HELD = """
local function held()
  local entry = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1]
  return entry and entry[2] == ARGV[3]
end
local function drop()
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
"""
_RENEW = (
    _HELD
    + """
if not held() then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[2], 'JUSTID')
return 1
"""
)
# Further arguments: item id, result, tokens.
_FINISH = (
    _HELD
    + """
drop()
if redis.call('HSETNX', KEYS[4], ARGV[4], ARGV[5]) == 1 then
  if redis.call('HDEL', KEYS[5], ARGV[4]) == 0 then redis.call('HINCRBY', KEYS[6], 'over', ARGV[6]) end
end
"""
)
# Further arguments: item id, tries and reason, tokens.
_QUARANTINE = (
    _HELD
    + """
if not held() then return 0 end
drop()
redis.call('HSET', KEYS[5], ARGV[4], ARGV[5])
redis.call('HINCRBY', KEYS[6], 'over', ARGV[6])
return 1
"""
)
# Further arguments: item id, change of its number of tries.
_PUT_BACK = (
    _HELD
    + """
if not held() then return 0 end
drop()
redis.call('HINCRBY', KEYS[3], ARGV[4], ARGV[5])
redis.call('XADD', KEYS[1], '*', 'id', ARGV[4])
return 1
"""
)


class RedisQueue:
    """A `WorkQueue` in Redis 7 or later."""

    def __init__(self, url: str, *, name: str, max_tries: int, lease_s: float) -> None:
        """Connect to Redis and create the consumer group.

        Args:
            name: distinguishes this population from others in the same Redis.
            max_tries: how often an item may fail before it is quarantined.
            lease_s: how long a claim is held without being renewed.

        Raises:
            ServiceError: no Redis answers.
        """
        self._url, self._max_tries, self._lease_ms = url, max_tries, int(lease_s * 1000)
        # The braces keep all keys on one node of a Redis cluster.
        self._keys = [f"hyperagent:populate:{{{name}}}:{key}" for key in _KEYS]
        self._todo, self._items, self._tries, self._done, self._quarantined, self._tokens = self._keys
        # The library's annotations do not distinguish the synchronous from the asynchronous client.
        self._redis: Any
        with self._refusals():
            self._redis = redis.Redis.from_url(
                url, protocol=3, socket_timeout=10.0, socket_connect_timeout=5.0, decode_responses=True
            )
            with suppress(redis.ResponseError):  # The group exists already.
                self._redis.xgroup_create(self._todo, _GROUP, id="0", mkstream=True)
        self._scripts: dict[str, Callable[..., Any]] = {
            text: self._redis.register_script(text) for text in (_BEGIN, _ADD, _RENEW, _FINISH, _QUARANTINE, _PUT_BACK)
        }

    def fill(self, items: Iterable[WorkItem]) -> None:
        """See `WorkQueue.fill`."""
        with self._refusals():
            self._run(_BEGIN, _GROUP)
            left = iter(items)
            while some := list(islice(left, _ITEMS_PER_CALL)):
                self._run(_ADD, *(value for i in some for value in (i.item_id, json.dumps(asdict(i)), i.num_tokens)))

    def claim(self, worker: str) -> Claim | None:
        """See `WorkQueue.claim`."""
        with self._refusals():
            while (entry := self._next_entry(worker)) is not None:
                handle, item_id = entry
                item = WorkItem(**json.loads(str(self._redis.hget(self._items, item_id))))
                if self._redis.hexists(self._done, item_id):  # The item was finished under an expired claim.
                    self._redis.xack(self._todo, _GROUP, handle)
                    self._redis.xdel(self._todo, handle)
                    continue
                tries = int(self._redis.hget(self._tries, item_id) or 0)
                claim = Claim(item, tries + 1, worker, handle)
                if tries < self._max_tries:
                    self._redis.hincrby(self._tries, item_id, 1)
                    return claim
                self._quarantine(claim, tries, f"{VANISHED} {tries} times")
        return None

    def renew(self, claim: Claim) -> bool:
        """See `WorkQueue.renew`."""
        with self._refusals():
            return bool(self._run(_RENEW, _GROUP, claim.handle, claim.worker))

    def finish(self, claim: Claim, finished: Finished) -> None:
        """See `WorkQueue.finish`."""
        result = {key: value for key, value in asdict(finished).items() if key != "item"}
        item = claim.item
        with self._refusals():
            self._run(_FINISH, _GROUP, claim.handle, claim.worker, item.item_id, json.dumps(result), item.num_tokens)

    def fail(self, claim: Claim, reason: str) -> bool:
        """See `WorkQueue.fail`."""
        with self._refusals():
            if claim.tries >= self._max_tries:
                return self._quarantine(claim, claim.tries, reason)
            self._run(_PUT_BACK, _GROUP, claim.handle, claim.worker, claim.item.item_id, 0)
            return False

    def give_back(self, claim: Claim) -> None:
        """See `WorkQueue.give_back`."""
        with self._refusals():
            self._run(_PUT_BACK, _GROUP, claim.handle, claim.worker, claim.item.item_id, -1)

    def counts(self) -> QueueCounts:
        """See `WorkQueue.counts`."""
        with self._refusals(), self._redis.pipeline() as together:
            for key in (self._items, self._done, self._quarantined):
                together.hlen(key)
            together.xpending(self._todo, _GROUP)
            together.hgetall(self._tokens)
            total, done, quarantined, pending, tokens = together.execute()
        claimed = int(pending["pending"])
        return QueueCounts(
            max(0, total - done - quarantined - claimed),
            claimed,
            done,
            quarantined,
            tokens_total=int(tokens.get("total", 0)),
            tokens_over=int(tokens.get("over", 0)),
        )

    def finished(self) -> Iterator[Finished]:
        """See `WorkQueue.finished`."""
        for item, result in self._results(self._done):
            yield Finished(item, **result)

    def quarantined(self) -> list[Quarantined]:
        """See `WorkQueue.quarantined`."""
        return [Quarantined(item, **result) for item, result in self._results(self._quarantined)]

    def close(self) -> None:
        """See `WorkQueue.close`."""
        self._redis.close()

    def _next_entry(self, worker: str) -> tuple[str, str] | None:
        """Return the entry and the item id of an expired claim, or of the next item."""
        _, lapsed, _ = self._redis.xautoclaim(self._todo, _GROUP, worker, self._lease_ms, "0-0", count=1)
        if lapsed:
            handle, fields = lapsed[0]
            return handle, fields["id"]
        streams = self._redis.xreadgroup(_GROUP, worker, {self._todo: ">"}, count=1)
        for entries in streams.values():
            for handle, fields in entries[0]:
                return handle, fields["id"]
        return None

    def _quarantine(self, claim: Claim, tries: int, reason: str) -> bool:
        item = claim.item
        result = json.dumps({"tries": tries, "reason": reason})
        return bool(self._run(_QUARANTINE, _GROUP, claim.handle, claim.worker, item.item_id, result, item.num_tokens))

    def _results(self, key: str) -> list[tuple[WorkItem, dict[str, Any]]]:
        with self._refusals():
            results = self._redis.hgetall(key)
            items = self._redis.hmget(self._items, list(results)) if results else []
        found = [
            (WorkItem(**json.loads(str(item))), json.loads(result))
            for item, result in zip(items, results.values(), strict=True)
        ]
        return sorted(found, key=lambda pair: pair[0].row)

    def _run(self, script: str, *arguments: str | int) -> Any:
        return self._scripts[script](keys=self._keys, args=arguments)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, ValueError) as error:
            place = urlsplit(self._url)  # The whole URL may contain a password.
            raise ServiceError(
                f"the queue in Redis at {place.hostname}:{place.port} cannot be used: {' '.join(str(error).split())}; "
                "check the address and that Redis is running"
            ) from error
