"""Prune events that have ended, by functions of the migration; see SPARK_OUTBOX["RETENTION"]."""

from typing import NamedTuple

from spark_outbox.store.connection import fetch

# From one group to the next, so not through all of their events. Those that SQL has ended without saying
# when come as if they were of age: to prune them gives them a time.
OLDEST = """
with recursive ended (event_group) as (
    select min(event_group) from spark_outbox_event
    where status = '{state}' and digest is null
    union all
    select (
        select min(event.event_group) from spark_outbox_event as event
        where event.status = '{state}' and event.digest is null
            and event.event_group > ended.event_group
    )
    from ended
    where ended.event_group is not null
)
select
    '{state}', event_group,
    case
        when (
            select event.id from spark_outbox_event as event
            where event.status = '{state}' and event.digest is null
                and event.event_group = ended.event_group and event.finished_at is null
            limit 1
        ) is not null then 'infinity'
        else extract(epoch from statement_timestamp() - greatest('0001-01-01', least('9999-12-31', (
            select min(event.finished_at) from spark_outbox_event as event
            where event.status = '{state}' and event.digest is null
                and event.event_group = ended.event_group
        ))))
    end::float
from ended
where event_group is not null
limit %(most)s
"""

PRUNE = """
select stripped, deleted from spark_outbox_prune(
    'spark_outbox_event'::regclass, %s, %s, statement_timestamp() - make_interval(secs => %s), %s
)
"""

FORGET_KEYS = """
select deleted, reached from spark_outbox_forget_keys(
    'spark_outbox_event'::regclass, %s, statement_timestamp() - make_interval(secs => %s), %s
)
"""

COUNT_ENDED = """
select count(*) from (
    select from spark_outbox_event
    where status = '{state}' and digest is null and event_group = %s
        and finished_at < statement_timestamp() - make_interval(secs => %s)
    limit %s
) as old
"""

# No index has them: this may read the whole table.
COUNT_KEYS = """
select count(*) from (
    select from spark_outbox_event
    where digest is not null and created_at < statement_timestamp() - make_interval(secs => %s)
    limit %s
) as old
"""

# Roles without pg_read_all_stats see their own sessions only.
OLDEST_SNAPSHOT = """
select who, extract(epoch from held_for)::float, xids from spark_outbox_snapshots
where held_for >= make_interval(secs => %s) or held_for is null and xids > %s
limit 1
"""


class Ended(NamedTuple):
    """Events of one state and group that have ended and not been pruned."""

    state: str
    group: str
    age: float
    """Seconds since the first of them ended."""


class Pruned(NamedTuple):
    """How many events were stripped of all but their keys, and how many deleted."""

    stripped: int
    deleted: int

    @property
    def total(self) -> int:
        return self.stripped + self.deleted


class Holder(NamedTuple):
    """What holds the oldest snapshot of this database."""

    who: str
    seconds: float | None
    """For how long; None if nobody knows."""
    xids: int
    """How many transactions have begun since."""


def oldest(states: list[str], *, most: int | None = None, using: str) -> list[Ended]:
    """Return groups that have ended events, with the age of the oldest; up to `most` of each state."""
    if not states:
        return []
    sql = " union all ".join(f"({OLDEST.format(state=state)})" for state in states)
    return list(map(Ended._make, fetch(sql, {"most": most}, using=using)))


def prune(state: str, group: str, *, seconds: float, most: int, using: str) -> Pruned | None:
    """Prune up to `most` events that ended so many seconds ago, earliest first; None if somebody else is
    at it. Passes over rows that others hold."""
    ((stripped, deleted),) = fetch(PRUNE, [state, group, seconds, most], using=using)
    return None if stripped is None else Pruned(stripped, deleted)


def forget_keys(after: int, *, seconds: float, most: int, using: str) -> tuple[int, int | None] | None:
    """Delete stripped events that were emitted so many seconds ago, among the next `most` events after
    this id. Return how many, and the last id of them; None for that if none is so old. Or None if
    somebody else is at it."""
    ((deleted, reached),) = fetch(FORGET_KEYS, [after, seconds, most], using=using)
    return None if deleted is None else (deleted, reached)


def count_ended(state: str, group: str, *, seconds: float, most: int, using: str) -> int:
    """Count the events that `prune` would prune, up to `most`."""
    sql = COUNT_ENDED.format(state=state)
    return int(fetch(sql, [group, seconds, most], using=using)[0][0])


def count_keys(*, seconds: float, most: int, using: str) -> int:
    """Count the events that `forget_keys` would delete, up to `most`."""
    return int(fetch(COUNT_KEYS, [seconds, most], using=using)[0][0])


def oldest_snapshot(*, seconds: float, xids: int, using: str) -> Holder | None:
    """Return what has kept vacuum from removing dead rows for so many seconds; or, if nobody knows for
    how long, for so many transactions. None if nothing has, or we may not see it."""
    found = fetch(OLDEST_SNAPSHOT, [seconds, xids], using=using)
    return Holder(*found[0]) if found else None
