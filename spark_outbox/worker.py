"""The worker: claim, dispatch, settle in one transaction on one connection; and sleep in between."""

import logging
import math
import os
import random
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable

from django.db import DatabaseError, DataError, Error, connections, transaction

from spark_outbox import conf, store
from spark_outbox.claim import Claims
from spark_outbox.dispatch import Alarm, Batch, Dispatcher, InHand, Outcomes, TransactionLost, book
from spark_outbox.errors import NotMigrated, SettingsError, WorkerDied
from spark_outbox.events import Event
from spark_outbox.isolation import Isolation
from spark_outbox.references import References
from spark_outbox.registry import Handler, Registry, registry
from spark_outbox.wake import Wake

logger = logging.getLogger(__name__)

HELD_POLL = 0.25
"""Seconds between two looks at events that another transaction holds: its worker may have died."""

PUT_BACK_CHUNK = 10_000

CRASH_PATIENCE = 5.0
"""Seconds to wait until the rows of a process that died are free."""

RECONNECT_PAUSES = (0.1, 10.0)
"""The first and the longest pause, in seconds, while the database is away."""


WHO = f"{socket.gethostname()}:{os.getpid()}"
"""This process, as its deliveries name it."""


class Worker:
    """Handles the events of one database, one batch after the other.

    `run` is the daemon; `drain` handles what is ready, on the current connection, and returns.
    `groups` is a PostgreSQL regular expression: the worker leaves other groups to others. `alarm`
    interrupts handlers that outlast their timeout; without one only their queries end in time.
    `in_hand` is told what is being called. `run` returns after about `max_events`, or once the
    process has used more than `max_rss` MiB.
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
        alarm: Alarm | None = None,
        in_hand: InHand | None = None,
        max_events: int | None = None,
        max_rss: int | None = None,
        on_ready: Callable[[str], None] | None = None,
        on_error: Callable[[Event, Handler, BaseException], None] | None = None,
    ) -> None:
        settings = conf.current()
        commit_interval = commit_interval or settings.COMMIT_INTERVAL
        self.using = using
        self.groups = groups
        self.poll_interval = poll_interval or settings.POLL_INTERVAL
        self._registry = registry
        self._on_ready = on_ready
        self._claims = Claims(
            using=using,
            groups=groups,
            batch_size=batch_size or settings.BATCH_SIZE,
            commit_interval=commit_interval,
            clock=clock,
        )
        self._isolation = Isolation(using)
        self._dispatcher = Dispatcher(
            registry.handlers_for, commit_interval=commit_interval, clock=clock, on_error=on_error
        )
        self._dispatcher.alarm = alarm
        self._dispatcher.in_hand = in_hand
        self._events_left = max_events or math.inf
        self._max_rss = max_rss
        listens = settings.WAKE != "never" and settings.LISTEN_DATABASE is not None
        self._wake = Wake((settings.LISTEN_DATABASE or using) if listens else None)
        self._stopping = False
        self._session: object = None  # the psycopg connection that is prepared
        self._failures = 0  # of the database, in a row

    # The loop

    def run(self, *, drain: bool = False, once: bool = False) -> None:
        """Handle events until `stop` is called; with `drain`, until none is ready; or `once`, a batch.

        Outlives the database: it reconnects with a growing pause. Raises NotMigrated if the
        database has no outbox, SettingsError if PostgreSQL can't read `groups`.
        """
        self._wake.open()
        self._dispatcher.daemon = True
        while not self._stopping:
            try:
                self._set_up_session()
                if self._work(drain, once):
                    break
            except Error as error:
                self._recover(error)
        logger.info("Stopped on database %s.", self.using, extra={"database": self.using})

    def _work(self, drain: bool, once: bool) -> bool:
        """Claim, dispatch and settle until it is time to stop; return True if the work is done."""
        while not self._stopping and connections[self.using].connection is self._session:
            handled = self.handle_batch(sweep=once)
            if once:
                return True
            if not handled:
                if not drain:
                    self._sleep()
                elif not self.handle_batch(sweep=True):
                    return True
            self._failures = 0
            self._events_left -= handled
            if self._events_left <= 0 or self._is_bloated():
                return True
            self._tidy()
        return False

    def drain(self) -> int:
        """Handle ready events until none is left, on the current connection; return how many."""
        total = 0
        while handled := self._handle_or_narrow() or self.handle_batch(sweep=True):
            total += handled
        return total

    def stop(self) -> None:
        """Finish the handler in hand, commit, and return from `run`. Signal handlers may call it."""
        self._stopping = True
        self._wake.interrupt()

    def handle_batch(self, *, sweep: bool = False) -> int:
        """Claim, dispatch and settle in one transaction; return how many events that settled."""
        references = References()
        batch = Batch([])
        try:
            with transaction.atomic(using=self.using):
                batch = self._claims.next(references, sweep=sweep)
                if not batch.events:
                    return 0
                self._wake.wake_up()
                with self._isolation.batch(references, strict=self._claims.careful):
                    outcomes = self._dispatcher.dispatch(batch, self._isolation, self._is_stopping)
                self._settle(outcomes)
        except TransactionLost as loss:
            return self._settle_alone(loss)
        except DatabaseError:
            if self._is_connected():  # then it was an event's fault, and nobody can tell whose
                self._claims.doubt(batch)
            raise
        finally:
            references.close()
        self._claims.learn(batch, outcomes)
        self._log(batch, outcomes)
        return outcomes.count

    # Its steps

    def _settle(self, outcomes: Outcomes) -> None:
        """Write what became of the events; a lost claim is told, and overwrites nothing."""
        applied = 0
        if outcomes.done:
            applied += store.finish(outcomes.done, "done", using=self.using)
        if outcomes.unhandled:
            applied += store.finish(outcomes.unhandled, "unhandled", using=self.using)
        if outcomes.attempts:
            store.record_attempts(outcomes.attempts, worker=WHO, using=self.using)
        if outcomes.postponed:
            applied += store.postpone(outcomes.postponed, using=self.using)
        if outcomes.ended:
            applied += store.end(outcomes.ended, using=self.using)
        if outcomes.retried:
            store.discard_deliveries(outcomes.retried, using=self.using)
        if applied != outcomes.count:
            lost = {"events": outcomes.count - applied}
            logger.warning("Lost the claim on %(events)s events.", lost, extra=lost)

    def _settle_alone(self, loss: TransactionLost) -> int:
        """Book what a handler did to its batch; the batch was rolled back, and is claimed again."""
        with transaction.atomic(using=self.using):
            if store.claim_one(loss.event.id, using=self.using):
                self._settle(loss.alone)
        return 1

    def _log(self, batch: Batch, outcomes: Outcomes) -> None:
        if outcomes.unhandled:
            context = {"event_ids": outcomes.unhandled[:20], "events": len(outcomes.unhandled)}
            logger.warning("No handler matched %(events)s events.", context, extra=context)
        if logger.isEnabledFor(logging.DEBUG):
            for event in batch.events[: outcomes.count]:
                done = {"event_id": event.id, "group": event.group, "attempt": event.attempt}
                logger.debug("Dispatched event %(event_id)s of group %(group)s.", done, extra=done)

    def _sleep(self) -> None:
        """Wait until there may be something to do; see `wake` for the protocol."""
        pause = self._wake.fall_asleep()
        if self.handle_batch(sweep=True):
            return
        outlook = store.outlook(groups=self.groups, using=self.using)
        self._claims.expect(outlook.due_in)
        notified = False
        while not (notified or self._stopping):
            held = HELD_POLL if outlook.ready or self._claims.held else math.inf
            timeout = min(pause, self.poll_interval, outlook.due_in, held)
            notified = self._wake.wait(timeout)
            if timeout != self.poll_interval:
                break
            outlook = store.outlook(groups=self.groups, using=self.using)
            if outlook.ready or outlook.ordered:
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
        self._put_back_unhandled()
        logger.info("Ready on database %s.", self.using, extra={"database": self.using})
        if self._on_ready is not None:
            self._on_ready(version)

    def _put_back_unhandled(self) -> None:
        """Make events ready that had no handler: old workers may meet new groups first."""
        groups = store.unhandled_groups(groups=self.groups, using=self.using)
        matched = [group for group in groups if self._registry.handlers_for(group)]
        total = 0
        while matched and (count := store.put_back(matched, limit=PUT_BACK_CHUNK, using=self.using)):
            total += count
        if total:
            context = {"events": total, "groups": matched}
            logger.info("Put back %(events)s unhandled events.", context, extra=context)

    def _recover(self, error: Error) -> None:
        """Drop the connections and wait; whatever was claimed is free as soon as the server sees it."""
        self._failures += 1
        first, longest = RECONNECT_PAUSES
        seconds = min(longest, first * 2 ** min(self._failures - 1, 16))
        seconds *= random.uniform(0.5, 1)  # noqa: S311, workers shall not come back in step
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
        self._claims.start_over()
        for connection in connections.all(initialized_only=True):
            connection.close()
        self._wake.pause(seconds)

    def _tidy(self) -> None:
        """Do between batches what Django does between requests."""
        for connection in connections.all(initialized_only=True):
            connection.queries_log.clear()
            if connection.connection is not self._session and not self._wake.uses(connection.alias):
                connection.close_if_unusable_or_obsolete()

    def book_crash(self, event_id: int, handler: int, cause: str) -> None:
        """Count an attempt that ended with its process; wait for the server to see that it is gone."""
        (row,) = store.events_by_id([event_id], using=self.using)
        event = Event.from_row(row, References())
        registered = {h.name for h in self._registry.handlers_for(event.group)}
        error = WorkerDied(f"The worker process died of {cause} while it ran this handler.")
        deadline = time.monotonic() + CRASH_PATIENCE
        while time.monotonic() < deadline:
            if not store.is_pending(event_id, using=self.using):
                return  # it has failed meanwhile, in the hands of another process
            with transaction.atomic(using=self.using):
                if store.claim_one(event_id, using=self.using):
                    earlier = store.deliveries([event_id], using=self.using).get(event_id, {})
                    culprit = self._registry.handlers[handler]
                    self._settle(book(culprit, event, error, earlier, registered))
                    return
            self._wake.pause(0.02)
        logger.warning(
            "The attempt on event %(event_id)s that ended with its process could not be counted.",
            {"event_id": event_id},
            extra={"event_id": event_id},
        )

    def _is_bloated(self) -> bool:
        if self._max_rss is None:
            return False
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > self._max_rss * unit

    def _handle_or_narrow(self) -> int:
        """Handle a batch; if its commit fails, handle its first event alone."""
        was_careful = self._claims.careful
        try:
            return self.handle_batch()
        except DatabaseError:
            if was_careful:
                raise
            return self.handle_batch()

    def _is_stopping(self) -> bool:
        return self._stopping

    def _is_connected(self) -> bool:
        raw = connections[self.using].connection
        return raw is not None and not raw.closed


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
