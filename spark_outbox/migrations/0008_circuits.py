"""What waits for a circuit, in spark_outbox_status; and a function that closes a circuit by hand. Frozen
SQL, since a database may have run it.

Circuits are in the memory of each worker. The function makes events ready: a worker calls one that a
person has made ready though the circuit is open, and closes the circuit if that goes well.
"""

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

WAITS = "status = 'pending' and error = 'spark_outbox: not called, its circuit is open'"

COLUMNS = """
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
    statement_timestamp() - min(coalesce(available_at, created_at)) filter (
        where status = 'pending' and (available_at is null or available_at <= statement_timestamp())
            and isfinite(coalesce(available_at, created_at))
    ) as oldest_pending_age
"""

STATUS = f"""
create or replace view spark_outbox_status as
select
    {COLUMNS},
    count(waits.event_id) filter (where status = 'pending') as waits_for_circuit
from spark_outbox_event as event
left join (select distinct event_id from spark_outbox_delivery where {WAITS}) as waits
    on waits.event_id = event.id
group by event_group;
"""
STATUS_REVERSE = f"""
drop view spark_outbox_status;
create view spark_outbox_status as
select {COLUMNS} from spark_outbox_event group by event_group;
"""

HOME = "(select relnamespace::regnamespace from pg_class where oid = 'spark_outbox_event'::regclass)"

# It passes over events that a worker has in hand: no lock is waited for.
CLOSE = f"""
do $do$ begin execute format($format$
create function spark_outbox_close_circuit(handler text) returns bigint
language sql set search_path = pg_catalog, %s, pg_temp as $body$
    select pg_notify('spark_outbox', '');
    with closed as (
        update spark_outbox_event set available_at = null
        where id in (
            select event.id from spark_outbox_event as event
            where event.status = 'pending' and event.available_at is not null and event.id in (
                select event_id from spark_outbox_delivery as delivery
                where delivery.handler = $1 and {WAITS}
            )
            order by event.id
            for no key update skip locked
        )
        returning id
    )
    select count(*) from closed
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_close_circuit(text) is
    'Make the events ready that wait for the circuit of this handler; returns how many.';
"""


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0007_ids_in_the_order_given")]

    operations = [
        RunSQL(STATUS, STATUS_REVERSE),
        RunSQL(CLOSE, "drop function spark_outbox_close_circuit(text);"),
    ]
