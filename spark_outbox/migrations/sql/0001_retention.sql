-- The functions that prune: for workers and spark_prune, see SPARK_OUTBOX["RETENTION"].
--
-- They run with the rights of their owner, so that the worker's role need not be allowed to delete events
-- or to change what they say. They touch no event but those that have ended. One runs at a time.
--
-- Polymorphic functions are named with their schema: one that somebody has put into the outbox's schema,
-- for exactly these types, would else be preferred.

-- Those of these events, locked, that tables of the project refer to by a foreign key: whatever that would
-- do to its rows, or say, if they were deleted.
create function spark_outbox_referenced(ids bigint[]) returns bigint[]
language plpgsql stable security definer as $body$
declare
    found bigint[];
    referenced bigint[] := '{}';
    relation regclass;
    attribute name;
begin
    for relation, attribute in
        select conrelid, attname from pg_constraint join pg_attribute
            on attrelid = conrelid and attnum = conkey[1]
        where contype = 'f' and confrelid = 'spark_outbox_event'::regclass
            and conrelid <> 'spark_outbox_delivery'::regclass
    loop
        execute pg_catalog.format(
            'select array(select %I from %s where %I operator(pg_catalog.=) any($1))',
            attribute, relation, attribute
        ) into found using ids;
        referenced := pg_catalog.array_cat(referenced, found);
    end loop;
    return referenced;
end
$body$;

revoke execute on function spark_outbox_referenced from public;


-- A key that somebody chose must stay a duplicate: its event is stripped. An event whose key was made up
-- is deleted; stripped as well, if the project's own tables refer to it.
--
-- The state is a literal in each query, or no partial index would be used.
create function spark_outbox_prune(
    outbox regclass, state text, event_group text, before timestamptz, most integer,
    out stripped integer, out deleted integer
)
language plpgsql security definer as $body$
declare
    old bigint[];
    held bigint[];
    referenced bigint[];
begin
    perform spark_outbox_check_home(outbox);
    if state is null or state not in ('done', 'discarded', 'failed', 'unhandled') then
        raise invalid_parameter_value using message = 'Events that are ' || coalesce(state, 'null')
            || ' have not ended.';
    end if;
    if not pg_try_advisory_xact_lock(7531004, outbox::oid::integer) then
        return;
    end if;
    -- SQL has ended these without saying when: their time counts from now.
    execute pg_catalog.format(
        $$
            update spark_outbox_event set finished_at = statement_timestamp()
            where id in (
                select id from spark_outbox_event
                where status = %L and event_group = $1 and finished_at is null and digest is null
                limit $2 for no key update skip locked
            )
        $$,
        state
    ) using event_group, most;
    execute pg_catalog.format(
        $$
            select array(
                select id from spark_outbox_event
                where status = %L and event_group = $1 and finished_at < $2 and digest is null
                order by finished_at limit $3
                for update skip locked
            )
        $$,
        state
    ) into old using event_group, before, most;
    held := array(
        select event_id from spark_outbox_delivery where event_id = any(old) and id not in (
            select id from spark_outbox_delivery where event_id = any(old) for update skip locked
        )
    );
    referenced := spark_outbox_referenced(old);
    delete from spark_outbox_event
    where id = any(old) and key_is_generated and id <> all(held) and id <> all(referenced);
    get diagnostics deleted = row_count;
    delete from spark_outbox_delivery where event_id = any(old) and event_id <> all(held);
    update spark_outbox_event as event
    set
        digest = spark_outbox_digest(event.event_group, event.payload),
        payload = '{}', headers = '{}', last_error = '', ordering_key = null, available_at = null,
        status = case when event.status = 'done' then 'done' else 'discarded' end
    where id = any(old) and id <> all(held);
    get diagnostics stripped = row_count;
    if state = 'failed' and stripped > 0 then
        perform pg_notify('spark_outbox', ''); -- what comes after it in its order can go on
    end if;
end
$body$;

comment on function spark_outbox_prune is
    'Strip up to `most` events of this state and group that ended `before`, earliest first, of all but '
    'their keys; delete those whose keys were made up. NULL if somebody else prunes.';

revoke execute on function spark_outbox_prune from public;


create function spark_outbox_refuse_pruned() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $body$
begin
    raise check_violation using
        message = concat(
            'The event ', new.id, ' has been pruned and can''t become ', new.status,
            ': of its payload nothing is left.'
        ),
        hint = 'Emit it again, with another key.';
end
$body$;

-- The condition costs the UPDATE that settles events nothing that can be measured.
create trigger spark_outbox_pruned after update on spark_outbox_event
    for each row when (new.digest is not null and new.status not in ('done', 'discarded'))
    execute function spark_outbox_refuse_pruned();


-- In the order of their ids, `most` rows at a time, as no index has them: each emit would pay for that.
create function spark_outbox_forget_keys(
    outbox regclass, after bigint, before timestamptz, most integer,
    out deleted integer, out reached bigint
)
language plpgsql security definer as $body$
declare
    old bigint[];
    referenced bigint[];
begin
    perform spark_outbox_check_home(outbox);
    if not pg_try_advisory_xact_lock(7531004, outbox::oid::integer) then
        return;
    end if;
    select case when bool_or(created_at < before) then max(id) end into reached
    from (select id, created_at from spark_outbox_event where id > after order by id limit most) as piece;
    old := array(
        select id from spark_outbox_event
        where id > after and id <= reached and created_at < before and digest is not null
        order by id for update skip locked
    );
    referenced := spark_outbox_referenced(old);
    delete from spark_outbox_event where id = any(old) and id <> all(referenced);
    get diagnostics deleted = row_count;
end
$body$;

comment on function spark_outbox_forget_keys is
    'Delete stripped events emitted `before`, among the next `most` after this id. `reached` is the '
    'last of these ids; NULL if none of them is so old. Both are NULL if somebody else prunes.';

revoke execute on function spark_outbox_forget_keys from public;


-- Pin the search_path, as in 0001_emitting.sql. Nobody waits long for what others hold.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
    function regprocedure;
begin
    foreach function in array array[
        'spark_outbox_referenced(bigint[])',
        'spark_outbox_prune(regclass, text, text, timestamptz, integer)',
        'spark_outbox_forget_keys(regclass, bigint, timestamptz, integer)'
    ]::regprocedure[] loop
        execute format('alter function %s set search_path = pg_catalog, %s, pg_temp', function, home);
        execute format('alter function %s set lock_timeout = ''1s''', function);
    end loop;
end
$do$;
