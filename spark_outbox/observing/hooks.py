"""Signals of what happens to events, for metrics and traces. They cost nothing while nobody listens.

    event_emitting         event: before it is written; receivers may add headers
    event_emitted          group, key, using: in the emitter's transaction, for each event that is new
    delivery_started       call: just before a handler is called
    delivery_finished      call: after the commit of what it came to, or after its rollback
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
batch_settled = Signal()
worker_state_changed = Signal()


class ReceiverQuery(RuntimeError):
    """A receiver of one of these signals has used the connection of those that it observes."""


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
        started = time.monotonic()
        send(delivery_started, self.using, call=self)
        try:
            yield
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.seconds = time.monotonic() - started
            self._context = copy_context()

    def finish(self, statuses: Mapping[int, str]) -> None:
        """Tell what the call came to."""
        self.statuses = statuses
        context = self._context or copy_context()
        context.run(send, delivery_finished, self.using, call=self)
        self._context = None


def observes_calls() -> bool:
    return bool(delivery_started.receivers or delivery_finished.receivers)


def send(signal: Signal, using: str = "", /, **arguments: Any) -> None:
    """Send a signal if anybody listens. Django logs receivers that raise."""
    if not signal.receivers:
        return
    if not using:
        signal.send_robust(sender=None, **arguments)
        return
    with connections[using].execute_wrapper(_refuse):
        signal.send_robust(sender=None, **arguments)


def _refuse(*_: Any) -> Any:
    raise ReceiverQuery(
        "A receiver of spark_outbox's signals must not use this database connection: a failure would "
        "abort the transaction of others. Let it collect what it needs, and query elsewhere."
    )
