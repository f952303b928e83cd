-- A function that closes a handler's circuit by hand.
--
-- Circuits are in the memory of each worker process. The function makes the waiting events ready. A
-- worker calls the handler for an event that a person made ready although its circuit is open, and
-- closes the circuit if the call succeeds.

create function spark_outbox_close_circuit(handler text) returns bigint
language sql as $body$
    select pg_notify('spark_outbox', '');
    with closed as (
        update spark_outbox_event set available_at = null
        where id in (
            select event.id from spark_outbox_event as event
            where event.status = 'pending' and event.available_at is not null and event.id in (
                select delivery.event_id from spark_outbox_delivery as delivery
                where delivery.handler = $1 and delivery.status = 'pending' and delivery.error <> ''
                    and starts_with(delivery.error, 'spark_outbox: not called, its circuit is open')
            )
            order by event.id
            for no key update skip locked -- a worker holds these: don't wait for it
        )
        returning id
    )
    select count(*) from closed
$body$;

comment on function spark_outbox_close_circuit(text) is
    'Make the events ready that wait for the circuit of this handler; returns how many.';

-- Pin the search_path, as in 0001_emitting.sql.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
begin
    execute format(
        'alter function spark_outbox_close_circuit(text) set search_path = pg_catalog, %s, pg_temp', home
    );
end
$do$;
