"""The calls of one batch, for those that listen to the signals of observing/hooks.py."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from spark_outbox.events.event import Event
from spark_outbox.observing import hooks
from spark_outbox.observing.hooks import HandlerCall, Made
from spark_outbox.registry.handlers import Handler
from spark_outbox.worker.batch import Call, Work
from spark_outbox.worker.context import Context


class Observed:
    """Collects calls, and says what they came to once that is certain."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._is_on = hooks.observes_calls()
        self._calls: list[HandlerCall] = []
        self.made: list[Made] | None = [] if hooks.calls_settled.receivers else None
        """Calls that have ended, for those that count; None if nobody does."""
        self.is_off = not self._is_on and self.made is None
        """Nobody listens."""

    @property
    def calls(self) -> list[HandlerCall]:
        """Those whose result is not certain yet."""
        return list(self._calls)

    def function(self, handler: Handler, events: Sequence[Event]) -> Callable[[Any], object]:
        """Return the function to call for `handler.call`."""
        if not self._is_on:
            return handler.call
        call = HandlerCall(handler.name, events, self._using)
        self._calls.append(call)
        return surround(call, handler.call)

    def refused(self, handler: Handler, event: Event, error: BaseException) -> None:
        """Note that a payload could not be read, so that the handler was not called with it."""
        if self._is_on:
            call = HandlerCall(handler.name, [event], self._using)
            self._calls.append(call)
            call.refuse(error)
        if self.made is not None:
            self.made.append((handler.name, [event], event.attempt, 0.0, 0.0))

    def explain(self, error: BaseException) -> None:
        """Note the error of the last call as its delivery has it."""
        if self._calls:
            self._calls[-1].error = error

    def take(self, calls: Iterable[Call]) -> None:
        """Collect async calls that end with the batch."""
        for call in calls:
            if call.observed is not None:
                call.observed.error = call.error
                self._calls.append(call.observed)
                call.observed = None
            if self.made is not None and call.started:
                self.made.append(_made(call))

    def settled(self, works: Iterable[Work]) -> None:
        """After the commit: all that is not in `works` simply succeeded."""
        if self._calls or self.made:
            self._finish(works, "done")

    def undone(self, but: Iterable[Work] = ()) -> None:
        """After a rollback, in which only these `works` were settled."""
        if self._calls or self.made:
            self._finish(but, "")

    def _finish(self, works: Iterable[Work], others: str) -> None:
        results = {work.event.id: work.results for work in works}
        calls, self._calls = self._calls, []
        for call in calls:
            statuses = {}
            for event in call.events:
                result = results.get(event.id, {}).get(call.handler)
                if status := result.status if result else others:
                    statuses[event.id] = status
            call.finish(statuses)
        if self.made:
            made, self.made = self.made, []
            by_call = {
                (event_id, name): result.status
                for event_id, of_event in results.items()
                for name, result in of_event.items()
            }
            _send_made(made, by_call, others, self._using)


class Timing:
    """Measures one batch, for `batch_settled`; does nothing if nobody listens."""

    def __init__(self, context: Context) -> None:
        self._using = context.using
        self._clock = context.clock if hooks.batch_settled.receivers else None
        self._started = self._settles_since = 0.0

    def start(self) -> None:
        """The events are claimed."""
        if self._clock is not None:
            self._started = self._clock()

    def settle(self) -> None:
        """The handlers were called: now results are written and committed."""
        if self._clock is not None:
            self._settles_since = self._clock()

    def end(self, events: int, calls: Sequence[HandlerCall]) -> None:
        """It is committed, and with it what these calls came to."""
        if self._clock is not None:
            now = self._clock()
            hooks.send(
                hooks.batch_settled,
                self._using,
                using=self._using,
                events=events,
                seconds=now - self._started,
                commit_seconds=now - self._settles_since,
                calls=calls,
            )


def surround(call: HandlerCall | None, function: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return a function that makes the call, observed."""
    if call is None:
        return function

    def run(argument: Any) -> None:
        with call.under_way():
            function(argument)

    return run


def observe(call: Call, using: str) -> None:
    """Before a call that goes on by itself: observe it, if anybody does."""
    if hooks.observes_calls():
        call.observed = HandlerCall(call.handler.name, [call.event], using)


def finish(call: Call, using: str) -> None:
    """A call that went on by itself has been settled, or was given up."""
    if call.result is not None and hooks.calls_settled.receivers:
        _send_made([_made(call)], {}, call.result.status, using)
    if call.observed is not None:
        observed, call.observed = call.observed, None
        observed.error = call.error
        observed.finish({call.event.id: call.result.status} if call.result else {})


def _made(call: Call) -> Made:
    return call.handler.name, [call.event], call.event.attempt, call.started, call.seconds


def _send_made(
    calls: Sequence[Made], statuses: Mapping[tuple[int, str], str], others: str, using: str
) -> None:
    arguments = {"calls": calls, "statuses": statuses, "others": others}
    hooks.send(hooks.calls_settled, using, using=using, **arguments)
