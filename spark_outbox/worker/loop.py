"""The worker: claim, dispatch, settle in one transaction on one connection; and sleep in between."""

import logging
import math
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from django.db import DataError, Error, OperationalError, connections, transaction

from spark_outbox import conf, store
from spark_outbox.errors import ConnectionLost, NotMigrated, SettingsError, describe
from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Handler, Registry, registry
from spark_outbox.worker import session, settle
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.crashes import Watched
from spark_outbox.worker.dispatch import Dispatcher, Experience, TransactionLost
from spark_outbox.worker.event_loop import PATIENCE, Alarm, Calls, Hand, InHand
from spark_outbox.worker.isolation import Isolation
from spark_outbox.worker.outcome import Batch, Outcomes
from spark_outbox.worker.presence import Presence
from spark_outbox.worker.refusals import TIMES, Refused, Suspects, is_final, refusals
from spark_outbox.worker.rest import next_look
from spark_outbox.worker.running import Detached
from spark_outbox.worker.wake import Wake, poll

logger = logging.getLogger(__name__)

PUT_BACK_INTERVAL = 60.0
"""Seconds between two looks, of a worker with nothing to do, at what another had no handler for."""

PUT_BACK_CHUNK = 10_000

SILENCE = 30.0
"""Seconds that a transaction may be idle beyond the timeouts of its handlers."""

REFUSED_PAUSES = (0.1, 0.3)
"""Seconds before an event is handled again whose settling was refused for what may pass."""

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
    `on_error` with the event, the handler and what it raised. `experience` is what other workers of this
    process have learned about the handlers, and about events that can't be settled.
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
        experience: Experience | None = None,
    ) -> None:
        settings = conf.current()
        experience = experience or Experience(clock)
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
            passed_over=experience.passed_over,
        )
        self._isolation = Isolation(using)
        self._alarm = alarm
        self._is_supervised = in_hand is not None
        self._direct = settings.direct(using)  # it LISTENs
        in_hand = in_hand or Hand()
        self._presence = Presence(using=using, direct=self._direct or using, in_hand=in_hand)
        self._in_hand = Watched(in_hand, registry, using=using, presence=self._presence)
        self._dispatcher = Dispatcher(
            registry.handlers_for,
            using=using,
            commit_interval=commit_interval,
            clock=clock,
            alarm=alarm,
            in_hand=self._in_hand,
            on_error=on_error,
            experience=experience,
        )
        self._async_concurrency = async_concurrency or settings.ASYNC_CONCURRENCY
        self._events_left = max_events or math.inf
        self._max_rss = max_rss
        self._wake = Wake(None if settings.WAKE == "never" else self._direct, poll=self._poll)
        self._detached = Detached(
            using=using,
            direct=self._direct,
            presence=self._presence,
            wake=self._wake,
            dispatcher=self._dispatcher,
            registry=registry,
            clock=clock,
            on_settled=self._claims.revisit,
        )
        self._clock = clock
        self._stopping = False
        self._session: tuple[object, object] | None = None  # the prepared psycopg connections
        self._was_ready = False  # in any session
        self._put_back_at = 0.0  # when to look at unhandled events again
        self._first = ""  # the query that a batch begins with
        self._defers = False  # to workers of another release, as it left to them the last due events
        self._failures = 0  # of the database, in a row
        self._suspects = Suspects()
        self._convicted: list[tuple[int, int]] = []  # events and handlers to count an attempt for

    # The loop

    def run(self, *, drain: bool = False, once: bool = False) -> None:
        """Handle events until `stop` is called; with `drain`, until none is ready; or `once`, a batch.

        Outlives the database: it reconnects with a growing pause. With `drain` or `once` only from
        when it has been there, and while it does not refuse what the worker itself asks: who waits for
        the end is told what is wrong. Raises NotMigrated if the database has no outbox, SettingsError if
        PostgreSQL can't read `groups`.
        """
        self._check_handlers()
        session.set_bounds(self.using, self._direct)
        session.leave_pools(self.using, self._direct)
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
                        self._in_hand.resign()
                except Error as error:
                    if (drain or once) and (not self._was_ready or self._is_refused(error)):
                        raise
                    self._recover(error)
                    finished = self._stopping and not self._detached.calls
        finally:
            calls.close()
            self._presence.end()
        logger.info("Stopped on database %s.", self.using, extra={"database": self.using})

    def _work(self, drain: bool, once: bool) -> bool:
        """Claim, dispatch and settle until it is time to stop; return True if the work is done."""
        while not self._stopping and self._raw() == self._session:
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
        with store.fixed_schema(using=self.using):
            try:
                self._detached.take_over()
                while handled := self.handle_batch() or self.handle_batch(sweep=True):
                    total += handled
            finally:
                self._presence.end()
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
        """Claim, dispatch and settle in one transaction; return how many events that settled.

        If PostgreSQL refuses to settle them, they are handled again, one by one; an event that it
        refuses alone fails. Raises what comes of an outage.
        """
        references = References(self.using)
        batch, outcomes = Batch([]), Outcomes()
        try:
            with refusals(using=self.using), transaction.atomic(using=self.using):
                first = self._wake.parting(self.using) or self._first
                if self._dispatcher.has_room:
                    self._claims.make_room()
                batch = self._claims.next(references, sweep=sweep, first=first)
                if not batch.events or self._waits_for_room(batch):
                    return 0
                self._in_hand.watch(batch)
                self._wake.wake_up()
                if self._is_supervised:  # what handlers do after the commit takes what it takes
                    transaction.on_commit(self._in_hand.rest, using=self.using)
                with self._isolation.batch(references, strict=self._claims.careful):
                    outcomes = self._dispatcher.dispatch(batch, self._isolation, self._is_stopping)
                self._ask()
                identity = self._presence.hold() if outcomes.calls else 0
                settle.write(outcomes, session=identity, using=self.using)
                self._claims.hand_over(batch, outcomes)
                self._in_hand.clear()
        except TransactionLost as loss:
            self._ask()
            self._in_hand.forget()
            self._claims.pass_over(settle.write_alone(loss.alone, using=self.using))
            return len(loss.alone)
        except Refused as refused:
            self._abandon()
            if not batch.events:
                raise refused.error from refused.error.__cause__  # which has the SQLSTATE
            return self._narrow(batch, outcomes, refused, sweep)
        except Error:
            if self._is_cut_off():
                self._suspect(batch, outcomes, self._in_hand.in_hand())
            self._abandon()
            raise
        except BaseException:
            self._abandon()
            raise
        finally:
            references.close()
        self._learn(batch, outcomes)
        return outcomes.count

    def _waits_for_room(self, batch: Batch) -> bool:
        """Return whether nothing of a batch can be handled until an async call ends."""
        waits = self._dispatcher.passes_all(batch)
        if waits:
            self._claims.pass_by(batch)
        return waits

    def _learn(self, batch: Batch, outcomes: Outcomes) -> None:
        """After the commit: note how it went, and begin what outlives the transaction."""
        self._ask()
        self._in_hand.settled(closely=self._claims.careful)
        if self._suspects:
            self._suspects.clear(outcomes.event_ids)
        self._dispatcher.release()
        self._claims.learn(batch, outcomes)
        if batch.elsewhere:
            self._defers = outcomes.leaves_to_others
        self._log(batch, outcomes)
        if outcomes.calls:
            self._detached.begin(outcomes.calls)

    # When that fails

    def _abandon(self) -> None:
        """The transaction is rolled back: nothing of it is in hand any more."""
        self._ask()
        self._in_hand.forget()
        self._dispatcher.abandon()

    def _narrow(self, batch: Batch, outcomes: Outcomes, refused: Refused, sweep: bool) -> int:
        """After PostgreSQL has refused to settle a batch: find the event that is at fault."""
        event = batch.events[0]
        if not self._claims.careful or len(batch.events) > 1:
            context = {"events": len(batch.events), "error": describe(refused.error)}
            logger.warning(
                "PostgreSQL refused to settle %(events)s events (%(error)s): they are handled alone.",
                context,
                extra=context,
            )
            self._claims.doubt(batch)
        elif refused.may_pass and not self._suspects.is_at_fault(event.id):
            self._wake.pause(random.uniform(*REFUSED_PAUSES))  # noqa: S311
        elif refused.may_pass:
            called = self._calls_of(batch, outcomes)
            stuck = settle.book(called, refused.error, self._registry, using=self.using)
            self._claims.pass_over(stuck)
            return 1
        else:
            if not settle.write_unsettled(event.id, refused.error, using=self.using):
                self._claims.pass_over([event.id])
            return 1
        return self.handle_batch(sweep=sweep)

    def _is_cut_off(self) -> bool:
        """Return whether the connection is lost on which a daemon has been working."""
        raw: Any = None if self._session is None else self._session[0]
        return raw is not None and raw.closed

    def _is_refused(self, error: Error) -> bool:
        """Return whether the database is there, and will not do what the worker asks another time."""
        raw: Any = connections[self.using].connection
        return raw is not None and not raw.closed and is_final(error)

    def _suspect(self, batch: Batch, outcomes: Outcomes, in_hand: list[tuple[int, int]]) -> None:
        """After a lost connection: if that has always come with the same event, it is the event's fault.

        From now on events are handled one by one, so that the next one has a single suspect. Nothing is
        in hand any more if the connection was lost as the event was settled, through a deferred trigger
        say; and not yet, if that was before it was dispatched: then it is nobody's fault.
        """
        if not batch.events:
            return
        if not in_hand and len(batch.events) == 1 and outcomes.reached:
            in_hand = self._calls_of(batch, outcomes)
        at_fault = {event_id for event_id in dict(in_hand) if self._suspects.is_at_fault(event_id)}
        self._convicted = [called for called in in_hand if called[0] in at_fault]
        self._claims.doubt(batch)

    def _calls_of(self, batch: Batch, outcomes: Outcomes) -> list[tuple[int, int]]:
        """Return the calls that were made with the only event of a batch, as they are noted in `InHand`.

        If it is the event's fault, nobody knows which handler's; but of none that was not called, as one
        that is detached. If none was, each that is owed is charged: else the event would stay for ever.
        """
        (event,) = batch.events
        if event.id in outcomes.passed:
            return []
        handlers = self._registry.handlers_for(event.group)
        owed = batch.owed(event, handlers) if event.id in batch.earlier else handlers
        uncalled = {attempt.handler for attempt in outcomes.attempts if not attempt.counts}
        called = [handler for handler in owed if handler.name not in uncalled]
        return [(event.id, handler.number) for handler in called or owed]

    def _book_convicted(self) -> None:
        """Count an attempt for what has cost the worker its connection, now that it has another."""
        convicted, self._convicted = self._convicted, []
        if convicted:
            error = ConnectionLost(
                f"The worker's database connection was lost {TIMES} times in a row while this handler "
                "ran: by a limit such as transaction_timeout, by pg_terminate_backend(), or since the "
                "server can't bear its query. The server's log says why."
            )
            stuck = settle.book(convicted, error, self._registry, using=self.using)
            self._claims.pass_over(stuck)

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
            if outlook.ready or outlook.ordered or not self._wake.guards(outlook.oid):
                return "poll"
        return "stop"

    # The session

    def _set_up_session(self) -> None:
        """Connect, prepare the session and LISTEN, unless this has been done on this connection."""
        connections[self.using].ensure_connection()
        if self._raw() == self._session:
            return
        silence = self._longest_silence()
        version = session.set_up(self.using, direct=self._direct, idle_in_transaction=silence)
        self._first = "" if self._direct == self.using else store.silence_limit(silence)
        if not store.has_outbox(using=self.using):
            raise NotMigrated(
                f"Database {self.using!r} has no outbox. Run: manage.py migrate spark_outbox"
                + ("" if self.using == "default" else f" --database {self.using}")
            )
        store.fix_schema(using=self.using)
        if self.groups is not None:
            try:
                store.check_groups(self.groups, using=self.using)
            except DataError as error:
                raise SettingsError(f"--groups {self.groups!r}: {error}") from error
        self._check_direct()
        self._wake.listen()
        if self._direct is not None and self._in_hand.enlist():
            self._claims.look_closely()
        self._session = self._raw()
        self._was_ready = True
        self._book_convicted()
        self._put_back_unhandled()
        logger.info("Ready on database %s.", self.using, extra={"database": self.using})
        if self._on_ready is not None:
            self._on_ready(version)

    def _check_direct(self) -> None:
        """Raise SettingsError if what LISTENs is another database than the worker's; OperationalError
        if that has only now become so: in a failover the two may change at different times."""
        try:
            session.check_direct(self.using, self._direct)
        except SettingsError as error:
            if self._was_ready:
                raise OperationalError(str(error)) from error
            raise

    def _check_handlers(self) -> None:
        session.check(self.using, self._direct)
        detached = [handler.name for handler in self._registry.handlers if not handler.atomic]
        if detached and self._direct is None:
            raise SettingsError(
                f"{', '.join(detached)}: handlers with atomic=False need a session that lasts. Name "
                'the alias of a direct connection in SPARK_OUTBOX["LISTEN_DATABASE"]; or "" if the '
                "worker's own is none of a pooler."
            )

    def _raw(self) -> tuple[object, object]:
        """Return the psycopg connections that we work on, and that LISTENs."""
        direct = None if self._direct is None else connections[self._direct].connection
        return connections[self.using].connection, direct

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
        self._in_hand.rest()
        calls = self._dispatcher.calls
        readable = calls.poll(descriptors, seconds) if calls else poll(descriptors, seconds)
        self._ask()
        return readable

    def _ask(self) -> None:
        """From now on the database has to answer in time, or the supervisor ends this process."""
        self._in_hand.put_down()

    def _put_back_unhandled(self) -> bool:
        """Make events ready that had no handler: old workers may meet new groups first, also after
        this one has started. Return whether there were any."""
        self._put_back_at = self._clock() + PUT_BACK_INTERVAL
        groups = store.unhandled_groups(groups=self.groups, using=self.using)
        matched = [group for group in groups if self._registry.handlers_for(group)]
        total = 0
        try:
            while matched and (count := self._put_back(matched)):
                total += count
                self._ask()
        except Refused as refused:
            context: dict[str, object] = {"error": describe(refused.error), "groups": matched}
            logger.warning("Unhandled events can't be put back (%(error)s).", context, extra=context)
        if total:
            context = {"events": total, "groups": matched}
            logger.info("Put back %(events)s unhandled events.", context, extra=context)
        return total > 0

    def _put_back(self, groups: list[str]) -> int:
        with refusals(using=self.using):
            return store.put_back(groups, limit=PUT_BACK_CHUNK, using=self.using)

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
            if connection.connection not in (self._session or ()):
                connection.close_if_unusable_or_obsolete()
            elif not connection.autocommit:
                connection.close()  # a callback has left it so, and nothing would be committed

    def _is_bloated(self) -> bool:
        if self._max_rss is None:
            return False
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > self._max_rss * unit

    def _is_stopping(self) -> bool:
        return self._stopping


def longest_run(handler: Handler) -> float | None:
    """Return the seconds after which a call is interrupted; None if never."""
    limit = handler.policy.limit()
    return limit * PATIENCE if limit is not None and handler.is_async else limit


_draining = threading.local()
_experience: dict[str, Experience] = {}


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
        Worker(using=using, experience=_experience_of(using)).drain()
    except Exception as error:  # noqa: BLE001, logged
        context = {"database": using, "error": describe(error)}
        logger.error(
            "Events of database %(database)s could not be handled after the commit (%(error)s).",
            context,
            extra=context,
        )
    finally:
        aliases.discard(using)


def _experience_of(using: str) -> Experience | None:
    """Return what this process has learned at earlier commits, in any thread.

    None within a TestCase, whose tests must not see each other's circuits; nothing else handles events
    inside of a transaction.
    """
    if connections[using].in_atomic_block:
        return None
    known = _experience.get(using)
    if known is None or known.settings is not conf.current():
        known = _experience[using] = Experience(time.monotonic)
    return known
