"""How many events come and go, by minute and by hour: counted up to a bound, and estimated above it.

Events come in the order of their ids, nearly: so a search by halves through the primary key finds where
each minute began. When events were done is read off the index of those, through the view, which a role
that only looks may read. No row is written for any of it.
"""

from spark_outbox.store.stepping import DONE_GROUPS
from spark_outbox.store.viewing import Row, rows

SAMPLE = 1000
"""How many events of a minute or an hour are counted at most."""

GROUPS = 70
"""Of how many groups done events are counted: those in which an event was done last."""

_MOMENTS = """
    select kind, n, step, statement_timestamp() - n * step as at
    from (values ('minute', interval '1 minute', 60), ('hour', interval '1 hour', 24))
        as scale (kind, step, most)
    cross join lateral generate_series(0, most) as n
"""

# Each moment is looked for on its own: the first id after it. Ids far outside of the sequence's range,
# which SQL may have written, are left out: the arithmetic would not hold them.
ARRIVED = f"""
with recursive moment as ({_MOMENTS}),
edge as (
    select
        coalesce((select id from spark_outbox_event where id >= 0 order by id limit 1), 0) as low,
        coalesce(
            (select id from spark_outbox_event where id < (1::bigint << 62) order by id desc limit 1), -1
        ) + 1 as high
),
search (kind, n, at, low, high) as (
    select kind, n, at, low, greatest(low, high) from moment cross join edge
    union all
    select
        kind, n, at,
        case when probe.created_at <= at then probe.id + 1 else low end,
        case when probe.created_at <= at then high else middle end
    from (select *, low + (high - low) / 2 as middle from search where low < high) as halved
    left join lateral (
        select id, created_at from spark_outbox_event as event
        where event.id >= halved.middle and event.id < halved.high order by id limit 1
    ) as probe on true
),
bucket as (
    select kind, n, low as upto, lead(low) over (partition by kind order by n) as start
    from search where low >= high
)
select
    kind, n, seen >= {SAMPLE} as is_estimate,
    case when seen < {SAMPLE} then seen
        else round(seen::numeric * (upto - start) / (last - start + 1))::bigint end as amount
from bucket cross join lateral (
    select count(*) as seen, max(id) as last from (
        select id from spark_outbox_event as event
        where event.id >= bucket.start and event.id < bucket.upto order by id limit {SAMPLE}
    ) as first
) as counted
where seen > 0
"""

# How many of each group may be read.
_DONE_GROUPS = f"""
{DONE_GROUPS},
latest as materialized (
    select event_group, finished_at
    from (select * from done_group limit 1000) as named cross join lateral (
        select event.finished_at from spark_outbox_events as event
        where event.status = 'done' and not event.is_pruned and event.event_group = named.event_group
            and event.finished_at < 'infinity'
        order by event.finished_at desc limit 1
    ) as of_it
    where finished_at > statement_timestamp() - interval '1 day'
    order by finished_at desc limit {GROUPS}
),
sample as (select greatest(100, least({SAMPLE}, 7000 / greatest(count(*), 1))) as size from latest)
"""

# Events of a batch are done at one time. So if the sample is full, its last batch, of which it may hold
# only a part, does not count.
DONE = f"""
with recursive moment as ({_MOMENTS}), {_DONE_GROUPS}
select
    kind, n, event_group as "group", seen >= size as is_estimate,
    case
        when seen < size then seen
        when whole > 0 then round(whole * extract(epoch from step) / extract(epoch from last - start))
        else round(seen * extract(epoch from step) / greatest(extract(epoch from last - start), 0.001))
    end::bigint as amount
from (select *, at - step as start from moment where at > statement_timestamp() - interval '1 day')
    as bucket
cross join latest cross join sample cross join lateral (
    select count(*) as seen, count(*) filter (where finished_at < last_at) as whole, max(last_at) as last
    from (
        select finished_at, max(finished_at) over () as last_at from (
            select event.finished_at from spark_outbox_events as event
            where event.status = 'done' and not event.is_pruned
                and event.event_group = latest.event_group
                and event.finished_at > bucket.start and event.finished_at <= bucket.at
            order by event.finished_at limit (select size from sample)
        ) as first
    ) as dated
) as counted
where seen > 0
"""

# An event that was retried counts from its last attempt.
WAITS = f"""
with recursive {_DONE_GROUPS}
select
    event_group as "group",
    percentile_cont(0.5) within group (order by seconds) as p50,
    percentile_cont(0.95) within group (order by seconds) as p95
from latest cross join sample cross join lateral (
    select extract(epoch from event.finished_at - greatest(event.created_at, event.available_at))::float
        as seconds
    from spark_outbox_events as event
    where event.status = 'done' and not event.is_pruned and event.event_group = latest.event_group
        and event.finished_at > statement_timestamp() - interval '1 hour'
        and event.finished_at < 'infinity'
        and isfinite(event.created_at) and (event.available_at is null or isfinite(event.available_at))
    order by event.finished_at desc limit (select size from sample)
) as of_it
group by event_group
"""

# Of simple successes there is no delivery.
DURATIONS = """
select
    handler, count(*) as stored,
    percentile_cont(0.5) within group (order by seconds) as p50,
    percentile_cont(0.95) within group (order by seconds) as p95
from (
    select handler, extract(epoch from duration)::float as seconds from spark_outbox_delivery
    order by id desc limit 5000
) as latest
where seconds is not null
group by handler order by handler limit 200
"""


def arrived(*, using: str) -> list[Row]:
    """Return how many events were emitted: `amount` in the n-th `minute` or `hour` before now; and
    whether that `is_estimate`, to which transactions that were rolled back may add."""
    return rows(ARRIVED, using=using)


def done(*, using: str) -> list[Row]:
    """Return likewise how many were done, by `group`."""
    return rows(DONE, using=using)


def waits(*, using: str) -> list[Row]:
    """Return by `group` how long the latest events took, in seconds, from ready until done."""
    return rows(WAITS, using=using)


def durations(*, using: str) -> list[Row]:
    """Return how long the calls took of which a delivery is stored, among the latest 5,000."""
    return rows(DURATIONS, using=using)
