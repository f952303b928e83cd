-- The functions that emit: spark_emit() for SQL, the others for emit() and emit_many().
--
-- Polymorphic functions are named with their schema: one that somebody has put into the outbox's schema, for
-- exactly these types, would else be preferred.
--
-- Some run with the rights of their owner, so that a role that emits needs few rights of its own. Such a
-- role gets EXECUTE by deploy/roles.sql; others don't. The end of this file pins the search_path of all.

-- A search_path may find the table of one outbox and the functions of another, which would write to
-- their own table. So the caller passes the table that it means; another outbox's function refuses it.
create function spark_outbox_check_home(outbox regclass) returns void
language plpgsql as $body$
begin
    if outbox is distinct from to_regclass('spark_outbox_event') then
        raise undefined_function using
            message = pg_catalog.concat(
                'The search_path finds the table ', outbox, ', but the functions of another outbox.'
            ),
            hint = 'Run migrate for the outbox of this table, so that its schema has the functions, '
                'too; or correct the search_path.';
    end if;
end
$body$;

comment on function spark_outbox_check_home(regclass) is
    'Raise undefined_function unless this is the table of the outbox that the functions belong to.';


create function spark_outbox_check_keys(outbox regclass, keys text[]) returns void
language plpgsql security definer as $body$
declare
    missing text;
begin
    perform spark_outbox_check_home(outbox);
    -- The function is volatile, so this query sees a key that was committed while the INSERT waited.
    select key into missing from pg_catalog.unnest(keys) as given (key)
    where not exists (select from spark_outbox_event as event where event.key = given.key)
    limit 1;
    if found then
        raise unique_violation using
            message = 'The event with the key ' || quote_literal(missing)
                || ' was not written: another event has its id.',
            hint = 'The sequence of the ids is behind the table, as after a restore of the data alone. '
                'Correct it, then emit again: select setval(''spark_outbox_event_id_seq'', '
                'greatest(nextval(''spark_outbox_event_id_seq''), max(id))) from spark_outbox_event;',
            table = 'spark_outbox_event', constraint = 'spark_outbox_event_pkey';
    end if;
end
$body$;

comment on function spark_outbox_check_keys(regclass, text[]) is
    'Raise unique_violation unless there is an event of each of these keys.';

revoke execute on function spark_outbox_check_keys(regclass, text[]) from public;


create function spark_emit(
    event_group text, key text, payload jsonb default '{}', headers jsonb default '{}'
) returns bigint
language plpgsql as $body$
declare
    new_key constant text := coalesce($2, gen_random_uuid()::text);
    new_id bigint;
begin
    insert into spark_outbox_event (event_group, key, payload, headers, key_is_generated)
    values ($1, new_key, coalesce($3, '{}'), coalesce($4, '{}'), $2 is null)
    on conflict do nothing
    returning id into new_id;
    if new_id is null then
        perform spark_outbox_check_keys('spark_outbox_event', array[new_key]);
    end if;
    return new_id;
end
$body$;

comment on function spark_emit(text, text, jsonb, jsonb) is
    'Write an event; returns its id, or NULL if there is an event of this key already.';


-- Ids are assigned in the order given. Rows are written in the order of their keys, so that two
-- transactions with the same keys can't deadlock.
--
-- Payloads and headers are JSON objects, one a line: a jsonb[] takes twice as long to read. If no event
-- has headers, an ordering key, a time, a delay or a generated key, that argument is NULL. Events `as_done`
-- are not to be handled, and their keys are known.
create function spark_outbox_emit_many(
    outbox regclass, keys text[], groups text[], payloads text, header_objects text,
    ordering_keys text[], times timestamptz[], delays interval[], generated boolean[],
    as_done boolean default false
) returns integer[]
language plpgsql security definer as $body$
declare
    ids regclass;
    new integer[];
begin
    perform spark_outbox_check_home(outbox);
    ids := pg_get_serial_sequence('spark_outbox_event', 'id');
    with numbered as (
        select nextval(ids) as id, given.*
        from unnest(
            keys, groups, string_to_array(payloads, E'\n'), string_to_array(header_objects, E'\n'),
            ordering_keys, times, delays, generated
        ) with ordinality as given (
            key, event_group, payload, headers, ordering_key, available_at, delay, key_is_generated,
            place
        )
        order by place
    ), written as (
        insert into spark_outbox_event
            (
                id, key, event_group, payload, headers, ordering_key, available_at, key_is_generated,
                status, finished_at
            )
        select
            id, key, event_group, payload::jsonb, coalesce(headers::jsonb, '{}'), ordering_key,
            coalesce(available_at, statement_timestamp() + delay), coalesce(key_is_generated, false),
            case when as_done then 'done' else 'pending' end,
            case when as_done then statement_timestamp() end
        from numbered
        order by key collate "C", id
        on conflict do nothing
        returning id
    )
    select coalesce(array_agg(place::integer), '{}') into new
    from numbered join written using (id);
    if pg_catalog.cardinality(new) < pg_catalog.cardinality(keys) then
        perform spark_outbox_check_keys(outbox, keys);
    end if;
    return new;
end
$body$;

comment on function spark_outbox_emit_many is
    'Write events, with ids in the order given; returns the places of the new ones, from 1. For emit_many().';

revoke execute on function spark_outbox_emit_many from public;


-- What is left of an event's group and payload once it has been pruned, see 0001_retention.sql. It is the
-- same for payloads that are equal as jsonb, such as {"n": 1} and {"n": 1.0}.
create function spark_outbox_digest(event_group text, payload jsonb) returns bigint
language sql immutable parallel safe as $body$
    select pg_catalog.jsonb_hash_extended($2, pg_catalog.hashtextextended($1, 0))
$body$;


-- For on_duplicate="check" by a role that may not read payloads.
create function spark_outbox_is_same(outbox regclass, key text, event_group text, payload jsonb)
returns boolean
language plpgsql stable security definer as $body$
begin
    perform spark_outbox_check_home(outbox);
    return exists (
        select from spark_outbox_event as event
        where event.key = $2 and event.event_group = $3 and case
            when event.digest is null then event.payload = $4
            else event.digest = spark_outbox_digest($3, $4)
        end
    );
end
$body$;

comment on function spark_outbox_is_same is 'Whether the event of this key has this group and payload.';

revoke execute on function spark_outbox_is_same from public;


-- Everybody may call it: `manage.py check` needs no privileges.
create function spark_outbox_ids_are_behind() returns boolean
language plpgsql security definer as $body$
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

comment on function spark_outbox_ids_are_behind() is
    'Whether the sequence will return an id that an event has already.';


-- Pin the search_path, so that a caller's search_path can't substitute another table or function.
-- pg_catalog comes first, because other roles may create objects in the outbox's schema.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
    function regprocedure;
begin
    foreach function in array array[
        'spark_outbox_check_home(regclass)',
        'spark_outbox_check_keys(regclass, text[])',
        'spark_emit(text, text, jsonb, jsonb)',
        'spark_outbox_emit_many('
            'regclass, text[], text[], text, text, text[], timestamptz[], interval[], boolean[], boolean)',
        'spark_outbox_is_same(regclass, text, text, jsonb)',
        'spark_outbox_ids_are_behind()'
    ]::regprocedure[] loop
        execute format('alter function %s set search_path = pg_catalog, %s, pg_temp', function, home);
    end loop;
end
$do$;
