"""Write what came of events and their deliveries, and read what was stored of them before."""

import datetime as dt
from collections.abc import Sequence
from typing import Any, NamedTuple

from spark_outbox.store.connection import (
    addressed,
    as_columns,
    execute,
    fetch,
    fetch_value,
    is_watched,
    past_wrappers,
)

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


_NOT_CALLED = """
excluded.status = 'pending' and starts_with(excluded.error, 'spark_outbox: not called, ')
"""

_FORMER_ERROR = """
case
    when not starts_with(delivery.error, 'spark_outbox: not called, ') then delivery.error
    when delivery.error like E'%%\\n%%'
        then substr(delivery.error, strpos(delivery.error, E'\\n') + 1)
    else ''
end
"""

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

# What is not called, for a pause or an open circuit, keeps its traceback, and its former error below the
# line that says why. If that happens again and again, it keeps the time of the first: since then it
# could have been handled.
RECORD_RESULTS = f"""
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
    error = case
        when {_NOT_CALLED} then concat_ws(E'\\n', excluded.error, nullif({_FORMER_ERROR}, ''))
        else excluded.error
    end,
    traceback = case when {_NOT_CALLED} then delivery.traceback else excluded.traceback end,
    duration = excluded.duration,
    available_at = excluded.available_at,
    worker = excluded.worker,
    session = case
        when excluded.session is not null or excluded.attempts > 0 then excluded.session
        else delivery.session
    end,
    attempts = least(greatest(delivery.attempts, 0), 2147483646) + excluded.attempts,
    attempted_at = case
        when {_NOT_CALLED} and starts_with(delivery.error, 'spark_outbox: not called, ')
            then delivery.attempted_at
        else excluded.attempted_at
    end
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
    status = 'pending' and starts_with(
        case
            when starts_with(error, 'spark_outbox: not called, ') then split_part(error, E'\\n', 2)
            else error
        end,
        'spark_outbox.errors.WorkerDied:'
    )
from spark_outbox_delivery
where event_id = any(%s)
"""


def count_pending(ids: list[int], *, using: str) -> int:
    return int(fetch_value(COUNT_PENDING, [ids], using=using))


def finish(ids: Sequence[int], status: str, *, using: str) -> int:
    """Give events their final status; return to how many it applied."""
    array = "{" + ",".join(map(str, ids)) + "}"  # psycopg takes its time over lists
    if is_watched(using):
        return execute(FINISH, {"ids": array, "status": status}, using=using)
    sql = addressed(FINISH, using) % {"ids": f"'{array}'", "status": f"'{status}'"}
    return past_wrappers(sql, using).command_tuples or 0


def settle(fates: Sequence[FateRow], *, using: str) -> list[str]:
    """Give events their next status, and the reason for it; return the statuses of those to which it
    applied."""
    return [status for (status,) in fetch(SETTLE, as_columns(fates), using=using)]


def record_results(results: Sequence[Sequence[Any]], *, worker: str, session: int, using: str) -> None:
    """Write deliveries. A row has an event's id, the handler's name, and the fields of a Result.

    Running ones belong to the worker that holds the lock of `session`.
    """
    execute(RECORD_RESULTS, [worker, session, *as_columns(results)], using=using)


def discard_deliveries(event_ids: list[int], *, using: str) -> None:
    """Give up what finished events still owe: to handlers that no worker has any more."""
    execute(DISCARD_DELIVERIES, [event_ids], using=using)


def deliveries(event_ids: list[int], *, using: str) -> dict[int, dict[str, Stored]]:
    """Return deliveries, by event and handler's name."""
    found: dict[int, dict[str, Stored]] = {}
    for event_id, name, *columns in fetch(DELIVERIES, [event_ids], using=using):
        found.setdefault(event_id, {})[name] = Stored(*columns)
    return found
