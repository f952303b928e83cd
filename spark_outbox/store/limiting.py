"""Limits on a worker's session, or where that is a pooler's, on its transactions.

See worker/session.py and worker/bounds.py.
"""

import math
from collections.abc import Mapping

from spark_outbox.store.connection import Using, execute, fetch, past_wrappers

# Before the savepoint, so that a rollback to it does not bring back what was in force before.
LIMIT_STATEMENTS = "set local statement_timeout = {milliseconds}"
LIMIT_SESSION = "set statement_timeout = {milliseconds}"

# In milliseconds, whatever unit it is shown in.
STATEMENT_TIMEOUT = """
select (extract(epoch from current_setting('statement_timeout')::interval) * 1000)::bigint
"""


def statement_timeout(*, using: str) -> int:
    """Return what is in force, in milliseconds; 0 for no limit."""
    return int(past_wrappers(STATEMENT_TIMEOUT, using).get_value(0, 0) or 0)


def limit_session(milliseconds: int, *, using: str) -> None:
    """Let no statement of the session take longer; 0 for no limit."""
    past_wrappers(LIMIT_SESSION.format(milliseconds=milliseconds), using)


LIMIT_TRANSACTION = "select set_config('statement_timeout', %s, true)"

NAME_SESSION = "set application_name = '{name}'"

# No statement of a session that only holds a lock takes long; but it is idle for as long as it takes.
KEEP_SESSION = """
select set_config('idle_session_timeout', '0', false), set_config('statement_timeout', '0', false)
"""

SEND_TIMEOUT = "select set_config('tcp_user_timeout', %s, false)"

BOUND_SESSION = """
select
    set_config('tcp_keepalives_idle', %(keepalives_idle)s, false),
    set_config('tcp_keepalives_interval', %(keepalives_interval)s, false),
    set_config('tcp_keepalives_count', %(keepalives_count)s, false),
    set_config('tcp_user_timeout', %(tcp_user_timeout)s, false)
"""

# The first is for statements that still run when the worker is gone.
LIMIT_SILENCE = """
select
    set_config('client_connection_check_interval', '1s', {local}),
    set_config('idle_in_transaction_session_timeout', '{milliseconds}', {local})
"""
LIFT_LIMIT = ", set_config('statement_timeout', '0', true)"

SET_BY_TRANSACTION = ("client_connection_check_interval", "idle_in_transaction_session_timeout")
"""The settings of `silence_limit`, where the session is a pooler's."""


def limit_transaction(seconds: float, *, using: str) -> None:
    """Let no statement of the current transaction take longer."""
    fetch(LIMIT_TRANSACTION, [str(math.ceil(seconds * 1000))], using=using)


def name_session(name: str, *, using: Using) -> None:
    """Tell people whose session it is. Poolers keep this apart for each of their clients."""
    execute(NAME_SESSION.format(name=name), using=using)


def keep_session(*, using: Using) -> None:
    """Have the server end the session for no reason but that its client is gone."""
    fetch(KEEP_SESSION, using=using)


def limit_send(milliseconds: str, *, using: str) -> None:
    """Have the server wait so long for a client that reads nothing; "0" for as long as it is alive."""
    fetch(SEND_TIMEOUT, [milliseconds], using=using)


def bound_session(bounds: Mapping[str, str], *, using: Using) -> None:
    """Have the server end the session if its client is silent; `bounds` are libpq's parameters."""
    fetch(BOUND_SESSION, bounds, using=using)


def limit_silence(seconds: float | None, *, using: str) -> None:
    """Have the server end the session if it hears nothing in a transaction for so long."""
    fetch(silence_limit(seconds, local=False), using=using)


def silence_limit(seconds: float | None, *, local: bool = True) -> str:
    """Return the query that does it, for the transaction alone; there our statements have no limit."""
    milliseconds = 0 if seconds is None else math.ceil(seconds * 1000)
    query = LIMIT_SILENCE.format(milliseconds=milliseconds, local=str(local).lower())
    return query + LIFT_LIMIT if local else query
