"""Lists of events and of deliveries, a page at a time, for those who turn pages.

Without conditions a page is a range of ids. Else it comes from a sample: up to LOOKED_AT rows, which are
read off the ends of indexes. So it reads no more, at any size of the tables. Call all of it in a
transaction, whose plans it changes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from spark_outbox.store import sampling, stepping
from spark_outbox.store.connection import execute, fetch_value
from spark_outbox.store.reading import HIGHEST_ID, LOWEST_ID
from spark_outbox.store.viewing import LOOKED_AT, REASON, Row, rows

MOST_GROUPS = 100
"""To choose from."""

# A plan that sorts reads all that it sorts, and statistics may not know yet how much that is.
IN_ORDER = (
    "select set_config('enable_bitmapscan', 'off', true), set_config('enable_seqscan', 'off', true)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which events or deliveries a page is to show; what is empty does not count."""

    key: str = ""
    """All of the event's key."""
    prefix: str = ""
    """Of the event's key."""
    state: str = ""
    group: str = ""
    """All of its name."""
    handler: str = ""
    """All of its name. Of the events it finds those that this handler fails on or runs on."""
    error: str = ""
    """A part of its text, in any case."""
    fingerprint: str | None = None
    """All of it, and the empty one counts. It finds what fails so, or has failed for good."""


class Range(NamedTuple):
    """Where a page begins: after an id or before one, which is not in it. Else it has the latest."""

    before: int | None = None
    after: int | None = None

    @property
    def params(self) -> dict[str, int]:
        highest = HIGHEST_ID if self.before is None else max(self.before - 1, LOWEST_ID)
        lowest = LOWEST_ID if self.after is None else min(self.after + 1, HIGHEST_ID)
        return {"lowest": lowest, "highest": highest}


class Found(NamedTuple):
    """The rows of a page, the latest first."""

    rows: list[Row]
    number: int
    """How many were found in the sample."""
    looked_at: int
    """How many rows the sample has; 0 if it is all."""
    is_sample: bool


class Query(NamedTuple):
    sql: str
    is_sample: bool


# What of a source is wanted

# `limit 1`, or else it might read all events to join them.
_ITS_EVENT = f"({sampling.EVENTS} where id = {{id}} limit 1)"

_HAS_ERROR = f"""
    (%(error)s = '' or position(lower(%(error)s) in lower(delivery.error)) > 0)
    and (%(fingerprint)s::text is null or {sampling.OF_KIND})
"""

_EVENT_FITS = """
    (%(group)s = '' or event_group = %(group)s)
    and (%(prefix)s = '' or starts_with(key, %(prefix)s))
"""

# No `exists`: PostgreSQL might read all deliveries to hash them.
_EVENT_MATCHES = f"""
    {_EVENT_FITS} and (%(state)s = '' or status = %(state)s and not is_pruned)
    and (%(handler)s = '' and %(fingerprint)s::text is null
            and (%(error)s = '' or position(lower(%(error)s) in lower(last_error)) > 0)
        or (
            select true from spark_outbox_delivery as delivery
            where delivery.event_id = event.id and {_HAS_ERROR}
                and (%(handler)s = '' or delivery.handler = %(handler)s)
            limit 1
        )
    )
"""

_EVENTS_OF_DELIVERIES = f"""
    select event.*
    from (select distinct event_id from looked as delivery where {_HAS_ERROR}) as failing
    cross join lateral {_ITS_EVENT.format(id="failing.event_id")} as event
"""

_MATCHING_EVENTS = f"""
    select distinct on (id) id, key, event_group, status, attempts, available_at, ordering_key,
        created_at, finished_at, is_pruned, last_error
    from ({{candidates}}) as event where {_EVENT_MATCHES} order by id
"""

_MATCHING_DELIVERIES = f"""
    select distinct on (delivery.id)
        delivery.id, delivery.event_id, handler, delivery.status, delivery.attempts,
        delivery.available_at, attempted_at, duration, worker, error, event.key, event.event_group
    from (
        select * from looked as delivery where {_HAS_ERROR}
            and (%(state)s = '' or status = %(state)s) and (%(handler)s = '' or handler = %(handler)s)
    ) as delivery
    cross join lateral {_ITS_EVENT.format(id="delivery.event_id")} as event
    where {_EVENT_FITS} order by delivery.id
"""

_EVENT_SHOWN = f"""
    id, key, event_group as "group", status, attempts, available_at, created_at, finished_at, is_pruned,
    {REASON} as error
"""

_DELIVERY_SHOWN = """
    id, event_id, handler, status, attempts, available_at, attempted_at,
    extract(epoch from duration)::float as duration, worker,
    left(split_part(error, E'\\n', 1), 500) as error, key, event_group as "group"
"""

_LIST = """
with looked as materialized ({source}), found as materialized ({matching}),
page as (
    select {shown} from found where id between %(lowest)s and %(highest)s
    order by id {way} limit %(limit)s
)
select
    (select count(*) from found) as number, (select count(*) from looked) as looked_at,
    (select coalesce(bool_or(is_cut), false) from looked) as is_cut,
    (select coalesce(jsonb_agg(to_jsonb(page) order by page.id desc), '[]') from page) as found
"""


def events(wanted: Wanted, where: Range, *, size: int, using: str) -> Found:
    """Return a page of events, and one more if there is one."""
    return _found(events_sql(wanted, where), wanted, where, size=size, using=using)


def events_sql(wanted: Wanted, where: Range) -> Query:
    candidates, is_sample = "select * from looked", True
    if wanted.key:
        source = sampling.piece(f"{sampling.EVENTS} where key = %(key)s", 2)
    elif wanted.prefix:
        source = sampling.with_prefix(LOOKED_AT)
    elif wanted.fingerprint is not None:
        source, candidates = sampling.of_kind(wanted.handler, LOOKED_AT // 2), _EVENTS_OF_DELIVERIES
    elif wanted.handler or wanted.error:
        sources = [sampling.failing(wanted.handler, LOOKED_AT // 2), sampling.running(LOOKED_AT // 10)]
        source, candidates = " union all ".join(sources), _EVENTS_OF_DELIVERIES
        if not wanted.handler:  # what can't be read fails without a delivery
            failed = sampling.of_state("failed", wanted.group, LOOKED_AT // 5)
            candidates += f" union all select {sampling.EVENT} from ({failed}) as failed"
    elif wanted.state:
        source = sampling.of_state(wanted.state, wanted.group, LOOKED_AT)
    elif wanted.group:
        most = LOOKED_AT // len(sampling.IN_STATE)
        sources = [sampling.of_state(state, wanted.group, most) for state in sampling.IN_STATE]
        source = " union all ".join(sources)
    else:
        source, is_sample = _in_range(sampling.EVENTS, where), False
    matching = _MATCHING_EVENTS.format(candidates=candidates)
    return Query(_list(source, matching, _EVENT_SHOWN, where), is_sample)


def deliveries(wanted: Wanted, where: Range, *, size: int, using: str) -> Found:
    """Return a page of deliveries, and one more if there is one."""
    return _found(deliveries_sql(wanted, where), wanted, where, size=size, using=using)


def deliveries_sql(wanted: Wanted, where: Range) -> Query:
    if wanted == Wanted():
        source = _in_range(sampling.DELIVERIES, where)
    elif wanted.key:
        its_event = "(select id from spark_outbox_events where key = %(key)s)"
        source = sampling.piece(f"{sampling.DELIVERIES} where event_id = {its_event}", LOOKED_AT)
    elif wanted.prefix:
        events = sampling.with_prefix(LOOKED_AT // 2)
        source = f"""
            select {", ".join(f"its.{name}" for name in sampling.DELIVERY.split(", "))}, event.is_cut
            from ({events}) as event left join lateral (
                {sampling.DELIVERIES} where event_id = event.id limit 20
            ) as its on starts_with(event.key, %(prefix)s)
        """
    elif wanted.fingerprint is not None:
        source = sampling.of_kind(wanted.handler, LOOKED_AT // 2)
    else:
        sources = [sampling.failing(wanted.handler, LOOKED_AT // 2), sampling.running(LOOKED_AT // 10)]
        latest = sampling.piece(f"{sampling.DELIVERIES} order by id desc", LOOKED_AT // 5)
        source = " union all ".join([*sources, latest])
    return Query(_list(source, _MATCHING_DELIVERIES, _DELIVERY_SHOWN, where), wanted != Wanted())


def _list(source: str, matching: str, shown: str, where: Range) -> str:
    return _LIST.format(source=source, matching=matching, shown=shown, way=_way(where))


def _way(where: Range) -> str:
    return "desc" if where.after is None else "asc"


def _in_range(source: str, where: Range) -> str:
    ids = f"{source} where id between %(lowest)s and %(highest)s order by id {_way(where)}"
    return sampling.piece(ids, "%(limit)s")


def params(wanted: Wanted, where: Range, size: int) -> dict[str, str | int | None]:
    return {**asdict(wanted), **where.params, "limit": size + 1}


def _found(query: Query, wanted: Wanted, where: Range, *, size: int, using: str) -> Found:
    execute(IN_ORDER, using=using)
    (found,) = rows(query.sql, params(wanted, where, size), using=using)
    looked_at = found["looked_at"] if query.is_sample and found["is_cut"] else 0
    return Found(found["found"], found["number"], looked_at, query.is_sample)


# By id, and what else the pages need

EVENTS_BY_ID = """
select
    id, key, event_group as "group", status, attempts, available_at, ordering_key, created_at,
    finished_at, is_pruned
from spark_outbox_events where id = any(%(ids)s) order by id
"""

HAS_KEY = "select exists (select from spark_outbox_events where key = %s)"

DELIVERY_BY_ID = f"""
select
    delivery.id, event_id, handler, delivery.status, delivery.attempts, delivery.available_at,
    attempted_at, extract(epoch from duration)::float as duration, worker, error, traceback,
    event.key, event.event_group as "group"
from spark_outbox_delivery as delivery
cross join lateral {_ITS_EVENT.format(id="delivery.event_id")} as event
where delivery.id = %(id)s
"""


def events_by_id(ids: Sequence[int], *, using: str) -> list[Row]:
    """Return events without payloads and errors, in the order of their ids."""
    return rows(EVENTS_BY_ID, {"ids": list(ids)}, using=using)


def has_key(key: str, *, using: str) -> bool:
    return bool(fetch_value(HAS_KEY, [key], using=using))


def delivery_by_id(delivery_id: int, *, using: str) -> Row | None:
    return next(iter(rows(DELIVERY_BY_ID, {"id": delivery_id}, using=using)), None)


# Those of events that have ended, and of the latest: of what is pending there is no index by group.
_LATEST = "select event_group from spark_outbox_events order by id desc limit 1000"

_STORED_GROUPS = " union ".join(
    [
        f"(select event_group from ({_LATEST}) as latest)",
        *(
            f"(with recursive {stepping.groups('stored', condition)} "
            f"select event_group from stored limit {MOST_GROUPS})"
            for state, condition in sampling.IN_STATE.items()
            if state != "pending"
        ),
    ]
)

GROUPS = f"""
select event_group from ({_STORED_GROUPS}) as stored order by event_group limit {MOST_GROUPS}
"""

ESTIMATE = "select reltuples::bigint from pg_class where oid = to_regclass(%s)"


def groups(*, using: str) -> list[str]:
    """Return names of groups, the first in their order: up to MOST_GROUPS."""
    execute(IN_ORDER, using=using)
    return [row["event_group"] for row in rows(GROUPS, {}, using=using)]


def estimate(table: str, *, using: str) -> int:
    """Return about how many rows a table has, as the server saw it last; less than 0 if it never did."""
    return int(fetch_value(ESTIMATE, [table], using=using))
