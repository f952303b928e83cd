-- The triggers that wake sleeping workers: at each INSERT of events, and at each UPDATE that makes one
-- ready, or due sooner.
--
-- A transaction that notifies holds a lock on the whole database while it commits. So they
-- notify only if a worker sleeps. Two advisory locks show this; the triggers wait for neither:
--
--     K (7531001, the table's OID)  shared, by each transaction that has emitted, until it ends
--     S (7531002, the table's OID)  shared, by each worker that sleeps
--
-- spark_outbox/worker/wake.py has the worker's half. The locks are asked for in the triggers' conditions,
-- which cost a third of what a call of the function would. The triggers' argument is their mode, `gated`
-- or `always`, which has no such condition; for SPARK_OUTBOX["WAKE"] = "never" there are none.

create function spark_outbox_wake() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $body$
begin
    -- An INSERT of duplicates alone wakes nobody. A transition table would show this exactly, but would
    -- make each emit a tenth dearer. The session's statistics are read only if a worker sleeps. They
    -- count this transaction's rows, and maybe rows of the last second: then there is one NOTIFY too
    -- many. Without statistics, notify.
    if tg_op = 'UPDATE' or pg_stat_get_xact_tuples_inserted(tg_relid) > 0
        or not current_setting('track_counts')::boolean
    then
        perform pg_notify('spark_outbox', '');
    end if;
    return null;
end
$body$;

create trigger spark_outbox_wake after insert on spark_outbox_event
    for each statement when (
        (
            -- The first fails while a worker probes K, the second while one sleeps.
            pg_try_advisory_xact_lock_shared(7531001, 'spark_outbox_event'::regclass::oid::integer)
            and pg_try_advisory_lock(7531002, 'spark_outbox_event'::regclass::oid::integer)
            and pg_advisory_unlock(7531002, 'spark_outbox_event'::regclass::oid::integer)
        ) is not true
    )
    execute function spark_outbox_wake('gated');

-- The condition costs the UPDATE that settles events nothing that can be measured. What workers
-- themselves make pending again wakes nobody: `running` events, which they settle next, and `unhandled`
-- ones, which a worker of an older release would only put aside again.
create trigger spark_outbox_wake_again after update on spark_outbox_event
    for each row when (
        new.status = 'pending' and (
            old.status in ('done', 'failed', 'discarded')
            or new.available_at < old.available_at
            or new.available_at is null and old.available_at is not null
        )
        and (
            pg_try_advisory_xact_lock_shared(7531001, 'spark_outbox_event'::regclass::oid::integer)
            and pg_try_advisory_lock(7531002, 'spark_outbox_event'::regclass::oid::integer)
            and pg_advisory_unlock(7531002, 'spark_outbox_event'::regclass::oid::integer)
        ) is not true
    )
    execute function spark_outbox_wake('gated');
