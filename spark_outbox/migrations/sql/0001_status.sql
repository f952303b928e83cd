-- The state of the outbox, by group.

create view spark_outbox_status as
select
    event_group,
    count(*) filter (
        where status = 'pending' and (available_at is null or available_at <= statement_timestamp())
    ) as pending,
    count(*) filter (
        where status = 'pending' and available_at > statement_timestamp()
    ) as delayed,
    count(*) filter (where status = 'running') as running,
    count(*) filter (where status = 'done') as done,
    count(*) filter (where status = 'failed') as failed,
    count(*) filter (where status = 'unhandled') as unhandled,
    count(*) filter (where status = 'discarded') as discarded,
    -- SQL may have written -infinity. Before PostgreSQL 17, subtracting it is an error.
    statement_timestamp() - min(coalesce(available_at, created_at)) filter (
        where status = 'pending' and (available_at is null or available_at <= statement_timestamp())
            and isfinite(coalesce(available_at, created_at))
    ) as oldest_pending_age,
    count(waits.event_id) filter (where status = 'pending') as waits_for_circuit
from spark_outbox_event as event
left join (
    select distinct event_id from spark_outbox_delivery
    where status = 'pending' and error = 'spark_outbox: not called, its circuit is open'
) as waits on waits.event_id = event.id
group by event_group;
