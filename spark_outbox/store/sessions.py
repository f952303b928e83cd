"""Which workers are there: the locks that they hold, and the rows that tell of an unclean end.

A worker holds an advisory lock on `session`, a random number, for as long as it is connected: whoever
can take that lock knows that the worker is gone. See worker/crashes.py for the rows.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from spark_outbox.store.connection import Using, execute, fetch, fetch_value

LOCK_SESSION = "select pg_try_advisory_lock(7531003, %s)"
UNLOCK_SESSION = "select pg_advisory_unlock(7531003, %s)"
IS_SESSION_GONE = "select pg_try_advisory_xact_lock(7531003, %s)"


def lock_session(session: int, *, using: Using) -> bool:
    """Hold the lock of `session` for as long as this connection lives; False if somebody has it."""
    return bool(fetch_value(LOCK_SESSION, [session], using=using))


def unlock_session(session: int, *, using: Using) -> None:
    fetch_value(UNLOCK_SESSION, [session], using=using)


def is_session_gone(session: int | None, *, using: str) -> bool:
    """Return whether nobody holds the lock of `session`; then we do, until the transaction ends."""
    return session is None or bool(fetch_value(IS_SESSION_GONE, [session], using=using))


# Workers' rows, which tell of an unclean end: see worker/crashes.py

ENLIST = """
insert into spark_outbox_session (session, name, version, backend, groups, handlers)
values (
    %(session)s, %(name)s, %(version)s, case when %(is_direct)s then pg_backend_pid() end, %(groups)s,
    %(handlers)s::jsonb
)
on conflict (session) do update
set
    event_id = null, handler = '', called_at = null, times = 0, started_at = excluded.started_at,
    backend = excluded.backend
"""

DISMISS = """
delete from spark_outbox_session where session in (
    select session from spark_outbox_session where session = any(%s) for update skip locked
)
"""

# Of one that was there before the server was restarted nobody knows whether it has died.
FALLEN_WORKERS = """
select
    session, event_id, handler,
    case when started_at > pg_postmaster_start_time() then times else 0 end
from spark_outbox_session
where session <> %s and pg_try_advisory_xact_lock(7531003, session)
"""

NOTE_CALL = """
update spark_outbox_session
set event_id = %(event_id)s, handler = %(handler)s, times = %(times)s, called_at = null
where session = any(%(sessions)s)
"""


# Not in the place of a call that is noted for another reason.
SHOW_CALL = """
update spark_outbox_session
set
    event_id = %(event_id)s, handler = %(handler)s,
    called_at = statement_timestamp() - %(seconds)s * interval '1 second'
where session = %(session)s and times <= 0
"""
FORGET_SHOWN = """
update spark_outbox_session set event_id = null, handler = '', called_at = null
where session = %s and called_at is not null
"""


class FallenWorker(NamedTuple):
    """A worker that did not stop by itself; and the call that it was making, if it has noted one."""

    session: int
    event_id: int | None
    handler: str
    times: int


def enlist(
    session: int,
    name: str,
    *,
    version: str,
    is_direct: bool,
    groups: str | None,
    handlers: Sequence[str],
    using: str,
) -> None:
    """Write a worker's row; it has noted no call. See the model for what it says."""
    params: dict[str, Any] = {
        "session": session,
        "name": name,
        "version": version,
        "is_direct": is_direct,
        "groups": groups,
        "handlers": json.dumps(handlers),
    }
    execute(ENLIST, params, using=using)


def dismiss(sessions: list[int], *, using: str) -> None:
    """Delete workers' rows."""
    execute(DISMISS, [sessions], using=using)


def fallen_workers(session: int, *, using: str) -> list[FallenWorker]:
    """Return the other workers that are gone; nobody else finds them until the transaction ends."""
    return list(map(FallenWorker._make, fetch(FALLEN_WORKERS, [session], using=using)))


def note_call(
    sessions: list[int], event_id: int | None, handler: str, times: int, *, using: Using
) -> None:
    """Note which call workers are making, and how often in a row."""
    params = {"sessions": sessions, "event_id": event_id, "handler": handler, "times": times}
    execute(NOTE_CALL, params, using=using)


def forget_call(sessions: list[int], *, using: Using) -> None:
    """Note that workers are making no call."""
    note_call(sessions, None, "", 0, using=using)


def show_call(session: int, event_id: int, handler: str, seconds: float, *, using: Using) -> None:
    """Note a call that has been under way for so many seconds, for people to see."""
    params = {"session": session, "event_id": event_id, "handler": handler, "seconds": seconds}
    execute(SHOW_CALL, params, using=using)


def hide_call(session: int, *, using: Using) -> None:
    """Note that it has ended."""
    execute(FORGET_SHOWN, [session], using=using)
