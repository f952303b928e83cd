"""How others know that a worker is there: the advisory lock on its number.

A worker draws a number, its session, and holds the lock on it for as long as it lives. Its running
deliveries have that number, and so has its row in `spark_outbox_session`. Locks die with the
connection: a worker that can take the lock of a session knows that its owner is gone.

The lock is on a private connection, which lasts whatever handlers do to those that they can reach, and
which an outage of the worker's own connection leaves as it is.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from django.db import Error

from spark_outbox.store import sessions
from spark_outbox.worker import bounds
from spark_outbox.worker.context import Context
from spark_outbox.worker.private import PrivateConnection

T = TypeVar("T")


class Presence:
    """One worker's session. Its guard notes the number, so that a crash is booked under it."""

    def __init__(self, context: Context) -> None:
        self._using = context.using
        self._direct = context.direct or context.using
        self._guard = context.guard
        self._private = PrivateConnection(self._direct)
        self.session = 0
        """The number; 0 if there was no need of one."""

    def hold(self) -> int:
        """Hold the lock until the connection is lost, or closed; return the session.

        It is another one than before if the connection was lost, and somebody is taking over what bears
        the old one. Raises OperationalError if there is no connection to be had.
        """
        if not self._private.is_open:
            bounds.check_direct(self._using, self._direct)
        try:
            self._lock()
        except Error:
            if not self._private.is_open:
                raise
            self._private.close()  # it was lost since it was last used
            self._lock()
        return self.session

    def confirm(self) -> int:
        """Do so after an outage: the private connection may lead to what is no primary any more."""
        if self.hold() and sessions.is_session_gone(self.session, using=self._using):
            self._private.close()
            self.hold()
        return self.session

    def _lock(self) -> None:
        number = self.session or bounds.new_number()
        while not self._private.run(sessions.lock_session, number):
            number = bounds.new_number()
        self.session = number
        self._guard.identify(number)

    def run(self, statement: Callable[..., T], *arguments: Any) -> T:
        """Call a function of the store on the private connection, while holding the lock."""
        if not self._private.is_open:
            self.hold()
        try:
            return self._private.run(statement, *arguments)
        except Error:
            self.hold()  # it may have been lost since it was last used
            return self._private.run(statement, *arguments)

    def write(self, statement: Callable[..., None], *arguments: Any) -> None:
        """Call a function of the store for our session, in whatever thread. Raises OperationalError if
        there is no connection: none is made for that."""
        self._private.use(statement, self.session, *arguments)

    def end(self) -> None:
        """Close the connection: others may take over whatever bears this session."""
        self._private.close()
