"""Inside a test's transaction, have a connection behave as outside of any.

A handler that runs outside of the worker's transaction commits each statement, or each atomic() block.
Here they are savepoints, so that the test can take everything back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from spark_outbox.store import testing
from spark_outbox.testing.boundaries import Boundaries
from spark_outbox.worker import wire


@contextmanager
def autocommitting(connection: BaseDatabaseWrapper, boundaries: Boundaries) -> Iterator[None]:
    """Have the block commit by savepoints. Those of atomic() have boundaries."""
    pretence = _Pretence(connection, boundaries)
    attributes = {
        "in_atomic_block": False,
        "atomic_blocks": [],
        "savepoint_ids": [],
        "run_on_commit": [],
        "run_commit_hooks_on_set_autocommit_on": False,
        "needs_rollback": False,
        "commit_on_exit": True,
        "autocommit": True,
        "_set_autocommit": pretence.set_autocommit,
        "_commit": pretence.commit,
        "_rollback": pretence.rollback,
        "close": lambda: None,  # it would end the test's transaction
    }
    of_connection = vars(connection)
    kept = {name: of_connection[name] for name in attributes if name in of_connection}
    of_connection.update(attributes)
    try:
        with wire.watched(connection.connection, pretence.before, pretence.after):
            yield
    finally:
        if pretence.is_open:
            pretence.rollback()
        for name in attributes:
            del of_connection[name]
        of_connection.update(kept)


class _Pretence:
    """Begins and ends transactions, those of atomic() and of single statements."""

    def __init__(self, connection: BaseDatabaseWrapper, boundaries: Boundaries) -> None:
        self._connection = connection
        self._boundaries = boundaries
        self.is_open = False
        self._is_statement = False  # that has been begun is a statement's own
        self._sequences = ""

    def set_autocommit(self, autocommit: bool) -> None:
        if not autocommit:
            self._begin()
        elif self.is_open:  # it was cut off before the commit
            self.rollback()

    def _begin(self) -> None:
        self._sequences = testing.sequences(using=self._connection)
        testing.begin(using=self._connection)
        self.is_open = True

    def commit(self) -> None:
        with self._boundaries.around("COMMIT"):
            testing.commit(using=self._connection)
            self.is_open = False

    def rollback(self) -> None:
        testing.roll_back(using=self._connection)
        self.is_open = False
        if self._boundaries.where:  # the next call shall give new rows the keys that these have had
            testing.restart(self._sequences, using=self._connection)

    def before(self, generator: Any) -> None:
        """Have each statement outside of atomic() in a transaction of its own."""
        raw = self._connection.connection
        is_inside = self.is_open or self._connection.in_atomic_block or raw.pgconn.pipeline_status
        if wire.sent(generator, raw)[1] and not is_inside:
            self._begin()
            self._is_statement = True

    def after(self) -> None:
        status = self._connection.connection.pgconn.transaction_status
        if not self._is_statement or status == TransactionStatus.ACTIVE:  # which a COPY is to its end
            return
        self._is_statement = False
        try:
            if status == TransactionStatus.INTRANS:
                testing.commit(using=self._connection)
                self.is_open = False
        finally:
            if self.is_open:
                self.rollback()
