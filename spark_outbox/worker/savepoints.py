"""The savepoints of a batch's handlers, each of which can be rolled back alone.

The release of the savepoint before, the new savepoint and the handler's first statement are sent as one
query, since a round trip of their own takes longer than all three. PostgreSQL parses a query before it
runs any of it: if the handler's statement is no SQL at all, there is no savepoint either. No other one
has its number, so the rollback finds out, and the batch is lost. It happens to a handler once: from then
on its savepoints are sent ahead.

There are few numbers, since psycopg parses each text that it has not seen lately: for a long INSERT that
takes longer than the savepoint does.
"""

from django.db import DatabaseError

from spark_outbox.store import isolating, limiting
from spark_outbox.worker.session_settings import SessionSettings

MAX_SUBTRANSACTIONS = 60
"""How many handlers of a batch may write. Each that does is a subtransaction id until the commit.
PostgreSQL caches 64 of them per backend (PGPROC_MAX_CACHED_SUBXIDS); beyond that every other session's
snapshots pay."""


class NotTaken(Exception):
    """There is no savepoint to roll back to."""


class Savepoints:
    """The savepoints of one transaction. At most one is kept: the next releases it.

    `apart` holds the names of handlers whose savepoints are sent ahead; it outlasts the transaction.
    None sends all of them ahead.
    """

    def __init__(self, settings: SessionSettings, *, apart: set[str] | None, using: str) -> None:
        self._settings = settings
        self._apart = apart
        self._using = using
        self._number = 0  # of the last one that was to be taken
        self._established = 0  # of the last one that is known to be there
        self._is_limited = False  # a handler's statement_timeout is in force
        self._subtransactions = 0
        self.are_used_up = False
        """The batch is to be committed."""

    def use_up(self) -> None:
        self.are_used_up = True

    def count_subtransaction(self) -> None:
        self._subtransactions += 1
        if self._subtransactions >= MAX_SUBTRANSACTIONS:
            self.use_up()

    def next(self, limit: float | None, *, is_worker: bool) -> list[str]:
        """Return the statements that take another, under a limit of `limit` seconds for each query.

        Call `confirm` after they have run, or `take` to run them now.
        """
        self._number = self._free_number()
        statements = [isolating.RELEASE.format(number=self._established)] if self._established else []
        timeout = self._settings.limit(limit, handler=not is_worker)
        is_limited = timeout != self._settings.own_limit
        if is_limited or self._is_limited:
            statements.append(limiting.LIMIT_STATEMENTS.format(milliseconds=timeout))
        self._is_limited = is_limited
        statements.append(isolating.SAVEPOINT.format(number=self._number))
        return statements

    def _free_number(self) -> int:
        """Return a number that no savepoint has now."""
        if self._number != self._established:  # nobody knows whether the last one was taken
            return max(self._number, 2) + 1
        return 2 if self._number == 1 else 1

    def take(self, statements: list[str]) -> None:
        isolating.savepoint("; ".join(statements), using=self._using)
        self.confirm()

    def confirm(self) -> None:
        self._established = self._number

    def are_sent_ahead(self, handler: str) -> bool:
        """Return whether the handler's savepoint is a query of its own."""
        return self._apart is None or handler in self._apart

    def roll_back(self, handler: str) -> None:
        """Undo what the handler did since the last one. Raises NotTaken if PostgreSQL has never run
        it."""
        rollback = isolating.ROLLBACK_TO_SAVEPOINT.format(number=self._number)
        try:
            isolating.savepoint(rollback, using=self._using)
        except DatabaseError as error:
            if getattr(error.__cause__, "sqlstate", None) != isolating.NO_SUCH_SAVEPOINT:
                raise
            if self._apart is not None:
                self._apart.add(handler)
            raise NotTaken from error
        self.confirm()

    def forget(self) -> str:
        """Return the statement that releases the last one. The caller restores the limit, too."""
        release = isolating.RELEASE.format(number=self._established) if self._established else ""
        self._established = 0
        self._is_limited = False
        return release

    def lift_limit(self) -> None:
        """After the last handler: give the worker's own statements their limit."""
        if self._is_limited:
            milliseconds = self._settings.own_limit
            isolating.savepoint(
                limiting.LIMIT_STATEMENTS.format(milliseconds=milliseconds), using=self._using
            )
            self._is_limited = False
