"""Inside a test's transaction, have a connection behave as outside of any.

A handler that runs outside of the worker's transaction commits each statement, or each atomic() block.
Here they are savepoints, so that the test can take everything back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from spark_outbox.store import testing
from spark_outbox.testing.boundaries import Boundaries, short
from spark_outbox.worker import wire


@contextmanager
def autocommitting(connection: BaseDatabaseWrapper, boundaries: Boundaries) -> Iterator[None]:
    """Have the block commit by savepoints, each with a boundary before and after it."""
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
        with connection.execute_wrapper(pretence.execute):
            yield
    finally:
        if pretence.is_open:
            pretence.rollback()
        for name in attributes:
            del of_connection[name]
        of_connection.update(kept)


class _Pretence:
    """What Django calls to begin and to end a transaction."""

    def __init__(self, connection: BaseDatabaseWrapper, boundaries: Boundaries) -> None:
        self._connection = connection
        self._boundaries = boundaries
        self.is_open = False
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

    def execute(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        """Wrap each statement; one outside of atomic() is a transaction of its own."""
        if self._connection.in_atomic_block:
            return execute(sql, params, many, context)
        text = sql if isinstance(sql, str) else wire.as_text(sql, self._connection.connection)
        with self._boundaries.around(short(text)):
            self._begin()
            try:
                result = execute(sql, params, many, context)
            except BaseException:
                self.rollback()
                raise
            testing.commit(using=self._connection)
            self.is_open = False
        return result
