"""Hand events to their handlers: one after the other, in lists, side by side, or after the commit.

Runs no SQL of its own; what becomes of the events is said in outcomes.py.
"""

import logging
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any, NamedTuple

from spark_outbox import conf
from spark_outbox.errors import BatchFailed, BrokenTransaction, Discard, HandlerTimeout, Retry
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler, Matching
from spark_outbox.registry.policy import HOPELESS
from spark_outbox.store import Attempt, Earlier
from spark_outbox.worker.breaker import Breakers, Turn
from spark_outbox.worker.event_loop import Alarm, Calls, InHand
from spark_outbox.worker.isolation import Isolation, apart
from spark_outbox.worker.outcome import (
    Batch,
    Call,
    Open,
    Outcomes,
    begun,
    judge,
    next_attempt,
    postponed_by_breaker,
    turn_of,
    worn_out,
)

logger = logging.getLogger(__name__)

READ_LIMIT = 30.0
"""Seconds that it may take to check or decode a payload, which is nobody's handler yet."""

LONGEST_WAIT = 1.0
"""Seconds for which a batch with nothing else to settle waits for the first of its async handlers."""


class TransactionLost(Exception):
    """A handler has ended the batch's transaction: nothing of the batch can be settled but `alone`,
    what comes of that handler's events, each in a transaction of its own."""

    def __init__(self, alone: dict[int, Outcomes]) -> None:
        super().__init__(f"The transaction of a batch was ended in the handling of {list(alone)}.")
        self.alone = alone


class Deferred(NamedTuple):
    """A call that is made at the end of the batch."""

    opened: Open
    call: Call


class Experience:
    """What is known of one database: circuits of its handlers, who is slow, which events to pass over.
    Threads may share it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.settings = conf.current()
        self.breakers = Breakers(self.settings.BREAK_AFTER, clock)
        self.slow: dict[str, float] = {}
        """By name, the recent seconds of handlers that outlast the commit interval."""
        self.passed_over: set[int] = set()
        """Events whose rows PostgreSQL refuses to change, to whatever end."""


class Dispatcher:
    """Calls handlers, and remembers which of them are slow.

    Locks that a handler took are held until its batch commits, so nobody shall wait there for a
    stranger's slow handler: one whose recent runs outlast the commit interval only starts a batch.

    Without `calls`, an event loop, async handlers are called like others, one after the other.
    """

    def __init__(
        self,
        handlers_for: Callable[[str], Matching],
        *,
        using: str,
        commit_interval: float,
        clock: Callable[[], float],
        alarm: Alarm | None = None,
        in_hand: InHand,
        on_error: Callable[[Event, Handler, BaseException], None] | None = None,
        experience: Experience,
    ) -> None:
        self._handlers_for = handlers_for
        self._using = using
        self._commit_interval = commit_interval
        self._clock = clock
        self._alarm = alarm
        self._in_hand = in_hand
        self._on_error = on_error
        self.calls: Calls | None = None
        self.daemon = False  # if so, nobody presses Ctrl-C: a KeyboardInterrupt is the handler's own
        self._failed_head = conf.current().FAILED_HEAD
        self._breakers = experience.breakers
        self._slow = experience.slow
        self._now = 0.0  # the end of the last call
        self._start_batch()

    def _start_batch(self) -> None:
        self._called = False  # whether this transaction may hold a handler's locks
        self._contended = False  # whether a handler lost a fight for locks: others wait for ours
        self._open: list[Open] = []
        self._lists: dict[str, list[Deferred]] = {}  # by the name of a batch handler
        self._concurrent: list[Deferred] = []

    def dispatch(self, batch: Batch, isolation: Isolation, stopping: Callable[[], bool]) -> Outcomes:
        """Run the handlers of one event after the other, until the commit interval is over.

        The note of what is in hand stays, for the caller to read if this raises.
        """
        self._start_batch()
        outcomes = Outcomes()
        self._now = self._clock()
        deadline = self._now + self._commit_interval
        blocked = outcomes.blocked
        for event in batch.events:
            if event.ordering_key in blocked:
                outcomes.reached += 1
                continue
            handlers = self._handlers_for(event.group)
            if self._slow and self._must_wait(handlers):
                outcomes.cut = True
                break
            if not handlers.are_plain and self._lacks_room(handlers):
                outcomes.passed.add(event.id)
                outcomes.reached += 1
                if event.ordering_key is not None:
                    blocked.add(event.ordering_key)
                continue
            is_open = self._handle(event, handlers, batch, isolation, outcomes)
            outcomes.reached += 1
            if event.ordering_key is not None and (
                is_open or outcomes.holds_up(event, self._failed_head)
            ):
                blocked.add(event.ordering_key)
            if (
                self._contended
                or isolation.full
                or outcomes.calls
                or self._now >= deadline
                or stopping()
            ):
                outcomes.cut = True
                break
        if self._open:
            self._call_deferred(isolation, outcomes)
        return outcomes

    @property
    def has_room(self) -> bool:
        """Another async handler can be called."""
        return self.calls is None or self.calls.room > 0

    def turn(self) -> None:
        """Let async calls that are under way make a step."""
        if self.calls:
            self.calls.turn()

    def passes_all(self, batch: Batch) -> bool:
        """Return whether all that a batch holds has to wait for room."""
        if self.has_room:
            return False
        return all(self._lacks_room(self._handlers_for(event.group)) for event in batch.events)

    def release(self) -> None:
        """After the commit: what is under way goes on by itself."""
        self._concurrent = []

    def abandon(self) -> None:
        """After a rollback: others will handle the batch's events, so drop what is under way."""
        if self.calls is not None and self._concurrent:
            self.calls.abandon(call for _, call in self._concurrent)

    def call_apart(self, call: Call) -> None:
        """Run a detached handler in no transaction of ours; or only start it, if it is async."""
        handler, event = call.handler, call.event
        started = self._clock()
        self._in_hand.take_in_hand((event.id, handler.number))
        try:
            if handler.is_async and self.calls is not None:
                event.load()
                self.calls.start([call])
                return
            limit = handler.policy.limit()
            with apart(self._using, limit):
                self._call_in_time(handler.call, event, limit)
        except BaseException as raised:
            if type(raised) is KeyboardInterrupt and not self.daemon:
                raise
            call.error = raised
        finally:
            self._in_hand.put_down()
        call.seconds = self._clock() - started
        call.ended = True

    def conclude(self, call: Call) -> Attempt | None:
        """Say what comes of a call that has ended; None if it succeeded."""
        return self._judge(call.handler, call.event, call.turn, call.error, call.seconds)

    # One event

    def _must_wait(self, handlers: Sequence[Handler]) -> bool:
        """Return whether these handlers can't be called in this transaction, but in another."""
        return self._called and any(handler.name in self._slow for handler in handlers)

    def _lacks_room(self, handlers: Sequence[Handler]) -> bool:
        """Return whether these handlers can only be called when another call has ended."""
        if self.calls is None or self.calls.room > len(self._concurrent):
            return False
        return any(handler.is_async for handler in handlers)

    def _handle(
        self,
        event: Event,
        handlers: Matching,
        batch: Batch,
        isolation: Isolation,
        outcomes: Outcomes,
    ) -> bool:
        """Run the handlers that one event owes; return whether it waits for the end of the batch."""
        if not handlers:
            outcomes.unhandled.append(event.id)
            return False
        earlier = batch.earlier.get(event.id)
        owed: Sequence[Handler] = handlers if earlier is None else batch.owed(event, handlers)
        is_checked = event.is_simple or not owed
        unreadable = None if is_checked else self._read(event, owed[0], Event.check, isolation)
        attempts: dict[str, Attempt] = {}
        deferred: list[Handler] = []
        attempt: Attempt | None
        for handler in owed:
            if earlier is not None:
                event.attempt = next_attempt(handler, earlier)
            if unreadable is not None:
                attempt = self._judge(handler, event, turn_of(handler, earlier), unreadable, 0.0)
            elif self._breakers.any and (wait := self._pause(handler, event, earlier)):
                attempt = postponed_by_breaker(handler, event, wait)
            elif handler.is_plain or self._is_called_alone(handler, event):
                attempt = self._deliver(handler, event, earlier, isolation)
            else:
                deferred.append(handler)
                continue
            if attempt is not None and isolation.lost:  # in the handler, or as the payload was read
                lost = Open(event, handlers, [handler], earlier or {}, {handler.name: attempt})
                raise TransactionLost({event.id: lost.alone()})
            if attempt is not None:
                attempts[handler.name] = attempt
        if not (attempts or deferred or earlier):
            outcomes.done.append(event.id)
            return False
        opened = Open(event, handlers, owed, earlier or {}, attempts)
        if deferred:
            self._defer(deferred, opened, isolation, outcomes)
        else:
            opened.close(outcomes)
        return bool(deferred)

    def _read(
        self, event: Event, handler: Handler, read: Callable[[Event], None], isolation: Isolation
    ) -> BaseException | None:
        """Check an event's payload, or load it, before `handler` is called; return what it raised."""
        self._in_hand.take_in_hand((event.id, handler.number))
        isolation.begin("", READ_LIMIT)
        try:
            self._call_in_time(read, event, READ_LIMIT)
            isolation.end()
        except BaseException as raised:  # noqa: BLE001, it is the fate of the event's deliveries
            error = self._undo(handler, event, raised, isolation)
            if isinstance(error, HandlerTimeout):
                return HandlerTimeout(f"The payload takes more than {READ_LIMIT:g} s to decode.")
            return error
        finally:
            self._now = self._clock()
        return None

    def _pause(self, handler: Handler, event: Event, earlier: dict[str, Earlier] | None) -> float:
        """Return the seconds for which an open circuit keeps the event waiting, or 0."""
        turn = turn_of(handler, earlier)
        by_hand = event.available_at is None and turn != "new"
        return self._breakers.remaining(handler.name, event.id, turn, by_hand=by_hand)

    def _is_called_alone(self, handler: Handler, event: Event) -> bool:
        """Return whether a handler of lists, or an async one, is called with this event at once.

        What has failed is tried again alone: if it always fails, it takes no others with it.
        """
        if handler.is_async:
            return self.calls is None and handler.atomic
        return handler.batch is not None and event.attempt > 1

    def _deliver(
        self,
        handler: Handler,
        event: Event,
        earlier: dict[str, Earlier] | None,
        isolation: Isolation,
    ) -> Attempt | None:
        """Call one handler with one event; return None if it succeeded."""
        self._in_hand.take_in_hand((event.id, handler.number))
        event.start_over()
        error, seconds = self._call(handler, event if handler.batch is None else [event], isolation)
        if error is None and not self._breakers.any:
            return None
        return self._judge(handler, event, turn_of(handler, earlier), error, seconds)

    def _judge(
        self,
        handler: Handler,
        event: Event,
        turn: Turn,
        error: BaseException | None,
        seconds: float,
        *,
        whole: Sequence[Event] = (),
    ) -> Attempt | None:
        """Tell the handler's circuit, and whoever wants to know, what came of a call; return it.

        A list that has failed as a `whole` is one failure to the circuit. An error that is final is so
        for one of its events, and nobody knows which: so each is tried again, by itself.
        """
        if isinstance(error, BatchFailed):
            error = error.errors.get(event)
        if error is None:
            if self._breakers.any and self._breakers.succeeded(handler.name):
                logger.warning("Circuit of %(handler)s is closed again.", {"handler": handler.name})
            return None
        self._contended = self._contended or is_contention(error)
        if self._on_error is not None:
            self._on_error(event, handler, error)
        if not isinstance(error, (Retry, Discard, *HOPELESS)):
            pause = self._breakers.failed(handler.name, (whole[0] if whole else event).id, turn)
            if pause:
                context = {"handler": handler.name, "seconds": round(pause)}
                logger.warning(
                    "Circuit of %(handler)s is open: its events wait %(seconds)s s, new ones less.",
                    context,
                    extra=context,
                )
        if len(whole) > 1 and handler.policy.is_final(error):
            error = of_a_list(error)
        return judge(handler, event, error, seconds)

    def _call(
        self, handler: Handler, argument: Event | list[Event], isolation: Isolation
    ) -> tuple[BaseException | None, float]:
        """Run one handler; return what it raised, and for how many seconds it ran."""
        error: BaseException | None = None
        limit = handler.policy.limit()
        self._called = True
        started = self._clock()
        isolation.begin(handler.name, limit)
        try:
            if limit is None:
                copy_context().run(handler.call, argument)
            else:
                self._call_in_time(handler.call, argument, limit)
            isolation.end()
        except BaseException as raised:  # noqa: BLE001, whatever it raises is its delivery's fate
            error = self._undo(handler, argument, raised, isolation)
        self._now = self._clock()
        seconds = self._now - started
        if seconds > self._commit_interval or self._slow:
            self._note_duration(handler.name, seconds)
        return error, seconds

    def _undo(
        self,
        handler: Handler,
        argument: Event | list[Event],
        raised: BaseException,
        isolation: Isolation,
    ) -> BaseException:
        """Take back what a handler did that raised; say what it died of."""
        if self._alarm is not None:
            self._alarm.stop()  # again: it may have rung while it was being stopped
        if isinstance(raised, BatchFailed):
            try:
                raised.check(argument if handler.batch else [])
                isolation.end()
            except Exception as error:  # noqa: BLE001, then all of the list has failed
                raised = error
            else:
                return raised
        isolation.undo()
        if type(raised) is KeyboardInterrupt and not self.daemon:
            raise raised
        return explain(raised, "" if isolation.unparsed else isolation.lost)

    def _call_in_time(
        self, function: Callable[[Any], object], argument: Event | list[Event], limit: float | None
    ) -> None:
        """Call a function, and interrupt it when its time is up.

        In a copy of the context, so that the language and the time zone that it activates, like all
        that it puts into context variables, end with it.
        """
        context = copy_context()
        if self._alarm is None or limit is None:
            context.run(function, argument)
            return
        try:
            self._alarm.start(limit)
            context.run(function, argument)
        finally:
            self._alarm.stop()

    def _note_duration(self, name: str, seconds: float) -> None:
        if seconds > self._commit_interval or name in self._slow:
            recent = (self._slow.get(name, seconds) + seconds) / 2
            self._slow[name] = recent
            if recent < self._commit_interval:
                self._slow.pop(name, None)

    # Several events

    def _defer(
        self, handlers: list[Handler], opened: Open, isolation: Isolation, outcomes: Outcomes
    ) -> None:
        """Note calls for the end of the batch, or for after its commit; but call a full list."""
        self._open.append(opened)
        for handler in handlers:
            call = Call(handler, opened.event.copy(), turn=turn_of(handler, opened.earlier))
            call.event.attempt = next_attempt(handler, opened.earlier)
            if handler.outlives and handler.policy.is_exhausted(call.event.attempt - 1):
                opened.attempts[handler.name] = worn_out(handler, call.event)
            elif not handler.atomic and outcomes.calls:  # one at a time: another pass calls it
                opened.owed = [other for other in opened.owed if other is not handler]
            elif not handler.atomic:
                opened.attempts[handler.name] = begun(call)
                outcomes.calls.append(call)
            elif handler.is_async:
                self._concurrent.append(Deferred(opened, call))
            else:
                waiting = self._lists.setdefault(handler.name, [])
                waiting.append(Deferred(opened, call))
                if len(waiting) == handler.batch:
                    self._call_list(self._lists.pop(handler.name), isolation)

    def _call_deferred(self, isolation: Isolation, outcomes: Outcomes) -> None:
        while self._lists:
            _, waiting = self._lists.popitem()
            self._call_list(waiting, isolation)
        if self._concurrent and self.calls is not None:
            self._call_concurrently(self.calls, isolation, outcomes)
        for opened in self._open:
            opened.close(outcomes)

    def _call_list(self, waiting: list[Deferred], isolation: Isolation) -> None:
        """Call a batch handler."""
        handler = waiting[0].call.handler
        events = [call.event for _, call in waiting]
        self._in_hand.take_in_hand(*[(event.id, handler.number) for event in events])
        error, seconds = self._call(handler, events, isolation)
        whole = () if isinstance(error, BatchFailed) else events
        lost: dict[int, Outcomes] = {}
        for opened, call in waiting:
            attempt = self._judge(handler, call.event, call.turn, error, seconds, whole=whole)
            if attempt is not None:
                opened.attempts[handler.name] = attempt
                lost[call.event.id] = Open(
                    call.event, opened.handlers, [handler], opened.earlier, {handler.name: attempt}
                ).alone()
        if isolation.lost:
            raise TransactionLost(lost)

    def _call_concurrently(self, side: Calls, isolation: Isolation, outcomes: Outcomes) -> None:
        """Call async handlers, and wait for those that are about as fast as the others."""
        for opened, call in self._concurrent:  # now: a running loop can't wait for our connection
            call.error = self._read(call.event, call.handler, Event.load, isolation)
            call.ended = call.error is not None
            if isolation.lost and (attempt := self.conclude(call)) is not None:
                attempts = {call.handler.name: attempt}
                lost = Open(call.event, opened.handlers, [call.handler], opened.earlier, attempts)
                raise TransactionLost({call.event.id: lost.alone()})
        calls = [call for _, call in self._concurrent]
        side.start(call for call in calls if not call.ended)
        first: float | None = LONGEST_WAIT
        if outcomes.count or len(self._open) > len({id(opened) for opened, _ in self._concurrent}):
            first = self._commit_interval
        if side.must_end:
            side.wait_for(calls, first=None, others=None)
        else:
            side.wait_for(calls, first=first, others=self._commit_interval)
        for opened, call in self._concurrent:
            name = call.handler.name
            if not call.ended:
                opened.attempts[name] = begun(call)
                outcomes.calls.append(call)
            elif (attempt := self.conclude(call)) is not None:
                opened.attempts[name] = attempt


def explain(raised: BaseException, lost: str) -> BaseException:
    """Return what a handler raised, or what tells better what it did."""
    if lost and not isinstance(raised, BrokenTransaction):
        return BrokenTransaction(lost)
    if type(raised) is RuntimeError and "durable atomic block" in str(raised):
        error = BrokenTransaction(
            "The handler uses atomic(durable=True), but shares the transaction in which its event is "
            "marked done. Register it with atomic=False: it then runs in no transaction but its own."
        )
        error.__cause__ = raised
        return error
    return raised


def of_a_list(raised: BaseException) -> Retry:
    """Return what stands for an error that is final, but of one event of a list: nobody knows which."""
    retry = Retry("An event of this list has failed for good; each is tried again by itself.")
    retry.__cause__ = raised
    return retry


def is_contention(error: BaseException) -> bool:
    """Return whether `error` is a deadlock or a lock timeout: others wait for what we hold."""
    cause = error.__cause__ or error
    return getattr(cause, "sqlstate", None) in {"40P01", "55P03"}
