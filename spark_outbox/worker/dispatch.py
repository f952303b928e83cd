"""Hand the events of one batch to their handlers: one after the other, in lists, or side by side.

Runs no SQL of its own. Everything that comes of it is in the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

from spark_outbox.errors import BatchFailed
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler, Kind, Matching
from spark_outbox.worker.batch import Batch, Call, Work, next_attempt, turn_of
from spark_outbox.worker.context import Context
from spark_outbox.worker.event_loop import EventLoop
from spark_outbox.worker.invoke import BatchLost, Invoker
from spark_outbox.worker.judge import held_back, note_success, result_of
from spark_outbox.worker.observed import Observed
from spark_outbox.worker.outcome import RUNNING, Result, is_contention, worn_out
from spark_outbox.worker.savepoints import Savepoints

PLAIN = Kind.PLAIN  # a global is looked up sooner than an attribute

LONGEST_WAIT = 1.0
"""Seconds for which a batch with nothing else to settle waits for the first of its async handlers."""


class Deferred(NamedTuple):
    """A call that is made at the end of the batch."""

    work: Work
    call: Call


class Dispatch:
    """The calls of one batch.

    Locks that a handler took are held until the batch commits, so nobody shall wait there for a
    stranger's slow handler: one whose recent runs outlast the commit interval only starts a batch.

    Without a `loop`, async handlers are called like others, one after the other.
    """

    def __init__(
        self,
        batch: Batch,
        context: Context,
        *,
        invoker: Invoker,
        observed: Observed,
        savepoints: Savepoints,
        loop: EventLoop | None,
    ) -> None:
        self._batch = batch
        self._context = context
        self._clock = context.clock
        self._interval = context.settings.COMMIT_INTERVAL
        self._failed_head = context.settings.FAILED_HEAD
        self._experience = context.experience
        self._breakers = context.experience.breakers
        self._savepoints = savepoints
        self._invoker = invoker
        self._observed = observed
        self._loop = loop
        self._called = False  # the transaction may hold a handler's locks
        self._contended = False  # a handler lost a fight for locks: others wait for ours
        self._deferred: list[Work] = []
        self._lists: dict[str, list[Deferred]] = {}  # by the name of a batch handler
        self._concurrent: list[Deferred] = []
        self._now = context.clock()  # the end of the last call

    def run(self) -> None:
        """Handle one event after the other, until the commit interval is over.

        Raises BatchLost. The guard's note of what is being called stays, for the caller to read then.
        """
        batch, stop = self._batch, self._context.stop
        handlers_for = self._context.registry.handlers_for
        slow = self._experience.slow
        deadline = self._now + self._interval
        for event in batch.events:
            if event.ordering_key in batch.blocked:
                batch.reached += 1
                continue
            handlers = handlers_for(event.group)
            if slow and self._called and any(handler.name in slow for handler in handlers):
                batch.cut = True  # these can only start a batch
                break
            if not handlers.are_plain and self._lacks_room(handlers):
                batch.pass_by(event)
            else:
                self._handle(event, handlers)
            batch.reached += 1
            if (
                self._now >= deadline
                or self._savepoints.are_used_up
                or self._contended
                or batch.calls
                or stop.is_set
            ):
                batch.cut = True
                break
        if self._deferred:
            self._call_deferred()

    def abandon(self) -> None:
        """After a rollback: cancel calls that are under way, as others will handle their events."""
        if self._loop is not None and self._concurrent:
            self._loop.abandon(call for _, call in self._concurrent)
        self._observed.take(call for _, call in self._concurrent)

    def _lacks_room(self, handlers: Matching) -> bool:
        return self._loop is not None and self._loop.lacks_room(handlers, begun=len(self._concurrent))

    # One event

    def _handle(self, event: Event, handlers: Matching) -> None:
        """Call the handlers that one event owes."""
        batch = self._batch
        if not handlers:
            batch.unhandled.append(event.id)
            return
        stored = batch.stored.get(event.id)
        is_first, owed = event.attempt == 1, handlers if stored is None else batch.owed(event, handlers)
        results = batch.put_aside(event, owed) if batch.paused else {}
        calls = [handler for handler in owed if handler.name not in results] if results else owed
        unreadable = None if event.is_simple or not calls else self._check(event, calls, handlers)
        deferred: list[Handler] = []
        result: Result | None
        for handler in calls:
            if not is_first:
                event.attempt = next_attempt(handler, stored or {})
            if unreadable is not None:
                result = self._conclude(Call(handler, event, turn_of(handler, stored), unreadable))
            elif self._breakers.any and (held := held_back(handler, event, stored, self._context)):
                result = held
            elif handler.kind is PLAIN or self._is_called_alone(handler, event):
                result = self._deliver(handler, event, handlers)
            else:
                deferred.append(handler)
                continue
            if result is not None:
                results[handler.name] = result
        if not (results or deferred or stored):
            batch.done.append(event.id)
            return
        work = Work(event, handlers, stored or {}, owed, results)
        if deferred:
            self._defer(deferred, work)
        else:
            self._batch.close(work)
        if event.ordering_key is not None and (deferred or work.holds_up(self._failed_head)):
            batch.blocked.add(event.ordering_key)

    def _check(self, event: Event, calls: Sequence[Handler], handlers: Matching) -> BaseException | None:
        """Check an event's payload before `calls` are made; return what is wrong with it."""
        try:
            return self._invoker.read(Event.check, calls, event)
        except BatchLost as lost:
            self._salvage(lost, Call(calls[0], event), handlers)
            raise
        finally:
            self._now = self._clock()

    def _is_called_alone(self, handler: Handler, event: Event) -> bool:
        """Return whether a handler of lists, or an async one, is called with this event at once.

        A list handler gets an event that has failed by itself: if it always fails, it takes no others
        with it.
        """
        if handler.kind is Kind.ASYNC:
            return self._loop is None
        return handler.kind is Kind.LIST and event.attempt > 1

    def _deliver(self, handler: Handler, event: Event, handlers: Matching) -> Result | None:
        """Call one handler with one event; return None if it simply succeeded."""
        if len(handlers) > 1:
            event.start_over()  # no handler sees what another made of the payload
        self._called = True
        started = self._clock()
        try:
            error = self._invoker.call(handler, event)
        except BatchLost as lost:
            seconds = self._note_duration(handler, started)
            self._salvage(lost, Call(handler, event, seconds=seconds), handlers)
            raise
        seconds = self._note_duration(handler, started)
        if error is None:
            if self._breakers.any:
                note_success(handler, self._context)
            return None
        turn = turn_of(handler, self._batch.stored.get(event.id))
        return self._conclude(Call(handler, event, turn, error, seconds))

    def _note_duration(self, handler: Handler, started: float) -> float:
        self._now = self._clock()
        seconds = self._now - started
        if seconds > self._interval or self._experience.slow:
            self._experience.note_duration(handler.name, seconds, self._interval)
        return seconds

    def _conclude(self, call: Call, *, together: Sequence[Event] = ()) -> Result | None:
        self._contended = self._contended or (call.error is not None and is_contention(call.error))
        return result_of(call, self._context, together=together)

    def _salvage(
        self, lost: BatchLost, call: Call, handlers: Sequence[Handler], *, together: Sequence[Event] = ()
    ) -> None:
        """Keep the result of the call that has cost the batch its transaction."""
        stored = self._batch.stored.get(call.event.id, {})
        call.event.attempt = next_attempt(call.handler, stored)
        call.error, call.turn = lost.error, turn_of(call.handler, stored)
        if (result := self._conclude(call, together=together)) is not None:
            results = {call.handler.name: result}
            lost.works.append(Work(call.event, handlers, stored, [call.handler], results))

    # Several events

    def _defer(self, handlers: list[Handler], work: Work) -> None:
        """Note calls for the end of the batch, or for after its commit; but call a full list."""
        self._deferred.append(work)
        for handler in handlers:
            call = Call(handler, work.event.copy(), turn_of(handler, work.stored))
            call.event.attempt = next_attempt(handler, work.stored)
            if handler.kind.outlives and handler.policy.is_exhausted(call.event.attempt - 1):
                work.results[handler.name] = worn_out(handler, call.event)
            elif handler.kind is Kind.DETACHED:
                if self._batch.calls:  # one at a time: another batch calls it
                    work.owed = [other for other in work.owed if other is not handler]
                else:
                    self._outlive(Deferred(work, call))
            elif handler.kind is Kind.ASYNC:
                self._concurrent.append(Deferred(work, call))
            else:
                waiting = self._lists.setdefault(handler.name, [])
                waiting.append(Deferred(work, call))
                if len(waiting) == handler.batch:
                    self._call_list(self._lists.pop(handler.name))

    def _outlive(self, deferred: Deferred) -> None:
        """Begin a call after the commit, or let it go on."""
        work, call = deferred
        work.results[call.handler.name] = RUNNING
        self._batch.calls.append(call)

    def _call_deferred(self) -> None:
        while self._lists:
            _, waiting = self._lists.popitem()
            self._call_list(waiting)
        if self._concurrent and self._loop is not None:
            self._call_concurrently(self._loop)
        for work in self._deferred:
            self._batch.close(work)

    def _call_list(self, waiting: list[Deferred]) -> None:
        """Call a batch handler."""
        handler = waiting[0].call.handler
        events = [call.event for _, call in waiting]
        self._called = True
        started = self._clock()
        try:
            error = self._invoker.call_list(handler, events)
        except BatchLost as lost:
            seconds = self._note_duration(handler, started)
            for work, call in waiting:
                call.seconds = seconds
                self._salvage(lost, call, work.handlers, together=events)
            raise
        seconds = self._note_duration(handler, started)
        together = () if isinstance(error, BatchFailed) else events
        for work, call in waiting:
            call.error, call.seconds = error, seconds
            if (result := self._conclude(call, together=together)) is not None:
                work.results[handler.name] = result

    def _call_concurrently(self, loop: EventLoop) -> None:
        """Call async handlers, and wait for those that are about as fast as the others."""
        for work, call in self._concurrent:  # now: a running loop can't wait for our connection
            try:
                call.error = self._invoker.read(Event.load, [call.handler], call.event)
            except BatchLost as lost:
                self._salvage(lost, call, work.handlers)
                raise
            call.has_ended = call.error is not None
        calls = [call for _, call in self._concurrent]
        loop.start(call for call in calls if not call.has_ended)
        if loop.must_end:
            loop.wait_for(calls, first=None, others=None)
        else:
            waiting = {id(work) for work, _ in self._concurrent}
            more = self._batch.count or len(self._deferred) > len(waiting)
            loop.wait_for(calls, first=self._interval if more else LONGEST_WAIT, others=self._interval)
        for work, call in self._concurrent:
            if not call.has_ended:
                self._outlive(Deferred(work, call))
                continue
            self._observed.take([call])
            if (result := self._conclude(call)) is not None:
                work.results[call.handler.name] = result
