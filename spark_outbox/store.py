"""Every SQL statement that spark_outbox runs, one constant each, next to what maps its rows.

Functions run on the Django connection `using`, in whatever transaction it is in. Times are the
database's. Outcomes are written under a guard, `status = 'pending'` on a row that this transaction
has locked, and say how many rows they applied to.
"""

import datetime as dt
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from django.db import connections
from psycopg import ClientCursor
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.sql import quote

from spark_outbox.errors import UnreadablePayload
from spark_outbox.events import StoredRow
from spark_outbox.payload import MAX_STORED


def _run(sql: str, params: Any = None, *, using: str) -> int:
    """Run a statement; return how many rows it wrote."""
    with connections[using].cursor() as cursor:
        cursor.execute(sql, params)
        return int(cursor.rowcount)


def _rows(sql: str, params: Any = None, *, using: str) -> list[Any]:
    with connections[using].cursor() as cursor:
        cursor.execute(sql, params)
        return list(cursor.fetchall())


def value(sql: str, params: Any = None, *, using: str) -> Any:
    """Run a statement of this module; return the first value of its first row."""
    return _rows(sql, params, using=using)[0][0]


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

INSERT_MANY = """
insert into spark_outbox_event
    (key, event_group, payload, headers, ordering_key, available_at)
select
    key, event_group, payload, headers, ordering_key,
    coalesce(available_at, statement_timestamp() + delay)
from unnest(
    %s::text[], %s::text[], %s::jsonb[], %s::jsonb[], %s::text[], %s::timestamptz[], %s::interval[]
) as new (key, event_group, payload, headers, ordering_key, available_at, delay)
on conflict do nothing
"""


def insert(row: NewRow, *, using: str) -> tuple[int, int] | None:
    """Write one event; return its id and its time in microseconds, or None if its key exists.

    Waits for a transaction that has written the same key and not ended yet.
    """
    is_ready = row[4:] == (None, None, None)
    stored = _rows(INSERT_READY, row[:4], using=using) if is_ready else _rows(INSERT, row, using=using)
    return stored[0] if stored else None


def insert_many(rows: Sequence[NewRow], *, using: str) -> int:
    """Write events in one statement, in the order given; return how many were new."""
    return _run(INSERT_MANY, _columns(rows), using=using)


# A function, so that who emits need not be allowed to read what others have emitted.
SAME_EVENT = "select spark_outbox_is_same(%s, %s, %s::jsonb)"


def is_same(row: NewRow, *, using: str) -> bool:
    """Return whether the event that is stored under this key has this group and payload."""
    return bool(value(SAME_EVENT, [row.key, row.group, row.payload], using=using))


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
    {{groups}}
order by id limit %(limit)s
for no key update skip locked
"""

CLAIM_DUE = f"""
select {_COLUMNS} from spark_outbox_event
where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
    {{groups}}
order by available_at limit %(limit)s
for no key update skip locked
"""

IS_UNFINISHED = """
select exists (select from spark_outbox_event where id = %s and status in ('pending', 'running'))
"""

CLAIM_ONE = """
select id from spark_outbox_event
where id = %s and status = 'pending'
for no key update skip locked
"""

_GROUPS = "and event_group ~ %(groups)s"


def claim_ready(
    floor: int, limit: int, *, groups: str | None, first: str = "", using: str
) -> list[StoredRow]:
    """Lock up to `limit` ready events with an id of `floor` or more, lowest first.

    `first` is a query to run before that, in the same round trip where the driver can.
    """
    return _claim(CLAIM_READY, using, first, floor=floor, limit=limit, groups=groups)


def claim_due(limit: int, *, groups: str | None, using: str) -> list[StoredRow]:
    """Lock up to `limit` delayed or failed events whose time has come, earliest first."""
    return _claim(CLAIM_DUE, using, limit=limit, groups=groups)


# Claim in order: of each ordering key the *head*, its lowest unfinished event, and what follows it.
# Whoever has locked the head may handle the key; nobody else's head can be of the same key.

UNFINISHED = {
    "block": "status in ('pending', 'running', 'failed')",
    "skip": "status in ('pending', 'running')",
}

KEYS_AT_ONCE = 100

# Jumps from key to key along the index, rather than reading all events of each.
HEADS = """
with recursive head as (
    (
        select ordering_key, id, event_group, status, available_at, 1 as turn
        from spark_outbox_event
        where ordering_key > %(after)s and {unfinished}
        order by ordering_key, id limit 1
    )
    union all
    select next.*, head.turn + 1 from head cross join lateral (
        select ordering_key, id, event_group, status, available_at
        from spark_outbox_event
        where ordering_key > head.ordering_key and {unfinished}
        order by ordering_key, id limit 1
    ) as next
    where head.turn < %(keys)s
)
select
    id, ordering_key,
    status = 'pending' and (available_at is null or available_at <= statement_timestamp()) {groups}
from head order by turn
"""

RUNS = """
select
    id, ordering_key,
    status = 'pending' and (available_at is null or available_at <= statement_timestamp()) {groups}
from spark_outbox_event
where ordering_key = any(%(keys)s) and {unfinished}
order by ordering_key, id limit %(limit)s
"""

CLAIM_IDS = f"""
select {_COLUMNS} from spark_outbox_event
where id = any(%s) and status = 'pending'
for no key update skip locked
"""


class Ordered(NamedTuple):
    """What a look at the ordering keys after some key came to."""

    rows: list[StoredRow]
    """Locked: of each key a head and the events that follow it without a gap, in order."""
    after: str
    """From where to look next; empty if there are no further keys."""
    held: bool
    """There are heads that could be handled, but another transaction holds them."""


def claim_ordered(after: str, limit: int, *, failed: str, groups: str | None, using: str) -> Ordered:
    """Lock about `limit` events that are next in their order, of up to KEYS_AT_ONCE keys.

    `failed` says what a failed head does to those behind it: `block`, or `skip`.
    """

    def rows(sql: str, **params: Any) -> list[Any]:
        filled = sql.format(unfinished=UNFINISHED[failed], groups="" if groups is None else _GROUPS)
        return _rows(filled, {"groups": groups, **params}, using=using)

    found = rows(HEADS, after=after, keys=KEYS_AT_ONCE)
    following = found[-1][1] if len(found) == KEYS_AT_ONCE else ""
    ready = [event_id for event_id, _, is_ready in found if is_ready]
    heads = {row.ordering_key: row for row in _claim_ids(ready[:limit], using)} if ready else {}
    if not heads:
        return Ordered([], following, bool(ready))
    runs: dict[str, list[int]] = {}
    ended: set[str] = set()
    for event_id, key, is_ready in rows(RUNS, keys=list(heads), limit=limit + len(heads)):
        if not is_ready or (key not in runs and event_id != heads[key].id):
            ended.add(key)  # a gap; or a lower id has been committed since, and is the head now
        if key not in ended:
            runs.setdefault(key, []).append(event_id)
    followers = [event_id for run in runs.values() for event_id in run[1:]]
    locked = {row.id: row for row in _claim_ids(followers, using)} if followers else {}
    locked |= {row.id: row for row in heads.values()}
    claimed = [
        locked[event_id]
        for run in runs.values()
        for event_id in itertools.takewhile(locked.__contains__, run)
    ]
    return Ordered(claimed, following, len(heads) < len(ready[:limit]))


def _claim_ids(ids: list[int], using: str) -> list[StoredRow]:
    return _events(CLAIM_IDS, ids, using)


def is_unfinished(event_id: int, *, using: str) -> bool:
    return bool(value(IS_UNFINISHED, [event_id], using=using))


def claim_one(event_id: int, *, using: str) -> bool:
    """Lock one event; return whether it is still pending, and nobody else's."""
    return bool(_rows(CLAIM_ONE, [event_id], using=using))


def _claim(sql: str, using: str, first: str = "", **params: Any) -> list[StoredRow]:
    sql = _with_groups(sql, params["groups"])
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
    return sql.format(groups="" if groups is None else _GROUPS)


class Outlook(NamedTuple):
    """What a worker that found nothing to claim can expect."""

    ready: bool
    """There are events it could not claim: another transaction holds their rows."""
    ordered: bool
    """There are events with an ordering key, which may have to wait for others of it."""
    due_in: float
    """Seconds until the next delayed event; infinity if there is none."""
    running: bool
    """There are events that detached handlers are at work on, here or elsewhere."""
    unhandled: bool
    """There are events that some worker had no handler for."""


# The last one is a min(), since for exists() a planner may choose to read the table to its end.
OUTLOOK = """
select
    exists (
        select from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is null {groups}
    ) or exists (
        select from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
            {groups}
    ),
    exists (
        select from spark_outbox_event
        where status = 'pending' and ordering_key is not null
            and (available_at is null or available_at <= statement_timestamp()) {groups}
    ),
    (
        select
            extract(epoch from nullif(min(available_at), 'infinity') - statement_timestamp())::float
        from spark_outbox_event
        where status = 'pending' and available_at > statement_timestamp() {groups}
    ),
    exists (select from spark_outbox_delivery where status = 'running'),
    (select min(event_group) from spark_outbox_event where status = 'unhandled') is not null
"""


def outlook(*, groups: str | None, using: str) -> Outlook:
    ((ready, ordered, due_in, running, unhandled),) = _rows(
        _with_groups(OUTLOOK, groups), {"groups": groups}, using=using
    )
    return Outlook(ready, ordered, math.inf if due_in is None else due_in, running, unhandled)


CHECK_GROUPS = "select '' ~ %s"


def check_groups(pattern: str, *, using: str) -> None:
    """Raise DataError if `pattern` is no regular expression to PostgreSQL."""
    _rows(CHECK_GROUPS, [pattern], using=using)


# Settle


class Ended(NamedTuple):
    """An event that no handler is owed any more, and that did not simply go well."""

    event_id: int
    status: str
    error: str


class Postponed(NamedTuple):
    """An event that waits for its next delivery; `now` if a handler is owed that was not called yet.

    It is looked at again after `pause`, if there is one, since another worker may have a handler.
    """

    event_id: int
    error: str
    now: bool
    pause: dt.timedelta | None = None


class Begun(NamedTuple):
    """An event of which a delivery is `running`."""

    event_id: int
    error: str


class Attempt(NamedTuple):
    """What came of calling one handler with one event that is, or was, not finished in one go.

    A `pending` one is to be tried again at `at`, or `delay` from now; a `running` one has only begun.
    """

    event_id: int
    handler: str
    status: str
    error: str = ""
    traceback: str = ""
    duration: dt.timedelta | None = None
    delay: dt.timedelta | None = None
    at: dt.datetime | None = None
    counts: bool = True


class Earlier(NamedTuple):
    """Where a delivery stands before this batch."""

    status: str
    attempts: int
    due_for: float | None
    """Seconds, a day at the most, for which it has been due; None if it is not."""

    @property
    def due(self) -> bool:
        return self.due_for is not None


_ONE_MORE = "least(greatest(attempts, 0), 2147483646) + 1"  # of an integer, whatever SQL has put there

FINISH = f"""
update spark_outbox_event
set status = %(status)s, attempts = {_ONE_MORE}, finished_at = statement_timestamp()
where id = any(%(ids)s::bigint[]) and status = 'pending'
"""

END = f"""
update spark_outbox_event as event
set status = ended.status, last_error = coalesce(nullif(ended.error, ''), event.last_error),
    attempts = {_ONE_MORE}, finished_at = statement_timestamp()
from unnest(%s::bigint[], %s::text[], %s::text[]) as ended (event_id, status, error)
where event.id = ended.event_id and event.status = 'pending'
"""

RUN = f"""
update spark_outbox_event as event
set status = 'running', available_at = null, attempts = {_ONE_MORE},
    last_error = coalesce(nullif(begun.error, ''), event.last_error)
from unnest(%s::bigint[], %s::text[]) as begun (event_id, error)
where event.id = begun.event_id and event.status = 'pending'
"""

# After RECORD_ATTEMPTS: the event waits for the first of its deliveries. Not for those that were due
# when this pass began and were not called in it: this worker does not have their handlers, and the event
# would be due again at once, for ever.
POSTPONE = f"""
update spark_outbox_event as event
set attempts = {_ONE_MORE},
    last_error = coalesce(nullif(postponed.error, ''), event.last_error),
    available_at = case when postponed.now then statement_timestamp() else coalesce(
        least(statement_timestamp() + postponed.pause, (
            select min(delivery.available_at)
            from spark_outbox_delivery as delivery
            where delivery.event_id = event.id and delivery.status = 'pending' and (
                delivery.available_at > transaction_timestamp()
                or delivery.attempted_at >= transaction_timestamp()
            )
        )),
        statement_timestamp()
    ) end
from unnest(%s::bigint[], %s::text[], %s::boolean[], %s::interval[])
    as postponed (event_id, error, now, pause)
where event.id = postponed.event_id and event.status = 'pending'
"""

RECORD_ATTEMPTS = """
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
) as attempt (event_id, handler, status, error, traceback, duration, delay, at, counts)
on conflict (event_id, handler) do update set
    status = excluded.status,
    error = excluded.error,
    traceback = excluded.traceback,
    duration = excluded.duration,
    available_at = excluded.available_at,
    worker = excluded.worker,
    session = excluded.session,
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
    end
from spark_outbox_delivery
where event_id = any(%s)
"""


def finish(ids: list[int], status: str, *, using: str) -> int:
    """Give events their final status; return to how many it applied."""
    array = "{" + ",".join(map(str, ids)) + "}"  # psycopg takes its time over lists
    return _run(FINISH, {"ids": array, "status": status}, using=using)


def end(ended: Sequence[Ended], *, using: str) -> int:
    """Give events their final status, and the reason for it; return to how many it applied."""
    return _run(END, _columns(ended), using=using)


def postpone(postponed: Sequence[Postponed], *, using: str) -> int:
    """Let events wait for their next delivery; return to how many it applied."""
    return _run(POSTPONE, _columns(postponed), using=using)


def run(begun: Sequence[Begun], *, using: str) -> int:
    """Give events to deliveries that have begun; return to how many it applied."""
    return _run(RUN, _columns(begun), using=using)


def record_attempts(attempts: Sequence[Attempt], *, worker: str, session: int, using: str) -> None:
    """Note what came of handlers whose events are, or were, not finished in one go.

    Running ones belong to the worker that holds the lock of `session`.
    """
    _run(RECORD_ATTEMPTS, [worker, session, *_columns(attempts)], using=using)


def discard_deliveries(event_ids: list[int], *, using: str) -> None:
    """Give up what finished events still owe: to handlers that no worker has any more."""
    _run(DISCARD_DELIVERIES, [event_ids], using=using)


def deliveries(event_ids: list[int], *, using: str) -> dict[int, dict[str, Earlier]]:
    """Return what is known of earlier attempts, by event and handler's name."""
    found: dict[int, dict[str, Earlier]] = {}
    for event_id, name, *earlier in _rows(DELIVERIES, [event_ids], using=using):
        found.setdefault(event_id, {})[name] = Earlier(*earlier)
    return found


# Running deliveries. Whoever runs them holds an advisory lock on `session`, a random number, for as
# long as it is connected: who can take that lock knows that nobody is there any more.

LOCK_SESSION = "select pg_try_advisory_lock(7531003, %s)"
UNLOCK_SESSION = "select pg_advisory_unlock(7531003, %s)"
IS_SESSION_GONE = "select pg_try_advisory_xact_lock(7531003, %s)"

RUNNING_SESSIONS = "select distinct session from spark_outbox_delivery where status = 'running'"

LOCK_RUNNING = """
select id from spark_outbox_event
where id = any(%s) and status = 'running'
order by id
for no key update
"""

TAKE_BACK = """
update spark_outbox_delivery as delivery
set status = 'pending', session = null, available_at = statement_timestamp()
from unnest(%s::bigint[], %s::text[], %s::integer[]) as ended (event_id, handler, session)
where delivery.event_id = ended.event_id and delivery.handler = ended.handler
    and delivery.session is not distinct from ended.session and delivery.status = 'running'
returning delivery.event_id, delivery.handler
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
    """A delivery that some worker has begun; it is that worker's while it has this session."""

    event_id: int
    handler: str
    session: int | None


def lock_session(session: int, *, using: str) -> bool:
    """Hold the lock of `session` for as long as this connection lives; False if somebody has it."""
    return bool(value(LOCK_SESSION, [session], using=using))


def unlock_session(session: int, *, using: str) -> None:
    value(UNLOCK_SESSION, [session], using=using)


def running_sessions(*, using: str) -> list[int | None]:
    return [session for (session,) in _rows(RUNNING_SESSIONS, using=using)]


def is_session_gone(session: int | None, *, using: str) -> bool:
    """Return whether nobody holds the lock of `session`; then we do, until the transaction ends."""
    return session is None or bool(value(IS_SESSION_GONE, [session], using=using))


def running_of(session: int | None, *, using: str) -> list[Running]:
    return list(map(Running._make, _rows(RUNNING_OF, [session], using=using)))


def take_back(running: Sequence[Running], *, to_settle: bool, using: str) -> set[tuple[int, str]]:
    """Make deliveries, and their events, pending again; return those to which it applied.

    It does not apply to those that another worker has taken over. Locks the events first. With
    `to_settle` it is in order to settle them, which counts the pass that they are in once more.
    """
    event_ids = sorted({event_id for event_id, _, _ in running})
    _rows(LOCK_RUNNING, [event_ids], using=using)
    taken = {tuple(row) for row in _rows(TAKE_BACK, _columns(running), using=using)}
    _run(REOPEN_RUNNING, [int(to_settle), [event_id for event_id, _ in taken]], using=using)
    return taken


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

OUTBOX_OID = "select 'spark_outbox_event'::regclass::oid::integer"

TAKE_S = "select pg_try_advisory_lock_shared(7531002, %s)"
LET_GO_OF_S = "select pg_advisory_unlock_shared(7531002, {oid})"
# Whether no transaction that has emitted is still open.
PROBE_K = """
select case when pg_try_advisory_lock(7531001, %(oid)s)
    then pg_advisory_unlock(7531001, %(oid)s) else false end
"""


def listen(*, using: str) -> None:
    _run(LISTEN, using=using)


# A worker's session, or where that is a pooler's, its transactions; see session.py

NAME_SESSION = "set application_name = 'spark_worker'"

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


def name_session(*, using: str) -> None:
    """Tell people whose session it is. Poolers keep this apart for each of their clients."""
    _run(NAME_SESSION, using=using)


def bound_session(bounds: Mapping[str, str], *, using: str) -> None:
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
