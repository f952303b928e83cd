"""Wake: the two advisory locks of the migration's trigger, LISTEN, and the trigger's mode.

See worker/wake.py for the protocol, and SPARK_OUTBOX["WAKE"] for the mode.
"""

from spark_outbox.store.connection import execute, fetch, fetch_value

# Each in a transaction of its own, also among other statements: before that ends, they do nothing.
LISTEN = "begin; listen spark_outbox; commit"
UNLISTEN = "begin; unlisten spark_outbox; commit"

OUTBOX_OID = "select to_regclass('spark_outbox_event')::oid::integer"
OID = "'spark_outbox_event'::regclass::oid::integer"

# Of the table as it is now: it may have been dropped and restored since the last time.
TAKE_S = f"""
select pg_try_advisory_lock_shared(7531002, this), this from (select {OID}) as outbox (this)
"""
LET_GO_OF_S = "select pg_advisory_unlock_shared(7531002, {oid})"

# Whether no transaction that has emitted is still open.
PROBE_K = f"""
select case when pg_try_advisory_lock(7531001, this)
    then pg_advisory_unlock(7531001, this) else false end
from (select {OID}) as outbox (this)
"""


def outbox_oid(*, using: str) -> int | None:
    """Return the OID of the table that this connection takes for the outbox; None if there is none."""
    oid: int | None = fetch_value(OUTBOX_OID, using=using)
    return oid


# To others, as the trigger does to those who sleep; see worker/wake.py.
WAKE_OTHERS = f"""
select case when (
    case when pg_try_advisory_xact_lock_shared(7531001, oid) then
        case when pg_try_advisory_lock(7531002, oid) then pg_advisory_unlock(7531002, oid) end
    end
) is not true then pg_notify('spark_outbox', '') end
from (select {OID} as oid) as outbox
"""


def wake_others(*, using: str) -> None:
    """Notify workers that sleep, when the transaction commits."""
    fetch(WAKE_OTHERS, using=using)


# The wake trigger's mode, see SPARK_OUTBOX["WAKE"]

WAKE_MODE = """
select case when count(*) = 2 and min(mode) = max(mode) then min(mode) else 'never' end
from (
    select substring(encode(tgargs, 'escape') from '^[a-z]+') as mode
    from pg_trigger
    where tgrelid = to_regclass('spark_outbox_event')
        and tgname in ('spark_outbox_wake', 'spark_outbox_wake_again')
) as triggers
"""

# As in migrations/sql/0001_wake.sql: nobody sleeps, and nobody is about to.
NOBODY_SLEEPS = f"""(
    pg_try_advisory_xact_lock_shared(7531001, {OID})
    and pg_try_advisory_lock(7531002, {OID})
    and pg_advisory_unlock(7531002, {OID})
)"""

IS_READY_AGAIN = """
new.status = 'pending' and (
    old.status in ('done', 'failed', 'discarded')
    or new.available_at < old.available_at
    or new.available_at is null and old.available_at is not null
)
"""

SET_WAKE_MODE = {
    mode: f"""
create or replace trigger spark_outbox_wake after insert on spark_outbox_event
    for each statement {"" if condition is None else f"when ({condition})"}
    execute function spark_outbox_wake('{mode}');
create or replace trigger spark_outbox_wake_again after update on spark_outbox_event
    for each row when ({IS_READY_AGAIN} {"" if condition is None else f"and {condition}"})
    execute function spark_outbox_wake('{mode}')
"""
    for mode, condition in {"gated": f"{NOBODY_SLEEPS} is not true", "always": None}.items()
}
SET_WAKE_MODE["never"] = """
drop trigger if exists spark_outbox_wake on spark_outbox_event;
drop trigger if exists spark_outbox_wake_again on spark_outbox_event
"""


def wake_mode(*, using: str) -> str:
    """Return what the trigger does: `gated`, `always`, or `never`."""
    mode: str = fetch_value(WAKE_MODE, using=using)
    return mode


def set_wake_mode(mode: str, *, using: str) -> None:
    """Make the trigger do `mode`. Locks the outbox against writers until the transaction ends."""
    execute(SET_WAKE_MODE[mode], using=using)
