"""Hand events to their handlers, and say what became of them. Runs no SQL of its own."""

import datetime as dt
import logging
import random
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spark_outbox import conf
from spark_outbox.breaker import Breakers
from spark_outbox.errors import BrokenTransaction, Discard, Retry
from spark_outbox.events import Event
from spark_outbox.isolation import Isolation
from spark_outbox.policy import HOPELESS, Verdict
from spark_outbox.registry import Handler
from spark_outbox.store import Attempt, Earlier, Ended, Postponed

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 20_000


@dataclass(slots=True)
class Batch:
    """Claimed events, and what is known of those that were tried before."""

    events: Sequence[Event]
    elsewhere: int = 0
    """How many of them, the first, were not in the ready queue: they are due, or ordered."""
    earlier: dict[int, dict[str, Earlier]] = field(default_factory=dict)

    def owed(self, event: Event, handlers: Sequence[Handler]) -> list[Handler]:
        """Return the handlers that an event tried before owes: those due, or all that are pending if
        somebody has made it ready by hand."""
        earlier = self.earlier[event.id]
        ready = event.available_at is None
        return [
            handler
            for handler in handlers
            if (before := earlier.get(handler.name)) is None
            or (before.status == "pending" and (ready or before.due))
        ]


@dataclass(slots=True)
class Outcomes:
    """What a dispatched batch comes to, in the store's terms."""

    done: list[int] = field(default_factory=list)
    unhandled: list[int] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    postponed: list[Postponed] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    retried: list[int] = field(default_factory=list)
    """Finished events that have deliveries."""
    reached: int = 0
    """How many events of the batch were looked at."""
    cut: bool = False
    """The batch ended before its last event, or might as well have."""

    def holds_up(self, event: Event, failed_head: str) -> bool:
        """Return whether later events of its ordering key have to wait for the last one handled."""
        if self.postponed and self.postponed[-1].event_id == event.id:
            return True
        failed = self.ended and self.ended[-1][:2] == (event.id, "failed")
        return bool(failed) and failed_head == "block"

    @property
    def count(self) -> int:
        return len(self.done) + len(self.unhandled) + len(self.ended) + len(self.postponed)


class TransactionLost(Exception):
    """A handler has ended the batch's transaction: nothing of the batch can be settled but `alone`,
    what comes of that handler and its event, in a transaction of its own."""

    def __init__(self, event: Event, alone: Outcomes) -> None:
        super().__init__(f"{event!r} ended the transaction of its batch.")
        self.event = event
        self.alone = alone


class Alarm(Protocol):
    """What interrupts a handler: see management/alarm.py."""

    def start(self, seconds: float) -> None: ...
    def stop(self) -> None: ...


class InHand(Protocol):
    """Where it is noted what is being called: see supervisor.py."""

    def take_in_hand(self, event_id: int, handler: int) -> None: ...
    def put_down(self) -> None: ...


class Dispatcher:
    """Calls handlers, and remembers which of them are slow.

    Locks that a handler took are held until its batch commits, so nobody shall wait there for a
    stranger's slow handler: one whose recent runs outlast the commit interval only starts a batch.
    """

    def __init__(
        self,
        handlers_for: Callable[[str], tuple[Handler, ...]],
        *,
        commit_interval: float,
        clock: Callable[[], float],
        on_error: Callable[[Event, Handler, BaseException], None] | None = None,
    ) -> None:
        self._handlers_for = handlers_for
        self._commit_interval = commit_interval
        self._clock = clock
        self._on_error = on_error
        self.alarm: Alarm | None = None
        self.in_hand: InHand | None = None
        self.daemon = False  # if so, nobody presses Ctrl-C: a KeyboardInterrupt is the handler's own
        self._contended = False
        self._failed_head = conf.current().FAILED_HEAD
        self._breakers = Breakers(conf.current().BREAK_AFTER, clock)
        self._slow: dict[str, float] = {}  # handler name -> recent seconds, if above the interval

    def dispatch(self, batch: Batch, isolation: Isolation, stopping: Callable[[], bool]) -> Outcomes:
        """Run the handlers of one event after the other, until the commit interval is over."""
        outcomes = Outcomes()
        self._contended = False  # whether a handler lost a fight for locks: others wait for ours
        deadline = self._clock() + self._commit_interval
        blocked: set[str] = set()
        for event in batch.events:
            if event.ordering_key in blocked:
                outcomes.reached += 1
                continue
            handlers = self._handlers_for(event.group)
            if self._slow and outcomes.count and any(h.name in self._slow for h in handlers):
                outcomes.cut = True
                break
            self._handle(event, handlers, batch, isolation, outcomes)
            outcomes.reached += 1
            if event.ordering_key is not None and outcomes.holds_up(event, self._failed_head):
                blocked.add(event.ordering_key)
            if self._contended or isolation.full or self._clock() >= deadline or stopping():
                outcomes.cut = True
                break
        if self.in_hand is not None:
            self.in_hand.put_down()
        return outcomes

    def _handle(
        self,
        event: Event,
        handlers: tuple[Handler, ...],
        batch: Batch,
        isolation: Isolation,
        outcomes: Outcomes,
    ) -> None:
        """Run the handlers that one event owes."""
        if not handlers:
            outcomes.unhandled.append(event.id)
            return
        earlier = batch.earlier.get(event.id)
        owed = handlers if earlier is None else batch.owed(event, handlers)
        attempts: dict[str, Attempt] = {}
        for handler in owed:
            if earlier is not None:
                event.attempt = earlier[handler.name].attempts + 1 if handler.name in earlier else 1
            attempt = self._deliver(handler, event, isolation)
            if attempt is None:
                continue
            attempts[handler.name] = attempt
            if isolation.lost:
                alone = Outcomes()
                settle(event, {handler.name: attempt}, earlier or {}, {h.name for h in handlers}, alone)
                raise TransactionLost(event, alone)
        if attempts or earlier is not None:
            for handler in owed:
                attempts.setdefault(handler.name, Attempt(event.id, handler.name, "done"))
            settle(event, attempts, earlier or {}, {h.name for h in handlers}, outcomes)
        else:
            outcomes.done.append(event.id)

    def _deliver(self, handler: Handler, event: Event, isolation: Isolation) -> Attempt | None:
        """Call one handler, unless its circuit is open; return None if it succeeded."""
        name = handler.name
        if self._breakers and (wait := self._breakers.remaining(name)):
            return postponed_by_breaker(event, name, wait)
        error, seconds = self._call(handler, event, isolation)
        if error is None:
            if self._breakers and self._breakers.succeeded(name):
                logger.warning("Circuit of %(handler)s is closed again.", {"handler": name})
            return None
        self._contended = self._contended or is_contention(error)
        if not isinstance(error, (Retry, Discard, *HOPELESS)):
            pause = self._breakers.failed(name, event.id)
            if pause:
                context = {"handler": name, "seconds": round(pause)}
                logger.warning(
                    "Circuit of %(handler)s is open: it is not called for %(seconds)s s.",
                    context,
                    extra=context,
                )
        return judge(handler, event, error, seconds)

    def _call(
        self, handler: Handler, event: Event, isolation: Isolation
    ) -> tuple[BaseException | None, float]:
        """Run one handler; return what it raised, and for how many seconds it ran."""
        error: BaseException | None = None
        started = self._clock()
        limit = handler.policy.limit()
        if self.in_hand is not None:
            self.in_hand.take_in_hand(event.id, handler.number)
        isolation.begin(limit)
        event.start_over()
        try:
            self._run(handler, event, limit)
            isolation.end()
        except BaseException as raised:  # whatever a handler raises is its delivery's fate
            if self.alarm is not None:
                self.alarm.stop()  # again: it may have rung while it was being stopped
            isolation.undo()
            if type(raised) is KeyboardInterrupt and not self.daemon:
                raise
            if isolation.lost and not isinstance(raised, BrokenTransaction):
                raised = BrokenTransaction(isolation.lost)
            error = raised
        seconds = self._clock() - started
        self._note_duration(handler.name, seconds)
        if error is not None and self._on_error is not None:
            self._on_error(event, handler, error)
        return error, seconds

    def _run(self, handler: Handler, event: Event, limit: float | None) -> None:
        if limit is None or self.alarm is None:
            handler.function(event)
            return
        try:
            self.alarm.start(limit)
            handler.function(event)
        finally:
            self.alarm.stop()

    def _note_duration(self, name: str, seconds: float) -> None:
        if seconds > self._commit_interval or name in self._slow:
            recent = (self._slow.get(name, seconds) + seconds) / 2
            self._slow[name] = recent
            if recent < self._commit_interval:
                del self._slow[name]


def postponed_by_breaker(event: Event, name: str, wait: float) -> Attempt:
    """Return what stands for a call that was not made; it burns no attempt."""
    spread = wait * random.uniform(1, 1.5)  # noqa: S311, so that not all come back at once
    return Attempt(
        event.id,
        name,
        "pending",
        error="spark_outbox: not called, its circuit is open",
        delay=dt.timedelta(seconds=spread),
        counts=False,
    )


def judge(handler: Handler, event: Event, error: BaseException, seconds: float) -> Attempt:
    """Say what becomes of a delivery whose handler raised, and log it."""
    verdict = handler.policy.judge(error, event.attempt)
    log_verdict(handler, event, error, verdict)
    return Attempt(
        event.id,
        handler.name,
        verdict.status,
        error=storable(f"{type(error).__module__}.{type(error).__qualname__}: {error}"),
        traceback=storable("".join(traceback.format_exception(error))),
        duration=dt.timedelta(seconds=seconds),
        delay=verdict.delay,
        at=verdict.at,
    )


def book(
    handler: Handler,
    event: Event,
    error: BaseException,
    earlier: dict[str, Earlier],
    registered: set[str],
) -> Outcomes:
    """Say what an event comes to of which nothing is known but that one handler failed."""
    if handler.name in earlier:
        event.attempt = earlier[handler.name].attempts + 1
    outcomes = Outcomes()
    attempt = judge(handler, event, error, 0.0)
    settle(event, {handler.name: attempt}, earlier, registered, outcomes)
    return outcomes


def settle(
    event: Event,
    attempts: dict[str, Attempt],
    earlier: dict[str, Earlier],
    registered: set[str],
    outcomes: Outcomes,
) -> None:
    """Say what an event comes to that was not, or is not, finished in one go."""
    outcomes.attempts += attempts.values()
    statuses = {name: before.status for name, before in earlier.items() if name in registered}
    statuses.update((name, attempt.status) for name, attempt in attempts.items())
    error = next((a.traceback for a in reversed(attempts.values()) if a.traceback), "")
    never_called = bool(registered - statuses.keys())
    if never_called or "pending" in statuses.values():
        outcomes.postponed.append(Postponed(event.id, error, never_called))
        return
    outcomes.retried.append(event.id)
    if "failed" in statuses.values():
        outcomes.ended.append(Ended(event.id, "failed", error))
    elif "done" in statuses.values():
        outcomes.done.append(event.id)
    else:
        outcomes.ended.append(Ended(event.id, "discarded", error))


def log_verdict(handler: Handler, event: Event, error: BaseException, verdict: Verdict) -> None:
    level, what = {
        "failed": (logging.ERROR, "failed for good"),
        "discarded": (logging.INFO, "discarded"),
        "pending": (logging.WARNING, "failed, to be tried again"),
    }[verdict.status]
    context = {
        "handler": handler.name,
        "event_id": event.id,
        "attempt": event.attempt,
        "error": type(error).__qualname__,
        "what": what,
    }
    logger.log(
        level,
        "Handler %(handler)s on event %(event_id)s: %(what)s (attempt %(attempt)s, %(error)s).",
        context,
        extra=context,
    )


def storable(text: str) -> str:
    """Return text that PostgreSQL can store; the end of it, if it is very long."""
    text = text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text[-MAX_ERROR_LENGTH:]


def is_contention(error: BaseException) -> bool:
    """Return whether `error` is a deadlock or a lock timeout: others wait for what we hold."""
    cause = error.__cause__ or error
    return getattr(cause, "sqlstate", None) in {"40P01", "55P03"}
