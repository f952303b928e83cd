"""Replay: make done events pending again, for one handler."""

import datetime as dt

from spark_outbox.store.connection import fetch, fetch_value

DONE_EVENTS = """
select id, event_group from spark_outbox_event
where status = 'done' and digest is null and id > %(last)s
    and (%(since)s::timestamptz is null or created_at >= %(since)s)
    and (%(keys)s::text[] is null or key = any(%(keys)s::text[]))
order by id limit %(limit)s
"""

LOCK_DONE = "select unnest(spark_outbox_lock(%s::bigint[], '{done}'))"

STATES_OF_KEYS = """
select key, event_group, case when digest is null then status else 'pruned' end, created_at
from spark_outbox_event where key = any(%s)
"""

MAY_READ = """
select has_column_privilege('spark_outbox_event', 'payload', 'select')
    and has_column_privilege('spark_outbox_event', 'headers', 'select')
"""

# What spark_replay() does as well.
OWE_AGAIN = "select count(*) from spark_outbox_owe_again(%s::bigint[], %s)"

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
    return int(fetch_value(OWE_AGAIN, [ids, handler], using=using))


def can_read_documents(*, using: str) -> bool:
    """Return whether this role may read payloads and headers."""
    return bool(fetch_value(MAY_READ, using=using))


def rows_written(*, using: str) -> dict[str, int]:
    """Return how many rows this transaction has inserted, updated and deleted, by table."""
    return dict(fetch(ROWS_WRITTEN, using=using))
