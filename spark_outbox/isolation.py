"""Let one handler's writes stand or fall alone, in a transaction that it shares with others.

A savepoint is taken the moment a handler first touches the database, in one round trip with the
release of the one before; a handler that never touches it costs nothing.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from spark_outbox import store
from spark_outbox.errors import BrokenTransaction
from spark_outbox.references import References

# Each savepoint that wrote is a subtransaction id until the commit. PostgreSQL caches 64 of them
# per backend (PGPROC_MAX_CACHED_SUBXIDS); beyond that every other session's snapshots pay.
MAX_SUBTRANSACTIONS = 60


class Isolation:
    """The savepoints of one worker's handlers: `batch` around a batch, then per handler `begin` and
    either `end` or `undo`."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._connection: BaseDatabaseWrapper = connections[using]
        self._references = References()
        self._strict = False
        self._subtransactions = 0
        self._release = ""
        self._touched = True
        self._wrote = False
        self.lost = ""
        self._limit: float | None = None
        self._limited = False  # a statement_timeout is in force
        self._raw: Any = None
        self._callbacks = self._blocks = self._savepoints = 0
        self._cursors: dict[type[Any], type[Any]] = {}

    @property
    def full(self) -> bool:
        return self._subtransactions >= MAX_SUBTRANSACTIONS

    @contextmanager
    def batch(self, references: References, *, strict: bool) -> Iterator[None]:
        """Watch what is run on the worker's connection, inside its transaction.

        `strict` checks deferred constraints at the end of each handler rather than at the commit,
        where nobody could tell whose they are.
        """
        connection = self._connection = connections[self._using]
        self.lost = ""  # a handler that is not called, its circuit being open, does not reset it
        self._references = references
        self._strict = strict
        self._subtransactions = 0
        self._release = ""
        self._touched = True
        raw = connection.connection
        factory, raw.cursor_factory = raw.cursor_factory, self._watched(raw.cursor_factory)
        try:
            with connection.execute_wrapper(self._execute):
                yield
            if self._limited:
                store.savepoint(store.UNLIMIT_STATEMENTS, using=self._using)
        finally:
            raw.cursor_factory = factory
            self._touched = True
            self._limited = False
        # No on_commit callback that raises shall cost other events theirs.
        hooks: list[Any] = connection.run_on_commit
        if len(connection.atomic_blocks) == 1:
            hooks[:] = [(sids, callback, True) for sids, callback, _ in hooks]

    def begin(self, limit: float | None = None) -> None:
        """Start a handler; none of its queries may take longer than `limit` seconds."""
        self._limit = limit
        connection = self._connection
        self.lost = ""
        self._touched = False
        self._wrote = False
        self._raw = connection.connection
        self._callbacks = len(connection.run_on_commit)
        self._blocks = len(connection.atomic_blocks)
        self._savepoints = len(connection.savepoint_ids)

    def end(self) -> None:
        """Accept what the handler did. Raises BrokenTransaction, or IntegrityError if strict."""
        connection = self._connection
        self.lost = self._loss()
        problem = self.lost or self._damage(connection)
        if problem:
            raise BrokenTransaction(problem)
        if self._touched and self._strict:
            store.savepoint(store.CHECK_CONSTRAINTS, using=self._using)

    def undo(self) -> None:
        """Take back what the handler did: its statements, and its on_commit callbacks.

        Not so if it has ended the whole transaction: then `lost` says how, and nothing of the batch
        can be kept. Raises OperationalError if the server has ended it.
        """
        self.lost = self._loss()
        if self.lost:
            return
        connection = self._connection
        connection.needs_rollback = False
        connection.in_atomic_block = True
        del connection.run_on_commit[self._callbacks :]
        del connection.atomic_blocks[self._blocks :]
        del connection.savepoint_ids[self._savepoints :]
        if self._touched:
            store.savepoint(store.ROLLBACK_TO_SAVEPOINT, using=self._using)
            self._references.forget()

    def _loss(self) -> str:
        """Say how the handler has ended the transaction that it shares with others, if it has."""
        raw = self._raw
        if self._connection.connection is not raw or (raw.closed and not raw.broken):
            return "The handler closed the worker's database connection."
        if self._touched and raw.info.transaction_status == TransactionStatus.IDLE:
            return "The handler committed or rolled back the worker's transaction."
        return ""

    def _damage(self, connection: BaseDatabaseWrapper) -> str:
        """Say what prevents the handler's work from being committed; `undo` mends it."""
        if len(connection.atomic_blocks) != self._blocks or not connection.in_atomic_block:
            return "The handler left an atomic() block open."
        if connection.needs_rollback:
            return (
                "The handler called set_rollback(True), or went on after a database error inside of "
                "atomic(). Put what may fail into `with transaction.atomic():` and catch it outside."
            )
        if self._touched and self._raw.info.transaction_status != TransactionStatus.INTRANS:
            return (
                "The handler went on after a database error, and its transaction is dead. Put the "
                "statement that may fail into `with transaction.atomic():` and catch it outside."
            )
        return ""

    def _touch(self) -> None:
        if not self._touched:
            self._touched = True
            limit = ""
            if self._limit is not None:
                limit = store.LIMIT_STATEMENTS.format(milliseconds=math.ceil(self._limit * 1000))
            elif self._limited:
                limit = store.UNLIMIT_STATEMENTS
            store.savepoint(self._release + limit + store.SAVEPOINT, using=self._using)
            self._release = store.RELEASE
            self._limited = self._limit is not None

    def _execute(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        """Wrap every statement that goes through Django."""
        self._touch()
        text = sql if isinstance(sql, str) else sql.as_string(self._connection.connection)
        verb = text.lstrip()[:9].upper()
        if not verb.startswith("SELECT"):
            if verb == "SAVEPOINT" or not self._wrote:
                self._subtransactions += 1
            self._wrote = True
            self._references.forget(text)
        return execute(sql, params, many, context)

    def _watched(self, factory: type[Any]) -> type[Any]:
        """Return `factory` with a savepoint before what Django's wrappers don't see, such as COPY."""
        if factory not in self._cursors:
            touch = self._touch

            class WatchedCursor(factory):  # type: ignore[misc]
                def execute(self, *args: Any, **kwargs: Any) -> Any:
                    touch()
                    return super().execute(*args, **kwargs)

                def copy(self, *args: Any, **kwargs: Any) -> Any:
                    touch()
                    return super().copy(*args, **kwargs)

                def stream(self, *args: Any, **kwargs: Any) -> Any:
                    touch()
                    return super().stream(*args, **kwargs)

            self._cursors[factory] = WatchedCursor
        return self._cursors[factory]


@contextmanager
def apart(using: str, limit: float | None) -> Iterator[None]:
    """Around a handler that runs on the worker's connection, but not in its transaction.

    None of its queries may take longer than `limit` seconds. Raises BrokenTransaction if it leaves a
    transaction open; then that is rolled back, and the connection closed.
    """
    connection = connections[using]
    blocks = len(connection.atomic_blocks)
    if limit is not None:
        milliseconds = math.ceil(limit * 1000)
        store.savepoint(store.LIMIT_SESSION.format(milliseconds=milliseconds), using=using)
    try:
        yield
    finally:
        problem = _left_open(connection, blocks)
        if limit is not None and connection.connection is not None and not problem:
            store.savepoint(store.UNLIMIT_SESSION, using=using)
    if problem:
        raise BrokenTransaction(problem)


def _left_open(connection: BaseDatabaseWrapper, blocks: int) -> str:
    """Say what a handler that had no transaction of ours has left open, and close the connection."""
    raw = connection.connection
    if len(connection.atomic_blocks) > blocks:
        problem = "The handler left an atomic() block open."
    elif not blocks and (connection.in_atomic_block or not connection.get_autocommit()):
        problem = "The handler left autocommit off."
    elif not blocks and raw is not None and raw.info.transaction_status not in _AT_REST:
        problem = "The handler left a transaction open."
    else:
        return ""
    if raw is not None:
        raw.close()
    del connection.atomic_blocks[blocks:]
    if not blocks:
        connection.in_atomic_block = connection.needs_rollback = False
        connection.savepoint_ids.clear()
        connection.run_on_commit.clear()
        connection.close()
    return problem


_AT_REST = {TransactionStatus.IDLE, TransactionStatus.UNKNOWN}
