"""The outlook of a worker that found nothing to claim: when to look again, and why."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from django.db import connections
from psycopg import ClientCursor
from psycopg.errors import DuplicatePreparedStatement, InvalidSqlStatementName

from spark_outbox.store import waking
from spark_outbox.store.connection import addressed, fetch
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


# The last ones are a min(), since for exists() a planner may choose to read the table to its end.
OUTLOOK = """
select
    exists (
        select from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is null
    ) or exists (
        select from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
    ),
    exists (
        select from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is not null
    ) or exists (
        select from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is not null
    ),
    extract(epoch from least({unordered}, {ordered}) - statement_timestamp())::float,
    exists (select from spark_outbox_delivery where status = 'running')
        or (select min(event_group) from spark_outbox_event where status = 'running') is not null,
    (select min(event_group) from spark_outbox_event where status = 'unhandled') is not null,
    'spark_outbox_event'::regclass::oid::integer
"""

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


# To plan the outlook takes several times as long as to read it.
PREPARE = "prepare spark_outbox_outlook as {outlook}"
DEALLOCATE = "deallocate spark_outbox_outlook"
LOOK = "execute spark_outbox_outlook"

# In this order, each with a snapshot of its own, whatever the session's isolation level is.
FALL_ASLEEP = "begin isolation level read committed; {take_s}; {probe_k}; {look}; commit"


class Asleep(NamedTuple):
    """A worker that is about to sleep."""

    holds_s: bool
    is_safe: bool
    """It holds S, and no transaction that has emitted is open: whoever emits from now on notifies."""
    outlook: Outlook
    """Read after that."""


def prepare(*, groups: str | None, using: str) -> None:
    """Prepare the outlook in a session that lasts, in place of another worker's."""
    sql = addressed(PREPARE.format(outlook=outlook_sql(groups=groups)), using)
    with _cursor(using) as cursor:
        try:
            cursor.execute(sql, {"groups": groups})
        except DuplicatePreparedStatement:
            cursor.execute(DEALLOCATE)
            cursor.execute(sql, {"groups": groups})


def fall_asleep(*, groups: str | None, using: str) -> Asleep:
    """Take S, unless somebody has it for himself; probe K; and look; all in one round trip.

    In a session that is prepared, and in no transaction.
    """
    sql = FALL_ASLEEP.format(take_s=waking.TAKE_S, probe_k=waking.PROBE_K, look=LOOK)
    with _cursor(using) as cursor:
        try:
            cursor.execute(addressed(sql, using))
        except InvalidSqlStatementName:  # a handler has deallocated it
            connections[using].connection.rollback()
            let_go = waking.LET_GO_OF_S.format(oid=waking.OID)
            cursor.execute(addressed(let_go, using))  # it outlasts the rollback
            prepare(groups=groups, using=using)
            cursor.execute(addressed(sql, using))
        (holds_s, _), (is_free,), found = (_next_row(cursor) for _ in range(3))
    return Asleep(holds_s, holds_s and is_free, _as_outlook(found))


def look(*, using: str) -> Outlook:
    """Look once more, after `fall_asleep` in the same session."""
    with _cursor(using) as cursor:
        cursor.execute(LOOK)
        return _as_outlook(cursor.fetchone())


@contextmanager
def _cursor(using: str) -> Iterator[ClientCursor[Any]]:
    """Open a cursor that sends several statements as one, whatever the project's cursors do."""
    connection = connections[using]
    with connection.wrap_database_errors, ClientCursor(connection.connection) as cursor:
        yield cursor


def _next_row(cursor: ClientCursor[Any]) -> Any:
    cursor.nextset()
    return cursor.fetchone()


def outlook(*, groups: str | None, using: str) -> Outlook:
    (row,) = fetch(outlook_sql(groups=groups), {"groups": groups}, using=using)
    return _as_outlook(row)


def _as_outlook(row: Any) -> Outlook:
    ready, ordered, due_in, running, unhandled, oid = row
    return Outlook(ready, ordered, math.inf if due_in is None else due_in, running, unhandled, oid)


def outlook_sql(*, groups: str | None) -> str:
    next_due = NEXT_DUE if groups is None else NEXT_DUE_OF_GROUPS
    unordered, ordered = (next_due.format(kind=parts["kind"]) for parts in (UNORDERED, ORDERED))
    return OUTLOOK.format(unordered=unordered, ordered=ordered)
