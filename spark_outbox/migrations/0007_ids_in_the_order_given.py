"""Ids follow the order in which events are given, and one that is taken is an error; frozen SQL, since
a database may have run it.

spark_outbox_emit_many() writes for emit_many(). Rows are written in the order of their keys, so that two
transactions with the same keys don't deadlock; ids are allotted in the order given. It runs with the
rights of its owner, so that who emits need not be allowed to choose ids.

spark_outbox_check_keys() tells a duplicate, whose key is there, from an event that was not written since
another one has its id. It takes a new snapshot (it is volatile), which shows a key that was committed
while the INSERT waited for it.
"""

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

HOME = "(select relnamespace::regnamespace from pg_class where oid = 'spark_outbox_event'::regclass)"

CHECK_KEYS = f"""
do $do$ begin execute format($format$
create function spark_outbox_check_keys(keys text[]) returns void
language plpgsql security definer set search_path = pg_catalog, %s, pg_temp as $body$
declare
    missing text;
begin
    select key into missing from unnest(keys) as given (key)
    where not exists (select from spark_outbox_event as event where event.key = given.key)
    limit 1;
    if found then
        raise unique_violation using
            message = 'The event with the key ' || quote_literal(missing)
                || ' was not written: another event has its id.',
            hint = 'The sequence of the ids is behind the table, as after a restore of the data alone. '
                'Put it right, then emit again: select setval(''spark_outbox_event_id_seq'', '
                'greatest(nextval(''spark_outbox_event_id_seq''), max(id))) from spark_outbox_event;',
            table = 'spark_outbox_event', constraint = 'spark_outbox_event_pkey';
    end if;
end
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_check_keys(text[]) is
    'Raise unique_violation unless there is an event of each of these keys.';

revoke execute on function spark_outbox_check_keys(text[]) from public;
"""

EMIT_MANY = f"""
do $do$ begin execute format($format$
create function spark_outbox_emit_many(
    keys text[], groups text[], payloads jsonb[], header_objects jsonb[], ordering_keys text[],
    times timestamptz[], delays interval[]
) returns bigint
language plpgsql security definer set search_path = pg_catalog, %s, pg_temp as $body$
declare
    ids constant regclass := pg_get_serial_sequence('spark_outbox_event', 'id');
    new bigint;
begin
    insert into spark_outbox_event
        (id, key, event_group, payload, headers, ordering_key, available_at)
    select
        id, key, event_group, payload, headers, ordering_key,
        coalesce(available_at, statement_timestamp() + delay)
    from (
        select nextval(ids) as id, given.*
        from unnest(keys, groups, payloads, header_objects, ordering_keys, times, delays)
            with ordinality as given
            (key, event_group, payload, headers, ordering_key, available_at, delay, place)
        order by place
    ) as numbered
    order by key collate "C", id
    on conflict do nothing;
    get diagnostics new = row_count;
    if new < cardinality(keys) then
        perform spark_outbox_check_keys(keys);
    end if;
    return new;
end
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_emit_many is
    'Write events, with ids in the order given; returns how many were new. For emit_many().';

revoke execute on function spark_outbox_emit_many from public;
"""

SPARK_EMIT = f"""
do $do$ begin execute format($format$
create or replace function spark_emit(event_group text, key text, payload jsonb default '{{}}')
returns bigint
language plpgsql set search_path = pg_catalog, %s, pg_temp as $body$
declare
    new_key constant text := coalesce($2, gen_random_uuid()::text);
    new_id bigint;
begin
    insert into spark_outbox_event (event_group, key, payload)
    values ($1, new_key, coalesce($3, '{{}}'))
    on conflict do nothing
    returning id into new_id;
    if new_id is null then
        perform spark_outbox_check_keys(array[new_key]);
    end if;
    return new_id;
end
$body$;
$format$, {HOME}); end $do$;
"""
SPARK_EMIT_REVERSE = f"""
do $do$ begin execute format($format$
create or replace function spark_emit(event_group text, key text, payload jsonb default '{{}}')
returns bigint
language sql set search_path = pg_catalog, %s, pg_temp as $body$
    insert into spark_outbox_event (event_group, key, payload)
    values ($1, coalesce($2, pg_catalog.gen_random_uuid()::text), coalesce($3, '{{}}'))
    on conflict do nothing
    returning id
$body$;
$format$, {HOME}); end $do$;
"""

# For everybody: `check` needs no privileges.
IDS_ARE_BEHIND = f"""
do $do$ begin execute format($format$
create function spark_outbox_ids_are_behind() returns boolean
language plpgsql security definer set search_path = pg_catalog, %s, pg_temp as $body$
declare
    highest constant bigint := max(id) from spark_outbox_event;
    behind boolean;
begin
    execute 'select $1 > last_value or $1 = last_value and not is_called from '
        || pg_get_serial_sequence('spark_outbox_event', 'id')
    into behind using highest;
    return coalesce(behind, false);
end
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_ids_are_behind() is
    'Whether the sequence is yet to give out an id that an event has.';
"""


class Migration(migrations.Migration):
    dependencies = [("spark_outbox", "0006_status_of_odd_times")]

    operations = [
        RunSQL(CHECK_KEYS, "drop function spark_outbox_check_keys(text[]);"),
        RunSQL(EMIT_MANY, "drop function spark_outbox_emit_many;"),
        RunSQL(SPARK_EMIT, SPARK_EMIT_REVERSE),
        RunSQL(IDS_ARE_BEHIND, "drop function spark_outbox_ids_are_behind();"),
    ]
