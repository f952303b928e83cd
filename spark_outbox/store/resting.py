"""The outlook of a worker that found nothing to claim: when to look again, and why."""

import math
from typing import Any, NamedTuple

from django.db import connections
from psycopg import ClientCursor

from spark_outbox.store import prepared, waking
from spark_outbox.store.connection import addressed, fetch, rows_of, send, send_several
from spark_outbox.store.filtering import IS_MINE
from spark_outbox.store.scanning import ORDERED, PIECE, UNORDERED


class Outlook(NamedTuple):
    """The reasons to look again, for a worker that found nothing to claim."""

    ready: bool
    """There are ready or due events, of any group: another transaction may hold their rows."""
    ordered: bool
    """The same of events with an ordering key, which may have to wait for others of it."""
    due_in: float
    """Seconds until the next delayed event; infinity if there is none. With groups it may be less."""
    running: bool
    """There are events that detached handlers are at work on, here or elsewhere; or seem to be."""
    unhandled: bool
    """There are events that some worker had no handler for."""
    oid: int
    """The table's."""

    @property
    def has_events(self) -> bool:
        """There are events that somebody could claim, now or once others let them go."""
        return self.ready or self.ordered


# The first of each, rather than exists(): for that a planner may choose to read the table to its end.
OUTLOOK = """
select
    {ready} is not null or {due} is not null,
    {ordered_ready} is not null or {ordered_due} is not null,
    extract(epoch from least({next}, {ordered_next}) - statement_timestamp())::float,
    (
        select id from spark_outbox_delivery where status = 'running' order by session limit 1
    ) is not null or (
        select min(event_group) from spark_outbox_event where status = 'running'
    ) is not null,
    (select min(event_group) from spark_outbox_event where status = 'unhandled') is not null,
    'spark_outbox_event'::regclass::oid::integer
"""

READY = """(
    select min(id) from spark_outbox_event
    where status = 'pending' and available_at is null and {kind}
)"""

DUE = """(
    select min(available_at) from spark_outbox_event
    where status = 'pending' and {kind} and available_at <= statement_timestamp()
)"""

NEXT_DUE = """(
    select nullif(min(available_at), 'infinity') from spark_outbox_event
    where status = 'pending' and {kind} and available_at > statement_timestamp()
)"""

# Among the next that are due; if none of them is ours, the last of them is when to look again.
NEXT_DUE_OF_GROUPS = f"""(
    select nullif(
        case
            when bool_or(is_mine) then min(available_at) filter (where is_mine)
            when count(*) = {PIECE} then max(available_at)
        end,
        'infinity'
    )
    from (
        select available_at, {IS_MINE} as is_mine from spark_outbox_event
        where status = 'pending' and {{kind}} and available_at > statement_timestamp()
        order by available_at, id limit {PIECE}
    ) as next
)"""


PREPARED_OUTLOOK = "spark_outbox_outlook"
LOOK = f"execute {PREPARED_OUTLOOK}"

# In this order, each with a snapshot of its own, whatever the session's isolation level is.
FALL_ASLEEP = f"""
begin isolation level read committed; {waking.TAKE_S}; {waking.PROBE_K}; {LOOK}; commit
"""


class Asleep(NamedTuple):
    """A worker that is about to sleep."""

    holds_s: bool
    oid: int
    """The table's whose S it holds."""
    is_safe: bool
    """It holds S, and no transaction that has emitted is open: whoever emits from now on notifies."""
    outlook: Outlook
    """Read after that."""


def prepare(*, groups: str | None, using: str) -> None:
    """Prepare the outlook, in a session that lasts."""
    sql = addressed(outlook_sql(groups=groups), using)
    sql = ClientCursor(connections[using].connection).mogrify(sql, {"groups": groups})
    prepared.prepare(PREPARED_OUTLOOK, sql, using=using)


def fall_asleep(*, listens: bool, using: str) -> Asleep:
    """LISTEN, unless the session `listens`; take S, unless somebody has it for himself; probe K; and
    look; all in one round trip.

    In a session that is prepared, and in no transaction.
    """
    connection, raw = connections[using], connections[using].connection
    sql = _heard(addressed(FALL_ASLEEP, using), listens=listens)
    let_go = addressed(waking.LET_GO_OF_S.format(oid=waking.OID), using)  # else we have S twice
    with connection.wrap_database_errors:
        results = prepared.insist(lambda: send_several(sql, raw), raw, undo=let_go)
        ((holds_s, oid),), ((is_free,),), (found,) = (rows_of(result, raw) for result in results[-4:-1])
    return Asleep(holds_s, oid, holds_s and is_free, _as_outlook(found))


def look(*, listens: bool, using: str) -> Outlook:
    """Look once more, after `fall_asleep` in the same session."""
    raw, sql = connections[using].connection, _heard(LOOK, listens=listens)
    with connections[using].wrap_database_errors:
        (row,) = rows_of(prepared.insist(lambda: send(sql, raw), raw), raw)
    return _as_outlook(row)


def _heard(sql: str, *, listens: bool) -> str:
    return sql if listens else f"{waking.LISTEN}; {sql}"


def outlook(*, groups: str | None, using: str) -> Outlook:
    (row,) = fetch(outlook_sql(groups=groups), {"groups": groups}, using=using)
    return _as_outlook(row)


def _as_outlook(row: Any) -> Outlook:
    ready, ordered, due_in, running, unhandled, oid = row
    return Outlook(ready, ordered, math.inf if due_in is None else due_in, running, unhandled, oid)


def outlook_sql(*, groups: str | None) -> str:
    parts = {"ready": READY, "due": DUE, "next": NEXT_DUE if groups is None else NEXT_DUE_OF_GROUPS}
    unordered = {name: part.format(**UNORDERED) for name, part in parts.items()}
    ordered = {f"ordered_{name}": part.format(**ORDERED) for name, part in parts.items()}
    return OUTLOOK.format(**unordered, **ordered)
