"""Questions of system checks, and of workers before they begin.

Questions about events read a bounded number of rows, and all but one the view without payloads, which
more roles may read.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from django.db import connections

from spark_outbox.conf import FINAL_STATES
from spark_outbox.events.event import StoredRow
from spark_outbox.store.connection import Using, fetch, fetch_value
from spark_outbox.store.reading import EVENTS_BY_ID, EVERY_OTHER

HAS_OUTBOX = "select to_regclass('spark_outbox_status') is not null"


def has_outbox(*, using: str) -> bool:
    """Return whether the migrations of spark_outbox have run in this database."""
    return bool(fetch_value(HAS_OUTBOX, using=using))


# For people. It never sets the sequence back. migrations/sql/0001_emitting.sql has the same text.
PUT_IDS_RIGHT = (
    "select setval('spark_outbox_event_id_seq', "
    "greatest(nextval('spark_outbox_event_id_seq'), max(id))) from spark_outbox_event;"
)
IDS_ARE_BEHIND = "select spark_outbox_ids_are_behind()"


def ids_are_behind(*, using: str) -> bool:
    """Return whether the sequence is yet to give out an id that an event has."""
    return bool(fetch_value(IDS_ARE_BEHIND, using=using))


BACKEND = "select pg_backend_pid()"


def is_pooled(*, using: str) -> bool:
    """Return whether a pooler gives others this connection's session between two transactions.

    The process id that a pooler gives its client is no backend's. Then a second connection is made: if
    sessions don't last, they share a backend, or the first one's changes. False within a transaction.
    """

    def backend(connection: Using) -> int:
        return int(fetch_value(BACKEND, using=connection))

    first = backend(using)
    raw: Any = connections[using].connection
    if raw.info.backend_pid == first:
        return False
    second = connections[using].copy()
    try:
        return any(backend(second) == first or backend(using) != first for _ in range(3))
    finally:
        second.close()


MOST_GROUPS = 1000
LOOKED_AT = 1000
"""How many pending events of each kind are looked at, and of which state how many groups."""

RECENT = timedelta(days=14)
"""As long as workers keep what is done, unless the project says otherwise."""

_RECENTLY = f"statement_timestamp() - interval '{RECENT.days} days'"

# From one group to the next, so not through all of their events.
_GROUPS = f"""(
    with recursive named (event_group) as (
        (
            select event_group from spark_outbox_events where status = '{{state}}' and not is_pruned
            order by event_group limit 1
        )
        union all
        select following.event_group from named cross join lateral (
            select event.event_group from spark_outbox_events as event
            where event.status = '{{state}}' and not event.is_pruned
                and event.event_group > named.event_group
            order by event.event_group limit 1
        ) as following
    )
    select event_group, exists (
        select from spark_outbox_events as event
        where event.status = '{{state}}' and not event.is_pruned
            and event.event_group = named.event_group
            and event.finished_at > {_RECENTLY}
    )
    from (select * from named limit {MOST_GROUPS}) as named
)"""
GROUPS = " union all ".join(_GROUPS.format(state=state) for state in FINAL_STATES)

IS_OLD = f"""
select created_at < {_RECENTLY} from spark_outbox_events order by id limit 1
"""

PENDING = " union all ".join(
    f"""(
        select id, key, event_group from spark_outbox_events
        where status = 'pending' and available_at is {time} and ordering_key is {order}
        order by {place} limit {LOOKED_AT}
    )"""
    for order in ("null", "not null")
    for time, place in (("null", "id"), ("not null", "available_at, id"))
)

# The limit keeps the planner from reading all deliveries.
OWED = """
select handler, count(*), min(key)
from unnest(%(ids)s::bigint[], %(keys)s::text[]) as event (id, key) cross join lateral (
    select handler from spark_outbox_delivery
    where event_id = event.id and status = 'pending' limit 1000
) as delivery
where handler <> all(%(handlers)s)
group by handler order by handler
"""


READABLE = """
select
    has_table_privilege(to_regclass('spark_outbox_events'), 'select'),
    has_table_privilege(to_regclass('spark_outbox_event'), 'select'),
    has_table_privilege(to_regclass('spark_outbox_delivery'), 'select')
"""


class Readable(NamedTuple):
    """What this role may read."""

    events: bool
    payloads: bool
    deliveries: bool


class Pending(NamedTuple):
    """A pending event, without its payload."""

    id: int
    key: str
    group: str


class Counted(NamedTuple):
    """How many events there are of this group, or owed to this handler, and the key of one."""

    name: str
    number: int
    key: str


class Recent(NamedTuple):
    """The groups of which events ended in the last two weeks."""

    groups: set[str]
    are_all: bool
    """There are no more groups than were looked at."""


def readable(*, using: str) -> Readable:
    (row,) = fetch(READABLE, using=using)
    return Readable(*map(bool, row))


def recent_groups(*, using: str) -> Recent:
    rows = fetch(GROUPS, using=using)
    return Recent({group for group, is_recent in rows if is_recent}, len(rows) < MOST_GROUPS)


def is_old(*, using: str) -> bool:
    """Return whether the oldest event was emitted more than two weeks ago."""
    rows = fetch(IS_OLD, using=using)
    return bool(rows and rows[0][0])


def pending(*, using: str) -> list[Pending]:
    """Return the oldest pending events: ready and delayed, each with and without an order."""
    return list(map(Pending._make, fetch(PENDING, using=using)))


def owed(events: Sequence[Pending], handlers: Sequence[str], *, using: str) -> list[Counted]:
    """Return what these events owe to other handlers than these."""
    params = {
        "ids": [event.id for event in events],
        "keys": [event.key for event in events],
        "handlers": [EVERY_OTHER, *handlers],
    }
    return list(map(Counted._make, fetch(OWED, params, using=using)))


def small_rows(ids: Sequence[int], *, using: str) -> list[StoredRow]:
    """Return those of these events whose payload and headers are not large."""
    rows = map(StoredRow._make, fetch(EVENTS_BY_ID, [list(ids)], using=using))
    return [row for row in rows if row.payload is not None and row.headers is not None]
