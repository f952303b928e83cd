"""What roles with few rights need, see deploy/roles.sql; frozen SQL, since a database may have run it.

spark_emit() looked into its own schema before pg_catalog. Whoever may create there, and up to
PostgreSQL 14 everybody may in public, could put a type of theirs in the way of `text`, and have its
constraint executed by others.

spark_outbox_is_same() is for on_duplicate="check" by a role that may not read payloads. It runs with
the rights of its owner, so it is not for everybody to call.
"""

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

HOME = "(select relnamespace::regnamespace from pg_class where oid = 'spark_outbox_event'::regclass)"

PIN = f"""
do $do$ begin execute format(
    'alter function spark_emit(text, text, jsonb) set search_path = pg_catalog, %s, pg_temp', {HOME}
); end $do$;
"""
PIN_REVERSE = f"""
do $do$ begin execute format(
    'alter function spark_emit(text, text, jsonb) set search_path = %s, pg_catalog, pg_temp', {HOME}
); end $do$;
"""

IS_SAME = f"""
do $do$ begin execute format($format$
create function spark_outbox_is_same(key text, event_group text, payload jsonb) returns boolean
language sql stable security definer set search_path = pg_catalog, %s, pg_temp as $body$
    select exists (
        select from spark_outbox_event as event
        where event.key = $1 and event.event_group = $2 and event.payload = $3
    )
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_is_same(text, text, jsonb) is
    'Whether the event of this key has this group and payload.';

revoke execute on function spark_outbox_is_same(text, text, jsonb) from public;
"""


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0004_wake_without_transition_table")]

    operations = [
        RunSQL(PIN, PIN_REVERSE),
        RunSQL(IS_SAME, "drop function spark_outbox_is_same(text, text, jsonb);"),
    ]
