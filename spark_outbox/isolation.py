"""Let one handler's writes stand or fall alone, in a transaction that it shares with others.

A savepoint is taken the moment a handler first touches the database, in one round trip with the
release of the one before; a handler that never touches it costs nothing.
"""

from collections.abc import Callable
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from spark_outbox import store
from spark_outbox.errors import BrokenTransaction
from spark_outbox.payload import References

# Each savepoint that wrote is a subtransaction id until the commit. PostgreSQL caches 64 of them
# per backend (PGPROC_MAX_CACHED_SUBXIDS); beyond that every other session's snapshots pay.
MAX_SUBTRANSACTIONS = 60


class Isolation:
    """The savepoints of one batch; to be installed as `execute_wrapper` while handlers run.

    `strict` checks deferred constraints at the end of each handler rather than at the commit, where
    nobody could tell whose they are.
    """

    def __init__(
        self, connection: BaseDatabaseWrapper, references: References, *, strict: bool = False
    ) -> None:
        self._connection = connection
        self._references = references
        self._strict = strict
        self._subtransactions = 0
        self._statement = store.SAVEPOINT
        self._touched = False
        self._wrote = False
        self._callbacks = 0

    @property
    def full(self) -> bool:
        return self._subtransactions >= MAX_SUBTRANSACTIONS

    def begin(self) -> None:
        """Start a handler."""
        self._touched = False
        self._wrote = False
        self._callbacks = len(self._connection.run_on_commit)

    def end(self) -> None:
        """Accept what the handler did. Raises what makes that impossible."""
        if not self._touched:
            return
        if self._connection.needs_rollback or self._status() != TransactionStatus.INTRANS:
            raise BrokenTransaction(
                "The handler went on after a database error, and its transaction is dead. Put the "
                "statement that may fail into `with transaction.atomic():` and catch it outside."
            )
        if self._strict:
            store.savepoint(store.CHECK_CONSTRAINTS, using=self._connection.alias)

    def undo(self) -> None:
        """Take back what the handler did: its statements, and its on_commit callbacks."""
        del self._connection.run_on_commit[self._callbacks :]
        if self._touched:
            self._connection.needs_rollback = False
            store.savepoint(store.ROLLBACK_TO_SAVEPOINT, using=self._connection.alias)
            self._references.forget()

    def close(self) -> None:
        """Before the commit: no on_commit callback that raises shall cost other events theirs."""
        hooks: list[Any] = self._connection.run_on_commit
        if len(self._connection.atomic_blocks) == 1:
            hooks[:] = [(sids, callback, True) for sids, callback, _ in hooks]

    def __call__(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        if not self._touched:
            store.savepoint(self._statement, using=self._connection.alias)
            self._statement = store.NEXT_SAVEPOINT
            self._touched = True
        text = sql if isinstance(sql, str) else sql.as_string(self._connection.connection)
        verb = text.lstrip()[:9].upper()
        if not verb.startswith("SELECT"):
            self._count(verb)
            self._references.forget(text)
        return execute(sql, params, many, context)

    def _count(self, verb: str) -> None:
        if verb == "SAVEPOINT" or not self._wrote:
            self._subtransactions += 1
        self._wrote = True

    def _status(self) -> TransactionStatus:
        status: TransactionStatus = self._connection.connection.info.transaction_status
        return status
