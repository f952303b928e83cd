-- What people look at: views that read a bounded number of rows, whatever the size of the tables.
--
-- Each looks at no more than 10,000 events of a kind in a group, and at 1,000 groups or kinds of failures;
-- of what is pending, at 10,000 of each kind in all, the oldest. So a count of 10,000 means that or more.

-- Events without what only their handlers should see. `locked_by` is the transaction that has locked it,
-- or was the last to do so.
create view spark_outbox_events as
select
    id, key, event_group, status, attempts, available_at, ordering_key, created_at, finished_at,
    last_error, digest is not null as is_pruned, xmax as locked_by
from spark_outbox_event;

comment on view spark_outbox_events is 'Events without payloads and headers.';


-- What an error is about: its type and message, with what differs from one event to the next left out. In
-- a database without an encoding, left() may cut a letter in two: so what is no ASCII at the end goes.
create function spark_outbox_fingerprint(error text) returns text
language sql immutable parallel safe as $body$
    select pg_catalog.regexp_replace(
        pg_catalog.left(
            pg_catalog.regexp_replace(
                pg_catalog.regexp_replace(
                    pg_catalog.regexp_replace(
                        pg_catalog.left(pg_catalog.split_part($1, E'\n', 1), 500),
                        $$'[^']*'|"[^"]*"|`[^`]*`$$, '*', 'g'
                    ),
                    '\m[0-9a-fA-F-]{8,}\M', '#', 'g'
                ),
                '[0-9]+', '#', 'g'
            ),
            200
        ),
        '[^ -~]+$', ''
    )
$body$;

comment on function spark_outbox_fingerprint(text) is
    'The first line of an error, without numbers, ids and quoted text.';

-- Only what fails pays for it.
create index spark_outbox_delivery_failing
    on spark_outbox_delivery (handler, spark_outbox_fingerprint(error), attempted_at)
    where status in ('pending', 'failed') and error <> '';


create view spark_outbox_status as
with recursive pending as (
    -- Each from an index of its own, the oldest first.
    (
        select 0 as kind, id, event_group, created_at, available_at, attempts, ordering_key
        from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is null
        order by id limit 10000
    )
    union all
    (
        select 1 as kind, id, event_group, created_at, available_at, attempts, ordering_key
        from spark_outbox_event
        where status = 'pending' and available_at is null and ordering_key is not null
        order by id limit 10000
    )
    union all
    (
        select 2 as kind, id, event_group, created_at, available_at, attempts, ordering_key
        from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is null
        order by available_at, id limit 10000
    )
    union all
    (
        select 3 as kind, id, event_group, created_at, available_at, attempts, ordering_key
        from spark_outbox_event
        where status = 'pending' and available_at <= statement_timestamp() and ordering_key is not null
        order by available_at, id limit 10000
    )
    union all
    (
        select 4 as kind, id, event_group, created_at, available_at, attempts, ordering_key
        from spark_outbox_event
        where status = 'pending' and available_at > statement_timestamp() and ordering_key is null
        order by available_at, id limit 10000
    )
    union all
    (
        select 5 as kind, id, event_group, created_at, available_at, attempts, ordering_key
        from spark_outbox_event
        where status = 'pending' and available_at > statement_timestamp() and ordering_key is not null
        order by available_at, id limit 10000
    )
),
waiting as (
    select
        event_group,
        least(count(*) filter (where kind < 4), 10000) as ready,
        least(count(*) filter (where kind >= 4 and attempts <= 0), 10000) as delayed,
        least(count(*) filter (where kind >= 4 and attempts > 0), 10000) as retrying,
        -- Not of those that a person has made ready: since when is not known.
        min(coalesce(available_at, created_at)) filter (
            where kind < 4 and (available_at is not null or attempts <= 0)
                and isfinite(coalesce(available_at, created_at))
                and (ordering_key is null or id = (
                    select head.id from spark_outbox_event as head
                    where head.ordering_key >= pending.ordering_key
                        and head.ordering_key <= pending.ordering_key
                        and head.status in ('pending', 'running', 'failed')
                    order by head.ordering_key, head.id limit 1
                ))
        ) as ready_since,
        statement_timestamp() - min(created_at) filter (where isfinite(created_at)) as oldest_pending_age
    from pending
    group by event_group
),
cut as (
    select exists (select from pending group by kind having count(*) >= 10000) as more
),
-- From one status and group to the next, so not through all of their events.
aside (status, event_group) as (
    (
        select status, event_group from spark_outbox_event
        where status in ('running', 'unhandled', 'failed')
        order by status, event_group limit 1
    )
    union all
    select following.* from aside cross join lateral (
        select event.status, event.event_group from spark_outbox_event as event
        where event.status in ('running', 'unhandled', 'failed')
            and (event.status, event.event_group) > (aside.status, aside.event_group)
        order by event.status, event.event_group limit 1
    ) as following
),
put_aside as (
    select
        event_group,
        max(amount) filter (where status = 'running') as running,
        max(amount) filter (where status = 'failed') as failed,
        max(amount) filter (where status = 'unhandled') as unhandled
    from (select * from aside limit 3000) as named cross join lateral (
        select count(*) from (
            select from spark_outbox_event as event
            where event.status in ('running', 'unhandled', 'failed') and event.status = named.status
                and event.event_group = named.event_group
            limit 10000
        ) as first
    ) as of_it (amount)
    group by event_group
),
failing (handler) as (
    (
        select handler from spark_outbox_delivery
        where status in ('pending', 'failed') and error <> '' order by handler limit 1
    )
    union all
    select following.handler from failing cross join lateral (
        select delivery.handler from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler > failing.handler
        order by delivery.handler limit 1
    ) as following
),
-- From one mark to the next: also of pauses that have ended, whose events are still to be put back.
marked (handler, mark) as (
    select handler, 'spark_outbox: not called, it is paused ('
    from (select * from failing limit 1000) as named
    union all
    select marked.handler, following.mark from marked cross join lateral (
        select spark_outbox_fingerprint(delivery.error) as mark from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = marked.handler
            and spark_outbox_fingerprint(delivery.error) > marked.mark
        order by spark_outbox_fingerprint(delivery.error) limit 1
    ) as following
    where starts_with(following.mark, 'spark_outbox: not called, it is paused (')
),
-- What could be handled but for an open circuit or a pause; a delivery keeps the time when it was first put
-- aside for one.
held as (
    select
        event_group,
        least(count(distinct id) filter (where not is_pause), 10000) as waits_for_circuit,
        least(count(distinct id) filter (where is_pause), 10000) as paused,
        min(attempted_at) filter (where isfinite(attempted_at)) as held_since
    from (
        select handler, 'spark_outbox: not called, its circuit is open' as mark, false as is_pause
        from (select * from failing limit 1000) as named
        union all
        select handler, mark, true from (select * from marked limit 2000) as named
        where mark like '%)'
    ) as reason
    cross join lateral (
        select delivery.event_id, delivery.attempted_at from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = reason.handler
            and spark_outbox_fingerprint(delivery.error) = reason.mark
            and (not reason.is_pause or delivery.available_at > statement_timestamp()) -- not put back yet
        order by delivery.attempted_at limit 10000
    ) as waiting
    join spark_outbox_event as event on event.id = waiting.event_id
    where event.status = 'pending'
    group by event_group
),
done_group (event_group) as (
    (
        select event_group from spark_outbox_event where status = 'done' and digest is null
        order by event_group limit 1
    )
    union all
    select following.event_group from done_group cross join lateral (
        select event.event_group from spark_outbox_event as event
        where event.status = 'done' and event.digest is null
            and event.event_group > done_group.event_group
        order by event.event_group limit 1
    ) as following
),
ended as (
    select event_group, amount as done_last_hour
    from (select * from done_group limit 1000) as named cross join lateral (
        select count(*) from (
            select from spark_outbox_event as event
            where event.status = 'done' and event.digest is null
                and event.event_group = named.event_group
                and event.finished_at > statement_timestamp() - interval '1 hour'
                and event.finished_at < 'infinity'
            limit 10000
        ) as latest
    ) as of_it (amount)
)
select
    event_group,
    coalesce(ready, 0) as ready,
    coalesce(delayed, 0) as delayed,
    coalesce(retrying, 0) as retrying,
    coalesce(running, 0) as running,
    coalesce(failed, 0) as failed,
    coalesce(unhandled, 0) as unhandled,
    coalesce(done_last_hour, 0) as done_last_hour,
    coalesce(waits_for_circuit, 0) as waits_for_circuit,
    coalesce(paused, 0) as paused,
    statement_timestamp() - least(ready_since, held_since) as late,
    oldest_pending_age,
    more
from waiting
full join put_aside using (event_group)
full join ended using (event_group)
full join held using (event_group)
cross join cut
order by event_group;

comment on view spark_outbox_status is
    'The state of the outbox, by group. A count of 10000 means that or more. `late`: the age of the oldest '
    'event that could be handled if all were well. `more`: there are more pending events than were '
    'counted, maybe of other groups.';


create view spark_outbox_pauses as
with recursive failing (handler) as (
    (
        select handler from spark_outbox_delivery
        where status in ('pending', 'failed') and error <> '' order by handler limit 1
    )
    union all
    select following.handler from failing cross join lateral (
        select delivery.handler from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler > failing.handler
        order by delivery.handler limit 1
    ) as following
)
select pause.kind, pause.name, pause.why, pause.paused_by, pause.paused_at, of_it.waiting
from spark_outbox_pause as pause cross join lateral (
    select count(distinct event_id) as waiting from (
        select held.event_id
        from (select * from failing limit 1000) as named cross join lateral (
            select delivery.event_id from spark_outbox_delivery as delivery
            where delivery.status in ('pending', 'failed') and delivery.error <> ''
                and delivery.handler = named.handler
                and spark_outbox_fingerprint(delivery.error) = spark_outbox_pause_mark(pause.id)
            limit 10000
        ) as held
        where pause.kind = 'group' or pause.name = named.handler
        limit 10000
    ) as first
) as of_it
order by pause.paused_at;

comment on view spark_outbox_pauses is
    'Handlers and groups that are paused: why, by whom and since when, and how many events wait for that.';


create view spark_outbox_failures as
with recursive kind (handler, fingerprint) as (
    (
        select handler, spark_outbox_fingerprint(error) from spark_outbox_delivery
        where status in ('pending', 'failed') and error <> ''
        order by handler, spark_outbox_fingerprint(error) limit 1
    )
    union all
    select following.* from kind cross join lateral (
        select delivery.handler, spark_outbox_fingerprint(delivery.error)
        from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and (delivery.handler, spark_outbox_fingerprint(delivery.error))
                > (kind.handler, kind.fingerprint)
        order by delivery.handler, spark_outbox_fingerprint(delivery.error) limit 1
    ) as following
)
select
    handler, fingerprint, of_it.failed, of_it.retrying,
    (
        select min(delivery.attempted_at) from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = named.handler
            and spark_outbox_fingerprint(delivery.error) = named.fingerprint
    ) as first_at,
    (
        select max(delivery.attempted_at) from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = named.handler
            and spark_outbox_fingerprint(delivery.error) = named.fingerprint
    ) as last_at,
    (
        select event.key from spark_outbox_delivery as delivery
        join spark_outbox_event as event on event.id = delivery.event_id
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = named.handler
            and spark_outbox_fingerprint(delivery.error) = named.fingerprint
        order by delivery.attempted_at desc limit 1
    ) as example_key
from (
    select * from kind where fingerprint not like 'spark_outbox: not called, it is paused (%' limit 1000
) as named cross join lateral (
    select
        count(*) filter (where status = 'failed') as failed,
        count(*) filter (where status = 'pending') as retrying
    from (
        select delivery.status from spark_outbox_delivery as delivery
        where delivery.status in ('pending', 'failed') and delivery.error <> ''
            and delivery.handler = named.handler
            and spark_outbox_fingerprint(delivery.error) = named.fingerprint
        limit 10000 -- without an order: to sort them would read them all
    ) as first
) as of_it
order by last_at desc;

comment on view spark_outbox_failures is
    'What fails, or is to be tried again after it has failed: by handler and kind of error.';
