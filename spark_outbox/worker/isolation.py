"""Let one handler's writes stand or fall alone, in a transaction that it shares with others.

A savepoint is taken the moment a handler first touches the database, by whatever way, see wire.py. The
release of the one before, the savepoint and the handler's statement are sent as one query, since a round
trip of their own takes longer than all three. A handler that never touches the database costs nothing.

A handler cannot end the transaction: such a statement is refused before it is sent. Settings of the
session that it changes are put back before anything else runs, see session_settings.py.

PostgreSQL parses a query before it runs any of it. So if the handler's statement is no SQL at all,
there is no savepoint either, and the batch is lost with it; `undo` finds out, for each savepoint has
a number. It happens to a handler once: from then on its savepoints go ahead of its statements.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

from django.db import DatabaseError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import ClientCursor
from psycopg.pq import TransactionStatus

from spark_outbox import conf, store
from spark_outbox.errors import BrokenTransaction, describe
from spark_outbox.events.references import References
from spark_outbox.worker import wire
from spark_outbox.worker.session_settings import SessionSettings

logger = logging.getLogger(__name__)

# Each savepoint that wrote is a subtransaction id until the commit. PostgreSQL caches 64 of them
# per backend (PGPROC_MAX_CACHED_SUBXIDS); beyond that every other session's snapshots pay.
MAX_SUBTRANSACTIONS = 60

ENDED = "The handler committed or rolled back the worker's transaction."
REFUSED = (
    "The handler must not commit or roll back: it shares its transaction with other events. Use "
    "`with transaction.atomic():` for what is to be undone alone, or register it with atomic=False."
)

# How psycopg's connection makes cursors: handlers change it, and the worker's own queries rely on it.
_FACTORIES = ("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold")


class Isolation:
    """The savepoints of one worker's handlers: `batch` around a batch, then per handler `begin` and
    either `end` or `undo`."""

    def __init__(self, using: str, *, combine: bool = True) -> None:
        self._using = using
        self._combine = combine
        self._connection: BaseDatabaseWrapper = connections[using]
        self._references = References()
        self._strict = False
        self._subtransactions = 0
        self._handler = ""
        self._apart: set[str] = set()  # handlers whose savepoints go ahead
        self._number = 0  # of the handler's savepoint
        self._established = 0  # the last savepoint that is known to be there
        self._touched = True
        self._wrote = False
        self.full = False
        """It has used up its savepoints, and the batch is to be committed."""
        self.lost = ""
        self.unparsed = False
        """It was lost with a statement that PostgreSQL could not run, nor anything sent with it."""
        self._limit: float | None = None
        self._limited = False  # a handler's statement_timeout is in force
        self._refused = False  # the handler has tried to end the transaction
        self._through_django = False  # what is being sent has gone through Django's wrappers
        self._raw: Any = None
        self._factories: list[Any] = []
        self._settings: SessionSettings
        self._callbacks = self._blocks = self._savepoints = 0

    @contextmanager
    def batch(self, references: References, *, strict: bool) -> Iterator[None]:
        """Watch what is run on the worker's connection, inside its transaction.

        `strict` checks deferred constraints at the end of each handler rather than at the commit,
        where nobody could tell whose they are.
        """
        connection = self._connection = connections[self._using]
        self.lost = ""
        self.unparsed = False
        self._references = references
        self._strict = strict
        self._subtransactions = 0
        self.full = False
        self._established = 0
        self._touched = True
        # As `end` has them after each handler, or it raises.
        self._raw = raw = connection.connection
        self._blocks = len(connection.atomic_blocks)
        self._savepoints = len(connection.savepoint_ids)
        self._factories = [getattr(raw, name) for name in _FACTORIES]
        self._settings = SessionSettings(self._using)
        try:
            with (
                wire.watched(raw, self._before, self._after),
                connection.execute_wrapper(self._execute),
            ):
                yield
            if self._limited:
                store.savepoint(self._limit_statements(self._settings.own_limit), using=self._using)
        finally:
            self._restore_factories()
            self._touched = True
            self._limited = False
        # No on_commit callback that raises shall cost other events theirs. Django's `robust` would log
        # its traceback, and in Django 5.2 stumbles over a partial.
        hooks: list[Any] = connection.run_on_commit
        if len(connection.atomic_blocks) == 1:
            hooks[:] = [
                (sids, partial(_call_back, self._using, callback), False) for sids, callback, _ in hooks
            ]

    def begin(self, handler: str, limit: float | None = None) -> None:
        """Start the handler of this name; none of its queries may take longer than `limit` seconds.

        Without a name it is the worker's own, and the project's statement_timeout is not for it.
        """
        self._handler = handler
        self._limit = limit
        self._touched = self._wrote = False
        self._callbacks = len(self._connection.run_on_commit)

    def end(self) -> None:
        """Accept what the handler did. Raises BrokenTransaction, or IntegrityError if strict."""
        connection = self._connection
        if (
            not self._touched
            and connection.connection is self._raw
            and self._raw.pgconn.transaction_status == TransactionStatus.INTRANS
            and not self._refused
            and not connection.needs_rollback
            and len(connection.atomic_blocks) == self._blocks
        ):
            return
        self.lost = self.lost or self._loss()
        problem = self.lost or self._damage(connection)
        if problem:
            raise BrokenTransaction(problem)
        if self._touched and self._strict:
            store.savepoint(store.CHECK_CONSTRAINTS, using=self._using)
        if self._settings.changed:
            self._put_back()

    def undo(self) -> None:
        """Take back what the handler did: its statements, and its on_commit callbacks.

        Not so if it has ended the whole transaction: then `lost` says how, and nothing of the batch
        can be kept. Raises OperationalError if the server has ended it.
        """
        self._refused = self._settings.changed = False
        self.lost = self.lost or self._loss()
        if self.lost:
            return
        connection = self._connection
        connection.needs_rollback = False
        connection.in_atomic_block = True
        del connection.run_on_commit[self._callbacks :]
        del connection.atomic_blocks[self._blocks :]
        del connection.savepoint_ids[self._savepoints :]
        if self._touched:
            self._roll_back()
            self._references.forget()

    def _roll_back(self) -> None:
        rollback = store.ROLLBACK_TO_SAVEPOINT.format(number=self._number)
        try:
            store.savepoint(rollback, using=self._using)
        except DatabaseError as error:
            if getattr(error.__cause__, "sqlstate", None) != store.NO_SUCH_SAVEPOINT:
                raise
            self._apart.add(self._handler)
            self.unparsed = True
            self.lost = "PostgreSQL could not run the handler's first statement, nor its savepoint."
        else:
            self._established = self._number

    def _put_back(self) -> None:
        """Put back the settings that the handler has changed.

        Its savepoint is released in the same round trip: that alone ends SET TRANSACTION READ ONLY.
        """
        release = store.RELEASE.format(number=self._established) if self._established else ""
        self._settings.put_back(first=release, in_transaction=True)
        self._established = 0
        self._limited = False

    def _loss(self) -> str:
        """Say how the handler has ended the transaction that it shares with others, if it has."""
        raw = self._raw
        if self._connection.connection is not raw or (raw.closed and not raw.broken):
            return "The handler closed the worker's database connection."
        self._restore_factories()
        status = raw.pgconn.transaction_status
        if status == TransactionStatus.IDLE:
            return ENDED
        is_busy = status == TransactionStatus.ACTIVE or raw.lock.locked() or raw.pgconn.pipeline_status
        if is_busy:  # nothing else could be sent, ever
            self._connection.close()
            return "The handler left a COPY, a stream() or a pipeline() of psycopg open."
        if not self._touched and status == TransactionStatus.INERROR:
            return "The handler broke the worker's transaction by a way around psycopg."
        return ""

    def _damage(self, connection: BaseDatabaseWrapper) -> str:
        """Say what prevents the handler's work from being committed; `undo` mends it."""
        if len(connection.atomic_blocks) != self._blocks or not connection.in_atomic_block:
            return "The handler left an atomic() block open."
        if self._refused:
            return REFUSED
        if connection.needs_rollback:
            return (
                "The handler called set_rollback(True), or went on after a database error inside of "
                "atomic(). Put what may fail into `with transaction.atomic():` and catch it outside."
            )
        if self._raw.pgconn.transaction_status != TransactionStatus.INTRANS:
            return (
                "The handler went on after a database error, and its transaction is dead. Put the "
                "statement that may fail into `with transaction.atomic():` and catch it outside."
            )
        return ""

    def _restore_factories(self) -> None:
        for name, value in zip(_FACTORIES, self._factories, strict=True):
            setattr(self._raw, name, value)

    def _touch(self) -> None:
        """Take a savepoint, in a round trip of its own."""
        if not self._touched:
            store.savepoint("; ".join(self._take_savepoint()), using=self._using)
            self._established = self._number

    def _take_savepoint(self) -> list[str]:
        """Return the statements that a handler's first is to follow."""
        self._number += 1  # first: an alarm may ring anywhere, and then `undo` goes back to this one
        self._touched = True
        statements = []
        if self._established:
            statements.append(store.RELEASE.format(number=self._established))
        milliseconds = None if self._limit is None else math.ceil(self._limit * 1000)
        limit = self._settings.limit(milliseconds, handler=bool(self._handler))
        is_limited = limit != self._settings.own_limit
        if is_limited or self._limited:
            statements.append(self._limit_statements(limit))
        self._limited = is_limited
        statements.append(store.SAVEPOINT.format(number=self._number))
        return statements

    def _limit_statements(self, milliseconds: int) -> str:
        return store.LIMIT_STATEMENTS.format(milliseconds=milliseconds)

    # What is sent

    def _execute(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        """Wrap every statement that goes through Django."""
        text = sql if isinstance(sql, str) else wire.as_text(sql, self._raw)
        kind = wire.kind(text)
        if kind:
            self._examine(kind, text, params)
        else:
            self._references.forget(text)  # it may call a function that writes
        self._through_django = True
        try:
            if self._touched:
                return execute(sql, params, many, context)
            cursor = context["cursor"].cursor
            if (
                not self._combine
                or self._handler in self._apart
                or many
                or not isinstance(sql, str)
                or not isinstance(cursor, ClientCursor)  # others send one statement only
            ):
                self._touch()
                return execute(sql, params, many, context)
            statements = self._take_savepoint()
            result = execute("; ".join([*statements, sql]), params, many, context)
            self._established = self._number
            for _ in statements:
                cursor.nextset()
            return result
        finally:
            self._through_django = False

    def _before(self, generator: Any) -> None:
        """Meet what psycopg is about to send, whoever has asked it to."""
        if not self._through_django:
            kind, text, params = wire.sent(generator, self._raw)
            if kind:
                self._examine(kind, text, params)
            elif text:
                self._references.forget(text)
        self._touch()

    def _after(self) -> None:
        """Note that the transaction has ended: soon there may be another, and nobody could tell."""
        if self._raw.pgconn.transaction_status == TransactionStatus.IDLE:
            self.lost = ENDED

    def _examine(self, kind: int, text: str, params: Any) -> None:
        """Prepare for a statement of the handler that does more than to read."""
        if kind & wire.ENDS:
            self._refused = True
            raise BrokenTransaction(REFUSED)
        if kind & wire.WRITES:
            if kind & wire.SAVEPOINT or not self._wrote:
                self._subtransactions += 1
                self.full = self.full or self._subtransactions >= MAX_SUBTRANSACTIONS
            self._wrote = True
            self._references.forget(None if kind & wire.ANYTHING else text)
        if kind & wire.DEFERS:
            self.full = True  # nobody can put that back, so it ends with the transaction
        self._settings.look(kind, text, params)


def _call_back(using: str, callback: Callable[[], object]) -> None:
    """Run what a handler has left for after the commit."""
    try:
        with apart(using, None):
            copy_context().run(callback)
    except Exception as error:  # noqa: BLE001, logged
        function = getattr(callback, "func", callback)  # a partial's arguments are not for the log
        context = {
            "callback": getattr(function, "__qualname__", type(function).__qualname__),
            "error": describe(error),
        }
        logger.error(
            "%(callback)s, which a handler gave to on_commit(), failed (%(error)s).",
            context,
            extra=context,
        )


@contextmanager
def apart(using: str, limit: float | None) -> Iterator[None]:
    """Around a handler that runs on the worker's connection, but not in its transaction.

    None of its queries may take longer than `limit` seconds, unless a pooler lends the connection's
    session to others, too. Raises BrokenTransaction if it leaves a transaction open; then that is
    rolled back, and the connection closed.
    """
    connection = connections[using]
    blocks = len(connection.atomic_blocks)
    is_ours = connection.connection is not None and conf.current().direct(using) == using
    try:
        with _whole_session(connection, limit, blocks) if is_ours else nullcontext():
            yield
    finally:
        problem = _left_open(connection, blocks)
    if problem:
        raise BrokenTransaction(problem)


@contextmanager
def _whole_session(connection: BaseDatabaseWrapper, limit: float | None, blocks: int) -> Iterator[None]:
    """Limit the time of queries from the first one on; put back the settings that are changed."""
    raw, using = connection.connection, connection.alias
    settings = SessionSettings(using)
    milliseconds = settings.limit(None if limit is None else math.ceil(limit * 1000))
    is_limited = False

    def before(generator: Any) -> None:
        nonlocal is_limited
        if not is_limited and milliseconds != settings.own_limit:
            is_limited = True
            store.limit_session(milliseconds, using=using)
        settings.look(*wire.sent(generator, raw))

    try:
        with wire.watched(raw, before, lambda: None):
            yield
    finally:
        if connection.connection is raw and raw.pgconn.transaction_status in _SOUND:
            if settings.changed:
                settings.put_back(in_transaction=blocks > 0)
            elif is_limited:
                store.limit_session(settings.limits.session, using=using)


def _left_open(connection: BaseDatabaseWrapper, blocks: int) -> str:
    """Say what a handler that had no transaction of ours has left open, and close the connection."""
    raw = connection.connection
    if len(connection.atomic_blocks) > blocks:
        problem = "The handler left an atomic() block open."
    elif not blocks and (connection.in_atomic_block or not connection.get_autocommit()):
        problem = "The handler left autocommit off."
    elif raw is not None and raw.pgconn.pipeline_status:
        problem = "The handler left a pipeline() of psycopg open."
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
_SOUND = {TransactionStatus.IDLE, TransactionStatus.INTRANS}
