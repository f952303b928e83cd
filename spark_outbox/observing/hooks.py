"""Signals of what happens to events, for metrics and traces. They cost nothing while nobody listens.

    emission_started       emission: before events are written in one statement; it may add headers
    emission_finished      emission: which of them are new; or `error` says why nothing was written
    event_emitted          group, key, using: in the emitter's transaction, for each event that is new
    delivery_started       call: just before a handler is called
    delivery_finished      call: after the commit of what it came to, or after its rollback
    calls_settled          using, calls, statuses, others: the ends of many calls at once, for those that
                           count: much cheaper than the two before
    batch_settled          using, events, seconds, commit_seconds, calls: after the commit
    worker_state_changed   using, state, reason: ready, asleep, awake, disconnected or stopped; why it
                           woke, or the database's error

A receiver that raises is logged, and changes nothing. It must not use the connection to the outbox,
where a failure would abort the transaction of others: its queries are refused. It is a plain function:
an async one can't be called where an event loop runs.
"""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.db import connections
from django.dispatch import Signal

from spark_outbox.events.encoding import dump
from spark_outbox.events.event import Event

logger = logging.getLogger(__name__)

emission_started = Signal()
emission_finished = Signal()
event_emitted = Signal()
delivery_started = Signal()
delivery_finished = Signal()
calls_settled = Signal()
batch_settled = Signal()
worker_state_changed = Signal()

OUTCOMES = {"done": "handled", "failed": "failed", "pending": "retried", "discarded": "discarded"}
"""What a call came to, by the status of its delivery after it."""


class ReceiverQuery(RuntimeError):
    """A receiver of one of these signals has used the connection of those that it observes."""


class Outgoing(Protocol):
    """An event that is ready to be written."""

    @property
    def group(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def payload(self) -> str:
        """As JSON."""

    @property
    def headers(self) -> str:
        """Those that the emitter has given, as JSON."""


@dataclass(eq=False, slots=True, weakref_slot=True)
class Emission:
    """One statement that writes events into the outbox. Its two signals are sent in the same context."""

    events: Sequence[Outgoing]
    using: str
    new: Sequence[Outgoing] = ()
    """Those that were written. The others are duplicates."""
    error: BaseException | None = None
    _added: list[Mapping[str, str]] = field(default_factory=list)

    def add(self, headers: Mapping[str, str]) -> None:
        """Add headers to all events; but none of these to an event whose emitter has given one of them.
        Baggage of several receivers is joined."""
        self._added.append(headers)

    def completed(self, headers: str) -> str:
        """Return an event's own headers, as JSON, with those that were added."""
        own = json.loads(headers)
        added: dict[str, str] = {}
        for each in self._added:
            if own.keys().isdisjoint(each):
                before = added.get("baggage")
                added.update(each)
                if before and "baggage" in each:
                    added["baggage"] = f"{before},{each['baggage']}"
        if not added:
            return headers
        text = dump(added, root="headers")
        return f"{text[:-1]},{headers[1:]}" if own else text

    @contextmanager
    def under_way(self) -> Iterator["Emission"]:
        """Surround the statement."""
        send(emission_started, self.using, emission=self)
        try:
            yield self
        except BaseException as error:
            self.error = error
            raise
        finally:
            send(emission_finished, self.using, emission=self)


@dataclass(eq=False, slots=True, weakref_slot=True)
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


def observes_emissions() -> bool:
    return bool(emission_started.receivers or emission_finished.receivers)


def emitted(events: Iterable[Outgoing], using: str) -> None:
    """Tell of events that were written."""
    if event_emitted.receivers:
        for event in events:
            send(event_emitted, using, group=event.group, key=event.key, using=using)


def observes_calls() -> bool:
    return bool(delivery_started.receivers or delivery_finished.receivers)


def send(signal: Signal, using: str, /, **arguments: Any) -> None:
    """Send a signal if anybody listens. Django logs receivers that raise."""
    if not signal.receivers:
        return
    connection = connections[using]
    must_roll_back = connection.needs_rollback
    connection.execute_wrappers.insert(0, _refuse)  # before those of the worker, which take savepoints
    try:
        signal.send_robust(sender=None, **arguments)
    except Exception:
        logger.exception("A receiver of spark_outbox's signals can't be called.")  # async, in a loop
    finally:
        connection.execute_wrappers.remove(_refuse)
        connection.needs_rollback = must_roll_back  # save() that is refused sets it


def _refuse(*_: Any) -> Any:
    raise ReceiverQuery(
        "A receiver of spark_outbox's signals must not use this database connection: a failure would "
        "abort the transaction of others. Let it collect what it needs, and query elsewhere."
    )
