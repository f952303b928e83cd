"""Running deliveries: calls that outlive their batch, and how others take them over.

A delivery belongs to the worker that holds the lock of its session; see `sessions`. A delivery whose
session is NULL is nobody's.
"""

from collections.abc import Sequence
from typing import NamedTuple

from spark_outbox.store.connection import as_columns, execute, fetch

RUNNING_SESSIONS = "select distinct session from spark_outbox_delivery where status = 'running'"

LOCK_RUNNING = """
select id from spark_outbox_event
where id = any(%s) and status = 'running'
order by id
for no key update
"""

# Of a worker that died, and did not just lose its connection to a server that was restarted.
_DIED = """
%(death)s <> '' and delivery.session is not null and delivery.attempted_at > pg_postmaster_start_time()
"""

TAKE_BACK = f"""
update spark_outbox_delivery as delivery
set status = 'pending', available_at = statement_timestamp(),
    session = case when {_DIED} then delivery.session end,
    attempts = least(greatest(delivery.attempts, 0), 2147483646) + ({_DIED})::integer,
    attempted_at = case when {_DIED} then statement_timestamp() else delivery.attempted_at end,
    error = case when {_DIED} then %(death)s else delivery.error end,
    traceback = case when {_DIED} then '' else delivery.traceback end
from unnest(%(events)s::bigint[], %(handlers)s::text[], %(sessions)s::integer[])
    as ended (event_id, handler, session)
where delivery.event_id = ended.event_id and delivery.handler = ended.handler
    and delivery.session is not distinct from ended.session and delivery.status = 'running'
returning delivery.event_id, delivery.handler
"""

HELD_BY = """
select coalesce(session, 0), status = 'running' from spark_outbox_delivery
where event_id = %s and handler = %s and status in ('running', 'pending', 'failed')
"""

# Whatever has come of it, unless another attempt has begun.
LOCK_COUNTED = """
select event.id from spark_outbox_event as event join spark_outbox_delivery as delivery
    on delivery.event_id = event.id
where event.id = %s and event.status in ('pending', 'failed')
    and delivery.handler = %s and delivery.session = %s and delivery.status in ('pending', 'failed')
for no key update skip locked
"""

SIGN = """
update spark_outbox_delivery set session = %s
where event_id = %s and handler = %s and status in ('pending', 'failed')
"""

UNCOUNT = """
update spark_outbox_delivery set status = 'pending', session = null, attempts = greatest(attempts, 1) - 1
where event_id = %s and handler = %s
"""

REOPEN_COUNTED = """
update spark_outbox_event
set status = 'pending', finished_at = null, attempts = greatest(attempts, 1) - %s
where id = %s
"""

RUNNING_OF = """
select event_id, handler, session from spark_outbox_delivery
where status = 'running' and session is not distinct from %s
"""

REOPEN_RUNNING = """
update spark_outbox_event
set status = 'pending', available_at = statement_timestamp(), attempts = greatest(attempts, 1) - %s
where id = any(%s) and status = 'running'
"""


class Running(NamedTuple):
    """A delivery that some worker has begun; it is that worker's while it has this session.

    If another takes it over, which counts as an attempt, it still says whose attempt that was.
    """

    event_id: int
    handler: str
    session: int | None


def running_sessions(*, using: str) -> list[int | None]:
    return [session for (session,) in fetch(RUNNING_SESSIONS, using=using)]


def held_by(event_id: int, handler: str, *, using: str) -> tuple[int, bool]:
    """Return the session of a delivery's last attempt, and whether that is still running.

    It is 0 if the attempt has ended in the ordinary way, or has not been counted yet.
    """
    found = fetch(HELD_BY, [event_id, handler], using=using)
    return found[0] if found else (0, False)


def sign(running: Running, *, using: str) -> None:
    """Note whose attempt a delivery's last one was, that has just been counted."""
    execute(SIGN, [running.session, running.event_id, running.handler], using=using)


def undo_count(running: Running, *, to_settle: bool, using: str) -> bool:
    """Take back that a delivery's last attempt was counted, and make its event pending if it has failed
    of that; return whether that could be done now. See `take_back`.
    """
    if not fetch(LOCK_COUNTED, list(running), using=using):
        return False
    execute(UNCOUNT, list(running[:2]), using=using)
    execute(REOPEN_COUNTED, [int(to_settle), running.event_id], using=using)
    return True


def running_of(session: int | None, *, using: str) -> list[Running]:
    return list(map(Running._make, fetch(RUNNING_OF, [session], using=using)))


def take_back(
    running: Sequence[Running], *, to_settle: bool, death: str = "", using: str
) -> set[tuple[int, str]]:
    """Make deliveries, and their events, pending again; return those to which it applied.

    It does not apply to those that another worker has taken over. Locks the events first. With
    `to_settle` it is in order to settle them, which counts the pass that they are in once more.
    With `death`, the error to note, it counts as an attempt; but not if the server was restarted
    since the deliveries have begun, as that ends all sessions.
    """
    event_ids = sorted({event_id for event_id, _, _ in running})
    fetch(LOCK_RUNNING, [event_ids], using=using)
    ended = dict(zip(("events", "handlers", "sessions"), as_columns(running), strict=True))
    taken = {tuple(row) for row in fetch(TAKE_BACK, {"death": death, **ended}, using=using)}
    execute(REOPEN_RUNNING, [int(to_settle), [event_id for event_id, _ in taken]], using=using)
    return taken


def running_events(session: int | None, *, using: str) -> list[int]:
    """Return the events of which deliveries run under a session."""
    return sorted({event_id for event_id, _, _ in running_of(session, using=using)})
