"""Lock events that are ready or due.

One table and no join: PostgreSQL then checks the conditions again on the row it has locked, so a row
that another worker has settled meanwhile is not claimed a second time. FOR NO KEY UPDATE lets a handler
insert rows that refer to the event.
"""

from typing import Any, NamedTuple

from django.db import connections
from psycopg import ClientCursor

from spark_outbox.events.event import StoredRow
from spark_outbox.store import prepared
from spark_outbox.store.connection import addressed, fetch, fetch_value
from spark_outbox.store.reading import EVENT_COLUMNS, LOWEST_ID, select_events, with_documents


class Due(NamedTuple):
    """A place in the index of due events. The time is text, as PostgreSQL's range is not Python's."""

    time: str
    id: int


EARLIEST = Due("-infinity", LOWEST_ID)

CLAIM_READY = f"""
select {EVENT_COLUMNS} from spark_outbox_event
where status = 'pending' and available_at is null and ordering_key is null and id >= %(floor)s
order by id limit %(limit)s
for no key update skip locked
"""

PREPARED_CLAIM = "spark_outbox_claim"

CLAIM_DUE = f"""
select {EVENT_COLUMNS} from spark_outbox_event
where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
    and (available_at, id) > (%(time)s::timestamptz, %(id)s)
order by available_at, id limit %(limit)s
for no key update skip locked
"""

# The condition on time is checked again on the row that is locked: somebody may have postponed it.
CLAIM_IDS = f"""
select {EVENT_COLUMNS} from spark_outbox_event
where id = any(%s) and status = 'pending'
    and (available_at is null or available_at <= statement_timestamp())
for no key update skip locked
"""

STILL_READY = """
select id from spark_outbox_event
where id = any(%s) and status = 'pending'
    and (available_at is null or available_at <= statement_timestamp())
"""

IS_UNFINISHED = """
select exists (select from spark_outbox_event where id = %s and status in ('pending', 'running'))
"""

CLAIM_ONE = """
select id from spark_outbox_event
where id = %s and status = 'pending'
for no key update skip locked
"""


def prepare(*, using: str) -> None:
    """Prepare the claim of ready events, in a session that lasts."""
    sql = addressed(CLAIM_READY, using) % {"floor": "$1", "limit": "$2"}
    prepared.prepare(PREPARED_CLAIM, sql, types="(bigint, bigint)", using=using)


def can_begin(*, using: str) -> bool:
    """Return whether a transaction can begin with the prepared claim."""
    return prepared.can_begin(PREPARED_CLAIM, using=using)


def claim_ready(floor: int, limit: int, *, first: str = "", using: str) -> list[StoredRow]:
    """Lock up to `limit` ready events with an id of `floor` or more, lowest first.

    `first` is a query to run before that, in the same round trip where the driver can.
    """
    return _claim(CLAIM_READY, using, first, floor=floor, limit=limit)


def begin_with_ready(floor: int, limit: int, *, first: str = "", using: str) -> list[StoredRow]:
    """Do the same and begin the transaction with it, if that `can_begin`: `first` runs ahead of it.

    The plan may be one for a table that was small: not for claims among many.
    """
    rows = prepared.begin_with(PREPARED_CLAIM, f"({floor}, {limit})", first=first, using=using)
    return with_documents(rows, using)


def claim_due(limit: int, *, after: Due = EARLIEST, using: str) -> list[StoredRow]:
    """Lock up to `limit` delayed or failed events whose time has come, earliest first."""
    return _claim(CLAIM_DUE, using, limit=limit, time=after.time, id=after.id)


def claim_ids(ids: list[int], *, using: str) -> list[StoredRow]:
    """Lock those of these events that are ready or due, and nobody else's; in the order of `ids`."""
    rows = {row.id: row for row in select_events(CLAIM_IDS, ids, using)}
    return [rows[event_id] for event_id in ids if event_id in rows]


def still_ready(ids: list[int], *, using: str) -> set[int]:
    """Return those of these events that are ready or due, whoever holds them."""
    return {event_id for (event_id,) in fetch(STILL_READY, [ids], using=using)}


def is_unfinished(event_id: int, *, using: str) -> bool:
    return bool(fetch_value(IS_UNFINISHED, [event_id], using=using))


def claim_one(event_id: int, *, using: str) -> bool:
    """Lock one event; return whether it is still pending, and nobody else's."""
    return bool(fetch(CLAIM_ONE, [event_id], using=using))


def _claim(sql: str, using: str, first: str = "", **params: Any) -> list[StoredRow]:
    sql = addressed(sql, using)
    with connections[using].cursor() as cursor:
        if not first:
            cursor.execute(sql, params)
        elif isinstance(cursor.cursor, ClientCursor):
            cursor.execute(f"{first}; {sql}", params)
            cursor.nextset()
        else:
            cursor.execute(first)
            cursor.execute(sql, params)
        return with_documents(cursor.fetchall(), using)  # as they come: to make StoredRows takes time
