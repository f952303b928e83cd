"""What fails, by handler and kind of error, and since when. Each kind is a piece of the index of
failures, which is read from its latest end. Call all of it in a transaction, whose plans it changes."""

from typing import NamedTuple

from spark_outbox.store.connection import execute, fetch, fetch_noticed
from spark_outbox.store.stepping import FAILS, kinds
from spark_outbox.store.viewing import Row, rows

COUNTED = 5000
"""How many deliveries of a kind are looked at: the latest."""

KINDS = 100
"""How many kinds are shown: those that failed last."""

PIECE = 1000
"""How many deliveries a step of a repair looks at."""

_OF_KIND = f"""
    {FAILS} and delivery.handler = %(handler)s
        and spark_outbox_fingerprint(delivery.error) = %(fingerprint)s
"""

_NAMED = f"""
    {FAILS} and delivery.handler = named.handler
        and spark_outbox_fingerprint(delivery.error) = named.fingerprint
"""

# Not new is what failed before the release; nor what is tried again, if an event of it is older.
FAILURES = f"""
with recursive {kinds(FAILS)},
release as materialized (
    select min(started_at) as since from spark_outbox_workers where state <> 'gone'
),
named as materialized (
    select handler, fingerprint, (
        select max(delivery.attempted_at) from spark_outbox_delivery as delivery
        where {FAILS} and delivery.handler = kind.handler
            and spark_outbox_fingerprint(delivery.error) = kind.fingerprint
    ) as last_at
    from (
        select * from kind where fingerprint not like 'spark_outbox: not called, it is paused (%%'
        limit 1000
    ) as kind
    order by last_at desc limit {KINDS + 1}
)
select
    named.handler, named.fingerprint, named.last_at, oldest.first_at, latest.*,
    named.fingerprint = 'spark_outbox: not called, its circuit is open' as is_circuit,
    coalesce(oldest.first_at > release.since and not exists (
        select from (
            select delivery.event_id, delivery.attempts from spark_outbox_delivery as delivery
            where {_NAMED} order by delivery.attempted_at limit 100
        ) as first
        join spark_outbox_event as event on event.id = first.event_id
        where first.attempts > 1 and event.created_at < release.since
    ), false) as is_new
from named cross join release
cross join lateral (
    select min(delivery.attempted_at) as first_at from spark_outbox_delivery as delivery
    where {_NAMED}
) as oldest
cross join lateral (
    select
        count(*) as looked_at,
        count(*) filter (where status = 'failed') as failed,
        count(*) filter (where status = 'pending') as retrying,
        count(*) filter (where age < interval '1 hour') as hour,
        count(*) filter (where age < interval '3 hours') as three_hours,
        count(*) filter (where age < interval '1 day') as day,
        count(*) filter (where age < interval '3 days') as three_days,
        count(*) filter (where age < interval '7 days') as week
    from (
        select delivery.status, case when isfinite(delivery.attempted_at)
            then statement_timestamp() - delivery.attempted_at end as age
        from spark_outbox_delivery as delivery
        where {_NAMED}
        order by delivery.attempted_at desc limit {COUNTED}
    ) as first
) as latest
order by named.last_at desc, named.handler, named.fingerprint
"""

EXAMPLES = f"""
select
    event.id, event.key, event.event_group as "group", delivery.status, delivery.attempts,
    delivery.attempted_at, delivery.worker,
    extract(epoch from delivery.duration)::float as duration
from (
    select * from spark_outbox_delivery as delivery
    where {_OF_KIND} order by delivery.attempted_at desc limit 20
) as delivery
join spark_outbox_event as event on event.id = delivery.event_id
order by delivery.attempted_at desc, event.id desc
"""

# A traceback of an endless recursion is long.
TRACEBACK = f"""
select left(error, 20000) as error, left(traceback, 100000) as traceback
from spark_outbox_delivery as delivery
where {_OF_KIND} order by delivery.attempted_at desc limit 1
"""

COUNT = f"""
select count(*) filter (where status = 'failed'), count(*) from (
    select delivery.status from spark_outbox_delivery as delivery where {_OF_KIND} limit 10000
) as first
"""

# Attempts of a batch may have the same time; so the id also says how far a repair is.
NEXT = f"""
select
    array_agg(event_id) filter (where status = 'failed'),
    (array_agg(attempted_at::text order by attempted_at desc, id desc))[1],
    (array_agg(id order by attempted_at desc, id desc))[1],
    count(*), %(until)s::timestamptz::text
from (
    select delivery.id, delivery.event_id, delivery.status, delivery.attempted_at
    from spark_outbox_delivery as delivery
    where {_OF_KIND}
        and delivery.attempted_at >= %(after)s and delivery.attempted_at <= %(until)s
        and (delivery.attempted_at, delivery.id) > (%(after)s::timestamptz, %(after_id)s::bigint)
    order by delivery.attempted_at, delivery.id limit {PIECE}
) as piece
"""

RETRY = "select key from spark_outbox_reopen(spark_outbox_lock(%(ids)s, '{failed}'), %(handler)s)"

DISCARD = "select key from spark_outbox_give_up(spark_outbox_lock(%(ids)s, '{failed}'), %(why)s)"


# A plan that sorts reads a whole kind, and statistics may not know yet how large that has become.
IN_ORDER = "set local enable_bitmapscan = off"


class Kind(NamedTuple):
    """What fails alike."""

    handler: str
    fingerprint: str


class Place(NamedTuple):
    """How far a repair is: after the delivery with this time and id, up to a time. So it ends, though
    what it retries may fail again."""

    after: str = "-infinity"
    after_id: int = 0
    until: str = "now"


class Step(NamedTuple):
    """What a step of a repair did."""

    changed: list[str]
    """The keys of the events."""
    notices: list[str]
    """Why others were left out; the first of them."""
    left_out: int
    place: Place | None
    """Where to go on; None if there is nothing more."""


def failures(*, using: str) -> list[Row]:
    """Return kinds of failures with counts, the latest first: one more than KINDS, if there are more."""
    execute(IN_ORDER, using=using)
    return rows(FAILURES, {}, using=using)


def examples(kind: Kind, *, using: str) -> list[Row]:
    execute(IN_ORDER, using=using)
    return rows(EXAMPLES, kind._asdict(), using=using)


def traceback(kind: Kind, *, using: str) -> Row | None:
    execute(IN_ORDER, using=using)
    found = rows(TRACEBACK, kind._asdict(), using=using)
    return found[0] if found else None


def count(kind: Kind, *, using: str) -> tuple[int, bool]:
    """Return how many have failed for good among the first 10,000, and whether there are more."""
    ((failed, seen),) = fetch(COUNT, kind._asdict(), using=using)
    return failed, seen >= 10_000


def step(kind: Kind, place: Place, why: str | None, *, using: str) -> Step:
    """Retry the failed events among the next PIECE deliveries of this kind, the oldest first; or discard
    them, if `why` is given. Passes over those that others hold."""
    execute(IN_ORDER, using=using)
    params = {**kind._asdict(), **place._asdict()}
    ((ids, after, after_id, looked_at, until),) = fetch(NEXT, params, using=using)
    following = None if looked_at < PIECE else Place(after, after_id, until)
    if not ids:
        return Step([], [], 0, following)
    sql = RETRY if why is None else DISCARD
    params = {"ids": ids, "handler": kind.handler, "why": why}
    found, notices = fetch_noticed(sql, params, using=using)
    changed = [key for (key,) in found]
    return Step(changed, notices[:5], len(ids) - len(changed), following)
