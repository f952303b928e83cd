"""Let one handler's writes stand or fall alone, in a transaction that it shares with others.

The first statement of a handler takes a savepoint, see savepoints.py, whatever way it is sent, see
wire.py. A handler that never touches the database costs nothing.

A handler can't end the transaction: a statement that would is refused before it is sent. Settings of the
session that a handler changes are put back before anything else runs, see session_settings.py.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import ClientCursor
from psycopg.pq import TransactionStatus

from spark_outbox.errors import BrokenTransaction
from spark_outbox.events.references import References
from spark_outbox.store import isolating
from spark_outbox.worker import wire
from spark_outbox.worker.apart import call_each_apart
from spark_outbox.worker.frame import Frame
from spark_outbox.worker.savepoints import NotTaken, Savepoints
from spark_outbox.worker.session_settings import SessionSettings

ENDED = "The handler committed or rolled back the worker's transaction."
REFUSED = (
    "The handler must not commit or roll back: it shares its transaction with other events. Use "
    "`with transaction.atomic():` for what is to be undone alone, or register it with atomic=False."
)


class TransactionLost(Exception):
    """A handler has ended the batch's transaction, so that none of the batch can be settled.

    `reason` says how; it is empty if the exception that the handler raised says it better.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Isolation:
    """The isolation of one batch's handlers. A context manager, to be entered in the transaction.

    For each handler: `begin`, call it, then `end`; `undo` if it raised, or `end` did.

    `strict` checks deferred constraints at the end of each handler rather than at the commit, where
    their errors could be anybody's. For `apart` see savepoints.py.
    """

    def __init__(
        self,
        using: str,
        references: References,
        *,
        strict: bool,
        apart: set[str] | None,
    ) -> None:
        self._connection: BaseDatabaseWrapper = connections[using]
        self._references = references
        self._strict = strict
        self._settings = SessionSettings(using)
        self.savepoints = Savepoints(self._settings, apart=apart, using=using)
        self._frame = Frame.of(self._connection)
        self._exit = ExitStack()
        self._lost = ""
        # Of the current call:
        self._name = ""
        self._limit: float | None = None
        self._callbacks = 0
        self._trace: _Trace | None = None
        self._through_django = False  # the statement that is being sent has passed `_execute`

    def __enter__(self) -> Self:
        raw = self._frame.raw
        self._exit.enter_context(wire.watched(raw, self._before, self._after))
        self._exit.enter_context(self._connection.execute_wrapper(self._execute))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._exit.close()
        try:
            if kind is None:
                self.savepoints.lift_limit()
        finally:
            self._frame.restore_cursors()
        if len(self._connection.atomic_blocks) == 1:
            call_each_apart(self._connection, self._frame.callbacks)

    # Around a call

    def begin(self, name: str, limit: float | None = None) -> None:
        """Start the handler `name`; none of its queries may take longer than `limit` seconds.

        Without a name the worker itself reads a payload, and the project's statement_timeout is not for
        it.
        """
        self._name = name
        self._limit = limit
        self._trace = None
        self._callbacks = len(self._connection.run_on_commit)

    def end(self) -> None:
        """Accept the handler's work. Raises BrokenTransaction, or IntegrityError if strict."""
        connection, frame = self._connection, self._frame
        if (
            self._trace is None
            and connection.connection is frame.raw
            and frame.raw.pgconn.transaction_status == TransactionStatus.INTRANS
            and not connection.needs_rollback
            and len(connection.atomic_blocks) == frame.blocks
        ):
            return
        trace = self._trace or _Trace()
        if problem := self._loss() or self._damage(trace):
            raise BrokenTransaction(problem)
        if trace.has_savepoint and self._strict:
            isolating.savepoint(isolating.CHECK_CONSTRAINTS, using=connection.alias)
        if trace.changed_settings:
            # The release alone ends SET TRANSACTION READ ONLY.
            self._settings.put_back(first=self.savepoints.forget(), in_transaction=True)

    def undo(self) -> None:
        """Take back the handler's statements, and its on_commit callbacks.

        Raises TransactionLost if the handler has ended the transaction, OperationalError if the server
        has.
        """
        if lost := self._loss():
            raise TransactionLost(lost)
        connection, frame = self._connection, self._frame
        connection.needs_rollback = False
        connection.in_atomic_block = True
        del connection.run_on_commit[self._callbacks :]
        del connection.atomic_blocks[frame.blocks :]
        del connection.savepoint_ids[frame.savepoints :]
        if self._trace is not None and self._trace.has_savepoint:
            try:
                self.savepoints.roll_back(self._name)
            except NotTaken:
                raise TransactionLost("") from None
            self._references.forget()

    def _loss(self) -> str:
        """Say how the handler has ended the transaction that it shares with others, if it has."""
        self._lost = self._lost or self._find_loss()
        return self._lost

    def _find_loss(self) -> str:
        raw = self._frame.raw
        if self._connection.connection is not raw or (raw.closed and not raw.broken):
            return "The handler closed the worker's database connection."
        self._frame.restore_cursors()
        status = raw.pgconn.transaction_status
        if status == TransactionStatus.IDLE:
            return ENDED
        is_busy = status == TransactionStatus.ACTIVE or raw.lock.locked() or raw.pgconn.pipeline_status
        if is_busy:  # nothing else could be sent, ever
            self._connection.close()
            return "The handler left a COPY, a stream() or a pipeline() of psycopg open."
        touched = self._trace is not None and self._trace.has_savepoint
        if not touched and status == TransactionStatus.INERROR:
            return "The handler broke the worker's transaction by a way around psycopg."
        return ""

    def _damage(self, trace: "_Trace") -> str:
        """Say why the handler's work can't be committed; `undo` mends it."""
        connection = self._connection
        if len(connection.atomic_blocks) != self._frame.blocks or not connection.in_atomic_block:
            return "The handler left an atomic() block open."
        if trace.refused:
            return REFUSED
        if connection.needs_rollback:
            return (
                "The handler called set_rollback(True), or went on after a database error inside of "
                "atomic(). Put what may fail into `with transaction.atomic():` and catch it outside."
            )
        if self._frame.raw.pgconn.transaction_status != TransactionStatus.INTRANS:
            return (
                "The handler went on after a database error, and its transaction is dead. Put the "
                "statement that may fail into `with transaction.atomic():` and catch it outside."
            )
        return ""

    # Statements

    def _execute(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        """Wrap every statement that goes through Django."""
        text = sql if isinstance(sql, str) else wire.as_text(sql, self._frame.raw)
        trace = self._examine(wire.kind(text), text, params)
        self._through_django = True
        try:
            if trace.has_savepoint:
                return execute(sql, params, many, context)
            cursor = context["cursor"].cursor
            if (
                self.savepoints.are_sent_ahead(self._name)
                or many
                or not isinstance(sql, str)
                or not isinstance(cursor, ClientCursor)  # others send one statement only
            ):
                self._take_savepoint(trace)
                return execute(sql, params, many, context)
            statements = self._prepare_savepoint(trace)
            result = execute("; ".join([*statements, sql]), params, many, context)
            self.savepoints.confirm()
            for _ in statements:
                cursor.nextset()
            return result
        finally:
            self._through_django = False

    def _before(self, generator: Any) -> None:
        """Wrap everything that psycopg sends, also what does not go through Django."""
        trace = self._trace
        if not self._through_django:
            trace = self._examine(*wire.sent(generator, self._frame.raw))
        if trace is not None and not trace.has_savepoint:
            self._take_savepoint(trace)

    def _after(self) -> None:
        """Note that the transaction has ended: another may begin soon, and look like it."""
        if self._frame.raw.pgconn.transaction_status == TransactionStatus.IDLE:
            self._lost = ENDED

    def _examine(self, kind: int, text: str, params: Any) -> "_Trace":
        """Prepare for a statement of the handler."""
        trace = self._trace = self._trace or _Trace()
        if not kind:
            if text:
                self._references.forget(text)  # it may call a function that writes
            return trace
        if kind & wire.ENDS:
            trace.refused = True
            raise BrokenTransaction(REFUSED)
        if kind & wire.WRITES:
            if kind & wire.SAVEPOINT or not trace.wrote:
                self.savepoints.count_subtransaction()
            trace.wrote = True
            self._references.forget(None if kind & wire.ANYTHING else text)
        if kind & wire.DEFERS:
            self.savepoints.use_up()  # nobody can put that back, so it ends with the transaction
        if self._settings.look(kind, text, params):
            trace.changed_settings = True
        return trace

    def _take_savepoint(self, trace: "_Trace") -> None:
        """Take a savepoint, in a round trip of its own."""
        self.savepoints.take(self._prepare_savepoint(trace))

    def _prepare_savepoint(self, trace: "_Trace") -> list[str]:
        statements = self.savepoints.next(self._limit, is_worker=not self._name)
        # Not before: an alarm may ring anywhere, and `undo` must not roll back to another's savepoint.
        trace.has_savepoint = True
        return statements


class _Trace:
    """The current handler's doings on the connection; made by its first statement."""

    __slots__ = ("changed_settings", "has_savepoint", "refused", "wrote")

    def __init__(self) -> None:
        self.has_savepoint = False
        self.wrote = False
        self.refused = False  # it has tried to end the transaction
        self.changed_settings = False
