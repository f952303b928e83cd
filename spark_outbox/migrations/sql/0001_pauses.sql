-- Pause a handler or a group by hand, and resume it.
--
-- A worker heeds a pause at the latest from its first batch that begins 0.8 s later. An event that meets
-- one gets a delivery that is due in the year 9999, with the mark of that pause as the first line of its
-- error, before its former error: so it stands in front of nobody, and is found again in the index of
-- failures. spark_outbox/worker/pauses.py has the workers' half.

-- The error of deliveries that wait for a pause. Its id is in letters, as a fingerprint has no digits, and
-- in others than a to f, as these may be hexadecimal.
create function spark_outbox_pause_mark(pause_id bigint) returns text
language sql immutable parallel safe as $body$
    select pg_catalog.replace(
        'spark_outbox: not called, it is paused (#)', '#',
        pg_catalog.translate($1::pg_catalog.text, '0123456789', 'ghijklmnop')
    )
$body$;


create function spark_outbox_check_kind(kind text) returns void
language plpgsql immutable as $body$
begin
    if kind is null or kind not in ('handler', 'group') then
        raise invalid_parameter_value using
            message = format('There are no pauses of the kind %s.', quote_nullable(kind)),
            hint = 'Write ''handler'', and its name as in spark_outbox_workers; or ''group'', and all of '
                'its name.';
    end if;
end
$body$;


create function spark_pause(kind text, name text, why text default '')
returns setof spark_outbox_pause
language plpgsql as $body$
begin
    perform spark_outbox_check_kind($1);
    if $1 = 'handler' and not exists (
        select from spark_outbox_session as worker where worker.handlers ? $2
    ) then
        raise notice 'No worker that can be seen has a handler %. It is paused all the same.',
            quote_nullable($2);
    end if;
    return query
        insert into spark_outbox_pause as pause (kind, name, why) values ($1, $2, coalesce($3, ''))
        on conflict on constraint spark_outbox_pause_kind_name do nothing
        returning pause.*;
    if not found then
        raise notice 'The % % is paused already.', $1, quote_literal($2);
    end if;
end
$body$;

comment on function spark_pause(text, text, text) is
    'Call this handler, or the handlers of this group, with no event until spark_resume(). Emits go on.';


-- What is left after the first thousand is put back by workers; with what others hold at this moment, and
-- what workers put aside that have not read yet that the pause has ended. The events are due rather than
-- ready: what they owe to other handlers has its own time. As in PUT_BACK of store/pausing.py, the second
-- statement does not have the condition of the index of failures.
create function spark_resume(kind text, name text) returns setof spark_outbox_pause
language plpgsql as $body$
declare
    ended spark_outbox_pause;
    locked bigint[];
begin
    perform spark_outbox_check_kind($1);
    delete from spark_outbox_pause as pause where pause.kind = $1 and pause.name = $2
    returning * into ended;
    if not found then
        raise notice 'The % % is not paused.', $1, quote_nullable($2);
        return;
    end if;
    locked := array(
        with recursive failing (handler) as (
            select min(delivery.handler) from spark_outbox_delivery as delivery
            where delivery.status in ('pending', 'failed') and delivery.error <> ''
            union all
            select (
                select min(delivery.handler) from spark_outbox_delivery as delivery
                where delivery.status in ('pending', 'failed') and delivery.error <> ''
                    and delivery.handler > failing.handler
            )
            from failing where failing.handler is not null
        )
        select event.id
        from failing join spark_outbox_delivery as delivery
            on delivery.handler = failing.handler and delivery.status in ('pending', 'failed')
            and delivery.error <> ''
            and spark_outbox_fingerprint(delivery.error) = spark_outbox_pause_mark(ended.id)
        join spark_outbox_event as event on event.id = delivery.event_id
        where ($1 = 'group' or failing.handler = $2) and event.status in ('pending', 'running')
        limit 1000
        for no key update of event skip locked
    );
    update spark_outbox_delivery as delivery set available_at = statement_timestamp()
    where delivery.event_id = any(locked) and delivery.status = 'pending'
        and starts_with(delivery.error, spark_outbox_pause_mark(ended.id));
    update spark_outbox_event as event set available_at = statement_timestamp()
    where event.id = any(locked) and event.status = 'pending'
        and event.available_at > statement_timestamp();
    perform pg_notify('spark_outbox', '');
    return next ended;
end
$body$;

comment on function spark_resume(text, text) is
    'End a pause: workers handle what has waited for it.';


-- Pin the search_path, as in 0001_emitting.sql.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
    function regprocedure;
begin
    foreach function in array array[
        'spark_outbox_check_kind(text)',
        'spark_pause(text, text, text)',
        'spark_resume(text, text)'
    ]::regprocedure[] loop
        execute format('alter function %s set search_path = pg_catalog, %s, pg_temp', function, home);
        execute format('alter function %s set client_min_messages = notice', function);
    end loop;
end
$do$;
