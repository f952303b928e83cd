"""The worker: claim, dispatch, settle in one transaction on one connection; and sleep in between."""

import logging
import math
import random
import resource
import sys
import threading
import time
from collections.abc import Callable

from django.db import DatabaseError, DataError, Error, connections, transaction

from spark_outbox import conf, session, settle, store
from spark_outbox.calls import PATIENCE, Alarm, Calls, InHand
from spark_outbox.claim import Claims
from spark_outbox.detached import Detached
from spark_outbox.dispatch import Dispatcher, TransactionLost
from spark_outbox.errors import NotMigrated, SettingsError, describe
from spark_outbox.events import Event
from spark_outbox.isolation import Isolation
from spark_outbox.outcomes import Batch, Outcomes
from spark_outbox.references import References
from spark_outbox.registry import Handler, Registry, registry
from spark_outbox.rest import next_look
from spark_outbox.wake import Wake, poll

logger = logging.getLogger(__name__)

PUT_BACK_INTERVAL = 60.0
"""Seconds between two looks, of a worker with nothing to do, at what another had no handler for."""

PUT_BACK_CHUNK = 10_000

SILENCE = 30.0
"""Seconds that a transaction may be idle beyond the timeouts of its handlers."""

ABOUT_ROWS = ("22", "23", "44", "P0")
"""Classes of SQLSTATE: of data, constraints and views, and of PL/pgSQL, so of triggers that refuse."""

RECONNECT_PAUSES = (0.1, 10.0)
"""The first and the longest pause, in seconds, while the database is away."""


class Worker:
    """Handles the events of one database, one batch after the other.

    `run` is the daemon; `drain` handles what is ready, on the current connection, and returns.
    `groups` is a PostgreSQL regular expression: the worker leaves other groups to others. `alarm`
    interrupts handlers that outlast their timeout; without one only their queries end in time.
    `in_hand` is told what is being called. `async_concurrency` bounds the calls of async handlers that
    are under way. `run` returns after about `max_events`, or once the
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
        async_concurrency: int | None = None,
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
        self._alarm = alarm
        self._in_hand = in_hand
        self._dispatcher = Dispatcher(
            registry.handlers_for,
            using=using,
            commit_interval=commit_interval,
            clock=clock,
            alarm=alarm,
            in_hand=in_hand,
            on_error=on_error,
        )
        self._async_concurrency = async_concurrency or settings.ASYNC_CONCURRENCY
        self._events_left = max_events or math.inf
        self._max_rss = max_rss
        self._direct = settings.direct(using)  # it LISTENs, and holds the lock of our session
        self._wake = Wake(None if settings.WAKE == "never" else self._direct, poll=self._poll)
        self._detached = Detached(
            using=using,
            direct=self._direct,
            dispatcher=self._dispatcher,
            registry=registry,
            clock=clock,
            on_settled=self._claims.revisit,
        )
        self._clock = clock
        self._stopping = False
        self._session: object = None  # the psycopg connection that is prepared
        self._put_back_at = 0.0  # when to look at unhandled events again
        self._first = ""  # the query that a batch begins with
        self._defers = False  # to workers of another release, as it left to them the last due events
        self._failures = 0  # of the database, in a row

    # The loop

    def run(self, *, drain: bool = False, once: bool = False) -> None:
        """Handle events until `stop` is called; with `drain`, until none is ready; or `once`, a batch.

        Outlives the database: it reconnects with a growing pause. Raises NotMigrated if the
        database has no outbox, SettingsError if PostgreSQL can't read `groups`.
        """
        self._check_handlers()
        session.set_bounds(self.using, self._direct)
        self._wake.open()
        self._dispatcher.daemon = True
        calls = Calls(
            self._async_concurrency,
            must_end=self._direct is None,
            alarm=self._alarm,
            in_hand=self._in_hand,
        )
        self._dispatcher.calls = calls
        finished = False
        try:
            while not finished:
                self._ask()
                try:
                    self._set_up_session()
                    finished = self._work(drain, once) or self._stopping
                    if finished:
                        self._detached.finish()
                        self._claims.leave()
                except Error as error:
                    self._recover(error)
                    finished = self._stopping and not self._detached.calls
        finally:
            calls.close()
        logger.info("Stopped on database %s.", self.using, extra={"database": self.using})

    def _work(self, drain: bool, once: bool) -> bool:
        """Claim, dispatch and settle until it is time to stop; return True if the work is done."""
        while not self._stopping and connections[self.using].connection is self._session:
            self._detached.settle()
            handled = self.handle_batch(sweep=once)
            self._detached.take_over()
            if once:
                return True
            if not handled and not drain:
                handled = 0 if self._claims.goes_on else self._sleep()
            elif not handled and self._detached.calls:
                self._detached.finish()
            elif not handled:
                handled = self.handle_batch(sweep=True)
                if not handled:
                    return True
            self._dispatcher.turn()
            self._failures = 0
            self._events_left -= handled
            if self._events_left <= 0 or self._is_bloated():
                return True
            self._tidy()
        return False

    def drain(self) -> int:
        """Handle ready events until none is left, on the current connection; return how many.

        Raises SettingsError if there are detached handlers, and no connection but a pooler's.
        """
        self._check_handlers()
        total = 0
        try:
            self._detached.take_over()
            while handled := self._handle_or_narrow() or self.handle_batch(sweep=True):
                total += handled
        finally:
            self._detached.resign()
        return total

    def open(self) -> int:
        """Return a file descriptor for `signal.set_wakeup_fd`: a signal ends the wait that it meets.

        Python may call a signal's handler only after a wait that the signal came just before.
        """
        return self._wake.open()

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
                first = self._wake.parting(self.using) or self._first
                if self._dispatcher.has_room:
                    self._claims.make_room()
                batch = self._claims.next(references, sweep=sweep, first=first)
                if not batch.events:
                    return 0
                if self._dispatcher.passes_all(batch):
                    self._claims.pass_by(batch)
                    return 0
                self._wake.wake_up()
                if self._in_hand is not None:  # what handlers do after the commit takes what it takes
                    transaction.on_commit(self._in_hand.rest, using=self.using)
                with self._isolation.batch(references, strict=self._claims.careful):
                    outcomes = self._dispatcher.dispatch(batch, self._isolation, self._is_stopping)
                identity = self._detached.identify() if outcomes.calls else 0
                settle.write(outcomes, session=identity, using=self.using)
                self._claims.hand_over(batch, outcomes)
        except TransactionLost as loss:
            settle.write_alone(loss.alone, using=self.using)
            return len(loss.alone)
        except BaseException as error:
            self._dispatcher.abandon()
            if isinstance(error, DatabaseError) and self._is_connected():
                if self._is_at_fault(batch, error):
                    settle.write_unsettled(batch.events[0].id, error, using=self.using)
                    return 1
                self._claims.doubt(batch)  # it was an event's fault, and nobody can tell whose
            raise
        finally:
            references.close()
        self._ask()
        self._dispatcher.release()
        self._claims.learn(batch, outcomes)
        if batch.elsewhere:
            self._defers = outcomes.leaves_to_others
        self._log(batch, outcomes)
        if outcomes.calls:
            self._detached.begin(outcomes.calls)
        return outcomes.count

    # Its steps

    def _log(self, batch: Batch, outcomes: Outcomes) -> None:
        if outcomes.unhandled:
            context = {"event_ids": outcomes.unhandled[:20], "events": len(outcomes.unhandled)}
            logger.warning("No handler matched %(events)s events.", context, extra=context)
        if logger.isEnabledFor(logging.DEBUG):
            for event in batch.events[: outcomes.count]:
                done = {"event_id": event.id, "group": event.group, "attempt": event.attempt}
                logger.debug("Dispatched event %(event_id)s of group %(group)r.", done, extra=done)

    def _sleep(self) -> int:
        """Wait until there may be something to do; see `wake` for the protocol. Return how many events
        were handled instead, as there was something to do."""
        pause = self._wake.fall_asleep()
        reason = "round"
        while reason == "round" and not self._stopping:
            self._claims.rest()
            goes_on = True
            while goes_on and not self._stopping:
                if handled := self.handle_batch():
                    return handled
                goes_on = self._claims.goes_on
            reason = self._wait(pause)
        self._wake.let_go_with_next()
        if reason == "notification":
            self._claims.hurry()
        return 0

    def _wait(self, pause: float) -> str:
        """Wait, with nothing to do, until there may be something; return why."""
        outlook = store.outlook(groups=self.groups, using=self.using)
        self._claims.expect(outlook.due_in)
        while not self._stopping:
            may_put_back = outlook.unhandled and self._clock() >= self._put_back_at
            if may_put_back and self._put_back_unhandled():
                return "put back"
            look = next_look(
                outlook,
                poll_interval=self.poll_interval,
                pause=pause,
                held=self._claims.held or (outlook.ready and self.groups is None),
                round_in=self._claims.round_in,
                defers=self._defers,
            )
            if self._wake.wait(look.seconds):
                return "notification"
            if self._detached.has_ended:
                return "ended"
            if look.reason != "poll":
                return look.reason
            outlook = store.outlook(groups=self.groups, using=self.using)
            if outlook.ready or outlook.ordered:
                return "poll"
        return "stop"

    # The session

    def _set_up_session(self) -> None:
        """Connect, prepare the session and LISTEN, unless this has been done on this connection."""
        connection = connections[self.using]
        connection.ensure_connection()
        if connection.connection is self._session:
            return
        silence = self._longest_silence()
        version = session.set_up(self.using, direct=self._direct, idle_in_transaction=silence)
        self._first = "" if self._direct == self.using else store.silence_limit(silence)
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
        self._detached.reconnected()
        self._session = connection.connection
        self._put_back_unhandled()
        logger.info("Ready on database %s.", self.using, extra={"database": self.using})
        if self._on_ready is not None:
            self._on_ready(version)

    def _check_handlers(self) -> None:
        detached = [handler.name for handler in self._registry.handlers if not handler.atomic]
        if detached and self._direct is None:
            raise SettingsError(
                f"{', '.join(detached)}: handlers with atomic=False need a session that lasts. Name "
                'the alias of a direct connection in SPARK_OUTBOX["LISTEN_DATABASE"]; or "" if the '
                "worker's own is none of a pooler."
            )

    def _longest_silence(self) -> float | None:
        """Return the seconds that may pass between two statements of a transaction; None if nobody
        knows, since a handler has no timeout or nothing would interrupt it."""
        handlers = [handler for handler in self._registry.handlers if handler.atomic]
        if self._direct is not None:  # async calls outlive their batch, rather than be waited for
            handlers = [handler for handler in handlers if not handler.is_async]
        limits = [None if self._alarm is None else longest_run(handler) for handler in handlers]
        known = [limit for limit in limits if limit is not None]
        return sum(known) + SILENCE if len(known) == len(limits) else None

    def _poll(self, descriptors: list[int], seconds: float) -> set[int]:
        """Wait until a file descriptor can be read; meanwhile async handlers go on."""
        if self._in_hand is not None:
            self._in_hand.rest()
        calls = self._dispatcher.calls
        readable = calls.poll(descriptors, seconds) if calls else poll(descriptors, seconds)
        self._ask()
        return readable

    def _ask(self) -> None:
        """From now on the database has to answer in time, or the supervisor ends this process."""
        if self._in_hand is not None:
            self._in_hand.put_down()

    def _put_back_unhandled(self) -> bool:
        """Make events ready that had no handler: old workers may meet new groups first, also after
        this one has started. Return whether there were any."""
        self._put_back_at = self._clock() + PUT_BACK_INTERVAL
        groups = store.unhandled_groups(groups=self.groups, using=self.using)
        matched = [group for group in groups if self._registry.handlers_for(group)]
        total = 0
        while matched and (count := store.put_back(matched, limit=PUT_BACK_CHUNK, using=self.using)):
            total += count
            self._ask()
        if total:
            context = {"events": total, "groups": matched}
            logger.info("Put back %(events)s unhandled events.", context, extra=context)
        return total > 0

    def _recover(self, error: Error) -> None:
        """Drop the connections and wait; whatever was claimed is free as soon as the server sees it."""
        self._failures += 1
        first, longest = RECONNECT_PAUSES
        seconds = min(longest, first * 2 ** min(self._failures - 1, 16))
        seconds *= random.uniform(0.5, 1)  # noqa: S311, workers shall not come back in step
        context = {
            "database": self.using,
            "error": describe(error),
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
            if connection.connection is not self._session and connection.alias != self._direct:
                connection.close_if_unusable_or_obsolete()

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

    def _is_at_fault(self, batch: Batch, error: Error) -> bool:
        """Return whether it is plain that a batch could not be settled because of its only event."""
        state = getattr(error.__cause__, "sqlstate", None) or ""
        return self._claims.careful and len(batch.events) == 1 and state.startswith(ABOUT_ROWS)

    def _is_connected(self) -> bool:
        raw = connections[self.using].connection
        return raw is not None and not raw.closed


def longest_run(handler: Handler) -> float | None:
    """Return the seconds after which a call is interrupted; None if never."""
    limit = handler.policy.limit()
    return limit * PATIENCE if limit is not None and handler.is_async else limit


_draining = threading.local()


def drain_after_commit(using: str, **_: object) -> None:
    """Handle what was just committed, in this process: DISPATCH = "on_commit".

    Events that handlers emit are handled by the call that is running, not by one inside it. What goes
    wrong is no fault of the caller's, who has committed: the events are left to the next call.
    """
    aliases: set[str] = _draining.__dict__.setdefault("aliases", set())
    if using in aliases:
        return
    aliases.add(using)
    try:
        Worker(using=using).drain()
    except Exception as error:  # noqa: BLE001, logged
        context = {"database": using, "error": describe(error)}
        logger.error(
            "Events of database %(database)s could not be handled after the commit (%(error)s).",
            context,
            extra=context,
        )
    finally:
        aliases.discard(using)
