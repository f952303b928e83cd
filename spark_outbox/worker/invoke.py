"""Call a handler in the batch's transaction; take back what it did if it raises."""

from collections.abc import Callable, Sequence
from contextvars import copy_context
from time import monotonic
from typing import Any

from spark_outbox.errors import BatchFailed, HandlerTimeout
from spark_outbox.events.event import Event
from spark_outbox.processes.guard import CallGuard
from spark_outbox.registry.handlers import Handler
from spark_outbox.worker.batch import Work
from spark_outbox.worker.isolation import Isolation, TransactionLost
from spark_outbox.worker.observed import Observed
from spark_outbox.worker.outcome import explain

READ_LIMIT = 30.0
"""Seconds that it may take to check or decode a payload, before any handler is called with it."""

Announce = Callable[..., None]
"""Takes pairs of an event's id and its handler's number: they are about to be called."""


class BatchLost(Exception):
    """A handler has ended the batch's transaction, and `error` says how. Nothing of the batch can be
    settled but `works`, each by itself."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error
        self.works: list[Work] = []


class Invoker:
    """Makes the calls of one batch. `inline` says that somebody waits for the end of it, and may press
    Ctrl-C."""

    def __init__(
        self,
        isolation: Isolation,
        guard: CallGuard,
        announce: Announce,
        observed: Observed,
        *,
        inline: bool,
    ) -> None:
        self._isolation = isolation
        self._observed = observed
        self._guard = guard
        self._announce = announce
        self._inline = inline

    def call(self, handler: Handler, event: Event) -> BaseException | None:
        """Call a handler with one event; return what it raised. Raises BatchLost."""
        if handler.is_async:  # while queries are possible
            error = self.read(Event.load, [handler], event)
            if error is not None:
                return error
        self._announce((event.id, handler.number))
        argument = event if handler.batch is None else [event]
        if self._observed.is_off:  # the shortest way, as this runs for each event
            return self._run(handler.call, argument, handler.name, handler.policy.limit())
        return self._call_observed(handler, [event], argument)

    def call_list(self, handler: Handler, events: list[Event]) -> BaseException | None:
        """Call a handler with a list of events; return what it raised. Raises BatchLost."""
        self._announce(*[(event.id, handler.number) for event in events])
        return self._call_observed(handler, events, events)

    def _call_observed(
        self, handler: Handler, events: list[Event], argument: Any
    ) -> BaseException | None:
        function = self._observed.function(handler, events)
        made = self._observed.made
        started = 0.0 if made is None else monotonic()
        try:
            error = self._run(function, argument, handler.name, handler.policy.limit())
        except BatchLost as lost:
            self._observed.explain(lost.error)
            raise
        finally:
            if made is not None:
                made.append((handler.name, events, events[0].attempt, started, monotonic() - started))
        if error is not None:
            self._observed.explain(error)
        return error

    def read(
        self, read: Callable[[Event], None], handlers: Sequence[Handler], event: Event
    ) -> BaseException | None:
        """Check an event's payload, or load it, before `handlers` are called; return what it raised."""
        self._announce((event.id, handlers[0].number))
        error = self._run(read, event, "", READ_LIMIT)
        if isinstance(error, HandlerTimeout):
            error = HandlerTimeout(f"The payload takes more than {READ_LIMIT:g} s to decode.")
        if error is not None:
            for handler in handlers:
                self._observed.refused(handler, event, error)
        return error

    def _run(
        self, function: Callable[[Any], object], argument: Any, name: str, limit: float | None
    ) -> BaseException | None:
        self._isolation.begin(name, limit)
        try:
            if limit is None:
                copy_context().run(function, argument)
            else:
                call_in_time(function, argument, limit, self._guard)
            self._isolation.end()
        except BaseException as raised:  # noqa: BLE001, whatever it raises is its delivery's fate
            return self._undo(raised, argument)
        return None

    def _undo(self, raised: BaseException, argument: Any) -> BaseException:
        """Take back what the function did, and return why."""
        if isinstance(raised, BatchFailed):
            try:
                raised.check(argument if isinstance(argument, list) else [])
                self._isolation.end()
            except Exception as error:  # noqa: BLE001, then all of the list has failed
                raised = error
            else:
                return raised
        try:
            self._isolation.undo()
        except TransactionLost as lost:
            self._pass_interrupt(raised)
            raise BatchLost(explain(raised, lost.reason)) from raised
        self._pass_interrupt(raised)
        return explain(raised)

    def _pass_interrupt(self, raised: BaseException) -> None:
        if self._inline and type(raised) is KeyboardInterrupt:
            raise raised


def call_in_time(
    function: Callable[[Any], object], argument: Any, limit: float | None, guard: CallGuard
) -> None:
    """Call a function, and interrupt it after `limit` seconds.

    In a copy of the context, so that the language and the time zone that it activates, like all that it
    puts into context variables, end with it.
    """
    context = copy_context()
    if limit is None:
        context.run(function, argument)
        return
    try:
        guard.start(limit)
        context.run(function, argument)
    finally:
        try:
            guard.stop()
        except HandlerTimeout:  # it has rung as it was about to be stopped, and would ring again
            guard.stop()
            raise
