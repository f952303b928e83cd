"""A worker's sessions: how soon client and server each notice that the other is gone.

The socket of a process that dies is closed, and the other side sees that at once. A host that dies, or
a line that is cut, says nothing: then TCP ends the connection, on each side by itself, once the other
has been silent for `tcp_user_timeout`; keepalives ask where nothing else is under way. A new connection
is given up after `connect_timeout`. So other workers have the rows of one that is cut off within 20
seconds, and by then it knows that it has lost them.

The figures are libpq's parameters, and go for both sides. Those that the project has given in OPTIONS
of its DATABASES come first. Processes that only emit keep their own.
"""

from typing import Any

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
    version: str = connections[using].connection.info.parameter_status("server_version")
    return version.split(maxsplit=1)[0]
