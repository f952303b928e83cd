"""Cut a handler off at one of the points at which its process could die.

Such a boundary is before and after each statement, also before and after those that begin, release and
commit. Between two of them nothing changes but by calls to others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.pq import TransactionStatus

from spark_outbox.errors import BrokenTransaction
from spark_outbox.worker import wire

ENDED = (
    "The handler commits or rolls back in another way than by atomic(). So nothing that the test and it "
    "have written could be taken back."
)

SHOWN = 100
"""How many characters of a statement name it in a report."""


class Cut(BaseException):
    """The process dies here. No handler catches it, but with a bare `except`."""


class Boundaries:
    """The boundaries of one run, from 1. The run is cut off at number `cut`, if that is not None.

    Nothing is sent after that but what rolls back.
    """

    def __init__(self, cut: int | None, on_cut: Callable[[], None]) -> None:
        self._cut = cut
        self._on_cut = on_cut
        self._count = 0
        self._statement = ""  # that is under way
        self._rolls_back = False
        self.where = ""
        """The boundary at which it was cut off."""

    def reach(self, where: str) -> None:
        """Raise Cut if this is the boundary, or a later one."""
        if self.where:
            raise Cut(self.where)
        self._count += 1
        if self._count == self._cut:
            self.where = where
            self._on_cut()
            raise Cut(where)

    @contextmanager
    def around(self, what: str) -> Iterator[None]:
        """Have one boundary before the block, and one after it."""
        self.reach(f"before {what}")
        yield
        self.reach(f"after {what}")

    @contextmanager
    def watched(self, connection: BaseDatabaseWrapper) -> Iterator[None]:
        """Have boundaries around everything that is sent on this connection. Raises BrokenTransaction
        rather than let it end the test's transaction."""
        connection.ensure_connection()
        raw = connection.connection

        def before(generator: Any) -> None:
            kind, statement, _ = wire.sent(generator, raw)
            if kind & wire.ENDS:
                raise BrokenTransaction(ENDED)
            self._before(short(statement))

        def after() -> None:
            if raw.pgconn.transaction_status != TransactionStatus.ACTIVE:  # which a COPY is to its end
                self._after()

        with wire.watched(raw, before, after):
            yield

    def _before(self, statement: str) -> None:
        if not statement or statement.startswith("CLOSE"):
            return
        if self.where and self._undoes(statement):
            return
        self.reach(f"before {statement}")
        self._statement = statement

    def _after(self) -> None:
        statement, self._statement = self._statement, ""
        if statement:
            self.reach(f"after {statement}")

    def _undoes(self, statement: str) -> bool:
        """Return whether this only takes back what was cut off, as atomic() does it."""
        is_rollback = statement.startswith("ROLLBACK")
        may_pass = is_rollback or (self._rolls_back and statement.startswith("RELEASE"))
        self._rolls_back = is_rollback
        return may_pass


def short(statement: str) -> str:
    text = " ".join(statement.split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
