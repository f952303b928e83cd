"""Every SQL statement that spark_outbox runs, one constant each, next to what maps its rows.

Functions run on the Django connection `using`, in whatever transaction it is in. It is an alias; some
functions also take a connection that has none. Times are the database's. Outcomes are written under a
guard, `status = 'pending'` on a row that this transaction has locked, and say how many rows they applied
to.
"""

import datetime as dt
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import IntegrityError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import ClientCursor, Connection
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.sql import quote

from spark_outbox.errors import IdCollision, UnreadablePayload
from spark_outbox.events.decoding import MAX_STORED
from spark_outbox.events.event import StoredRow

Using = str | BaseDatabaseWrapper

# Which outbox: on a worker's connection the one that its search_path found first, by its schema,
# whatever a handler makes of the search_path. Elsewhere the one that the caller's search_path finds.

SCHEMA = """
select relnamespace::regnamespace::text from pg_class where oid = to_regclass('spark_outbox_event')
"""

_schemas: "WeakKeyDictionary[Connection[Any], str]" = WeakKeyDictionary()
_TABLE = re.compile(r"(?<![\w.])spark_outbox_(?:event|delivery|session)\b")


def fix_schema(*, using: str) -> None:
    """Have statements on this connection mean the outbox that its search_path finds now."""
    (schema,) = _rows(SCHEMA, using=using)[0]
    _schemas[connections[using].connection] = schema


@contextmanager
def fixed_schema(*, using: str) -> Iterator[None]:
    """Do what `fix_schema` does, for the block, unless it has been done."""
    connection = connections[using]
    connection.ensure_connection()
    raw = connection.connection
    if raw in _schemas:
        yield
        return
    fix_schema(using=using)
    try:
        yield
    finally:
        _schemas.pop(raw, None)


def _addressed(sql: str, using: Using) -> str:
    raw = _connection(using).connection
    schema = None if raw is None else _schemas.get(raw)
    return sql if schema is None else _qualified(sql, schema)


@lru_cache(maxsize=512)
def _qualified(sql: str, schema: str) -> str:
    return _TABLE.sub(lambda table: f"{schema}.{table[0]}", sql)


def _connection(using: Using) -> BaseDatabaseWrapper:
    return connections[using] if isinstance(using, str) else using


def _run(sql: str, params: Any = None, *, using: Using) -> int:
    """Run a statement; return how many rows it wrote."""
    with _connection(using).cursor() as cursor:
        cursor.execute(_addressed(sql, using), params)
        return int(cursor.rowcount)


def _rows(sql: str, params: Any = None, *, using: Using) -> list[Any]:
    return _rows_here(_addressed(sql, using), params, using=using)


def _rows_here(sql: str, params: Any = None, *, using: Using) -> list[Any]:
    """Do it in the outbox that the caller's search_path finds."""
    with _connection(using).cursor() as cursor:
        cursor.execute(sql, params)
        return list(cursor.fetchall())


def value(sql: str, params: Any = None, *, using: Using) -> Any:
    """Run a statement of this module; return the first value of its first row."""
    return _rows(sql, params, using=using)[0][0]


def run_query(sql: str, *, using: str) -> None:
    """Run a query of this module whose rows nobody needs."""
    _rows(sql, using=using)


def _columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Turn rows into the arrays that `unnest` turns into rows again."""
    return [list(column) for column in zip(*rows, strict=True)]


# Emit


class NewRow(NamedTuple):
    """An event, ready to be written. `delay` is added to the database's clock."""

    key: str
    group: str
    payload: str
    headers: str
    ordering_key: str | None
    available_at: dt.datetime | None
    delay: dt.timedelta | None


INSERT = """
insert into spark_outbox_event
    (key, event_group, payload, headers, ordering_key, available_at)
values
    (%s, %s, %s::jsonb, %s::jsonb, %s, coalesce(%s, statement_timestamp() + %s::interval))
on conflict do nothing
returning id, (extract(epoch from created_at) * 1000000)::bigint
"""

# The same for most events: without order, and ready at once.
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
    %s::text[], %s::text[], %s::jsonb[], %s::jsonb[], %s::text[], %s::timestamptz[], %s::interval[]
)
"""

# Of an INSERT that wrote nothing: whether a row of the key is the reason, or one of the same id.
CHECK_KEY = "select spark_outbox_check_keys('spark_outbox_event'::regclass, array[%s::text])"
PRIMARY_KEY = "spark_outbox_event_pkey"


def insert(row: NewRow, *, using: str) -> tuple[int, int] | None:
    """Write one event; return its id and its time in microseconds, or None if its key exists.

    Waits for a transaction that has written the same key and not ended yet.
    """
    is_ready = row[4:] == (None, None, None)
    sql, params = (INSERT_READY, row[:4]) if is_ready else (INSERT, row)
    stored = _rows_here(sql, params, using=using)
    return stored[0] if stored else None


def insert_many(rows: Sequence[NewRow], *, using: str) -> int:
    """Write events in one statement, all or none of them; return how many were new.

    Ids follow the order of `rows`. Raises IdCollision.
    """
    with _collisions():
        return int(_rows_here(INSERT_MANY, _columns(rows), using=using)[0][0])


def check_key(key: str, *, using: str) -> None:
    """Raise IdCollision if there is no event of this key."""
    with _collisions():
        _rows_here(CHECK_KEY, [key], using=using)


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
    return bool(_rows_here(SAME_EVENT, [row.key, row.group, row.payload], using=using)[0][0])


# Claim
#
# One table and no join: PostgreSQL then checks the conditions again on the row it has locked, so a
# row that another worker has settled meanwhile is not claimed a second time. FOR NO KEY UPDATE lets
# a handler insert rows that refer to the event.

# Whatever SQL has put into a row, it can be claimed. Times are within the years that Python knows;
# created_at in microseconds, since a datetime costs more to load than all the other columns, and few
# ask for it. Large documents are NULL here, so that a batch of them does not fill the memory: the
# stored size, compressed, costs nothing to know.
_COLUMNS = """
    id, key, event_group,
    case when pg_column_size(payload) < 8192 then payload::text end,
    case when pg_column_size(headers) < 8192 then headers::text end,
    ordering_key, attempts,
    (extract(epoch from least(greatest(created_at, '0001-01-02'), '9999-12-30')) * 1000000)::bigint,
    case when available_at is not null then least(greatest(available_at, '0001-01-02'), '9999-12-30') end
"""

LOWEST_ID = -(2**63) + 1
"""Of all but one: PostgreSQL takes the literal of the lowest bigint for no bigint."""


class Due(NamedTuple):
    """A place in the index of due events. The time is text, as PostgreSQL's range is not Python's."""

    time: str
    id: int


EARLIEST = Due("-infinity", LOWEST_ID)

# The array has it uncompressed. As text even that may be too large for PostgreSQL itself.
LARGE_DOCUMENT = """
select size, case when size <= %(limit)s then document::text end
from (
    select {column} as document, pg_column_size(array[{column}]) as size
    from spark_outbox_event where id = %(id)s
) as stored
"""

CLAIM_READY = f"""
select {_COLUMNS} from spark_outbox_event
where status = 'pending' and available_at is null and ordering_key is null and id >= %(floor)s
order by id limit %(limit)s
for no key update skip locked
"""

CLAIM_DUE = f"""
select {_COLUMNS} from spark_outbox_event
where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
    and (available_at, id) > (%(time)s::timestamptz, %(id)s)
order by available_at, id limit %(limit)s
for no key update skip locked
"""

# The condition on time is checked again on the row that is locked: somebody may have postponed it.
CLAIM_IDS = f"""
select {_COLUMNS} from spark_outbox_event
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

_IS_MINE = "event_group ~ %(groups)s"


def claim_ready(floor: int, limit: int, *, first: str = "", using: str) -> list[StoredRow]:
    """Lock up to `limit` ready events with an id of `floor` or more, lowest first.

    `first` is a query to run before that, in the same round trip where the driver can.
    """
    return _claim(CLAIM_READY, using, first, floor=floor, limit=limit)


def claim_due(limit: int, *, after: Due = EARLIEST, using: str) -> list[StoredRow]:
    """Lock up to `limit` delayed or failed events whose time has come, earliest first."""
    return _claim(CLAIM_DUE, using, limit=limit, time=after.time, id=after.id)


def claim_ids(ids: list[int], *, using: str) -> list[StoredRow]:
    """Lock those of these events that are ready or due, and nobody else's; in the order of `ids`."""
    rows = {row.id: row for row in _claim_ids(ids, using)}
    return [rows[event_id] for event_id in ids if event_id in rows]


def still_ready(ids: list[int], *, using: str) -> set[int]:
    """Return those of these events that are ready or due, whoever holds them."""
    return {event_id for (event_id,) in _rows(STILL_READY, [ids], using=using)}


# Look for events that this worker can handle, a piece of the index at a time: those of other groups,
# and those that wait for others of their ordering key, may be any number.


class Position(NamedTuple):
    """Where a piece ended: in the index of ready events, and in that of due ones."""

    id: int = LOWEST_ID
    due: Due = EARLIEST


class Piece(NamedTuple):
    """A bounded part of the index, read in its order. Locks nothing."""

    candidates: list[Any]
    """Ids of events that may be handled; or of ordered ones their keys, as often as they have events."""
    end: Position
    is_full: bool
    """It has ended before the index did."""
    oldest: int
    """The oldest transaction that had written and not ended yet."""
    next: int
    """The transaction that comes after all that had written by then."""


PIECE = 1000
"""How many entries of each index one look reads."""

READ_PIECE = """
with ready as materialized (
    select id, {what} as candidate, {mine} as is_mine from spark_outbox_event
    where status = 'pending' and available_at is null and {kind} and id > %(id)s
    order by id limit %(piece)s
),
due as materialized (
    select available_at, id, {what} as candidate, {mine} as is_mine from spark_outbox_event
    where status = 'pending' and {kind} and available_at <= statement_timestamp()
        and (available_at, id) > (%(time)s::timestamptz, %(due_id)s)
    order by available_at, id limit %(piece)s
)
select
    array(select candidate from ready where is_mine order by id),
    (select count(*) from ready), (select max(id) from ready),
    array(select candidate from due where is_mine order by available_at, id),
    (select count(*) from due), last.available_at::text, last.id,
    pg_snapshot_xmin(now.snapshot)::text::bigint, pg_snapshot_xmax(now.snapshot)::text::bigint
from (select pg_current_snapshot() as snapshot) as now
left join lateral (
    select available_at, id from due order by available_at desc, id desc limit 1
) as last on true
"""

# Each has an index of ready events and one of due ones.
UNORDERED = {"kind": "ordering_key is null", "what": "id"}
ORDERED = {"kind": "ordering_key is not null", "what": "ordering_key"}


def read_piece(after: Position, *, ordered: bool, groups: str | None, using: str) -> Piece:
    """Read what comes `after` a position, up to PIECE ready and PIECE due events."""
    params = {"id": after.id, "time": after.due.time, "due_id": after.due.id, "piece": PIECE}
    sql = piece_sql(ordered=ordered, groups=groups)
    (row,) = _rows(sql, {**params, "groups": groups}, using=using)
    ready, ready_count, last_id, due, due_count, last_time, last_due_id, oldest, following = row
    pairs = itertools.zip_longest(ready, due)
    return Piece(
        candidates=[each for pair in pairs for each in pair if each is not None],
        end=Position(
            after.id if last_id is None else last_id,
            after.due if last_time is None else Due(last_time, last_due_id),
        ),
        is_full=PIECE in (ready_count, due_count),
        oldest=oldest,
        next=following,
    )


def piece_sql(*, ordered: bool, groups: str | None) -> str:
    parts = ORDERED if ordered else UNORDERED
    return READ_PIECE.format(mine="true" if groups is None else _IS_MINE, **parts)


# Claim in order: of each ordering key the *head*, its lowest unfinished event, and what follows it.
# Whoever has locked the head may handle the key; nobody else's head can be of the same key.

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
    """What a look at some ordering keys came to. Those that have nothing to do are in none of these."""

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
    parts = {"unfinished": UNFINISHED[failed], "mine": "true" if groups is None else _IS_MINE}

    def rows(sql: str, **params: Any) -> list[Any]:
        return _rows(sql.format(**parts), {"groups": groups, **params}, using=using)

    ready: dict[int, str] = {}
    others: list[str] = []
    for event_id, key, is_ready, is_mine in rows(HEADS, keys=keys):
        if is_ready and is_mine:
            ready[event_id] = key
        elif is_ready:
            others.append(key)
    wanted = list(ready)[:limit]
    left = list(ready.values())[limit:]
    heads = {str(row.ordering_key): row for row in _claim_ids(wanted, using)} if wanted else {}
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
    locked = {row.id: row for row in _claim_ids(followers, using)} if followers else {}
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


# To others, as the trigger does to those who sleep; see worker/wake.py.
WAKE_OTHERS = """
select case when (
    case when pg_try_advisory_xact_lock_shared(7531001, oid) then
        case when pg_try_advisory_lock(7531002, oid) then pg_advisory_unlock(7531002, oid) end
    end
) is not true then pg_notify('spark_outbox', '') end
from (select 'spark_outbox_event'::regclass::oid::integer as oid) as outbox
"""


def wake_others(*, using: str) -> None:
    """Notify workers that sleep, when the transaction commits."""
    _rows(WAKE_OTHERS, using=using)


def hand_over(keys: list[str], *, failed: str, groups: str, using: str) -> bool:
    """Wake workers of other groups if one of them can go on with one of these keys."""
    parts = {"unfinished": UNFINISHED[failed], "mine": _IS_MINE}
    heads = _rows(HEADS.format(**parts), {"keys": keys, "groups": groups}, using=using)
    is_theirs = any(is_ready and not is_mine for _, _, is_ready, is_mine in heads)
    if is_theirs:
        wake_others(using=using)
    return is_theirs


def _claim_ids(ids: list[int], using: str) -> list[StoredRow]:
    return _events(CLAIM_IDS, ids, using)


def is_unfinished(event_id: int, *, using: str) -> bool:
    return bool(value(IS_UNFINISHED, [event_id], using=using))


def claim_one(event_id: int, *, using: str) -> bool:
    """Lock one event; return whether it is still pending, and nobody else's."""
    return bool(_rows(CLAIM_ONE, [event_id], using=using))


def _claim(sql: str, using: str, first: str = "", **params: Any) -> list[StoredRow]:
    sql = _addressed(sql, using)
    with connections[using].cursor() as cursor:
        if not first:
            cursor.execute(sql, params)
        elif isinstance(cursor.cursor, ClientCursor):
            cursor.execute(f"{first}; {sql}", params)
            cursor.nextset()
        else:
            cursor.execute(first)
            cursor.execute(sql, params)
        return _stored(cursor.fetchall(), using)  # as they come: to make StoredRows takes time


def _stored(rows: Iterable[Any], using: str) -> list[Any]:
    """Put what fetches a large document in its place."""
    return [
        row if row[3] is not None and row[4] is not None else _with_large(row, using) for row in rows
    ]


def _events(sql: str, param: Any, using: str) -> list[StoredRow]:
    return list(map(StoredRow._make, _stored(_rows(sql, [param], using=using), using)))


def _with_large(row: Sequence[Any], using: str) -> tuple[Any, ...]:
    event_id, key, group, payload, headers, *others = row
    if payload is None:
        payload = partial(_large_document, "payload", event_id, using)
    if headers is None:
        headers = partial(_large_document, "headers", event_id, using)
    return (event_id, key, group, payload, headers, *others)


def _large_document(column: str, event_id: int, using: str) -> str:
    params = {"limit": MAX_STORED, "id": event_id}
    found = _rows(LARGE_DOCUMENT.format(column=column), params, using=using)
    if not found:
        raise UnreadablePayload(f"The {column} can't be read any more: its event was deleted.")
    size, text = found[0]
    if text is None:
        raise UnreadablePayload(
            f"{size:,} bytes are too many for the {column}: no more than {MAX_STORED:,} are read."
        )
    return str(text)


def _with_groups(sql: str, groups: str | None) -> str:
    return sql.format(groups="" if groups is None else f"and {_IS_MINE}")


class Outlook(NamedTuple):
    """What a worker that found nothing to claim can expect."""

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
        select available_at, {_IS_MINE} as is_mine from spark_outbox_event
        where status = 'pending' and {{kind}} and available_at > statement_timestamp()
        order by available_at, id limit {PIECE}
    ) as next
)"""


def outlook(*, groups: str | None, using: str) -> Outlook:
    ((ready, ordered, due_in, running, unhandled, oid),) = _rows(
        outlook_sql(groups=groups), {"groups": groups}, using=using
    )
    return Outlook(ready, ordered, math.inf if due_in is None else due_in, running, unhandled, oid)


def outlook_sql(*, groups: str | None) -> str:
    next_due = NEXT_DUE if groups is None else NEXT_DUE_OF_GROUPS
    unordered, ordered = (next_due.format(kind=parts["kind"]) for parts in (UNORDERED, ORDERED))
    return OUTLOOK.format(unordered=unordered, ordered=ordered)


CHECK_GROUPS = "select '' ~ %s"


def check_groups(pattern: str, *, using: str) -> None:
    """Raise DataError if `pattern` is no regular expression to PostgreSQL."""
    _rows(CHECK_GROUPS, [pattern], using=using)


# Settle


FateRow = tuple[int, str, str, bool, dt.timedelta | None]
"""An event's id, its next status, its last error, whether it is due now, and when to look again."""


class Stored(NamedTuple):
    """A delivery as it is before this batch."""

    status: str
    attempts: int
    due_for: float | None
    """Seconds, a day at the most, for which it has been due; None if it is not."""
    died: bool
    """It is to be tried again since its worker process died of it, or seemed to."""

    @property
    def is_due(self) -> bool:
        return self.due_for is not None


COUNT_PENDING = "select count(*) from spark_outbox_event where id = any(%s) and status = 'pending'"

_ONE_MORE = "least(greatest(attempts, 0), 2147483646) + 1"  # of an integer, whatever SQL has put there

FINISH = f"""
update spark_outbox_event
set status = %(status)s, attempts = {_ONE_MORE}, finished_at = statement_timestamp()
where id = any(%(ids)s::bigint[]) and status = 'pending'
"""

# After RECORD_RESULTS: a pending event waits for the first of its deliveries. Not for those that were
# due when this batch began and were not called in it: this worker does not have their handlers, and the
# event would be due again at once, for ever.
SETTLE = f"""
update spark_outbox_event as event
set status = fate.status,
    attempts = {_ONE_MORE},
    last_error = coalesce(nullif(fate.error, ''), event.last_error),
    finished_at = case
        when fate.status in ('pending', 'running') then event.finished_at
        else statement_timestamp()
    end,
    available_at = case
        when fate.status = 'running' then null
        when fate.status <> 'pending' then event.available_at
        when fate.due_now then statement_timestamp()
        else coalesce(
            least(statement_timestamp() + fate.look_again, (
                select min(delivery.available_at)
                from spark_outbox_delivery as delivery
                where delivery.event_id = event.id and delivery.status = 'pending' and (
                    delivery.available_at > transaction_timestamp()
                    or delivery.attempted_at >= transaction_timestamp()
                )
            )),
            statement_timestamp()
        )
    end
from unnest(%s::bigint[], %s::text[], %s::text[], %s::boolean[], %s::interval[])
    as fate (event_id, status, error, due_now, look_again)
where event.id = fate.event_id and event.status = 'pending'
returning event.status
"""

RECORD_RESULTS = """
insert into spark_outbox_delivery as delivery
    (event_id, handler, status, error, traceback, duration, available_at, worker, session, attempts,
    attempted_at)
select
    event_id, handler, status, error, traceback, duration,
    coalesce(at, statement_timestamp() + delay), %s, case when status = 'running' then %s::integer end,
    counts::integer, statement_timestamp()
from unnest(
    %s::bigint[], %s::text[], %s::text[], %s::text[], %s::text[], %s::interval[], %s::interval[],
    %s::timestamptz[], %s::boolean[]
) as result (event_id, handler, status, error, traceback, duration, delay, at, counts)
on conflict (event_id, handler) do update set
    status = excluded.status,
    error = excluded.error,
    traceback = excluded.traceback,
    duration = excluded.duration,
    available_at = excluded.available_at,
    worker = excluded.worker,
    session = case
        when excluded.session is not null or excluded.attempts > 0 then excluded.session
        else delivery.session
    end,
    attempts = least(greatest(delivery.attempts, 0), 2147483646) + excluded.attempts,
    attempted_at = excluded.attempted_at
where delivery.status = 'pending'
"""

DISCARD_DELIVERIES = """
update spark_outbox_delivery
set status = 'discarded'
where event_id = any(%s) and status = 'pending'
"""

DELIVERIES = """
select
    event_id, handler, status, attempts,
    case when available_at is null or available_at <= statement_timestamp() then
        extract(
            epoch from
            statement_timestamp() - greatest(available_at, statement_timestamp() - interval '1 day')
        )::float
    end,
    status = 'pending' and error like 'spark\\_outbox.errors.WorkerDied:%%'
from spark_outbox_delivery
where event_id = any(%s)
"""


def count_pending(ids: list[int], *, using: str) -> int:
    return int(value(COUNT_PENDING, [ids], using=using))


def finish(ids: Sequence[int], status: str, *, using: str) -> int:
    """Give events their final status; return to how many it applied."""
    array = "{" + ",".join(map(str, ids)) + "}"  # psycopg takes its time over lists
    return _run(FINISH, {"ids": array, "status": status}, using=using)


def settle(fates: Sequence[FateRow], *, using: str) -> list[str]:
    """Give events their next status, and the reason for it; return the statuses of those to which it
    applied."""
    return [status for (status,) in _rows(SETTLE, _columns(fates), using=using)]


def record_results(results: Sequence[Sequence[Any]], *, worker: str, session: int, using: str) -> None:
    """Write deliveries. A row has an event's id, the handler's name, and the fields of a Result.

    Running ones belong to the worker that holds the lock of `session`.
    """
    _run(RECORD_RESULTS, [worker, session, *_columns(results)], using=using)


def discard_deliveries(event_ids: list[int], *, using: str) -> None:
    """Give up what finished events still owe: to handlers that no worker has any more."""
    _run(DISCARD_DELIVERIES, [event_ids], using=using)


def deliveries(event_ids: list[int], *, using: str) -> dict[int, dict[str, Stored]]:
    """Return deliveries, by event and handler's name."""
    found: dict[int, dict[str, Stored]] = {}
    for event_id, name, *columns in _rows(DELIVERIES, [event_ids], using=using):
        found.setdefault(event_id, {})[name] = Stored(*columns)
    return found


# Running deliveries. Whoever runs them holds an advisory lock on `session`, a random number, for as
# long as it is connected: who can take that lock knows that nobody is there any more. A delivery whose
# session is NULL is nobody's.

LOCK_SESSION = "select pg_try_advisory_lock(7531003, %s)"
UNLOCK_SESSION = "select pg_advisory_unlock(7531003, %s)"
IS_SESSION_GONE = "select pg_try_advisory_xact_lock(7531003, %s)"

RUNNING_SESSIONS = "select distinct session from spark_outbox_delivery where status = 'running'"

# Not found in a race: an event and its delivery begin to run, and stop, in one transaction.
_STRAYS = """
    select id from spark_outbox_event as event
    where status = 'running' and not exists (
        select from spark_outbox_delivery
        where event_id = event.id and status = 'running'
    )
"""

REOPEN_STRAYS = f"""
update spark_outbox_event set status = 'pending', available_at = statement_timestamp()
where id in ({_STRAYS} for no key update skip locked)
"""

REOPEN_SOME_STRAYS = f"""
update spark_outbox_event set status = 'pending', available_at = statement_timestamp()
where id in ({_STRAYS} and id = any(%s) for no key update skip locked)
"""

LOCK_RUNNING = """
select id from spark_outbox_event
where id = any(%s) and status = 'running'
order by id
for no key update
"""

# Of a worker that died, and did not just lose its connection to a server that was restarted.
_DIED = """
%(death)s <> '' and delivery.session is not null and delivery.attempted_at > pg_postmaster_start_time()
"""

TAKE_BACK = f"""
update spark_outbox_delivery as delivery
set status = 'pending', available_at = statement_timestamp(),
    session = case when {_DIED} then delivery.session end,
    attempts = least(greatest(delivery.attempts, 0), 2147483646) + ({_DIED})::integer,
    attempted_at = case when {_DIED} then statement_timestamp() else delivery.attempted_at end,
    error = case when {_DIED} then %(death)s else delivery.error end,
    traceback = case when {_DIED} then '' else delivery.traceback end
from unnest(%(events)s::bigint[], %(handlers)s::text[], %(sessions)s::integer[])
    as ended (event_id, handler, session)
where delivery.event_id = ended.event_id and delivery.handler = ended.handler
    and delivery.session is not distinct from ended.session and delivery.status = 'running'
returning delivery.event_id, delivery.handler
"""

HELD_BY = """
select coalesce(session, 0), status = 'running' from spark_outbox_delivery
where event_id = %s and handler = %s and status in ('running', 'pending', 'failed')
"""

# Whatever has come of it, unless another attempt has begun.
LOCK_TAKEN_OVER = """
select event.id from spark_outbox_event as event join spark_outbox_delivery as delivery
    on delivery.event_id = event.id
where event.id = %s and event.status in ('pending', 'failed')
    and delivery.handler = %s and delivery.session = %s and delivery.status in ('pending', 'failed')
for no key update skip locked
"""

UNCOUNT = """
update spark_outbox_delivery set status = 'pending', session = null, attempts = greatest(attempts, 1) - 1
where event_id = %s and handler = %s
"""

REOPEN_TAKEN_OVER = """
update spark_outbox_event
set status = 'pending', finished_at = null, attempts = greatest(attempts, 1) - %s
where id = %s
"""

RUNNING_OF = """
select event_id, handler, session from spark_outbox_delivery
where status = 'running' and session is not distinct from %s
"""

REOPEN_RUNNING = """
update spark_outbox_event
set status = 'pending', available_at = statement_timestamp(), attempts = greatest(attempts, 1) - %s
where id = any(%s) and status = 'running'
"""


class Running(NamedTuple):
    """A delivery that some worker has begun; it is that worker's while it has this session.

    If another takes it over, which counts as an attempt, it still says whose attempt that was.
    """

    event_id: int
    handler: str
    session: int | None


def lock_session(session: int, *, using: Using) -> bool:
    """Hold the lock of `session` for as long as this connection lives; False if somebody has it."""
    return bool(value(LOCK_SESSION, [session], using=using))


def unlock_session(session: int, *, using: Using) -> None:
    value(UNLOCK_SESSION, [session], using=using)


def running_sessions(*, using: str) -> list[int | None]:
    return [session for (session,) in _rows(RUNNING_SESSIONS, using=using)]


def is_session_gone(session: int | None, *, using: str) -> bool:
    """Return whether nobody holds the lock of `session`; then we do, until the transaction ends."""
    return session is None or bool(value(IS_SESSION_GONE, [session], using=using))


def held_by(event_id: int, handler: str, *, using: str) -> tuple[int, bool]:
    """Return the session of a delivery's last attempt, and whether that is still running.

    It is 0 if nobody knows it: the attempt has ended in the ordinary way, or in a worker's transaction.
    """
    found = _rows(HELD_BY, [event_id, handler], using=using)
    return found[0] if found else (0, False)


def undo_take_over(running: Running, *, to_settle: bool, using: str) -> bool:
    """Take back that a delivery's last attempt was counted as it was taken over, and make its event
    pending if it has failed of that; return whether that could be done now. See `take_back`.
    """
    if not _rows(LOCK_TAKEN_OVER, list(running), using=using):
        return False
    _run(UNCOUNT, list(running[:2]), using=using)
    _run(REOPEN_TAKEN_OVER, [int(to_settle), running.event_id], using=using)
    return True


def running_of(session: int | None, *, using: str) -> list[Running]:
    return list(map(Running._make, _rows(RUNNING_OF, [session], using=using)))


def take_back(
    running: Sequence[Running], *, to_settle: bool, death: str = "", using: str
) -> set[tuple[int, str]]:
    """Make deliveries, and their events, pending again; return those to which it applied.

    It does not apply to those that another worker has taken over. Locks the events first. With
    `to_settle` it is in order to settle them, which counts the pass that they are in once more.
    With `death`, the error to note, it counts as an attempt; but not if the server was restarted
    since the deliveries have begun, as that ends all sessions.
    """
    event_ids = sorted({event_id for event_id, _, _ in running})
    _rows(LOCK_RUNNING, [event_ids], using=using)
    ended = dict(zip(("events", "handlers", "sessions"), _columns(running), strict=True))
    taken = {tuple(row) for row in _rows(TAKE_BACK, {"death": death, **ended}, using=using)}
    _run(REOPEN_RUNNING, [int(to_settle), [event_id for event_id, _ in taken]], using=using)
    return taken


def running_events(session: int | None, *, using: str) -> list[int]:
    """Return the events of which deliveries run under a session."""
    return sorted({event_id for event_id, _, _ in running_of(session, using=using)})


def strays(*, using: str) -> list[int]:
    """Return running events of which no delivery runs.

    A person may have discarded the delivery, or SQL may have made the event so.
    """
    return [event_id for (event_id,) in _rows(_STRAYS, using=using)]


def reopen_strays(only: list[int] | None = None, *, using: str) -> int:
    """Make them, or some of them, pending again; return how many."""
    if only is None:
        return _run(REOPEN_STRAYS, using=using)
    return _run(REOPEN_SOME_STRAYS, [only], using=using)


# Workers' rows, which tell of an unclean end: see worker/crashes.py

ENLIST = """
insert into spark_outbox_session (session, name) values (%s, %s)
on conflict (session) do update
set event_id = null, handler = '', times = 0, started_at = excluded.started_at
"""

DISMISS = """
delete from spark_outbox_session where session in (
    select session from spark_outbox_session where session = any(%s) for update skip locked
)
"""

# Of one that was there before the server was restarted nobody knows whether it has died.
FALLEN_WORKERS = """
select
    session, event_id, handler,
    case when started_at > pg_postmaster_start_time() then times else 0 end
from spark_outbox_session
where session <> %s and pg_try_advisory_xact_lock(7531003, session)
"""

NOTE_CALL = """
update spark_outbox_session set event_id = %(event_id)s, handler = %(handler)s, times = %(times)s
where session = any(%(sessions)s)
"""


class FallenWorker(NamedTuple):
    """A worker that did not stop by itself; and the call that it was making, if it has noted one."""

    session: int
    event_id: int | None
    handler: str
    times: int


def enlist(session: int, name: str, *, using: str) -> None:
    """Write a worker's row; it has noted no call."""
    _run(ENLIST, [session, name], using=using)


def dismiss(sessions: list[int], *, using: str) -> None:
    """Delete workers' rows."""
    _run(DISMISS, [sessions], using=using)


def fallen_workers(session: int, *, using: str) -> list[FallenWorker]:
    """Return the other workers that are gone; nobody else finds them until the transaction ends."""
    return list(map(FallenWorker._make, _rows(FALLEN_WORKERS, [session], using=using)))


def note_call(
    sessions: list[int], event_id: int | None, handler: str, times: int, *, using: Using
) -> None:
    """Note which call workers are making, and how often in a row."""
    params = {"sessions": sessions, "event_id": event_id, "handler": handler, "times": times}
    _run(NOTE_CALL, params, using=using)


def forget_call(sessions: list[int], *, using: Using) -> None:
    """Note that workers are making no call."""
    note_call(sessions, None, "", 0, using=using)


# Unhandled events: a worker puts back those that its registry matches

# From one group to the next, so not through all of their events.
UNHANDLED_GROUPS = """
with recursive unhandled (event_group) as (
    select min(event_group) from spark_outbox_event where status = 'unhandled'
    union all
    select (
        select min(event.event_group) from spark_outbox_event as event
        where event.status = 'unhandled' and event.event_group > unhandled.event_group
    )
    from unhandled
    where unhandled.event_group is not null
)
select event_group from unhandled where event_group is not null {groups}
"""

PUT_BACK = """
update spark_outbox_event as event
set status = 'pending', finished_at = null, available_at = (
    select min(delivery.available_at)
    from spark_outbox_delivery as delivery
    where delivery.event_id = event.id and delivery.status = 'pending'
)
where id in (
    select id from spark_outbox_event
    where status = 'unhandled' and event_group = any(%(matched)s)
    limit %(limit)s
    for no key update skip locked
)
"""


def unhandled_groups(*, groups: str | None, using: str) -> list[str]:
    rows = _rows(_with_groups(UNHANDLED_GROUPS, groups), {"groups": groups}, using=using)
    return [group for (group,) in rows]


def put_back(matched: list[str], *, limit: int, using: str) -> int:
    """Make up to `limit` unhandled events of these groups pending again; return how many.

    They are ready, or due when what they owe is: another release may have tried them.
    """
    return _run(PUT_BACK, {"matched": matched, "limit": limit}, using=using)


# Replay: done events are owed to a handler once more

DONE_EVENTS = """
select id, event_group from spark_outbox_event
where status = 'done' and id > %(last)s
    and (%(since)s::timestamptz is null or created_at >= %(since)s)
    and (%(keys)s::text[] is null or key = any(%(keys)s::text[]))
order by id limit %(limit)s
"""

LOCK_DONE = """
select id, event_group from spark_outbox_event
where id = any(%s) and status = 'done'
for no key update skip locked
"""

OTHERS_ARE_DONE = """
insert into spark_outbox_delivery (event_id, handler, status)
select event_id, handler, 'done' from unnest(%s::bigint[], %s::text[]) as other (event_id, handler)
on conflict do nothing
"""

STATES_OF_KEYS = """
select key, event_group, status, created_at from spark_outbox_event where key = any(%s)
"""

OWE = """
insert into spark_outbox_delivery (event_id, handler, available_at)
select event_id, %s, statement_timestamp() from unnest(%s::bigint[]) as owed (event_id)
on conflict (event_id, handler) do update
set status = 'pending', attempts = 0, available_at = excluded.available_at
"""

REOPEN = """
update spark_outbox_event set status = 'pending', available_at = null, finished_at = null
where id = any(%s) and status = 'done'
"""

NOTIFY = "notify spark_outbox"

EVENTS_BY_ID = f"""
select {_COLUMNS} from spark_outbox_event where id = any(%s) order by id
"""

ROWS_WRITTEN = """
select relname, n_tup_ins + n_tup_upd + n_tup_del from pg_stat_xact_user_tables
where n_tup_ins + n_tup_upd + n_tup_del > 0
"""


def done_events(
    last: int, *, since: dt.datetime | None, keys: list[str] | None, limit: int, using: str
) -> list[tuple[int, str]]:
    """Return ids and groups of done events with a higher id than `last`, in order."""
    params = {"last": last, "since": since, "keys": keys, "limit": limit}
    return _rows(DONE_EVENTS, params, using=using)


def states_of_keys(keys: list[str], *, using: str) -> dict[str, tuple[str, str, dt.datetime]]:
    """Return the groups, statuses and creation times of the events with these keys."""
    return {key: (group, *rest) for key, group, *rest in _rows(STATES_OF_KEYS, [keys], using=using)}


def lock_done(ids: list[int], *, using: str) -> list[tuple[int, str]]:
    """Lock those of these events that are still done; return their ids and groups."""
    return _rows(LOCK_DONE, [ids], using=using)


def owe_again(ids: list[int], handler: str, others: Sequence[tuple[int, str]], *, using: str) -> int:
    """Reopen done events for one handler, with those of `others` done; return how many."""
    if not ids:
        return 0
    if others:
        _run(OTHERS_ARE_DONE, _columns(others), using=using)
    _run(OWE, [handler, ids], using=using)
    reopened = _run(REOPEN, [ids], using=using)
    _run(NOTIFY, using=using)
    return reopened


def events_by_id(ids: list[int], *, using: str) -> list[StoredRow]:
    return _events(EVENTS_BY_ID, ids, using)


def rows_written(*, using: str) -> dict[str, int]:
    """Return how many rows this transaction has inserted, updated and deleted, by table."""
    return dict(_rows(ROWS_WRITTEN, using=using))


# Isolation: a savepoint per handler that touches the database

SAVEPOINT = "savepoint spark_outbox_{number}"
RELEASE = "release savepoint spark_outbox_{number}"
# Before the savepoint, so that a rollback to it does not bring back what was in force before.
LIMIT_STATEMENTS = "set local statement_timeout = {milliseconds}"
LIMIT_SESSION = "set statement_timeout = {milliseconds}"
ROLLBACK_TO_SAVEPOINT = "rollback to savepoint spark_outbox_{number}"
NO_SUCH_SAVEPOINT = "3B001"
CHECK_CONSTRAINTS = "set constraints all immediate"


# In milliseconds, whatever unit it is shown in.
STATEMENT_TIMEOUT = """
select (extract(epoch from current_setting('statement_timeout')::interval) * 1000)::bigint
"""

# Those of transactions end with their savepoints, and limits have statements of their own.
_NOT_KEPT = """
'statement_timeout', 'transaction_isolation', 'transaction_read_only', 'transaction_deferrable'
"""

SETTINGS = f"""
select
    (
        select json_object_agg(name, setting) from pg_settings
        where source = 'session' and name not in ({_NOT_KEPT})
    ),
    (
        select json_object_agg(name, current_setting(name, true))
        from json_array_elements_text({{names}}::json) as each (name)
    )
"""

# The user and the search_path come first: with those of a handler, the rest might not be allowed, or
# mean something else. A setting of the project's own that was not there comes back as '', as after
# PostgreSQL's SET LOCAL. In a pooler's session, what the worker has set for its transaction (`local`)
# ends with that.
RESTORE_SETTINGS = f"""
reset session authorization;
set search_path = pg_catalog;
select count(set_config(name, value, name = any({{local}}::text[])))
from (
    select name, coalesce(value, reset_val, '') as value
    from pg_settings left join json_each_text({{shown}}::json) as shown (name, value) using (name)
    where (source = 'session' or shown.name is not null)
        and setting is distinct from coalesce(value, reset_val) and name not in ({_NOT_KEPT})
    union all
    (
        select name, coalesce(value, '')
        from json_each_text({{named}}::json) as named (name, value)
        where current_setting(name, true) is distinct from value
        order by name = 'role'
    )
) as changed
"""


def savepoint(sql: str, *, using: str) -> None:
    """Run some of the statements above, past the wrappers and the log that watch the handlers' SQL.

    Past psycopg's cursors, too, which take longer than the server does.
    """
    _past_wrappers(sql, using)


def _past_wrappers(sql: str, using: str) -> Any:
    """Run statements; return the result of the last."""
    connection = connections[using]
    with connection.wrap_database_errors:
        raw = connection.connection
        result = raw.pgconn.exec_(sql.encode())
        if result.status not in {ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
            raise error_from_result(result, raw.info.encoding)
        return result


def statement_timeout(*, using: str) -> int:
    """Return what is in force, in milliseconds; 0 for no limit."""
    return int(_past_wrappers(STATEMENT_TIMEOUT, using).get_value(0, 0))


def limit_session(milliseconds: int, *, using: str) -> None:
    """Let no statement of the session take longer; 0 for no limit."""
    _past_wrappers(LIMIT_SESSION.format(milliseconds=milliseconds), using)


def settings(names: Sequence[str], *, using: str) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return the settings that were made in this session, and those of these names."""
    result = _past_wrappers(SETTINGS.format(names=quote(json.dumps(names))), using)
    shown, named = (json.loads(result.get_value(0, column) or "{}") for column in (0, 1))
    return shown, named


def restore_settings(
    shown: Mapping[str, str],
    named: Mapping[str, str | None],
    *,
    first: str = "",
    local: Sequence[str] = (),
    limits: Sequence[str],
    using: str,
) -> None:
    """Run the statements `limits` and `first`, then restore what `settings` has returned, where it is
    different now. The limits go ahead, so that those of a handler do not end the rest."""
    sql = RESTORE_SETTINGS.format(
        shown=quote(json.dumps(shown, ensure_ascii=False)),
        named=quote(json.dumps(named, ensure_ascii=False)),
        local=quote(f"{{{','.join(local)}}}"),
    )
    _past_wrappers("; ".join(filter(None, [*limits, first, sql])), using)


# Wake: the two advisory locks of the migration's trigger, and LISTEN

LISTEN = "listen spark_outbox"
UNLISTEN = "unlisten spark_outbox"

OUTBOX_OID = "select to_regclass('spark_outbox_event')::oid::integer"

# Of the table as it is now: it may have been dropped and restored since the last time.
TAKE_S = """
select pg_try_advisory_lock_shared(7531002, this), this
from (select 'spark_outbox_event'::regclass::oid::integer) as outbox (this)
"""
LET_GO_OF_S = "select pg_advisory_unlock_shared(7531002, {oid})"
# Whether no transaction that has emitted is still open.
PROBE_K = """
select case when pg_try_advisory_lock(7531001, %(oid)s)
    then pg_advisory_unlock(7531001, %(oid)s) else false end
"""


def listen(*, using: str) -> None:
    _run(LISTEN, using=using)


def unlisten(*, using: str) -> None:
    _run(UNLISTEN, using=using)


def outbox_oid(*, using: str) -> int | None:
    """Return the OID of the table that this connection takes for the outbox; None if there is none."""
    oid: int | None = value(OUTBOX_OID, using=using)
    return oid


def take_s(*, using: str) -> tuple[bool, int]:
    """Hold S, unless somebody has it for himself; return whether we do, and of which table."""
    ((held, oid),) = _rows(TAKE_S, using=using)
    return held, oid


# A worker's session, or where that is a pooler's, its transactions; see worker/session.py

NAME_SESSION = "set application_name = '{name}'"

# No statement of a session that only holds a lock takes long; but it is idle for as long as it takes.
KEEP_SESSION = """
select set_config('idle_session_timeout', '0', false), set_config('statement_timeout', '0', false)
"""

SEND_TIMEOUT = "select set_config('tcp_user_timeout', %s, false)"

BOUND_SESSION = """
select
    set_config('tcp_keepalives_idle', %(keepalives_idle)s, false),
    set_config('tcp_keepalives_interval', %(keepalives_interval)s, false),
    set_config('tcp_keepalives_count', %(keepalives_count)s, false),
    set_config('tcp_user_timeout', %(tcp_user_timeout)s, false)
"""

# The first is for statements that still run when the worker is gone.
LIMIT_SILENCE = """
select
    set_config('client_connection_check_interval', '1s', {local}),
    set_config('idle_in_transaction_session_timeout', '{milliseconds}', {local})
"""
LIFT_LIMIT = ", set_config('statement_timeout', '0', true)"

SET_BY_TRANSACTION = ("client_connection_check_interval", "idle_in_transaction_session_timeout")
"""What `silence_limit` sets, where the session is a pooler's."""


def name_session(name: str = "spark_worker", *, using: Using) -> None:
    """Tell people whose session it is. Poolers keep this apart for each of their clients."""
    _run(NAME_SESSION.format(name=name), using=using)


def keep_session(*, using: Using) -> None:
    """Have the server end the session for no reason but that its client is gone."""
    _rows(KEEP_SESSION, using=using)


def limit_send(milliseconds: str, *, using: str) -> None:
    """Have the server wait so long for a client that reads nothing; "0" for as long as it is alive."""
    _rows(SEND_TIMEOUT, [milliseconds], using=using)


def bound_session(bounds: Mapping[str, str], *, using: Using) -> None:
    """Have the server end the session if its client is silent; `bounds` are libpq's parameters."""
    _rows(BOUND_SESSION, bounds, using=using)


def limit_silence(seconds: float | None, *, using: str) -> None:
    """Have the server end the session if it hears nothing in a transaction for so long."""
    _rows(silence_limit(seconds, local=False), using=using)


def silence_limit(seconds: float | None, *, local: bool = True) -> str:
    """Return the query that does it, for the transaction alone; there our statements have no limit."""
    milliseconds = 0 if seconds is None else math.ceil(seconds * 1000)
    query = LIMIT_SILENCE.format(milliseconds=milliseconds, local=str(local).lower())
    return query + LIFT_LIMIT if local else query


# The wake trigger's mode, see SPARK_OUTBOX["WAKE"]

WAKE_MODE = """
select coalesce((
    select substring(encode(tgargs, 'escape') from '^[a-z]+')
    from pg_trigger
    where tgrelid = to_regclass('spark_outbox_event') and tgname = 'spark_outbox_wake'
), 'never')
"""

SET_WAKE_MODE = {
    mode: f"""
create or replace trigger spark_outbox_wake after insert on spark_outbox_event
    for each statement execute function spark_outbox_wake('{mode}')
"""
    for mode in ("gated", "always")
} | {"never": "drop trigger if exists spark_outbox_wake on spark_outbox_event"}

HAS_OUTBOX = "select to_regclass('spark_outbox_status') is not null"


def has_outbox(*, using: str) -> bool:
    """Return whether the migrations of spark_outbox have run in this database."""
    return bool(value(HAS_OUTBOX, using=using))


# For people. It never sets the sequence back. migrations/sql/0001_emitting.sql has the same text.
PUT_IDS_RIGHT = (
    "select setval('spark_outbox_event_id_seq', "
    "greatest(nextval('spark_outbox_event_id_seq'), max(id))) from spark_outbox_event;"
)
IDS_ARE_BEHIND = "select spark_outbox_ids_are_behind()"


def ids_are_behind(*, using: str) -> bool:
    """Return whether the sequence is yet to give out an id that an event has."""
    return bool(value(IDS_ARE_BEHIND, using=using))


def wake_mode(*, using: str) -> str:
    """Return what the trigger does: `gated`, `always`, or `never`."""
    mode: str = value(WAKE_MODE, using=using)
    return mode


def set_wake_mode(mode: str, *, using: str) -> None:
    """Make the trigger do `mode`. Locks the outbox against writers until the transaction ends."""
    _run(SET_WAKE_MODE[mode], using=using)


# For people's tests

LAST_ID = "select coalesce(max(id), 0) from spark_outbox_event"

EVENTS_AFTER = f"""
select {_COLUMNS} from spark_outbox_event where id > %s order by id
"""


def last_id(*, using: str) -> int:
    return int(value(LAST_ID, using=using))


def events_after(last: int, *, using: str) -> list[StoredRow]:
    """Return the events of any status with a higher id than `last`, in order."""
    return _events(EVENTS_AFTER, last, using)
