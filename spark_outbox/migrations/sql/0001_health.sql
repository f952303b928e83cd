-- Who works, why an event is not handled yet, and whether all is well. As in 0001_status.sql, everything
-- here reads a bounded number of rows.
--
-- Of the sessions of other roles, PostgreSQL shows what they do only to roles that have
-- pg_read_all_stats: to others their state is unknown.

create view spark_outbox_workers as
select
    split_part(session.name, ':', 1) as host,
    nullif(split_part(session.name, ':', 2), '')::integer as pid,
    session.started_at,
    case
        when presence.pid is null then 'gone'
        when exists (
            select from pg_locks
            where locktype = 'advisory' and classid = 7531002 and pid = session.backend and granted
        ) then 'watch'
        when activity.state like 'idle in transaction%' or activity.state = 'active' then 'busy'
        when activity.state = 'idle' then 'resting'
        else 'unknown'
    end as state,
    date_trunc('milliseconds', statement_timestamp() - activity.state_change) as state_for,
    session.groups,
    session.handlers,
    session.version,
    session.backend,
    case when session.called_at is null or presence.pid is null then '' else session.handler end as handler,
    case when presence.pid is not null then event.key end as event_key,
    case when presence.pid is not null then
        date_trunc('seconds', statement_timestamp() - session.called_at)
    end as in_hand_for
from spark_outbox_session as session
left join spark_outbox_event as event
    on event.id = session.event_id and session.called_at is not null
left join pg_locks as presence
    on presence.locktype = 'advisory' and presence.classid = 7531003
    and presence.objid = session.session::oid and presence.granted
    and presence.database = (select oid from pg_database where datname = current_database())
left join pg_stat_activity as activity
    on activity.pid = session.backend and activity.datname = current_database()
order by host, pid;

comment on view spark_outbox_workers is
    'Worker processes: busy, resting, or with the watch, which looks out for events; or gone without '
    'having stopped. What a handler has had in hand for more than a second.';


-- What keeps vacuum from removing dead rows, the oldest first.
create view spark_outbox_snapshots as
select who, date_trunc('seconds', statement_timestamp() - since) as held_for, xids, remedy
from (
    select
        concat(
            'session ', pid, ' (', concat_ws(', ', usename, nullif(application_name, ''), state), ')'
        ),
        xact_start, greatest(age(backend_xmin), age(backend_xid)),
        format('select pg_terminate_backend(%s)', pid)
    from pg_stat_activity
    where pid <> pg_backend_pid() and (datname = current_database() or backend_type = 'walsender')
        and backend_type <> 'autovacuum worker' -- vacuum minds no vacuum
        and pid not in (select pid from pg_stat_progress_vacuum)
    union all
    select
        concat('prepared transaction ', quote_literal(gid)), prepared, age(transaction),
        format('rollback prepared %L', gid)
    from pg_prepared_xacts where database = current_database()
    union all
    select
        concat('replication slot ', slot_name), null::timestamptz as since, age(xmin),
        format('select pg_drop_replication_slot(%L)', slot_name)
    from pg_replication_slots
) as holder (who, since, xids, remedy)
where xids is not null
order by xids desc;

comment on view spark_outbox_snapshots is
    'What keeps vacuum from removing dead rows: sessions, prepared transactions, replication slots.';


create view spark_outbox_health as
with status as (
    select
        coalesce(sum(ready), 0) as ready, coalesce(sum(failed), 0) as failed,
        coalesce(sum(unhandled), 0) as unhandled,
        coalesce(sum(waits_for_circuit), 0) as waits_for_circuit, coalesce(sum(paused), 0) as paused,
        max(late) as lag
    from spark_outbox_status
),
workers as (
    select
        count(*) filter (where state <> 'gone') as there,
        count(*) filter (where state = 'gone') as gone
    from spark_outbox_workers
),
snapshot as (
    select who, held_for, xids, remedy from spark_outbox_snapshots
    order by held_for desc nulls last, xids desc limit 1
),
rows as (
    select n_dead_tup as dead, n_live_tup as live from pg_stat_all_tables
    where relid = 'spark_outbox_event'::regclass
),
prepared as (
    select gid, statement_timestamp() - prepared as held_for from pg_prepared_xacts
    where database = current_database() order by prepared limit 1
),
triggers as (
    select count(*) as there from pg_trigger
    where tgrelid = 'spark_outbox_event'::regclass and tgenabled in ('O', 'A')
        and tgname in ('spark_outbox_wake', 'spark_outbox_wake_again')
)
select
    'lag' as name,
    case
        when lag > interval '10 minutes' then 'critical'
        when lag > interval '1 minute' then 'warning'
        else 'ok'
    end as status,
    case
        when lag is null then 'No event waits.'
        else concat(
            'The oldest event that could be handled if all were well has waited for ',
            date_trunc('seconds', lag), '; ', ready, ' are ready.'
        )
    end as detail,
    'select * from spark_outbox_status; select spark_explain(key) says why one of them waits.' as remedy
from status
union all
select
    'failed', case when failed > 0 then 'warning' else 'ok' end,
    concat(failed, ' events have failed for good.'),
    'select * from spark_outbox_failures; then spark_retry_failed(handler) or spark_discard(key, why).'
from status
union all
select
    'unhandled', case when unhandled > 0 then 'warning' else 'ok' end,
    concat(unhandled, ' events had no handler that matches their group.'),
    'Deploy a handler: its worker takes them up by itself. Or spark_discard(key, why).'
from status
union all
select
    'circuits', case when waits_for_circuit > 0 then 'warning' else 'ok' end,
    concat(waits_for_circuit, ' events wait since a handler fails on everything.'),
    'select * from spark_outbox_failures; once it works, spark_outbox_close_circuit(handler).'
from status
union all
select
    'pauses',
    case when count(*) > 0 or (select paused from status) > 0 then 'warning' else 'ok' end,
    case
        when count(*) = 0 and (select paused from status) > 0 then concat(
            'Nothing is paused; ', (select paused from status),
            ' events wait to be put back after a pause: a worker does that within a minute.'
        )
        when count(*) = 0 then 'Nothing is paused.'
        else concat(
            string_agg(
                concat(
                    'The ', kind, ' ', name, ' is paused since ', date_trunc('seconds', paused_at), ', by ',
                    paused_by, ': ' || nullif(why, ''), '; ', waiting, ' events wait for it'
                ),
                '. ' order by paused_at
            ),
            case when count(*) = 20 then '. There may be more' end, '.'
        )
    end,
    'select * from spark_outbox_pauses; then spark_resume(kind, name).'
from (select * from spark_outbox_pauses limit 20) as pause
union all
select
    'workers',
    case when there = 0 then 'critical' when gone > 0 then 'warning' else 'ok' end,
    concat(there, ' worker processes are there', case when gone > 0 then concat(
        ', and ', gone, ' are gone without having stopped'
    ) end, '.'),
    'Start one: manage.py spark_worker. What became of the others is in their log.'
from workers
union all
select
    'trigger', case when there = 2 then 'ok' else 'warning' end,
    case
        when there = 2 then 'An emit wakes a worker that sleeps.'
        else 'The triggers that wake workers are not there: workers poll.'
    end,
    'manage.py migrate, unless SPARK_OUTBOX["WAKE"] is "never".'
from triggers
union all
select
    'snapshot',
    case
        when held_for > interval '6 hours' then 'critical'
        when held_for > interval '1 hour' or held_for is null and xids > 1000000 then 'warning'
        else 'ok'
    end,
    case
        when who is null then 'Nothing keeps vacuum from removing dead rows.'
        else concat(
            who, ' holds a snapshot', coalesce(' for ' || held_for, ', nobody knows for how long'),
            ': ', xids, ' transactions have begun since, whose dead rows vacuum can''t remove.'
        )
    end,
    coalesce(remedy, '')
from (select) as one left join snapshot on true
union all
select
    'dead rows', case when dead > greatest(200000, live / 2) then 'warning' else 'ok' end,
    concat(dead, ' dead rows beside ', live, ' live ones.'),
    'Look at the check "snapshot" and at autovacuum; vacuum spark_outbox_event.'
from rows
union all
select
    'prepared', case when held_for > interval '5 minutes' then 'warning' else 'ok' end,
    case
        when held_for is null then 'No transaction is prepared.'
        else concat(
            'The transaction ', quote_literal(gid), ' has been prepared for ',
            date_trunc('seconds', held_for), ': if it has emitted, workers look again and again.'
        )
    end,
    'commit prepared, or rollback prepared.'
from (select) as one left join prepared on true
union all
select
    'notifications',
    case when usage > 0.5 then 'critical' when usage > 0.1 then 'warning' else 'ok' end,
    concat('The server''s queue of notifications is full to ', round((usage * 100)::numeric), ' %.'),
    'A session that LISTENs is in a long transaction: look for it in pg_stat_activity.'
from pg_notification_queue_usage() as usage;

comment on view spark_outbox_health is
    'Whether all is well: a row for each check, `ok`, `warning` or `critical`, with the remedy.';


-- The sentences of spark_explain() about one event that is pending.
create function spark_outbox_explain_pending(event_id bigint) returns setof text
language plpgsql stable as $body$
declare
    moment constant timestamptz := statement_timestamp();
    event record;
    owed record;
    head record;
    paused record;
    is_held boolean := false;
    workers record;
    holder record;
    refusing text;
begin
    select * into event from spark_outbox_events as wanted where wanted.id = $1;
    select
        count(*) as there,
        count(*) filter (where groups is null or event.event_group ~ groups) as mine
    into workers from spark_outbox_workers where state <> 'gone';
    if workers.there = 0 then
        return next 'No worker that can be seen is there. Start one: manage.py spark_worker.';
    elsif workers.mine = 0 then
        return next concat(
            'None of the ', workers.there, ' workers that are there takes its group: they have --groups.'
        );
    end if;
    -- A pause may be younger than the event's last turn, or its event not have had one yet.
    for paused in
        select kind, name, why, paused_by, date_trunc('seconds', paused_at) as paused_at
        from spark_outbox_pause as pause
        where kind = 'group' and name = event.event_group or kind = 'handler' and name in (
            select delivery.handler from spark_outbox_delivery as delivery
            where delivery.event_id = $1 and delivery.status = 'pending'
        )
        order by pause.id limit 20
    loop
        return next concat(
            case paused.kind when 'group' then 'Its group ' else 'The handler ' end, paused.name,
            ' is paused since ', paused.paused_at, ', by ', paused.paused_by,
            ': ' || nullif(paused.why, ''), '. It goes on after select spark_resume(',
            quote_literal(paused.kind), ', ', quote_literal(paused.name),
            '); spark_retry(key) does not change that.'
        );
    end loop;
    for owed in
        select
            handler, attempts, date_trunc('seconds', attempted_at) as attempted_at,
            date_trunc('seconds', available_at) as again_at, available_at > moment as waits,
            split_part(error, E'\n', 1) = 'spark_outbox: not called, its circuit is open'
                as waits_for_circuit,
            error like 'spark\_outbox: not called, it is paused (%' as was_paused,
            split_part(error, E'\n', 1) in (
                select spark_outbox_pause_mark(id) from spark_outbox_pause
            ) as is_paused,
            regexp_replace(left(split_part(error, E'\n', 1), 300), '[^ -~]+$', '') as error
        from spark_outbox_delivery as delivery
        where delivery.event_id = $1 and delivery.status = 'pending'
        order by available_at limit 20
    loop
        if owed.was_paused then
            is_held := true;
            if owed.waits and not owed.is_paused then
                return next concat(
                    'The handler ', owed.handler, ' was paused. A worker puts the event back within a '
                    'minute.'
                );
            end if;
        elsif owed.waits_for_circuit then
            return next concat(
                'The handler ', owed.handler, ' is not called: it has failed on everything, and its '
                'circuit is open. It is tried again at ', owed.again_at, ', or now after select '
                'spark_outbox_close_circuit(', quote_literal(owed.handler), ').'
            );
        elsif owed.attempts > 0 then
            return next concat(
                'The handler ', owed.handler, ' has failed ', owed.attempts, ' times, the last time at ',
                owed.attempted_at, ': ', owed.error, case when owed.waits then concat(
                    '. Its next attempt is at ', owed.again_at, ', or now after select spark_retry(key)'
                ) end, '.'
            );
        elsif not exists (
            select from spark_outbox_workers where state <> 'gone' and handlers ? owed.handler
        ) then
            return next concat(
                'It is owed to the handler ', owed.handler, ', which no worker that can be seen has.'
            );
        end if;
    end loop;
    if event.available_at > moment and not (is_held and event.available_at >= '9999-01-01 00:00+00') then
        return next concat(
            'It is not to be handled before ', date_trunc('seconds', event.available_at), '.'
        );
    end if;
    select key, status into head from spark_outbox_event as other
    where other.ordering_key = event.ordering_key
        and other.status in ('pending', 'running', 'failed')
    order by other.ordering_key, other.id limit 1;
    if head.key <> event.key then
        return next concat(
            'It comes after the event ', quote_literal(head.key), ' of its ordering key, which is ',
            head.status, case when head.status = 'failed' then
                ': with FAILED_HEAD = "block" that holds it up until it is retried or discarded'
            end, '.'
        );
    elsif event.available_at is null or event.available_at <= moment then
        select lock.pid, application_name, date_trunc('seconds', xact_start) as since into holder
        from pg_locks as lock left join pg_stat_activity as activity on activity.pid = lock.pid
        where lock.locktype = 'transactionid' and lock.granted
            and lock.transactionid = event.locked_by;
        if found then
            return next concat(
                'The session ', holder.pid, ' (', holder.application_name, ') has it in hand',
                ' since ' || holder.since, '.'
            );
        elsif workers.mine > 0 then
            return next concat(
                'It is ready: it is its turn as soon as one of ', workers.mine, ' workers comes to it.'
            );
        end if;
    end if;
    select tgname into refusing from pg_trigger
    where tgrelid = 'spark_outbox_event'::regclass and not tgisinternal
        and tgname not like 'spark\_outbox\_%'
    order by tgname limit 1;
    if found then
        return next concat(
            'Your trigger ', refusing, ' on spark_outbox_event may keep workers from settling it: their '
            'log says so.'
        );
    end if;
end
$body$;


create function spark_explain(key text) returns setof text
language plpgsql stable as $body$
declare
    event record;
    delivery record;
begin
    select * into event from spark_outbox_events as wanted where wanted.key = $1;
    if not found then
        return next 'There is no event with this key: it was never emitted, its transaction is still '
            'open or was rolled back, or it has been deleted.';
        return;
    end if;
    return next concat(
        'It is ', event.status, ', in the group ', event.event_group, '; emitted at ',
        date_trunc('seconds', event.created_at),
        case when event.status not in ('pending', 'running')
            then '; ended at ' || date_trunc('seconds', event.finished_at) end,
        case when event.attempts > 0 then concat('; taken up ', event.attempts, ' times') end, '.'
    );
    if event.is_pruned then
        return next 'It has been pruned: its key is kept, so that it stays a duplicate.';
    elsif event.status = 'pending' then
        return query select * from spark_outbox_explain_pending(event.id);
    elsif event.status = 'unhandled' then
        return next 'No handler matched its group when a worker came to it. A worker that has one takes '
            'it up within a minute.';
    elsif event.status = 'discarded' and event.last_error like 'Discarded by %' then
        return next split_part(event.last_error, E'\n', 1);
    end if;
    for delivery in
        select
            handler, status, attempts, worker, date_trunc('seconds', attempted_at) as attempted_at,
            regexp_replace(left(split_part(error, E'\n', 1), 300), '[^ -~]+$', '') as error
        from spark_outbox_delivery where event_id = event.id and status in ('failed', 'running', 'discarded')
        order by id limit 20
    loop
        return next case delivery.status
            when 'discarded' then concat(
                'The handler ', delivery.handler, ' does not get it any more',
                ': ' || nullif(delivery.error, ''), '.'
            )
            when 'running' then concat(
                'The handler ', delivery.handler, ' is at work on it since ', delivery.attempted_at,
                ', in the worker ', delivery.worker, '.'
            )
            else concat(
                'The handler ', delivery.handler, ' has failed ', delivery.attempts, ' times, the last '
                'time at ', delivery.attempted_at, ': ', delivery.error, '. To try it again: select '
                'spark_retry(key).'
            )
        end;
    end loop;
end
$body$;

comment on function spark_explain(text) is
    'Say in sentences where the event of this key is, and why it is not handled yet.';


-- Pin the search_path, as in 0001_emitting.sql.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
    function regprocedure;
begin
    foreach function in array array[
        'spark_outbox_explain_pending(bigint)',
        'spark_explain(text)'
    ]::regprocedure[] loop
        execute format('alter function %s set search_path = pg_catalog, %s, pg_temp', function, home);
    end loop;
end
$do$;
