"""A worker's private connection: nothing but the worker can reach, close or use it.

Handlers get their connections from Django's `connections`, where `close_old_connections()` finds them.
Anything that must outlast handlers, such as the lock of a session, is therefore on this one. It
belongs to no pool, and the server ends it only if the worker is gone: see the bounds in bounds.py.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from spark_outbox.worker import bounds

T = TypeVar("T")

NAME = "spark_worker_lock"
"""Its name in pg_stat_activity, before that of the worker."""


class PrivateConnection:
    """One connection to the database of `alias`, made when it is first needed; in autocommit mode."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._connection: BaseDatabaseWrapper | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def run(self, statement: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a function of the store with this connection as its `using`.

        Connects first if need be. Raises OperationalError if the connection is lost: then `close` it.
        """
        if self._connection is None:
            self._connection = self._connect()
        self._connection.queries_log.clear()
        return statement(*arguments, **options, using=self._connection)

    def use(self, statement: Callable[..., T], *arguments: Any) -> T:
        """Do so if there is a connection; in any thread. Raises OperationalError if there is none."""
        if (connection := self._connection) is None:
            raise OperationalError("There is no private connection.")
        return statement(*arguments, using=connection)

    def close(self) -> None:
        """Close the connection, if there is one. Its locks are free then."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connect(self) -> BaseDatabaseWrapper:
        connection = connections[self._alias].copy()
        connection.inc_thread_sharing()  # psycopg runs one statement after the other
        settings = connection.settings_dict
        settings.update(AUTOCOMMIT=True, CONN_MAX_AGE=None)
        settings["OPTIONS"] = bounds.bounded(settings["OPTIONS"])
        settings["OPTIONS"].pop("pool", None)
        connection.ensure_connection()
        try:
            bounds.keep(connection, name=NAME)
        except BaseException:
            connection.close()
            raise
        return connection
