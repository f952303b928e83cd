"""Lists of events and of deliveries, a page at a time, for those who turn pages.

A page reads one source: a range of ids, in their order; or else a sample of LOOKED_AT rows, which come
from the ends of indexes. So it reads no more, at any size of the tables.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from spark_outbox.models import EventStatus
from spark_outbox.store.connection import fetch_value
from spark_outbox.store.reading import HIGHEST_ID, LOWEST_ID
from spark_outbox.store.viewing import LOOKED_AT, Row, rows

MOST_GROUPS = 100
"""To choose from."""

OF_EACH = LOOKED_AT // 10
"""How many of a group, or of a kind of failure, a sample may have."""


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
    """The delivery's; it fails on the event, or has failed for good."""
    error: str = ""
    """A part of its text, in any case."""


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
    """The rows of a page, the latest first, and how far it has looked for them."""

    rows: list[Row]
    looked_at: int
    lowest: int | None
    highest: int | None
    is_sample: bool
    is_all: bool
    """The source had no more."""


_IN_STATE = {state: f"status = '{state}' and not is_pruned" for state in EventStatus.values}

# From one group to the next, so not through all of their events.
_GROUPS = """
with recursive stored (event_group) as (
    (
        select event_group from spark_outbox_events where {state} order by event_group limit 1
    )
    union all
    select following.event_group from stored cross join lateral (
        select event.event_group from spark_outbox_events as event
        where {state} and event.event_group > stored.event_group
        order by event.event_group limit 1
    ) as following
)
"""

_OF_ALL_GROUPS = f"""
{_GROUPS}
select latest.* from (select * from stored limit 1000) as named cross join lateral (
    select event.* from spark_outbox_events as event
    where {{state}} and event.event_group = named.event_group
    order by event.finished_at desc limit {OF_EACH}
) as latest
limit {LOOKED_AT}
"""

_OF_A_GROUP = f"""
select * from spark_outbox_events where {{state}} and event_group = %(group)s
order by finished_at desc limit {LOOKED_AT}
"""

_PENDING = " union all ".join(
    f"""(
        select * from spark_outbox_events
        where status = 'pending' and available_at is {time} and ordering_key is {order}
        order by {place} desc limit {LOOKED_AT // 4}
    )"""
    for order in ("null", "not null")
    for time, place in (("null", "id"), ("not null", "available_at"))
)

_IN_ORDER = """
select {columns} from {table} where id between %(lowest)s and %(highest)s
order by id {way} limit %(most)s
"""

_FAILING = f"""
with recursive kind (handler, fingerprint) as (
    (
        select handler, spark_outbox_fingerprint(error) from spark_outbox_delivery as delivery
        where status in ('pending', 'failed') and error <> '' {{of_handler}}
        order by handler, spark_outbox_fingerprint(error) limit 1
    )
    union all
    select following.* from kind cross join lateral (
        select delivery.handler, spark_outbox_fingerprint(delivery.error)
        from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> '' {{of_handler}}
            and (delivery.handler, spark_outbox_fingerprint(delivery.error))
                > (kind.handler, kind.fingerprint)
        order by delivery.handler, spark_outbox_fingerprint(delivery.error) limit 1
    ) as following
)
select latest.* from (select * from kind limit 1000) as named cross join lateral (
    select {{columns}} from spark_outbox_delivery as delivery
    where delivery.status in ('pending', 'failed') and delivery.error <> ''
        and delivery.handler = named.handler
        and spark_outbox_fingerprint(delivery.error) = named.fingerprint
    order by delivery.attempted_at desc limit {OF_EACH}
) as latest
limit {LOOKED_AT}
"""

_DELIVERY = (
    "id, event_id, handler, status, attempts, available_at, attempted_at, duration, worker, error"
)

_HAS_ERROR = "(%(error)s = '' or position(lower(%(error)s) in lower(error)) > 0)"

# `limit 1`, or else it might read all events to join them.
_ITS_EVENT = "(select * from spark_outbox_events where id = {id} limit 1)"

_EVENTS_OF_FAILING = f"""
select event.* from (select distinct event_id from looked where {_HAS_ERROR}) as failing
cross join lateral {_ITS_EVENT.format(id="failing.event_id")} as event
"""

_MATCHES = """
id between %(lowest)s and %(highest)s and (%(state)s = '' or status = %(state)s)
"""

_EVENT_MATCHES = """
(%(group)s = '' or event_group = %(group)s)
and (%(prefix)s = '' or left(key, length(%(prefix)s)) = %(prefix)s)
"""

_EVENT = """
id, key, event_group as "group", status, attempts, available_at, ordering_key, created_at, finished_at,
is_pruned, left(split_part(last_error, E'\\n', 1), 500) as error
"""

_EVENT_PAGE = f"""
select {_EVENT} from ({{candidates}}) as event where {_MATCHES} and {_EVENT_MATCHES}
order by id {{way}} limit %(limit)s
"""

_DELIVERY_PAGE = f"""
select
    delivery.id, delivery.event_id, handler, delivery.status, delivery.attempts, delivery.available_at,
    attempted_at, extract(epoch from duration)::float as duration, worker,
    left(split_part(error, E'\\n', 1), 500) as error, event.key, event.event_group as "group"
from (
    select * from looked where {_MATCHES} and {_HAS_ERROR}
        and (%(handler)s = '' or handler = %(handler)s)
) as delivery
cross join lateral {_ITS_EVENT.format(id="delivery.event_id")} as event
where {_EVENT_MATCHES}
order by delivery.id {{way}} limit %(limit)s
"""

_LIST = """
with looked as materialized ({source}), page as ({page})
select
    (select count(*) from looked) as looked_at, (select min(id) from looked) as lowest,
    (select max(id) from looked) as highest,
    (select coalesce(jsonb_agg(to_jsonb(page) order by page.id desc), '[]') from page) as found
"""


def events(wanted: Wanted, where: Range, *, size: int, using: str) -> Found:
    """Return a page of events, and one more if there is one."""
    candidates = "select * from looked"
    if wanted.key:
        source = "select * from spark_outbox_events where key = %(key)s"
    elif wanted.handler or wanted.error:
        source, candidates = _failing(wanted), _EVENTS_OF_FAILING
    elif wanted.group or wanted.state:
        states = [wanted.state] if wanted.state in _IN_STATE else _IN_STATE
        source = " union all ".join(f"({_of_state(state, wanted)})" for state in states)
    else:
        source = _in_order("spark_outbox_events", "*", where)
    return _list(source, _EVENT_PAGE, wanted, where, size, using, candidates=candidates)


def deliveries(wanted: Wanted, where: Range, *, size: int, using: str) -> Found:
    """Return a page of deliveries, and one more if there is one."""
    if wanted.key:
        source = (
            f"select {_DELIVERY} from spark_outbox_delivery "
            f"where event_id = (select id from spark_outbox_event where key = %(key)s) limit {LOOKED_AT}"
        )
    elif wanted.handler or wanted.error or wanted.state == "failed":
        source = _failing(wanted)
    elif wanted.state == "running":
        source = (
            f"select {_DELIVERY} from spark_outbox_delivery where status = 'running' limit {LOOKED_AT}"
        )
    else:
        source = _in_order("spark_outbox_delivery", _DELIVERY, where)
    return _list(source, _DELIVERY_PAGE, wanted, where, size, using)


def _of_state(state: str, wanted: Wanted) -> str:
    if state == "pending":
        return _PENDING
    return (_OF_A_GROUP if wanted.group else _OF_ALL_GROUPS).format(state=_IN_STATE[state])


def _failing(wanted: Wanted) -> str:
    of_handler = "and delivery.handler = %(handler)s" if wanted.handler else ""
    return _FAILING.format(of_handler=of_handler, columns=_DELIVERY)


def _way(where: Range) -> str:
    return "desc" if where.after is None else "asc"


def _in_order(table: str, columns: str, where: Range) -> str:
    return _IN_ORDER.format(table=table, columns=columns, way=_way(where))


def _list(
    source: str, page: str, wanted: Wanted, where: Range, size: int, using: str, **parts: str
) -> Found:
    is_sample = "%(most)s" not in source
    most = LOOKED_AT if is_sample or wanted != Wanted() else size + 1
    sql = _LIST.format(source=source, page=page.format(way=_way(where), **parts))
    params = {**asdict(wanted), **where.params, "limit": size + 1, "most": most}
    (found,) = rows(sql, params, using=using)
    looked_at = found["looked_at"]
    return Found(
        found["found"], looked_at, found["lowest"], found["highest"], is_sample, looked_at < most
    )


EVENTS_BY_ID = f"select {_EVENT} from spark_outbox_events where id = any(%(ids)s) order by id"

DELIVERY_BY_ID = "select id, event_id, handler from spark_outbox_delivery where id = %(id)s"


def events_by_id(ids: Iterable[int], *, using: str) -> list[Row]:
    return rows(EVENTS_BY_ID, {"ids": list(ids)}, using=using)


def delivery_by_id(delivery_id: int, *, using: str) -> Row | None:
    found = rows(DELIVERY_BY_ID, {"id": delivery_id}, using=using)
    return found[0] if found else None


# Those of events that have ended, and of the latest: of what is pending there is no index by group.
STORED_GROUPS = " union ".join(
    [
        "select event_group from (select event_group from spark_outbox_events order by id desc limit 1000)"
        " as latest",
        *(
            f"({_GROUPS.format(state=condition)} select event_group from stored limit {MOST_GROUPS})"
            for state, condition in _IN_STATE.items()
            if state != "pending"
        ),
    ]
)

GROUPS = f"select event_group from ({STORED_GROUPS}) as stored order by 1 limit {MOST_GROUPS}"

ESTIMATE = "select reltuples::bigint from pg_class where oid = to_regclass(%s)"


def groups(*, using: str) -> list[str]:
    """Return names of groups, the first in their order."""
    return [row["event_group"] for row in rows(GROUPS, using=using)]


def estimate(table: str, *, using: str) -> int:
    """Return about how many rows a table has, as the server saw it last; less than 0: it did not look."""
    return int(fetch_value(ESTIMATE, [table], using=using))
