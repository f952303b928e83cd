"""Signals of what happens to events, for metrics and traces. They cost nothing while nobody listens.

    event_emitting         emission: before an event is written; receivers may add headers
    event_emitted          group, key, using, emission: in the emitter's transaction, for each event
                           that is new
    delivery_started       call: just before a handler is called
    delivery_finished      call: after the commit of what it came to, or after its rollback
    calls_settled          using, calls, statuses, others: the ends of many calls at once, for those that
                           count: much cheaper than the two before
    batch_settled          using, events, seconds, commit_seconds: after the commit
    worker_state_changed   using, state, reason: ready, asleep, awake, disconnected or stopped; why it
                           woke, or the database's error

A receiver that raises is logged, and changes nothing. It must not use the connection to the outbox,
where a failure would abort the transaction of others: but for `event_emitting`, its queries are refused.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any

from django.db import connections
from django.dispatch import Signal

from spark_outbox.events.event import Event

event_emitting = Signal()
event_emitted = Signal()
delivery_started = Signal()
delivery_finished = Signal()
calls_settled = Signal()
batch_settled = Signal()
worker_state_changed = Signal()


class ReceiverQuery(RuntimeError):
    """A receiver of one of these signals has used the connection of those that it observes."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Emission:
    """An event on its way into the outbox. It is the same object in `event_emitted`, so a receiver can
    keep what belongs to it in a WeakKeyDictionary: the emission of a duplicate just goes away.

    Nothing of the event may be changed: its emitter may emit it again.
    """

    event: Event
    headers: dict[str, Any]
    """What is going to be stored."""

    def add(self, headers: Mapping[str, str]) -> None:
        """Add headers, but for those that the emitter has given. Baggage of several receivers is
        joined."""
        for name, value in headers.items():
            if name not in self.event.headers:
                before = self.headers.get(name) if name == "baggage" else None
                self.headers[name] = f"{before},{value}" if before else value


@dataclass(eq=False, slots=True)
class HandlerCall:
    """One call of a handler, with an event or a list of events.

    `delivery_finished` is sent in a copy of the context in which the call ended, and that began with
    `delivery_started`. So a value that a receiver puts into a context variable is there in the handler,
    and in the receiver of the end.
    """

    handler: str
    events: Sequence[Event]
    using: str
    started_at: float = field(default_factory=time.time)
    """Seconds since 1970."""
    seconds: float = 0.0
    error: BaseException | None = None
    """What ended the call, if it did not return."""
    statuses: Mapping[int, str] = field(default_factory=dict)
    """The deliveries' next statuses, by event. An event that is not in it was rolled back with its
    batch, and will be handled again."""
    _context: Context | None = None

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Surround the call."""
        self.started_at, started = time.time(), time.monotonic()
        try:
            send(delivery_started, self.using, call=self)
            yield
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.seconds = time.monotonic() - started
            self._context = copy_context()

    def refuse(self, error: BaseException) -> None:
        """Note that the payload can't be read, so that the handler is not called."""
        self.error = error
        self._context = copy_context()
        self._context.run(send, delivery_started, self.using, call=self)

    def finish(self, statuses: Mapping[int, str]) -> None:
        """Tell what the call came to."""
        self.statuses = statuses
        context = self._context or copy_context()
        context.run(send, delivery_finished, self.using, call=self)
        self._context = None


Made = tuple[str, Sequence[Event], int, float, float]
"""A call, in `calls_settled`: the handler, the events, the attempt; when it began, by the monotonic
clock, and the seconds that it took. It began at 0 if the payload could not be read: nothing was called.

`statuses` has the next statuses of deliveries, by event and handler, and `others` that of all others; it
is empty if they were rolled back."""


def emitting(event: Event) -> Emission | None:
    """Tell of an event that is about to be written; return None if nobody listens."""
    if not event_emitting.receivers:
        return None
    emission = Emission(event, dict(event.headers))
    send(event_emitting, emission=emission)
    return emission


def emitted(emission: Emission | None, group: str, key: str, using: str) -> None:
    """Tell of an event that was written."""
    send(event_emitted, using, group=group, key=key, using=using, emission=emission)


def observes_calls() -> bool:
    return bool(delivery_started.receivers or delivery_finished.receivers)


def send(signal: Signal, using: str = "", /, **arguments: Any) -> None:
    """Send a signal if anybody listens. Django logs receivers that raise."""
    if not signal.receivers:
        return
    if not using:
        signal.send_robust(sender=None, **arguments)
        return
    wrappers = connections[using].execute_wrappers
    wrappers.insert(0, _refuse)  # before those of the worker, which take savepoints
    try:
        signal.send_robust(sender=None, **arguments)
    finally:
        wrappers.remove(_refuse)


def _refuse(*_: Any) -> Any:
    raise ReceiverQuery(
        "A receiver of spark_outbox's signals must not use this database connection: a failure would "
        "abort the transaction of others. Let it collect what it needs, and query elsewhere."
    )
