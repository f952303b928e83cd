"""The wake trigger, spark_emit() and spark_outbox_status: frozen SQL, since a database may have run it.

Functions pin their search_path to the schema that this migration runs in, so that no caller's
search_path can put another table or function in their way.
"""

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

# Written for churn: a busy outbox dies as fast as it grows. The defaults wait for 20 % dead rows.
STORAGE = """
alter table spark_outbox_event set (
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.05
);
alter table spark_outbox_delivery
    add constraint spark_outbox_delivery_event_fk foreign key (event_id)
    references spark_outbox_event (id) on delete cascade;
"""
STORAGE_REVERSE = """
alter table spark_outbox_delivery drop constraint spark_outbox_delivery_event_fk;
alter table spark_outbox_event reset (
    autovacuum_vacuum_scale_factor,
    autovacuum_vacuum_threshold,
    autovacuum_vacuum_insert_scale_factor,
    autovacuum_analyze_scale_factor
);
"""

# A transaction that notifies holds one database-wide lock while it commits, so the trigger only
# notifies when a worker sleeps. It asks two advisory locks, and waits for neither:
#   K (7531001, the table)  shared, by every transaction that has emitted, to its end
#   S (7531002, the table)  shared, by every sleeping worker
# The worker's half is in spark_outbox/wake.py.
WAKE = """
do $do$ begin execute format($format$
create function spark_outbox_wake() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $body$
declare
    mode constant text := tg_argv[0];
    this constant integer := tg_relid::integer;
begin
    if not exists (select from inserted) then
        return null;                                       -- only duplicates: nothing new
    elsif mode = 'always' then
        perform pg_notify('spark_outbox', '');
    elsif not pg_try_advisory_xact_lock_shared(7531001, this) then
        perform pg_notify('spark_outbox', '');             -- a worker tests K this instant
    elsif pg_try_advisory_lock(7531002, this) and pg_advisory_unlock(7531002, this) then
        null;                                              -- nobody sleeps: say nothing
    else
        perform pg_notify('spark_outbox', '');
    end if;
    return null;
end
$body$;

create trigger spark_outbox_wake after insert on spark_outbox_event
    referencing new table as inserted
    for each statement execute function spark_outbox_wake('gated');

create function spark_emit(event_group text, key text, payload jsonb default '{}') returns bigint
language sql set search_path = %1$I, pg_catalog, pg_temp as $body$
    insert into spark_outbox_event (event_group, key, payload)
    values ($1, coalesce($2, pg_catalog.gen_random_uuid()::text), coalesce($3, '{}'))
    on conflict do nothing
    returning id
$body$;

comment on function spark_emit(text, text, jsonb) is
    'Write an event; returns its id, or NULL if there is an event of this key already.';
$format$, current_schema()); end $do$;
"""
WAKE_REVERSE = """
drop function spark_emit(text, text, jsonb);
drop trigger if exists spark_outbox_wake on spark_outbox_event;
drop function spark_outbox_wake();
"""

STATUS = """
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
    statement_timestamp() - min(coalesce(available_at, created_at)) filter (
        where status = 'pending' and (available_at is null or available_at <= statement_timestamp())
    ) as oldest_pending_age
from spark_outbox_event
group by event_group;
"""


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0001_initial")]

    operations = [
        RunSQL(STORAGE, STORAGE_REVERSE),
        RunSQL(WAKE, WAKE_REVERSE),
        RunSQL(STATUS, "drop view spark_outbox_status;"),
    ]
