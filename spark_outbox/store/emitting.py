"""Write events. Runs on the caller's connection, in the outbox that its search_path finds."""

import datetime as dt
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from django.db import IntegrityError

from spark_outbox.errors import IdCollision
from spark_outbox.store.connection import as_columns, fetch_here


class NewRow(NamedTuple):
    """An event, ready to be written. `delay` is added to the database's clock."""

    key: str
    group: str
    payload: str
    headers: str
    ordering_key: str | None
    available_at: dt.datetime | None
    delay: dt.timedelta | None
    key_is_generated: bool = False


INSERT = """
insert into spark_outbox_event
    (key, event_group, payload, headers, ordering_key, available_at, key_is_generated)
values
    (%s, %s, %s::jsonb, %s::jsonb, %s, coalesce(%s, statement_timestamp() + %s::interval), %s)
on conflict do nothing
returning id, (extract(epoch from created_at) * 1000000)::bigint
"""

# The same for most events: without order, ready at once, and with a key that somebody chose.
INSERT_READY = """
insert into spark_outbox_event (key, event_group, payload, headers)
values (%s, %s, %s::jsonb, %s::jsonb)
on conflict do nothing
returning id, (extract(epoch from created_at) * 1000000)::bigint
"""

# A function, which allots the ids in the order given, and writes in that of the keys.
# Each function is told which table is meant: if it is that of another outbox, found in another schema of
# the search_path, it raises undefined_function.
INSERT_MANY = """
select spark_outbox_emit_many(
    'spark_outbox_event'::regclass,
    %s::text[], %s::text[], %s::text, %s::text, %s::text[], %s::timestamptz[], %s::interval[],
    %s::boolean[], %s
)
"""

# What was written as done, and has not been handled since, is to be handled after all. Not each role may
# change what an event says.
REOPEN = """
update spark_outbox_event set status = 'pending', finished_at = null{changes}
where key = %(key)s and status = 'done' and finished_at = created_at and digest is null
returning id
"""
CHANGES = ", event_group = %(group)s, payload = %(payload)s::jsonb"

# Of an INSERT that wrote nothing: whether a row of the key is the reason, or one of the same id.
CHECK_KEY = "select spark_outbox_check_keys('spark_outbox_event'::regclass, array[%s::text])"
PRIMARY_KEY = "spark_outbox_event_pkey"


def insert(row: NewRow, *, using: str) -> tuple[int, int] | None:
    """Write one event; return its id and its time in microseconds, or None if its key exists.

    Waits for a transaction that has written the same key and not ended yet.
    """
    is_ready = row[4:8] == (None, None, None, False)
    sql, params = (INSERT_READY, row[:4]) if is_ready else (INSERT, row)
    stored = fetch_here(sql, params, using=using)
    return stored[0] if stored else None


def insert_many(rows: Sequence[NewRow], *, as_done: bool = False, using: str) -> list[int]:
    """Write events in one statement, all or none of them; return the places of the new ones, from 1.

    Ids follow the order of `rows`. With `as_done` they are not to be handled. Raises IdCollision.
    """
    with _collisions():
        new: list[int] = fetch_here(INSERT_MANY, [*_columns(rows), as_done], using=using)[0][0]
        return new


def _columns(rows: Sequence[NewRow]) -> list[Any]:
    """Return the arguments of INSERT_MANY. A column that has the default in every row is not sent."""
    keys, groups, payloads, headers, ordering_keys, times, delays, generated = as_columns(rows)
    return [
        _text_array(keys),
        _text_array(groups),
        _lines(payloads),
        None if _all_are("{}", headers) else _lines(headers),
        None if _all_are(None, ordering_keys) else _text_array(ordering_keys),
        None if _all_are(None, times) else times,
        None if _all_are(None, delays) else delays,
        None if _all_are(False, generated) else generated,
    ]


def _all_are(value: Any, column: list[Any]) -> bool:
    return column.count(value) == len(column)


def _text_array(texts: list[str | None]) -> str:
    """Return a text[] literal: psycopg takes its time over lists."""
    quoted = [
        "NULL" if text is None else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        for text in texts
    ]
    return "{" + ",".join(quoted) + "}"


def _lines(objects: list[str]) -> str:
    """Return JSON objects, one a line: `dump` writes no line breaks."""
    return "\n".join(objects)


def reopen(row: NewRow, *, is_changed: bool, using: str) -> bool:
    """Make an event pending that was written as done; return whether it was. If it is changed, it gets
    its new group and payload."""
    sql = REOPEN.format(changes=CHANGES if is_changed else "")
    params = {"key": row.key}
    if is_changed:
        params |= {"group": row.group, "payload": row.payload}
    return bool(fetch_here(sql, params, using=using))


def check_key(key: str, *, using: str) -> None:
    """Raise IdCollision if there is no event of this key."""
    with _collisions():
        fetch_here(CHECK_KEY, [key], using=using)


@contextmanager
def _collisions() -> Iterator[None]:
    """Raise IdCollision for what spark_outbox_check_keys() raises."""
    try:
        yield
    except IntegrityError as error:
        diagnostic = getattr(error.__cause__, "diag", None)
        if diagnostic is None or diagnostic.constraint_name != PRIMARY_KEY:
            raise
        raise IdCollision(f"{diagnostic.message_primary} {diagnostic.message_hint}") from error


# A function, so that who emits need not be allowed to read what others have emitted.
SAME_EVENT = "select spark_outbox_is_same('spark_outbox_event'::regclass, %s, %s, %s::jsonb)"


def is_same(row: NewRow, *, using: str) -> bool:
    """Return whether the event that is stored under this key has this group and payload."""
    return bool(fetch_here(SAME_EVENT, [row.key, row.group, row.payload], using=using)[0][0])
