"""For people's tests: read all events, and move them in time."""

import datetime as dt
from collections.abc import Sequence
from typing import Any

from psycopg.sql import quote

from spark_outbox.events.event import StoredRow
from spark_outbox.store.connection import (
    Using,
    execute,
    fetch,
    fetch_value,
    past_wrappers,
)
from spark_outbox.store.reading import EVENT_COLUMNS, with_documents

Found = tuple[StoredRow, str, str]
"""An event, its status and its last error."""

LAST_ID = "select coalesce(max(id), 0) from spark_outbox_event"

EVENTS_AFTER = f"""
select {EVENT_COLUMNS}, status, last_error from spark_outbox_event where id > %s order by id
"""

EVENTS_BY_KEY = f"""
select {EVENT_COLUMNS}, status, last_error from spark_outbox_event where key = %s
"""

# But for what waits for the end of a pause, which is no time.
ADVANCE = """
update {table} set available_at = available_at - %s
where status = 'pending' and available_at < '9999-01-01'
"""

# As due events, of which the earliest comes first.
REVERSE = """
update spark_outbox_event as event
set available_at = statement_timestamp() - numbered.number * interval '1 millisecond'
from (
    select id, row_number() over (order by id) as number from spark_outbox_event
    where status = 'pending' and available_at is null and ordering_key is null
) as numbered
where event.id = numbered.id
"""

SEQUENCES = """
select coalesce(json_agg(json_build_object(
    'name', format('%I.%I', schemaname, sequencename),
    'value', coalesce(last_value, start_value),
    'is_called', last_value is not null
)), '[]')
from pg_sequences
"""

RESTART = """
select count(setval(name::regclass, value, is_called))
from json_to_recordset({sequences}) as sequence (name text, value bigint, is_called boolean)
join pg_sequences on name = format('%I.%I', schemaname, sequencename)
where last_value is distinct from case when is_called then value end
"""

# Also by statements that were rolled back. Rows are counted for the partition that holds them.
TABLES_WRITTEN = """
with recursive written (id) as (
    select relid from pg_stat_xact_user_tables where n_tup_ins + n_tup_upd + n_tup_del > 0
    union
    select inhparent from written join pg_inherits on inhrelid = id
)
select name from unnest(%s::text[]) as name where to_regclass(name) in (select id from written)
"""

# As a commit does, but leaving them as deferred as they are.
CHECK_CONSTRAINTS = """
savepoint spark_outbox_check; set constraints all immediate; rollback to savepoint spark_outbox_check
"""

# A transaction inside of a test's.
BEGIN = "savepoint spark_outbox_begin"
END = "release savepoint spark_outbox_begin"
COMMIT = f"{CHECK_CONSTRAINTS}; {END}"
ROLL_BACK = f"rollback to savepoint spark_outbox_begin; {END}"


def last_id(*, using: str) -> int:
    return int(fetch_value(LAST_ID, using=using))


def events_after(last: int, *, using: str) -> list[Found]:
    """Return the events with a higher id than `last`, in order."""
    return _found(EVENTS_AFTER, last, using)


def events_by_key(key: str, *, using: str) -> list[Found]:
    return _found(EVENTS_BY_KEY, key, using)


def _found(sql: str, param: Any, using: str) -> list[Found]:
    rows = with_documents(fetch(sql, [param], using=using), using)
    return [(StoredRow._make(columns), status, error) for *columns, status, error in rows]


def advance(by: dt.timedelta, *, using: str) -> None:
    """Bring the times nearer that pending events and deliveries wait for."""
    for table in ("spark_outbox_delivery", "spark_outbox_event"):
        execute(ADVANCE.format(table=table), [by], using=using)


def reverse(*, using: str) -> None:
    """Let ready events without an ordering key be handled in the reverse order of their ids."""
    execute(REVERSE, using=using)


def sequences(*, using: Using) -> str:
    """Return where sequences are. Like those below, it runs past all wrappers."""
    return str((past_wrappers(SEQUENCES, using).get_value(0, 0) or b"").decode())


def restart(sequences: str, *, using: Using) -> None:
    """Let sequences go on from where they were, which no rollback does."""
    past_wrappers(RESTART.format(sequences=quote(sequences)), using)


def tables_written(names: Sequence[str], *, using: str) -> set[str]:
    """Return the tables of these quoted names that this transaction has written."""
    return {name for (name,) in fetch(TABLES_WRITTEN, [list(names)], using=using)}


def check_constraints(*, using: Using) -> None:
    """Raise what a commit would raise for deferred constraints."""
    past_wrappers(CHECK_CONSTRAINTS, using)


def touch(*, using: Using) -> None:
    """Have psycopg begin the transaction that Django has begun."""
    execute("select", using=using)


def begin(*, using: Using) -> None:
    past_wrappers(BEGIN, using)


def commit(*, using: Using) -> None:
    past_wrappers(COMMIT, using)


def roll_back(*, using: Using) -> None:
    past_wrappers(ROLL_BACK, using)
