"""A worker's sessions: how soon client and server each notice that the other is gone.

The socket of a process that dies is closed, and the other side sees that at once. A host that dies, or
a line that is cut, says nothing: then TCP ends the connection, on each side by itself, once the other
has been silent for `tcp_user_timeout`; keepalives ask where nothing else is under way. A new connection
is given up after `connect_timeout`. So other workers have the rows of one that is cut off within 20
seconds, and by then it knows that it has lost them.

The figures are libpq's parameters, and go for both sides. A figure that the project has given in the
OPTIONS of its DATABASES comes first. Processes that only emit keep their own.

`tcp_user_timeout` also ends a connection whose client is alive, but does not read what it has asked for:
it bounds a pause in a COPY. That has to be for a worker's transaction, which holds rows that others wait
for. While a detached handler runs, its connection has no such bound, and keepalives alone notice that
the host is gone. The lock by which other workers see it is on another connection: see private.py.

No statement of the worker's own is ended by the project's `statement_timeout`, which is meant for
handlers. It is lifted, and their queries get it again, see isolation.py.
"""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import Conninfo

from spark_outbox.errors import SettingsError
from spark_outbox.store import limiting, sessions, waking
from spark_outbox.worker.identity import identity

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
    """The limit of the session, outside of transactions that set another."""
    own: int
    """For the worker's own statements."""
    handlers: int
    """The project's, so for the statements of its handlers."""
    is_shared: bool = False
    """The session is a pooler's: what a worker sets goes with each transaction."""


_limits: WeakKeyDictionary[Any, Limits] = WeakKeyDictionary()
"""The limits of sessions that have been set up, by psycopg's connection."""


def noted_limits(raw: Any) -> Limits | None:
    """Return the limits of a worker's session; None for the session of a caller that drains."""
    return None if raw is None else _limits.get(raw)


def limits(using: str) -> Limits:
    """Return the limits of a session. It is asked if it is not a worker's: then all are what it says."""
    noted = noted_limits(connections[using].connection)
    if noted is not None:
        return noted
    current = limiting.statement_timeout(using=using)
    return Limits(current, current, current)


def _lift_limit(using: str, *, is_own: bool) -> None:
    """Let the worker's own statements take their time; in a pooler's session each batch says so."""
    raw = connections[using].connection
    if raw not in _limits:
        project = limiting.statement_timeout(using=using)
        _limits[raw] = Limits(0 if is_own else project, 0, project, not is_own)
        if is_own and project:
            limiting.limit_session(0, using=using)


def set_bounds(*aliases: str | None) -> None:
    """Have this process give up servers that are gone: on connections that it makes from now on.

    A project that connects by a libpq service has its parameters in that service's file.
    """
    for alias in aliases:
        if alias is not None:
            settings = connections[alias].settings_dict
            settings["OPTIONS"] = bounded(settings["OPTIONS"])


def bounded(options: dict[str, Any]) -> dict[str, Any]:
    """Return the OPTIONS of a database with our bounds, where the project has none of its own."""
    if "service" in options:
        return options
    environment = {option.keyword.decode() for option in Conninfo.get_defaults() if option.val}
    bounds = {name: value for name, value in BOUNDS.items() if name not in environment}
    return {**bounds, **options}


def check(using: str, direct: str | None) -> None:
    """Raise SettingsError if a worker can't work on connections that are configured like these."""
    for alias in dict.fromkeys((using, direct)):
        if alias is not None and not connections[alias].settings_dict["AUTOCOMMIT"]:
            raise SettingsError(
                f"DATABASES[{alias!r}] has AUTOCOMMIT off: a worker would commit nothing. Remove "
                "that setting; or give the outbox an alias of its own, without it."
            )


def check_direct(using: str, direct: str | None) -> None:
    """Raise SettingsError if the two aliases don't lead to the same outbox.

    A lock that one takes must be held against the other: this is tried. Comparing their names would
    prove nothing, since a standby has the name of its primary, and a pooler may give any.
    """
    if direct is None or direct == using:
        return
    number = new_number()
    sessions.lock_session(number, using=direct)
    try:
        elsewhere = sessions.is_session_gone(number, using=using)
    finally:
        sessions.unlock_session(number, using=direct)
    if elsewhere or waking.outbox_oid(using=using) != waking.outbox_oid(using=direct):
        raise SettingsError(
            f"SPARK_OUTBOX['LISTEN_DATABASE'] names {direct!r} for {using!r}, which has another outbox. "
            f"Name a direct connection for each database: {{{using!r}: ALIAS, …}}; "
            "'' for one that is direct itself, None for one to be polled."
        )


def new_number() -> int:
    """Return a number for a session that is nobody's: its lock says that its worker is there."""
    return random.SystemRandom().randrange(1, 2**31)


def leave_pools(*aliases: str | None) -> None:
    """Have this process connect by itself where the project has a pool. A worker needs one connection.
    Its session has locks and LISTENs, so it must end with the worker, and not go back to a pool."""
    for alias in aliases:
        if alias is not None:
            settings = connections[alias].settings_dict
            options: dict[str, Any] = settings["OPTIONS"]
            if options.get("pool"):
                settings["OPTIONS"] = {name: options[name] for name in options if name != "pool"}
                settings["CONN_MAX_AGE"] = None  # those of other threads last, as in the pool


def set_up(using: str, *, direct: str | None, idle_in_transaction: float | None) -> str:
    """Have the server give up this worker when it is gone; return the server's version.

    `direct` is the alias of the connection that is no pooler's. A setting in a pooler's session would
    stay for its next client. So there the limit on silence goes with each transaction, see
    `limiting.silence_limit`, and the pooler has to notice the rest.
    """
    limiting.name_session(f"spark_worker {identity()}", using=using)
    for alias in {using, direct or using}:
        connections[alias].ensure_connection()
        connections[alias].close_at = None  # close_old_connections() leaves it, whatever CONN_MAX_AGE is
    if direct is not None:
        connection = connections[direct]
        limiting.bound_session(_bounds_of(connection.connection), using=direct)
        limiting.limit_silence(idle_in_transaction, using=direct)
    _lift_limit(using, is_own=direct == using)
    version: str = connections[using].connection.info.parameter_status("server_version")
    return version.split(maxsplit=1)[0]


def keep(connection: BaseDatabaseWrapper, *, name: str) -> None:
    """Have the server end a session when its worker is gone, and for no other reason."""
    limiting.name_session(f"{name} {identity()}", using=connection)
    limiting.bound_session(_bounds_of(connection.connection), using=connection)
    limiting.keep_session(using=connection)


@contextlib.contextmanager
def patience(using: str, *, direct: bool) -> Iterator[None]:
    """While a handler has the connection `using` for itself: let it read and write at its leisure.

    `direct` says that the session is this worker's alone, so that the server's side can be told. A bound
    that the project has given is kept.
    """
    raw = connections[using].connection
    ours = BOUNDS["tcp_user_timeout"]
    if raw is None or not _is_tcp(raw) or _bounds_of(raw)["tcp_user_timeout"] != ours:
        yield
        return
    _limit_send(raw, 0)
    if direct:
        limiting.limit_send("0", using=using)
    try:
        yield
    finally:
        if connections[using].connection is raw and not raw.closed:
            _limit_send(raw, int(ours))
            if direct:
                limiting.limit_send(ours, using=using)


def _bounds_of(raw: Any) -> dict[str, str]:
    """Return the bounds that a psycopg connection was made with; ours, where it has none."""
    options = raw.pgconn.info  # all of them: the password as well
    given = {option.keyword.decode(): option.val.decode() for option in options if option.val}
    return {name: given.get(name, value) for name, value in BOUNDS.items()}


def _is_tcp(raw: Any) -> bool:
    with _socket(raw) as end:
        return end.family != socket.AF_UNIX


def _limit_send(raw: Any, milliseconds: int) -> None:
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # else libpq has not set it either
        with _socket(raw) as end:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _socket(raw: Any) -> socket.socket:
    return socket.socket(fileno=os.dup(raw.fileno()))
