"""A wake trigger that costs writers next to nothing; frozen SQL, since a database may have run it.

The transition table of 0002 was there to tell inserts from duplicates, and cost each emit a tenth of
its server time. The session's statistics tell well enough, and are only asked if somebody sleeps.
"""

from importlib import import_module

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

BEFORE = import_module("spark_outbox.migrations.0002_wake_and_views")

WAKE = """
create or replace function spark_outbox_wake() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $body$
declare
    mode constant text := tg_argv[0];
    this constant integer := tg_relid::integer;
begin
    if mode = 'gated'
        and pg_try_advisory_xact_lock_shared(7531001, this) -- else a worker tests K this instant
        and pg_try_advisory_lock(7531002, this)             -- else somebody sleeps
        and pg_advisory_unlock(7531002, this)
    then
        return null;
    end if;
    -- Duplicates alone are nothing new. The count is that of the transaction, and of what the session
    -- has inserted since it last reported its statistics, a second ago or so: at worst it is one NOTIFY
    -- too many. Without statistics nobody knows.
    if pg_stat_get_xact_tuples_inserted(tg_relid) > 0
        or not current_setting('track_counts')::boolean
    then
        perform pg_notify('spark_outbox', '');
    end if;
    return null;
end
$body$;

create or replace trigger spark_outbox_wake after insert on spark_outbox_event
    for each statement execute function spark_outbox_wake('gated');
"""

WAKE_REVERSE = """
drop trigger if exists spark_outbox_wake on spark_outbox_event;
drop function spark_outbox_wake();
drop function spark_emit(text, text, jsonb);
"""


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0003_running_sessions")]

    operations = [RunSQL(WAKE, WAKE_REVERSE + BEFORE.WAKE)]
