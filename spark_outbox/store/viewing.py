"""Read what people look at: the views of the migration, and single events. Bounded, as these are.

Rows come as JSON, in which times are text: SQL may have written times that Python does not know. Ages
are seconds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any

from spark_outbox.store import stepping
from spark_outbox.store.connection import fetch

Row = dict[str, Any]

STATUS = """
select
    event_group as "group", ready, delayed, retrying, running, failed, unhandled, done_last_hour,
    waits_for_circuit, paused, extract(epoch from late)::float as late,
    extract(epoch from oldest_pending_age)::float as oldest_pending_age, more
from spark_outbox_status
order by late desc nulls last, event_group
"""

WORKERS = """
select
    host, pid, started_at, state, extract(epoch from state_for)::float as state_for, groups, handlers,
    version, backend, handler, event_key, extract(epoch from in_hand_for)::float as in_hand_seconds
from spark_outbox_workers
"""

PAUSES = "select * from spark_outbox_pauses"

FAILURES = "select * from spark_outbox_failures"

HEALTH = "select * from spark_outbox_health"

SNAPSHOTS = """
select who, extract(epoch from held_for)::float as held_for, xids, remedy
from spark_outbox_snapshots order by held_for desc nulls last, xids desc limit 5
"""

LAG = "select extract(epoch from max(late))::float as lag from spark_outbox_status"

OPEN_CIRCUITS = f"""
with recursive {stepping.FAILING_HANDLERS}
select handler from (select * from failing limit 1000) as named
where exists (
    select from spark_outbox_delivery as delivery
    where {stepping.FAILS} and delivery.handler = named.handler
        and spark_outbox_fingerprint(delivery.error) = 'spark_outbox: not called, its circuit is open'
)
"""

EXPLANATION = "select sentence from spark_explain(%(key)s) as said (sentence)"

LOOKED_AT = 10_000
"""How many events of a state are looked at, for those that somebody wants to see."""

# An event's last error is a traceback, if it failed, which ends with the reason.
REASON = "left(substring(right(last_error, 1000) from '[^\\n]+\\s*$'), 500)"

_COLUMNS = f"""
    id, key, event_group as "group", status, attempts, available_at, ordering_key, created_at,
    finished_at, coalesce({REASON}, '') as error
"""

_LATEST = f"select * from spark_outbox_events order by id desc limit {LOOKED_AT}"
_ANY = (
    f"select * from spark_outbox_events where status = '{{state}}' and not is_pruned limit {LOOKED_AT}"
)


def _pending(most: int) -> str:
    return " union all ".join(
        f"""(
            select * from spark_outbox_events
            where status = 'pending' and available_at is {time} and ordering_key is {order}
            order by {place} desc limit {most}
        )"""
        for order in ("null", "not null")
        for time, place in (("null", "id"), ("not null", "available_at"))
    )


# The latest of each group, from one group to the next.
_DONE = f"""
with recursive {stepping.DONE_GROUPS}
select latest.* from (select * from done_group limit 1000) as named cross join lateral (
    select event.* from spark_outbox_events as event
    where event.status = 'done' and not event.is_pruned and event.event_group = named.event_group
    order by event.finished_at desc limit {LOOKED_AT // 10}
) as latest
"""

_SOURCES: dict[str | None, str] = {
    None: _LATEST,
    "done": _DONE,
    "pending": _pending(LOOKED_AT),
    **{state: _ANY.format(state=state) for state in ("failed", "unhandled", "running", "discarded")},
}

_FAILING = f"""
select event.* from (
    select distinct event_id from (
        select event_id from spark_outbox_delivery
        where status in ('pending', 'failed') and error <> ''
            and (%(handler)s = '' or handler = %(handler)s)
            and (%(fingerprint)s = '' or spark_outbox_fingerprint(error) = %(fingerprint)s)
        limit {LOOKED_AT}
    ) as delivery
) as failing join spark_outbox_events as event on event.id = failing.event_id
"""

# Each source reads one index, from an end of it: so none reads more than LOOKED_AT events.
EVENTS = f"""
select {_COLUMNS} from ({{source}}) as seen
where not is_pruned
    and (%(state)s::text is null or status = %(state)s)
    and (%(group)s = '' or event_group ~ %(group)s)
    and (%(prefix)s = '' or left(key, length(%(prefix)s)) = %(prefix)s)
    and (
        %(seconds)s::float is null
        or created_at < statement_timestamp() - make_interval(secs => %(seconds)s)
    )
order by id desc limit %(limit)s
"""

# Of each group, from the end of its part of an index.
_LATEST_OF = """
select example.id from unnest(%(groups)s::text[]) as named (event_group) cross join lateral (
    select event.id from spark_outbox_events as event
    where {condition} and event.status = '{state}' and event.event_group = named.event_group
    order by event.finished_at desc limit %(each)s
) as example
"""
_ASIDE = "event.status in ('running', 'unhandled', 'failed')"
_ENDED = "not event.is_pruned"

EXAMPLES = " union all ".join(
    [_LATEST_OF.format(state=state, condition=_ENDED) for state in ("done", "discarded")]
    + [_LATEST_OF.format(state=state, condition=_ASIDE) for state in ("failed", "unhandled", "running")]
)
EXAMPLES = f"""
(
    {EXAMPLES}
) union all (
    select id from (
        select id, row_number() over (partition by event_group order by id desc) as place
        from ({_pending(LOOKED_AT // 10)}) as pending where event_group = any(%(groups)s)
    ) as latest
    where place <= %(each)s
)
"""

EVENT = """
select
    id, key, event_group as "group", status, attempts, available_at, ordering_key, created_at,
    finished_at,
    last_error, digest is not null as is_pruned, payload, headers
from spark_outbox_event where key = %(key)s
"""

EVENT_WITHOUT_PAYLOAD = f"""
select {_COLUMNS}, last_error, is_pruned, null as payload, null as headers
from spark_outbox_events where key = %(key)s
"""

DELIVERIES = """
select
    handler, status, attempts, available_at, attempted_at,
    extract(epoch from duration)::float as duration, worker, error, traceback
from spark_outbox_delivery
where event_id = (select id from spark_outbox_event where key = %(key)s)
order by id
"""


def rows(sql: str, params: Mapping[str, Any] | None = None, *, using: str) -> list[Row]:
    """Run one of the queries above."""
    found = fetch(f"select to_jsonb(seen)::text from ({sql}) as seen", params, using=using)
    return [json.loads(text, parse_int=_whole, parse_float=_decimal) for (text,) in found]


def _whole(text: str) -> int | str:
    """Return a number of a payload; as text, if it is longer than Python converts."""
    return int(text) if len(text) < 1000 else text


def _decimal(text: str) -> float | str:
    """Return a number of a payload; as text, if a float would be another one."""
    number = float(text)
    return number if math.isfinite(number) and Decimal(repr(number)) == Decimal(text) else text


@dataclass(frozen=True, kw_only=True, slots=True)
class Filter:
    """Which events somebody wants to see; what is empty does not count."""

    state: str | None = None
    group: str = ""
    """A regular expression of PostgreSQL's."""
    handler: str = ""
    """That fails on the event, or has failed for good."""
    fingerprint: str = ""
    prefix: str = ""
    """Of the key."""
    seconds: float | None = None
    """Since it was emitted, at least."""


def events(wanted: Filter, *, limit: int, using: str) -> list[Row]:
    """Return the latest events among the first LOOKED_AT of their state; or that a handler fails on."""
    failing = wanted.handler or wanted.fingerprint
    sql = EVENTS.format(source=_FAILING if failing else _SOURCES[wanted.state])
    return rows(sql, {**asdict(wanted), "limit": limit}, using=using)


def examples(groups: Sequence[str], *, each: int, using: str) -> list[int]:
    """Return the ids of the latest events of these groups: up to `each` in each state."""
    found = fetch(EXAMPLES, {"groups": list(groups), "each": each}, using=using)
    return [event_id for (event_id,) in found]
