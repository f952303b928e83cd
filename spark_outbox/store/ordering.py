"""Claim in order: of each ordering key the *head*, its lowest unfinished event, and what follows it.

A worker that has locked the head may handle the key; nobody else's head can be of the same key.
"""

import itertools
from typing import Any, NamedTuple

from spark_outbox.events.event import StoredRow
from spark_outbox.store.claiming import claim_ids
from spark_outbox.store.connection import fetch
from spark_outbox.store.filtering import IS_MINE
from spark_outbox.store.waking import wake_others

UNFINISHED = {
    "block": "status in ('pending', 'running', 'failed')",
    "skip": "status in ('pending', 'running')",
}

KEYS_AT_ONCE = 200
"""Of how many keys one look finds the heads."""

_IS_READY = "status = 'pending' and (available_at is null or available_at <= statement_timestamp())"

# With `=` a planner that knows of a key with many events would rather read the primary key, from the
# first event ever. Between two bounds the order is that of one index alone.
HEADS = f"""
select head.id, head.ordering_key, head.is_ready, head.is_mine
from unnest(%(keys)s::text[]) with ordinality as wanted (key, turn) cross join lateral (
    select id, ordering_key, {_IS_READY} as is_ready, {{mine}} as is_mine
    from spark_outbox_event
    where ordering_key >= wanted.key and ordering_key <= wanted.key and {{unfinished}}
    order by ordering_key, id limit 1
) as head
order by wanted.turn
"""

RUNS = f"""
select run.id, run.ordering_key, run.is_ready
from unnest(%(keys)s::text[]) with ordinality as wanted (key, turn) cross join lateral (
    select id, ordering_key, {_IS_READY} and {{mine}} as is_ready
    from spark_outbox_event
    where ordering_key >= wanted.key and ordering_key <= wanted.key and {{unfinished}}
    order by ordering_key, id limit %(limit)s
) as run
order by wanted.turn, run.id
"""


class Ordered(NamedTuple):
    """The result of a look at some ordering keys. A key with nothing to do is in none of these."""

    rows: list[StoredRow]
    """Locked: of each key a head and the events that follow it without a gap, in order."""
    whole: set[str]
    """Keys of which that is all there is."""
    held: list[str]
    """Keys whose head could be handled, but another transaction holds it."""
    left: list[str]
    """Keys whose head could be handled, but the limit was reached, or it is a new one by now."""
    others: list[str]
    """Keys whose head could be handled by a worker of other groups."""


def claim_ordered(
    keys: list[str], limit: int, *, failed: str, groups: str | None, using: str
) -> Ordered:
    """Lock about `limit` events of these keys that are next in their order: the same share of each.

    `failed` says what a failed head does to those behind it: `block`, or `skip`.
    """
    parts = {"unfinished": UNFINISHED[failed], "mine": "true" if groups is None else IS_MINE}

    def rows(sql: str, **params: Any) -> list[Any]:
        return fetch(sql.format(**parts), {"groups": groups, **params}, using=using)

    ready: dict[int, str] = {}
    others: list[str] = []
    for event_id, key, is_ready, is_mine in rows(HEADS, keys=keys):
        if is_ready and is_mine:
            ready[event_id] = key
        elif is_ready:
            others.append(key)
    wanted = list(ready)[:limit]
    left = list(ready.values())[limit:]
    heads = {str(row.ordering_key): row for row in claim_ids(wanted, using=using)} if wanted else {}
    held = [ready[event_id] for event_id in wanted if ready[event_id] not in heads]
    if not heads:
        return Ordered([], set(), held, left, others)
    share = -(-limit // len(heads))
    runs: dict[str, list[int]] = {}
    ended: set[str] = set()
    seen: dict[str, int] = {}
    for event_id, key, is_ready in rows(RUNS, keys=list(heads), limit=share + 1):
        seen[key] = seen.get(key, 0) + 1
        if not is_ready or (key not in runs and event_id != heads[key].id):
            ended.add(key)  # a gap; or a lower id has been committed since, and is the head now
        if key not in ended and seen[key] <= share:
            runs.setdefault(key, []).append(event_id)
    followers = [event_id for run in runs.values() for event_id in run[1:]]
    locked = {row.id: row for row in claim_ids(followers, using=using)} if followers else {}
    locked |= {row.id: row for row in heads.values()}
    claimed = [
        locked[event_id]
        for run in runs.values()
        for event_id in itertools.takewhile(locked.__contains__, run)
    ]
    left += [key for key in heads if key not in runs]
    unlocked = {key for key, run in runs.items() if not all(map(locked.__contains__, run))}
    whole = {key for key in runs if seen[key] <= share} - ended - unlocked
    return Ordered(claimed, whole, held, left, others)


def hand_over(keys: list[str], *, failed: str, groups: str, using: str) -> bool:
    """Wake workers of other groups if one of them can go on with one of these keys."""
    parts = {"unfinished": UNFINISHED[failed], "mine": IS_MINE}
    heads = fetch(HEADS.format(**parts), {"keys": keys, "groups": groups}, using=using)
    is_theirs = any(is_ready and not is_mine for _, _, is_ready, is_mine in heads)
    if is_theirs:
        wake_others(using=using)
    return is_theirs
