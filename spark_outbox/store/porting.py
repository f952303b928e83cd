"""The keys that django-spark has handled: its table `spark_event`, in the database of the outbox.

Both tables are found by the search_path.
"""

from typing import NamedTuple

from spark_outbox.events.event import MAX_LENGTH
from spark_outbox.store.connection import execute, fetch, fetch_value

# Another app may have a table of this name.
MAY_READ = """
select case when count(*) = 3 then bool_and(has_table_privilege(attrelid, 'select')) end
from pg_attribute join pg_class as relation on relation.oid = attrelid
where attrelid = to_regclass('spark_event') and relkind = 'r' and (
    attname = 'created_at'
    or attname in ('key', 'group') and atttypid in ('varchar'::regtype, 'text'::regtype)
)
"""

NAMELESS = "(none)"
"""The group of events that had none."""

# Less than deadlock_timeout: who emits keys in another order shall not be the one that fails.
WAIT_BRIEFLY = "set local lock_timeout = '500ms'"

# In the order of the keys, as emit() and its siblings write: so that none of them deadlocks with this.
# The rows are as if pruned: of the payload nothing is left, and nobody can replay or retry them.
TAKE_OVER = """
with old as materialized (
    select key, "group" as event_group, created_at
    from spark_event where key {beyond} %(after)s order by key limit %(most)s
),
compared as materialized (
    select
        old.key, left(coalesce(nullif(old.event_group, ''), %(nameless)s), %(longest)s) as event_group,
        coalesce(old.created_at, statement_timestamp()) as created_at,
        (length(old.event_group) between 1 and %(longest)s) is not true as is_mended,
        length(old.key) between 1 and %(longest)s as fits,
        event.status
    from old left join spark_outbox_event as event on event.key = old.key
),
taken as (
    insert into spark_outbox_event (key, event_group, status, created_at, finished_at, digest)
    select
        key, event_group, 'done', created_at, created_at, spark_outbox_digest(event_group, '{{}}')
    from compared where fits and status is null
    order by key collate "C"
    on conflict do nothing
    returning key
)
select
    count(*), count(taken.key), count(taken.key) filter (where is_mended),
    count(*) filter (where not fits),
    count(*) filter (where status in ('pending', 'unhandled')),
    count(*) filter (where fits and status is null and taken.key is null),
    (select max(key) from old)
from compared left join taken on taken.key = compared.key
"""

WHY = "django-spark has handled this key."

# Passes over what a worker has in hand.
DISCARD = """
with waiting as materialized (
    select event.id from spark_event as old join spark_outbox_event as event on event.key = old.key
    where old.key {beyond} %(after)s and old.key <= %(last)s and event.status in ('pending', 'unhandled')
    order by event.id for no key update of event skip locked
)
select count(*) from spark_outbox_give_up(array(select id from waiting), %(why)s)
"""

LOOKED_AT = 1000
"""How many keys are looked at that come last."""
PAGES = 20
"""How many pages are looked at, of those that were added last: where the newest rows are."""

LAST_PAGES = """
select greatest(0, pg_relation_size('spark_event') / current_setting('block_size')::bigint - %s)
"""

UNKNOWN = """
select old.key from (
    (select key, created_at from spark_event order by key desc limit %(most)s)
    union all
    (select key, created_at from spark_event {newest})
) as old
where length(old.key) between 1 and %(longest)s
    and (
        %(seconds)s::float is null
        or old.created_at > statement_timestamp() - make_interval(secs => %(seconds)s::float)
    )
    and not exists (select from spark_outbox_events as event where event.key = old.key)
limit 1
"""


class Taken(NamedTuple):
    """What became of some keys of django-spark."""

    read: int = 0
    new: int = 0
    """So many are done here now, and were not known before."""
    mended: int = 0
    """Of the new ones, those whose group was empty or too long."""
    unfit: int = 0
    """Keys that no event can have: they are left out."""
    waiting: int = 0
    """Events of such keys that are emitted here, and wait for handlers."""
    discarded: int = 0
    """Of these, those that were given up."""


def may_read(*, using: str) -> bool | None:
    """Return whether this role may read django-spark's table; None if the database has none."""
    may: bool | None = fetch_value(MAY_READ, using=using)
    return may


def wait_briefly(*, using: str) -> None:
    """Let no statement of the transaction wait long for the keys that others write."""
    execute(WAIT_BRIEFLY, using=using)


def take_over(after: str | None, *, most: int, using: str) -> tuple[Taken, int, str | None]:
    """Write the next keys as done. Return what became of them; how many have been written by others
    meanwhile, so that it has not seen their status; and the last of them."""
    params = {
        "after": after or "",
        "most": most,
        "longest": MAX_LENGTH,
        "nameless": NAMELESS,
    }
    ((*counts, overtaken, last),) = fetch(TAKE_OVER.format(beyond=_beyond(after)), params, using=using)
    return Taken(*counts), overtaken, last


def discard(after: str | None, last: str, *, using: str) -> int:
    """Give up the events of the same keys that wait for handlers; return how many."""
    params = {"after": after or "", "last": last, "why": WHY}
    return int(fetch_value(DISCARD.format(beyond=_beyond(after)), params, using=using))


def _beyond(after: str | None) -> str:
    """Return the comparison with the key before; "" is the lowest of all."""
    return ">=" if after is None else ">"


def unknown_key(*, seconds: float | None, using: str) -> str | None:
    """Return a key that django-spark has handled, in so many last seconds, and the outbox does not know.

    Looks at a bounded number of them. An import that was stopped lacks the last keys, and one that was
    too early lacks the newest.
    """
    page = int(fetch_value(LAST_PAGES, [PAGES], using=using))
    newest = f"where ctid >= '({page},0)'::tid" if page else ""
    params = {"most": LOOKED_AT, "longest": MAX_LENGTH, "seconds": seconds}
    rows = fetch(UNKNOWN.format(newest=newest), params, using=using)
    return rows[0][0] if rows else None
