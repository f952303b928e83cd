"""The worker: claim, dispatch, settle in one transaction on one connection; and sleep in between."""

import logging
import math
import random
import threading
import time
from collections.abc import Callable

from django.db import DatabaseError, DataError, Error, connections, transaction

from spark_outbox import conf, store
from spark_outbox.dispatch import Batch, Dispatcher, Outcomes
from spark_outbox.errors import NotMigrated, SettingsError
from spark_outbox.events import Event, StoredRow
from spark_outbox.isolation import Isolation
from spark_outbox.payload import References
from spark_outbox.registry import Handler, Registry, registry
from spark_outbox.wake import Wake

logger = logging.getLogger(__name__)

SWEEP_INTERVAL = 1.0
"""Seconds between two claims from id 0, at least; see Worker._claim."""

HELD_POLL = 0.25
"""Seconds between two looks at events that another transaction holds: its worker may have died."""

RECONNECT_PAUSES = (0.1, 10.0)
"""The first and the longest pause, in seconds, while the database is away."""


class Worker:
    """Handles the events of one database, one batch after the other.

    `run` is the daemon; `drain` handles what is ready, on the current connection, and returns.
    `groups` is a PostgreSQL regular expression: the worker leaves other groups to others.
    `on_ready` is called with the server's version whenever a new session is prepared and LISTENs;
    `on_error` with the event, the handler and what it raised.
    """

    def __init__(
        self,
        *,
        using: str = "default",
        groups: str | None = None,
        batch_size: int | None = None,
        commit_interval: float | None = None,
        poll_interval: float | None = None,
        registry: Registry = registry,
        clock: Callable[[], float] = time.monotonic,
        on_ready: Callable[[str], None] | None = None,
        on_error: Callable[[Event, Handler, Exception], None] | None = None,
    ) -> None:
        settings = conf.current()
        self.using = using
        self.groups = groups
        self.batch_size = batch_size or settings.BATCH_SIZE
        self.poll_interval = poll_interval or settings.POLL_INTERVAL
        self.commit_interval = commit_interval or settings.COMMIT_INTERVAL
        self._clock = clock
        self._on_ready = on_ready
        self._isolation = Isolation(using)
        self._dispatcher = Dispatcher(
            registry.handlers_for,
            commit_interval=self.commit_interval,
            clock=clock,
            on_error=on_error,
        )
        listens = settings.WAKE != "never" and settings.LISTEN_DATABASE is not None
        self._wake = Wake((settings.LISTEN_DATABASE or using) if listens else None)
        self._stopping = False
        self._session: object = None
        self._failures = 0  # in a row, of the database
        self._careful = 0  # events to be handled one by one, after a commit that failed
        self._size = min(16, self.batch_size)  # of the next claim
        self._floor = 0  # the lowest id that can still be ready, as far as this worker knows
        self._sweep_at = -math.inf  # when to claim from id 0 again
        self._due_at = -math.inf  # when a busy worker looks for due events again
        self._looked_for_due = False

    # The loop

    def run(self, *, drain: bool = False, once: bool = False) -> None:
        """Handle events until `stop` is called; with `drain`, until none is ready; or `once`, a batch.

        Outlives the database: it reconnects with a growing pause. Raises NotMigrated if the
        database has no outbox, SettingsError if PostgreSQL can't read `groups`.
        """
        self._wake.open()
        while not self._stopping:
            try:
                self._set_up_session()
                if self._work(drain, once):
                    break
            except Error as error:
                self._recover(error)
        self._wake.close()
        logger.info("Stopped on database %s.", self.using, extra={"database": self.using})

    def _work(self, drain: bool, once: bool) -> bool:
        """Claim, dispatch and settle until it is time to stop; return True if the work is done."""
        while not self._stopping:
            handled = self.handle_batch(sweep=once)
            if once:
                return True
            if not handled:
                if not drain:
                    self._sleep()
                elif not self.handle_batch(sweep=True):
                    return True
            self._failures = 0
            self._tidy()
        return False

    def drain(self) -> int:
        """Handle ready events until none is left, on the current connection; return how many."""
        total = 0
        while handled := self._handle_batch_or_narrow() or self.handle_batch(sweep=True):
            total += handled
        return total

    def stop(self) -> None:
        """Finish the handler in hand, commit, and return from `run`. Signal handlers may call it."""
        self._stopping = True
        self._wake.interrupt()

    def handle_batch(self, *, sweep: bool = False) -> int:
        """Claim, dispatch and settle in one transaction; return how many events that settled."""
        connection = connections[self.using]
        references = References()
        claimed = 1
        try:
            with transaction.atomic(using=self.using):
                batch = self._claim(references, sweep=sweep)
                if not batch.events:
                    return 0
                claimed = len(batch.events)
                self._wake.wake_up()
                with self._isolation.batch(references, strict=self._careful > 0):
                    outcomes = self._dispatcher.dispatch(batch, self._isolation, lambda: self._stopping)
                self._settle(outcomes)
        except DatabaseError:
            if connection.connection is not None and not connection.connection.closed:
                # Whose fault it was can't be told now; so handle the same events one by one.
                self._careful = claimed
            raise
        finally:
            references.close()
        self._learn(batch, outcomes)
        return outcomes.count

    # Its steps

    def _claim(self, references: References, *, sweep: bool) -> Batch:
        """Lock the next events: from the floor of the ready queue, and what is due.

        Entries of handled rows stay in the index, below the first ready one, for as long as any
        snapshot is open; the floor skips them. A lower id can be committed later, or be freed by a
        worker that died: so now and then, and before it sleeps, the worker sweeps from id 0.
        """
        started = self._clock()
        limit = 1 if self._careful else self._size
        from_zero = sweep or started >= self._sweep_at
        floor = 0 if from_zero else self._floor
        rows = store.claim_ready(floor, limit, groups=self.groups, using=self.using)
        if from_zero:
            now = self._clock()
            self._sweep_at = now + max(SWEEP_INTERVAL, 10 * (now - started))
        due: list[StoredRow] = []
        # Not twice in a row: a backlog of due events must leave slow handlers time for ready ones.
        self._looked_for_due = sweep or (started >= self._due_at and not self._looked_for_due)
        if self._looked_for_due:
            self._due_at = started + self.commit_interval
            due = store.claim_due(max(1, limit // 4), groups=self.groups, using=self.using)
        rows = due + rows
        if self._careful:
            rows = rows[:1]
        retried = [row.id for row in rows if row.attempts]
        return Batch(
            [Event.from_row(row, references) for row in rows],
            due=len(due),
            settled=store.settled_handlers(retried, using=self.using) if retried else {},
        )

    def _settle(self, outcomes: Outcomes) -> None:
        """Write what became of the events; a lost claim is told, and overwrites nothing."""
        applied = 0
        if outcomes.done:
            applied += store.finish(outcomes.done, "done", using=self.using)
        if outcomes.unhandled:
            applied += store.finish(outcomes.unhandled, "unhandled", using=self.using)
        if outcomes.failures:
            applied += store.postpone(outcomes.failures, using=self.using)
        if outcomes.deliveries:
            store.record_deliveries(outcomes.deliveries, using=self.using)
        if outcomes.retried:
            store.discard_deliveries(outcomes.retried, using=self.using)
        if applied != outcomes.count:
            lost = {"events": outcomes.count - applied}
            logger.warning("Lost the claim on %(events)s events.", lost, extra=lost)

    def _learn(self, batch: Batch, outcomes: Outcomes) -> None:
        """After the commit: from where, and how much, to claim next."""
        if self._careful:
            self._careful -= 1
        elif outcomes.cut:
            self._size = max(1, min(outcomes.count, self.batch_size))
        else:
            self._size = min(self._size * 2, self.batch_size)
        handled_ready = batch.events[batch.due : outcomes.count]
        if handled_ready:
            self._floor = handled_ready[-1].id + 1
        if logger.isEnabledFor(logging.DEBUG):
            for event in batch.events[: outcomes.count]:
                done = {"event_id": event.id, "group": event.group, "attempt": event.attempt}
                logger.debug("Dispatched event %(event_id)s of group %(group)s.", done, extra=done)
        if outcomes.unhandled:
            context = {"event_ids": outcomes.unhandled[:20], "events": len(outcomes.unhandled)}
            logger.warning("No handler matched %(events)s events.", context, extra=context)

    def _sleep(self) -> None:
        """Wait until there may be something to do; see `wake` for the protocol."""
        pause = self._wake.fall_asleep()
        if self.handle_batch(sweep=True):
            return
        outlook = store.outlook(groups=self.groups, using=self.using)
        self._due_at = self._clock() + min(outlook.due_in, SWEEP_INTERVAL)
        notified = False
        while not (notified or self._stopping):
            timeout = min(
                pause, self.poll_interval, outlook.due_in, HELD_POLL if outlook.ready else math.inf
            )
            notified = self._wake.wait(timeout)
            if timeout != self.poll_interval:
                break
            outlook = store.outlook(groups=self.groups, using=self.using)
            if outlook.ready:
                break
        self._wake.let_go()

    # The session

    def _set_up_session(self) -> None:
        """Connect, prepare the session and LISTEN, unless this has been done on this connection."""
        connection = connections[self.using]
        connection.ensure_connection()
        if connection.connection is self._session:
            return
        version = store.set_up_session(using=self.using)
        if not store.has_outbox(using=self.using):
            raise NotMigrated(
                f"Database {self.using!r} has no outbox. Run: manage.py migrate spark_outbox"
                + ("" if self.using == "default" else f" --database {self.using}")
            )
        if self.groups is not None:
            try:
                store.check_groups(self.groups, using=self.using)
            except DataError as error:
                raise SettingsError(f"--groups {self.groups!r}: {error}") from error
        self._wake.listen()
        self._session = connection.connection
        logger.info("Ready on database %s.", self.using, extra={"database": self.using})
        if self._on_ready is not None:
            self._on_ready(version)

    def _recover(self, error: Error) -> None:
        """Drop the connections and wait; whatever was claimed is free as soon as the server sees it."""
        self._failures += 1
        first, longest = RECONNECT_PAUSES
        seconds = min(longest, first * 2 ** min(self._failures - 1, 16)) * random.uniform(0.5, 1)  # noqa: S311
        context = {
            "database": self.using,
            "error": str(error).partition("\n")[0],  # DETAIL, on later lines, may quote rows
            "seconds": round(seconds, 2),
        }
        logger.warning(
            "Database %(database)s failed (%(error)s); trying again in %(seconds)s s.",
            context,
            extra=context,
        )
        self._session = None
        self._floor, self._sweep_at = 0, -math.inf
        for connection in connections.all(initialized_only=True):
            connection.close()
        self._wake.pause(seconds)

    def _tidy(self) -> None:
        """Do between batches what Django does between requests."""
        for connection in connections.all(initialized_only=True):
            connection.queries_log.clear()
            if connection.connection is not self._session and not self._wake.uses(connection.alias):
                connection.close_if_unusable_or_obsolete()

    def _handle_batch_or_narrow(self) -> int:
        """Handle a batch; if its commit fails, handle its first event alone."""
        was_careful = self._careful > 0
        try:
            return self.handle_batch()
        except DatabaseError:
            if was_careful:
                raise
            return self.handle_batch()


_draining = threading.local()


def drain_after_commit(using: str, **_: object) -> None:
    """Handle what was just committed, in this process: DISPATCH = "on_commit".

    Events that handlers emit are handled by the call that is running, not by one inside it.
    """
    aliases: set[str] = _draining.__dict__.setdefault("aliases", set())
    if using in aliases:
        return
    aliases.add(using)
    try:
        Worker(using=using).drain()
    finally:
        aliases.discard(using)
