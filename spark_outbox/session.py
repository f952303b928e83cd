"""A worker's sessions: how soon client and server each notice that the other is gone.

The socket of a process that dies is closed, and the other side sees that at once. A host that dies, or
a line that is cut, says nothing: then TCP ends the connection, on each side by itself, once the other
has been silent for `tcp_user_timeout`; keepalives ask where nothing else is under way. A new connection
is given up after `connect_timeout`. So other workers have the rows of one that is cut off within 20
seconds, and by then it knows that it has lost them.

The figures are libpq's parameters, and go for both sides. Those that the project has given in OPTIONS
of its DATABASES come first. Processes that only emit keep their own.

No statement of the worker's own is ended by the project's `statement_timeout`, which is meant for
handlers. It is lifted, and their queries get it again, see isolation.py.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import connections
from psycopg.pq import Conninfo

from spark_outbox import store

BOUNDS = {
    "connect_timeout": "10",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",  # milliseconds
}


class Limits(NamedTuple):
    """Milliseconds that a statement may take; 0 for no limit."""

    session: int
    """What is set for the session, outside of transactions that say otherwise."""
    own: int
    """For the worker's own statements."""
    handlers: int
    """The project's, so for the statements of its handlers."""
    is_shared: bool = False
    """The session is a pooler's: what a worker sets goes with each transaction."""


_limits: WeakKeyDictionary[Any, Limits] = WeakKeyDictionary()
"""Those of the sessions that have been set up, by psycopg's connection."""


def noted_limits(raw: Any) -> Limits | None:
    """Return the limits of a worker's session; None if the session is that of whoever called us."""
    return None if raw is None else _limits.get(raw)


def limits(using: str) -> Limits:
    """Return the limits of a session. It is asked if it is not a worker's: then all are what it says."""
    noted = noted_limits(connections[using].connection)
    if noted is not None:
        return noted
    current = store.statement_timeout(using=using)
    return Limits(current, current, current)


def _lift_limit(using: str, *, is_own: bool) -> None:
    """Let the worker's own statements take their time; in a pooler's session each batch says so."""
    raw = connections[using].connection
    if raw not in _limits:
        project = store.statement_timeout(using=using)
        _limits[raw] = Limits(0 if is_own else project, 0, project, not is_own)
        if is_own and project:
            store.limit_session(0, using=using)


def set_bounds(*aliases: str | None) -> None:
    """Have this process give up servers that are gone: on connections that it makes from now on.

    A project that connects by a libpq service has its parameters in that service's file.
    """
    environment = {option.keyword.decode() for option in Conninfo.get_defaults() if option.val}
    bounds = {name: value for name, value in BOUNDS.items() if name not in environment}
    for alias in aliases:
        if alias is not None and "service" not in connections[alias].settings_dict["OPTIONS"]:
            settings = connections[alias].settings_dict
            settings["OPTIONS"] = {**bounds, **settings["OPTIONS"]}


def set_up(using: str, *, direct: str | None, idle_in_transaction: float | None) -> str:
    """Have the server give up this worker when it is gone; return the server's version.

    `direct` is the alias of the connection that is no pooler's. What is set in a pooler's session is
    left to whoever gets it next: there, the limit on silence goes with each transaction, see
    `store.silence_limit`; and as the server can't see past the pooler, the rest is up to that.
    """
    store.name_session(using=using)
    if direct is not None:
        connection = connections[direct]
        connection.ensure_connection()
        options = connection.connection.pgconn.info  # all of them: the password as well
        given = {option.keyword.decode(): option.val.decode() for option in options if option.val}
        bounds = {name: given.get(name, value) for name, value in BOUNDS.items()}
        store.bound_session(bounds, using=direct)
        store.limit_silence(idle_in_transaction, using=direct)
    _lift_limit(using, is_own=direct == using)
    version: str = connections[using].connection.info.parameter_status("server_version")
    return version.split(maxsplit=1)[0]
