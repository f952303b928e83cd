-- What people do to events. Each function returns the events that it changed. It passes over those that
-- a worker has in hand, says in a NOTICE what it leaves out, and wakes a worker. They run with the rights
-- of those who call them, such as the operator's role.

create function spark_outbox_id_of(key text) returns bigint[]
language plpgsql stable as $body$
declare
    found constant bigint[] := array(select id from spark_outbox_event as event where event.key = $1);
begin
    if found = '{}' then
        raise notice 'There is no event with the key %.', quote_nullable(key);
    end if;
    return found;
end
$body$;


-- Lock those of these events that have one of these states, and that nobody holds.
create function spark_outbox_lock(wanted bigint[], states text[]) returns bigint[]
language plpgsql as $body$
declare
    locked constant bigint[] := array(
        select id from spark_outbox_event as event
        where id = any(wanted) and status = any(states) and not exists (
            select from spark_outbox_events as pruned where pruned.id = event.id and pruned.is_pruned
        )
        order by id for no key update skip locked
    );
    other record;
begin
    for other in
        select key, status, is_pruned from spark_outbox_events
        where id = any(wanted) and id <> all(locked)
        order by id limit 20
    loop
        raise notice 'The event % is left out: %.', quote_literal(other.key), case
            when other.is_pruned then 'it was pruned, and of its payload nothing is left'
            when other.status = any(states) then 'a worker has it in hand'
            else 'it is ' || other.status
        end;
    end loop;
    return locked;
end
$body$;


-- What failed has all its attempts again; and what was discarded, if the event was. With a handler, only
-- what is owed to that. An event that was taken up before has an attempt: so its deliveries are read.
create function spark_outbox_reopen(locked bigint[], handler text default null)
returns setof spark_outbox_events
language plpgsql as $body$
begin
    update spark_outbox_delivery as delivery
    set
        status = 'pending', available_at = statement_timestamp(),
        attempts = case when delivery.status = 'pending' then delivery.attempts else 0 end
    where delivery.event_id = any($1) and ($2 is null or delivery.handler = $2) and (
        delivery.status in ('pending', 'failed')
        or delivery.status = 'discarded' and exists (
            select from spark_outbox_events as event
            where event.id = delivery.event_id and event.status = 'discarded'
        )
    );
    update spark_outbox_event as event
    set
        status = 'pending', available_at = null, finished_at = null,
        attempts = greatest(event.attempts, 1)
    where event.id = any($1);
    return query select * from spark_outbox_events as event where event.id = any($1) order by id;
    if $1 <> '{}' then
        perform pg_notify('spark_outbox', '');
    end if;
end
$body$;


create function spark_retry(key text)
returns setof spark_outbox_events
language sql as $body$
    select * from spark_outbox_reopen(
        spark_outbox_lock(spark_outbox_id_of($1), '{pending, failed, unhandled, discarded}')
    )
$body$;

comment on function spark_retry(text) is
    'Have the event of this key handled now: it failed, was unhandled or discarded, or waits.';


-- Lock events that have failed for good, the oldest first, but those that others hold.
create function spark_outbox_lock_failed(
    handler text, since timestamptz, fingerprint text, max integer
)
returns bigint[]
language sql as $body$
    select array(
        select id from spark_outbox_event as event
        where status = 'failed' and case
            when $1 is null and $3 is null then coalesce(finished_at, created_at) >= $2
            else id in (
                select delivery.event_id from spark_outbox_delivery as delivery
                where delivery.status in ('pending', 'failed') and delivery.error <> ''
                    and delivery.status = 'failed' and delivery.attempted_at >= $2
                    and ($1 is null or delivery.handler = $1)
                    and ($3 is null or spark_outbox_fingerprint(delivery.error) = $3)
            )
        end
        order by id limit $4
        for no key update skip locked
    )
$body$;


create function spark_retry_failed(
    handler text default null, since timestamptz default '-infinity', fingerprint text default null,
    max integer default 1000
)
returns setof spark_outbox_events
language plpgsql as $body$
begin
    return query select * from spark_outbox_reopen(spark_outbox_lock_failed($1, $2, $3, $4), $1);
end
$body$;

comment on function spark_retry_failed is
    'Have events handled now that failed for good: of this handler, whose last attempt was since then, '
    'with this kind of error; up to `max`, the oldest first.';


create function spark_outbox_give_up(locked bigint[], why text) returns setof spark_outbox_events
language plpgsql as $body$
begin
    update spark_outbox_delivery as delivery set status = 'discarded'
    where delivery.event_id = any($1) and delivery.status in ('pending', 'failed');
    update spark_outbox_event as event
    set
        status = 'discarded', finished_at = statement_timestamp(),
        last_error = concat('Discarded by ', session_user, ': ', $2)
    where event.id = any($1);
    return query select * from spark_outbox_events as event where event.id = any($1) order by id;
    if $1 <> '{}' then
        perform pg_notify('spark_outbox', ''); -- what comes after it in its order can go on
    end if;
end
$body$;


create function spark_discard(key text, why text) returns setof spark_outbox_events
language sql as $body$
    select * from spark_outbox_give_up(
        spark_outbox_lock(spark_outbox_id_of($1), '{pending, failed, unhandled}'), $2
    )
$body$;

comment on function spark_discard(text, text) is
    'Give up the event of this key, and say why: no handler is called with it any more.';


-- Done events are owed to one handler again. The delivery of '*' stands for all handlers that have no
-- delivery of their own.
create function spark_outbox_owe_again(locked bigint[], handler text) returns setof spark_outbox_events
language plpgsql as $body$
begin
    insert into spark_outbox_delivery (event_id, handler, status)
    select event_id, '*', 'done' from unnest($1) as done (event_id)
    on conflict do nothing;
    insert into spark_outbox_delivery as delivery (event_id, handler, available_at)
    select event_id, $2, statement_timestamp() from unnest($1) as done (event_id)
    on conflict on constraint spark_outbox_delivery_event_handler do update
    set status = 'pending', attempts = 0, available_at = excluded.available_at;
    return query select * from spark_outbox_reopen($1, $2);
end
$body$;


create function spark_replay(key text, handler text)
returns setof spark_outbox_events
language plpgsql as $body$
declare
    locked bigint[];
begin
    if $2 is null or $2 = '*' or not exists (
        select from spark_outbox_session as worker where worker.handlers ? $2
    ) and exists (select from spark_outbox_session) then
        raise invalid_parameter_value using
            message = 'No worker has a handler ' || quote_nullable($2) || '.',
            hint = 'select jsonb_array_elements_text(handlers) from spark_outbox_workers;';
    end if;
    locked := spark_outbox_lock(spark_outbox_id_of($1), '{done}');
    return query select * from spark_outbox_owe_again(locked, $2);
end
$body$;

comment on function spark_replay(text, text) is
    'Give the event of this key, which is done, to this handler once more, and to no other.';


-- Pin the search_path, as in 0001_emitting.sql.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
    function regprocedure;
begin
    foreach function in array array[
        'spark_outbox_id_of(text)',
        'spark_outbox_lock(bigint[], text[])',
        'spark_outbox_lock_failed(text, timestamptz, text, integer)',
        'spark_outbox_reopen(bigint[], text)',
        'spark_outbox_give_up(bigint[], text)',
        'spark_outbox_owe_again(bigint[], text)',
        'spark_retry(text)',
        'spark_retry_failed(text, timestamptz, text, integer)',
        'spark_discard(text, text)',
        'spark_replay(text, text)'
    ]::regprocedure[] loop
        execute format('alter function %s set search_path = pg_catalog, %s, pg_temp', function, home);
        execute format('alter function %s set client_min_messages = notice', function);
    end loop;
end
$do$;
