-- Four roles, each with the least that it needs. They can't log in: grant them to roles that do.
--
--     psql --single-transaction --file roles.sql shop
--
-- as the owner of the tables, who may CREATE ROLE, or as a superuser. It can be run again, and should
-- be after a migration of spark_outbox: it takes back what an earlier version has granted.
--
--     grant spark_outbox_emitter to shop_web;
--     grant spark_outbox_worker to shop_worker;
--     grant spark_outbox_viewer to shop_monitoring;
--     grant spark_outbox_operator to shop_on_call;
--
-- Rights on the project's own tables are yours to grant: handlers run as the worker's role. `migrate`
-- needs the owner of the tables, `spark_bench` a role that may create databases.

do $$
declare
    role text;
    home regnamespace := (select relnamespace from pg_class where oid = 'spark_outbox_event'::regclass);
begin
    foreach role in array array[
        'spark_outbox_emitter', 'spark_outbox_worker', 'spark_outbox_viewer', 'spark_outbox_operator'
    ] loop
        if not exists (select from pg_roles where rolname = role) then
            execute format('create role %I nologin', role);
        end if;
        execute format('grant usage on schema %s to %I', home, role);
    end loop;
end $$;

revoke all on
    spark_outbox_event, spark_outbox_delivery, spark_outbox_session, spark_outbox_pause, spark_outbox_events,
    spark_outbox_status, spark_outbox_pauses, spark_outbox_failures, spark_outbox_workers,
    spark_outbox_snapshots, spark_outbox_health
    from spark_outbox_emitter, spark_outbox_worker, spark_outbox_viewer, spark_outbox_operator;
-- These functions run with the rights of their owner. `pg_dump --no-privileges` leaves out that they are not
-- for everybody.
revoke all on function
    spark_outbox_is_same, spark_outbox_check_keys, spark_outbox_emit_many, spark_outbox_prune,
    spark_outbox_forget_keys
    from public, spark_outbox_emitter, spark_outbox_worker, spark_outbox_viewer, spark_outbox_operator;

-- The emitter writes new events: pending ones, with no attempt behind them, at the time that it is. Of
-- what is there it can read ids and times, which emit() returns, but no key, group or payload. Whether
-- a key is taken it learns from the duplicate; whether by the same event, from a function. It can't choose
-- ids: a function allots them to the events of emit_many(), in the order given.
grant
    insert (key, event_group, payload, headers, ordering_key, available_at, key_is_generated),
    select (id, created_at)
    on spark_outbox_event to spark_outbox_emitter;
grant execute on function
    spark_outbox_is_same, spark_outbox_check_keys, spark_outbox_emit_many
    to spark_outbox_emitter;

-- The worker moves events from status to status. It can't change what an event says, nor delete one: but
-- by functions that prune what has ended. Handlers emit, too. It is also the role for spark_replay, for
-- repairs by hand, and for spark_outbox_close_circuit(), which runs with the rights of those who call it.
grant spark_outbox_emitter to spark_outbox_worker;
grant select, update (status, attempts, available_at, finished_at, last_error)
    on spark_outbox_event to spark_outbox_worker;
grant
    select,
    insert (
        event_id, handler, status, attempts, available_at, attempted_at, duration, worker, error, traceback,
        session
    ),
    update (
        status, attempts, available_at, attempted_at, duration, worker, error, traceback, session
    )
    on spark_outbox_delivery to spark_outbox_worker;
grant select, insert, update, delete on spark_outbox_session to spark_outbox_worker;
grant execute on function spark_outbox_prune, spark_outbox_forget_keys to spark_outbox_worker;
grant select on
    spark_outbox_pause, spark_outbox_events, spark_outbox_snapshots,
    spark_outbox_status, spark_outbox_pauses, spark_outbox_workers, spark_outbox_health -- for --metrics-port
    to spark_outbox_worker;

-- A worker begins by looking whether the outbox knows what django-spark has handled.
do $$
begin
    if to_regclass('spark_event') is not null then
        grant select on spark_event to spark_outbox_worker;
    end if;
end $$;

-- The viewer sees everything but payloads and headers. Errors and tracebacks are what an operator looks
-- for, but they can quote a payload: who must not see even that gets spark_outbox_status alone.
grant select (
        id, key, event_group, status, attempts, available_at, ordering_key, created_at, finished_at,
        last_error, key_is_generated
    )
    on spark_outbox_event to spark_outbox_viewer;
grant select on
    spark_outbox_delivery, spark_outbox_session, spark_outbox_pause, spark_outbox_events,
    spark_outbox_status, spark_outbox_pauses, spark_outbox_failures, spark_outbox_workers,
    spark_outbox_snapshots, spark_outbox_health
    to spark_outbox_viewer;
-- To see in pg_stat_activity what workers do, and what everybody else does, payloads included:
-- grant pg_read_all_stats to spark_outbox_viewer;

-- The operator is a viewer who also repairs, and who pauses and resumes: by spark_retry() and the other
-- functions, which run with the rights of those who call them, or by an UPDATE of what these change.
grant spark_outbox_viewer to spark_outbox_operator;
grant update (status, attempts, available_at, finished_at, last_error)
    on spark_outbox_event to spark_outbox_operator;
grant insert (event_id, handler, status, available_at), update (status, attempts, available_at)
    on spark_outbox_delivery to spark_outbox_operator;
grant insert (kind, name, why), delete on spark_outbox_pause to spark_outbox_operator;

-- For databases in which functions are not for everybody by default.
grant execute on function spark_emit to spark_outbox_emitter;
grant execute on function
    spark_outbox_close_circuit, spark_outbox_id_of, spark_outbox_lock, spark_outbox_lock_failed,
    spark_outbox_reopen, spark_outbox_give_up, spark_outbox_owe_again, spark_retry, spark_retry_failed,
    spark_discard, spark_replay
    to spark_outbox_worker, spark_outbox_operator;
grant execute on function spark_outbox_check_kind, spark_pause, spark_resume to spark_outbox_operator;
grant execute on function spark_explain, spark_outbox_explain_pending to spark_outbox_viewer;
grant execute on function spark_outbox_fingerprint, spark_outbox_pause_mark
    to spark_outbox_worker, spark_outbox_viewer;
