"""Make events pending again: running ones without a delivery, and unhandled ones."""

from typing import Any, NamedTuple

from spark_outbox.store.connection import execute, fetch, fetch_noticed, fetch_value
from spark_outbox.store.filtering import with_groups

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


def strays(*, using: str) -> list[int]:
    """Return running events of which no delivery runs.

    A person may have discarded the delivery, or SQL may have made the event so.
    """
    return [event_id for (event_id,) in fetch(_STRAYS, using=using)]


def reopen_strays(only: list[int] | None = None, *, using: str) -> int:
    """Make them, or some of them, pending again; return how many."""
    if only is None:
        return execute(REOPEN_STRAYS, using=using)
    return execute(REOPEN_SOME_STRAYS, [only], using=using)


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
    rows = fetch(with_groups(UNHANDLED_GROUPS, groups), {"groups": groups}, using=using)
    return [group for (group,) in rows]


def put_back(matched: list[str], *, limit: int, using: str) -> int:
    """Make up to `limit` unhandled events of these groups pending again; return how many.

    They are ready, or due when what they owe is: another release may have tried them.
    """
    return execute(PUT_BACK, {"matched": matched, "limit": limit}, using=using)


# By hand: through the functions of the migration, so that SQL and commands do the same

RETRY = "select key from spark_retry(%s)"

DISCARD = "select key from spark_discard(%s, %s)"

RETRY_FAILED = """
select key from spark_retry_failed(%(handler)s, %(since)s, %(fingerprint)s, %(most)s)
"""

DISCARD_FAILED = """
select key from spark_outbox_give_up(
    spark_outbox_lock_failed(%(handler)s, %(since)s, %(fingerprint)s, %(most)s), %(why)s
)
"""

# It locks them, as the functions do, until this query ends.
COUNT_FAILED = """
select cardinality(spark_outbox_lock_failed(%(handler)s, %(since)s, %(fingerprint)s, %(most)s))
"""

CLOSE_CIRCUIT = "select spark_outbox_close_circuit(%s)"


def close_circuit(handler: str, *, using: str) -> int:
    return int(fetch_value(CLOSE_CIRCUIT, [handler], using=using))


# Not on a replica, not in a session that may only read, and not as a role that only looks.
CAN_REPAIR = """
select
    not pg_is_in_recovery() and not current_setting('transaction_read_only')::boolean
    and has_any_column_privilege('spark_outbox_event', 'update')
"""


def can_repair(*, using: str) -> bool:
    """Return whether this session may change events at all."""
    return bool(fetch_value(CAN_REPAIR, using=using))


class Failed(NamedTuple):
    """Which events that have failed for good; what is None does not count."""

    handler: str | None = None
    fingerprint: str | None = None
    since: str = "-infinity"
    """When they were tried last, as PostgreSQL reads it."""


Changed = tuple[list[str], list[str]]
"""The keys of the events that were changed, and why others were left out."""


def retry(key: str, *, using: str) -> Changed:
    return _changed(RETRY, [key], using)


def discard(key: str, why: str, *, using: str) -> Changed:
    return _changed(DISCARD, [key, why], using)


def retry_failed(failed: Failed, *, most: int, using: str) -> Changed:
    """Make up to `most` failed events pending, the oldest first."""
    return _changed(RETRY_FAILED, {**failed._asdict(), "most": most}, using)


def discard_failed(failed: Failed, why: str, *, most: int, using: str) -> Changed:
    return _changed(DISCARD_FAILED, {**failed._asdict(), "why": why, "most": most}, using)


def count_failed(failed: Failed, *, most: int, using: str) -> int:
    """Count failed events, up to `most`."""
    return int(fetch_value(COUNT_FAILED, {**failed._asdict(), "most": most}, using=using))


def _changed(sql: str, params: Any, using: str) -> Changed:
    found, notices = fetch_noticed(sql, params, using=using)
    return [key for (key,) in found], notices
