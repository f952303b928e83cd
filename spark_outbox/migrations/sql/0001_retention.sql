-- The functions that prune: for workers and spark_prune, see SPARK_OUTBOX["RETENTION"].
--
-- They run with the rights of their owner, so that the worker's role need not be allowed to delete events
-- or to change what they say. They touch no event but those that have ended. One runs at a time.

-- A key that somebody chose must stay a duplicate: its event is stripped. An event whose key was made up
-- is deleted; stripped as well, if the project's own tables refer to it.
--
-- The status and the pattern of the index are literals in each query, or no partial index would be used.
create function spark_outbox_prune(
    outbox regclass, state text, event_group text, before timestamptz, most integer,
    out stripped integer, out deleted integer
)
language plpgsql security definer as $body$
declare
    made_up bigint[];
    chosen bigint[];
begin
    perform spark_outbox_check_home(outbox);
    if state is null or state not in ('done', 'discarded', 'failed', 'unhandled') then
        raise invalid_parameter_value using message = 'Events that are ' || coalesce(state, 'null')
            || ' have not ended.';
    end if;
    if not pg_try_advisory_xact_lock(7531004, outbox::oid::integer) then
        return;
    end if;
    -- SQL has ended these without saying when.
    execute format(
        $$
            update spark_outbox_event set finished_at = created_at
            where id in (
                select id from spark_outbox_event
                where status = %1$L and event_group = $1 and finished_at is null and digest is null
                limit $2 for no key update skip locked
            )
        $$,
        state
    ) using event_group, most;
    execute format(
        $$
            select
                coalesce(array_agg(id) filter (where key_is_generated), '{}'),
                coalesce(array_agg(id) filter (where not key_is_generated), '{}')
            from (
                select id, key_is_generated from spark_outbox_event
                where status = %L and event_group = $1 and finished_at < $2 and digest is null
                order by finished_at limit $3
                for update skip locked
            ) as old
        $$,
        state
    ) into made_up, chosen using event_group, before, most;
    set constraints all immediate; -- also Django's, which would be checked at the commit
    begin
        if made_up <> '{}' then
            delete from spark_outbox_event where id = any(made_up);
        end if;
    exception when foreign_key_violation then
        chosen := chosen || made_up;
        made_up := '{}';
    end;
    if chosen <> '{}' then
        delete from spark_outbox_delivery where event_id = any(chosen);
        update spark_outbox_event as event
        set
            digest = spark_outbox_digest(event.event_group, event.payload),
            payload = '{}', headers = '{}', last_error = '', ordering_key = null, available_at = null,
            status = case when event.status = 'done' then 'done' else 'discarded' end
        where id = any(chosen);
    end if;
    stripped := cardinality(chosen);
    deleted := cardinality(made_up);
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
    each_id bigint;
begin
    perform spark_outbox_check_home(outbox);
    if not pg_try_advisory_xact_lock(7531004, outbox::oid::integer) then
        return;
    end if;
    select
        coalesce(array_agg(id) filter (where created_at < before and digest is not null), '{}'),
        case when bool_or(created_at < before) then max(id) end
    into old, reached
    from (
        select id, created_at, digest from spark_outbox_event where id > after order by id limit most
    ) as piece;
    deleted := 0;
    set constraints all immediate;
    begin
        delete from spark_outbox_event where id = any(old);
        deleted := cardinality(old);
    exception when foreign_key_violation then
        foreach each_id in array old loop
            begin
                delete from spark_outbox_event where id = each_id;
                deleted := deleted + 1;
            exception when foreign_key_violation then
                null; -- the project's own tables refer to it: it stays
            end;
        end loop;
    end;
end
$body$;

comment on function spark_outbox_forget_keys is
    'Delete stripped events emitted `before`, among the next `most` after this id. `reached` is the last '
    'of these ids; NULL if none of them is so old. Both are NULL if somebody else prunes.';

revoke execute on function spark_outbox_forget_keys from public;


-- Pin the search_path, as in 0001_emitting.sql.
do $do$
declare
    home constant regnamespace := (
        select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass
    );
    function regprocedure;
begin
    foreach function in array array[
        'spark_outbox_prune(regclass, text, text, timestamptz, integer)',
        'spark_outbox_forget_keys(regclass, bigint, timestamptz, integer)'
    ]::regprocedure[] loop
        execute format('alter function %s set search_path = pg_catalog, %s, pg_temp', function, home);
    end loop;
end
$do$;
