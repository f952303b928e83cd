"""Ids follow the order in which events are given, and one that is taken is an error; frozen SQL, since
a database may have run it.

spark_outbox_emit_many() writes for emit_many(). Rows are written in the order of their keys, so that two
transactions with the same keys don't deadlock; ids are allotted in the order given. It runs with the
rights of its owner, so that who emits need not be allowed to choose ids.

spark_outbox_check_keys() tells a duplicate, whose key is there, from an event that was not written since
another one has its id. It takes a new snapshot (it is volatile), which shows a key that was committed
while the INSERT waited for it.

A search_path may find the table in one schema and these functions in another, where they would write to
a table of their own. So the caller says which table it means, and a function of another outbox refuses.
"""

from importlib import import_module

from django.db import migrations

from spark_outbox.migrations._postgresql import RunSQL

BEFORE = import_module("spark_outbox.migrations.0005_least_privilege")

HOME = "(select relnamespace::regnamespace from pg_class where oid = 'spark_outbox_event'::regclass)"

CHECK_HOME = f"""
do $do$ begin execute format($format$
create function spark_outbox_check_home(outbox regclass) returns void
language plpgsql set search_path = pg_catalog, %s, pg_temp as $body$
begin
    if outbox is distinct from to_regclass('spark_outbox_event') then
        raise undefined_function using
            message = concat(
                'The search_path finds the table ', outbox, ', but the functions of another outbox.'
            ),
            hint = 'Run migrate for the outbox that is meant, so that the schema of its table has the '
                'functions, too; or correct the search_path.';
    end if;
end
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_check_home(regclass) is
    'Raise undefined_function unless this is the table of the outbox that the functions belong to.';
"""

CHECK_KEYS = f"""
do $do$ begin execute format($format$
create function spark_outbox_check_keys(outbox regclass, keys text[]) returns void
language plpgsql security definer set search_path = pg_catalog, %s, pg_temp as $body$
declare
    missing text;
begin
    perform spark_outbox_check_home(outbox);
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

comment on function spark_outbox_check_keys(regclass, text[]) is
    'Raise unique_violation unless there is an event of each of these keys.';

revoke execute on function spark_outbox_check_keys(regclass, text[]) from public;
"""

EMIT_MANY = f"""
do $do$ begin execute format($format$
create function spark_outbox_emit_many(
    outbox regclass, keys text[], groups text[], payloads jsonb[], header_objects jsonb[],
    ordering_keys text[], times timestamptz[], delays interval[]
) returns bigint
language plpgsql security definer set search_path = pg_catalog, %s, pg_temp as $body$
declare
    ids regclass;
    new bigint;
begin
    perform spark_outbox_check_home(outbox);
    ids := pg_get_serial_sequence('spark_outbox_event', 'id');
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
        perform spark_outbox_check_keys(outbox, keys);
    end if;
    return new;
end
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_emit_many is
    'Write events, with ids in the order given; returns how many were new. For emit_many().';

revoke execute on function spark_outbox_emit_many from public;
"""

IS_SAME = f"""
drop function spark_outbox_is_same(text, text, jsonb);

do $do$ begin execute format($format$
create function spark_outbox_is_same(outbox regclass, key text, event_group text, payload jsonb)
returns boolean
language plpgsql stable security definer set search_path = pg_catalog, %s, pg_temp as $body$
begin
    perform spark_outbox_check_home(outbox);
    return exists (
        select from spark_outbox_event as event
        where event.key = $2 and event.event_group = $3 and event.payload = $4
    );
end
$body$;
$format$, {HOME}); end $do$;

comment on function spark_outbox_is_same is 'Whether the event of this key has this group and payload.';

revoke execute on function spark_outbox_is_same from public;
"""
IS_SAME_REVERSE = "drop function spark_outbox_is_same;" + BEFORE.IS_SAME

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
        perform spark_outbox_check_keys('spark_outbox_event', array[new_key]);
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
        RunSQL(CHECK_HOME, "drop function spark_outbox_check_home;"),
        RunSQL(CHECK_KEYS, "drop function spark_outbox_check_keys(regclass, text[]);"),
        RunSQL(EMIT_MANY, "drop function spark_outbox_emit_many;"),
        RunSQL(IS_SAME, IS_SAME_REVERSE),
        RunSQL(SPARK_EMIT, SPARK_EMIT_REVERSE),
        RunSQL(IDS_ARE_BEHIND, "drop function spark_outbox_ids_are_behind();"),
    ]
