"""A worker's connections: prepared once, and made anew after an outage."""

import logging
import random
from typing import Any

from django.db import DataError, Error, OperationalError, connections

from spark_outbox.errors import NotMigrated, SettingsError, describe
from spark_outbox.observing import hooks
from spark_outbox.registry.handlers import Kind
from spark_outbox.store import checking, claiming, filtering, limiting
from spark_outbox.store.connection import fix_schema, no_outbox
from spark_outbox.worker import bounds, ported
from spark_outbox.worker.context import Context
from spark_outbox.worker.event_loop import PATIENCE
from spark_outbox.worker.refusals import is_final
from spark_outbox.worker.wake import Wake

logger = logging.getLogger(__name__)

SILENCE = 30.0
"""Seconds that a transaction may be idle beyond the timeouts of its handlers."""

RECONNECT_PAUSES = (0.1, 10.0)
"""The first and the longest pause, in seconds, while the database is away."""


class Session:
    """The sessions of one worker, one after the other: on its own connection, and on that which
    LISTENs."""

    def __init__(self, context: Context, wake: Wake) -> None:
        self._context = context
        self._wake = wake
        self._prepared: tuple[object, object] | None = None  # the psycopg connections
        self._was_ready = False
        self._failures = 0  # of the database, in a row
        self._version = ""  # the server's
        self.first_statement = ""
        """The query that each batch begins with: the limits of a pooler's session go with each
        transaction."""

    @property
    def is_intact(self) -> bool:
        """The connections are those that were prepared."""
        return self._prepared == self._current()

    @property
    def is_cut_off(self) -> bool:
        """The connection is lost on which this worker has been working."""
        raw: Any = None if self._prepared is None else self._prepared[0]
        return raw is not None and raw.closed

    def configure(self) -> None:
        """Before the first connection. Raises SettingsError if a worker can't work on such
        connections."""
        check_handlers(self._context)
        bounds.set_bounds(self._context.using, self._context.direct)
        bounds.leave_pools(self._context.using, self._context.direct)

    def ensure(self) -> bool:
        """Connect and prepare the session; return False if this has been done on this
        connection.

        Raises NotMigrated if the database has no outbox, or lacks keys of django-spark; SettingsError if
        PostgreSQL can't read `groups`, or what LISTENs is another database.
        """
        context, using = self._context, self._context.using
        connections[using].ensure_connection()
        if self.is_intact:
            return False
        silence = self._longest_silence()
        self._version = bounds.set_up(using, direct=context.direct, idle_in_transaction=silence)
        self.first_statement = "" if context.is_direct else limiting.silence_limit(silence)
        try:
            check_outbox(context.groups, using=using)
        except NotMigrated as error:
            if self._was_ready:
                raise OperationalError(
                    "The outbox is gone. It may be coming back from a backup."
                ) from error
            raise
        if context.needs_keys and not self._was_ready:
            ported.check_keys(using=using)
        fix_schema(using=using)
        self._check_direct()
        if context.is_direct:
            claiming.prepare(using=using)
        self._wake.start()
        self._prepared = self._current()
        return True

    def be_ready(self) -> None:
        """From now on outages are outlived, whoever waits for the end."""
        self._was_ready = True

    def confirm(self) -> None:
        """The database has done what it was asked. That it can be reached is not enough: a worker whose
        every claim fails must not come back at once each time."""
        self._failures = 0

    def announce(self) -> None:
        """Say that the worker is ready."""
        using = self._context.using
        logger.info("Ready on database %s.", using, extra={"database": using})
        hooks.send(hooks.worker_state_changed, using, using=using, state="ready", reason="")
        if self._context.on_ready is not None:
            self._context.on_ready(self._version)

    def announce_end(self) -> None:
        """Say that the worker has stopped."""
        using = self._context.using
        logger.info("Stopped on database %s.", using, extra={"database": using})
        hooks.send(hooks.worker_state_changed, using, using=using, state="stopped", reason="")

    def gives_up(self, error: Error) -> bool:
        """Return whether a worker that somebody waits for should end with this error: the database has
        never been there, or it is there and would refuse the same another time."""
        raw: Any = connections[self._context.using].connection
        is_refused = raw is not None and not raw.closed and is_final(error)
        return is_refused or not self._was_ready

    def recover(self, error: Error) -> None:
        """Drop the connections and wait; whatever was claimed is free as soon as the server sees it."""
        self._failures += 1
        self._context.guard.lose_database()
        first, longest = RECONNECT_PAUSES
        seconds = min(longest, first * 2 ** min(self._failures - 1, 16))
        seconds *= random.uniform(0.5, 1)  # noqa: S311, workers shall not come back in step
        details = {
            "database": self._context.using,
            "error": describe(error),
            "seconds": round(seconds, 2),
        }
        logger.warning(
            "Database %(database)s failed (%(error)s); trying again in %(seconds)s s.",
            details,
            extra=details,
        )
        self._prepared = None
        for connection in connections.all(initialized_only=True):
            connection.close()
        state = {"using": self._context.using, "state": "disconnected", "reason": details["error"]}
        hooks.send(hooks.worker_state_changed, self._context.using, **state)
        self._wake.pause(seconds)

    def tidy(self) -> None:
        """Do between batches what Django does between requests."""
        for connection in connections.all(initialized_only=True):
            connection.queries_log.clear()
            if connection.connection not in (self._prepared or ()):
                connection.close_if_unusable_or_obsolete()
            elif not connection.autocommit:
                connection.close()  # a callback has left it so, and nothing would be committed

    def _current(self) -> tuple[object, object]:
        direct = self._context.direct
        listening = None if direct is None else connections[direct].connection
        return connections[self._context.using].connection, listening

    def _check_direct(self) -> None:
        """Raise SettingsError if what LISTENs is another database than the worker's; OperationalError
        if that has only now become so: in a failover the two may change at different times."""
        try:
            bounds.check_direct(self._context.using, self._context.direct)
        except SettingsError as error:
            if self._was_ready:
                raise OperationalError(str(error)) from error
            raise

    def _longest_silence(self) -> float | None:
        """Return the seconds that may pass between two statements of a transaction; None if nobody
        knows, since a handler has no timeout or nothing would interrupt it."""
        context = self._context
        handlers = [
            handler for handler in context.registry.handlers if handler.kind is not Kind.DETACHED
        ]
        if context.direct is not None:  # async calls outlive their batch, rather than be waited for
            handlers = [handler for handler in handlers if handler.kind is not Kind.ASYNC]
        if handlers and not context.guard.interrupts:
            return None
        total = SILENCE
        for handler in handlers:
            limit = handler.policy.limit()
            if limit is None:
                return None
            total += limit * PATIENCE if handler.kind is Kind.ASYNC else limit
        return total


def check_outbox(groups: str | None, *, using: str) -> None:
    """Raise NotMigrated if the database has no outbox, SettingsError if it can't read `groups`."""
    if not checking.has_outbox(using=using):
        raise no_outbox(using)
    if groups is not None:
        try:
            filtering.check_groups(groups, using=using)
        except DataError as error:
            raise SettingsError(f"--groups {groups!r}: {error}") from error


def check_handlers(context: Context) -> None:
    """Raise SettingsError if the handlers need a connection that the worker does not have."""
    bounds.check(context.using, context.direct)
    detached = [handler.name for handler in context.registry.handlers if handler.kind is Kind.DETACHED]
    if detached and context.direct is None:
        raise SettingsError(
            f"{', '.join(detached)}: handlers with atomic=False need a session that lasts. Name "
            'the alias of a direct connection in SPARK_OUTBOX["LISTEN_DATABASE"]; or "" if the '
            "worker's own is none of a pooler."
        )
