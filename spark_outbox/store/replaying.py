"""Replay: make done events pending again, for one handler."""

import datetime as dt

from spark_outbox.store.connection import execute, fetch
from spark_outbox.store.reading import EVERY_OTHER

DONE_EVENTS = """
select id, event_group from spark_outbox_event
where status = 'done' and digest is null and id > %(last)s
    and (%(since)s::timestamptz is null or created_at >= %(since)s)
    and (%(keys)s::text[] is null or key = any(%(keys)s::text[]))
order by id limit %(limit)s
"""

LOCK_DONE = """
select id from spark_outbox_event
where id = any(%s) and status = 'done' and digest is null
for no key update skip locked
"""

OTHERS_ARE_DONE = f"""
insert into spark_outbox_delivery (event_id, handler, status)
select event_id, '{EVERY_OTHER}', 'done' from unnest(%s::bigint[]) as done (event_id)
on conflict do nothing
"""

STATES_OF_KEYS = """
select key, event_group, case when digest is null then status else 'pruned' end, created_at
from spark_outbox_event where key = any(%s)
"""

OWE = """
insert into spark_outbox_delivery (event_id, handler, available_at)
select event_id, %s, statement_timestamp() from unnest(%s::bigint[]) as owed (event_id)
on conflict (event_id, handler) do update
set status = 'pending', attempts = 0, available_at = excluded.available_at
"""

REOPEN = """
update spark_outbox_event
set
    status = 'pending', available_at = null, finished_at = null,
    attempts = greatest(attempts, 1) -- or its deliveries would not be read
where id = any(%s) and status = 'done'
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
    return fetch(DONE_EVENTS, params, using=using)


def states_of_keys(keys: list[str], *, using: str) -> dict[str, tuple[str, str, dt.datetime]]:
    """Return the groups, statuses and creation times of the events with these keys."""
    return {key: (group, *rest) for key, group, *rest in fetch(STATES_OF_KEYS, [keys], using=using)}


def lock_done(ids: list[int], *, using: str) -> list[int]:
    """Lock those of these events that are still done; return their ids."""
    return [event_id for (event_id,) in fetch(LOCK_DONE, [ids], using=using)]


def owe_again(ids: list[int], handler: str, *, using: str) -> int:
    """Reopen done events for one handler, and no other; return how many."""
    if not ids:
        return 0
    execute(OTHERS_ARE_DONE, [ids], using=using)
    execute(OWE, [handler, ids], using=using)
    return execute(REOPEN, [ids], using=using)


def rows_written(*, using: str) -> dict[str, int]:
    """Return how many rows this transaction has inserted, updated and deleted, by table."""
    return dict(fetch(ROWS_WRITTEN, using=using))
