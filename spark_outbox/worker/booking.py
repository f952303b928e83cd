"""Count attempts that nobody was left to count: their process has died, or their connection was lost."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from django.db import transaction

from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Handler, Kind, Registry
from spark_outbox.store import claiming, detached, reading, sessions, settling, waking
from spark_outbox.store.detached import Running
from spark_outbox.worker import settle
from spark_outbox.worker.batch import Work, known_deliveries, next_attempt
from spark_outbox.worker.outcome import failure, of_a_list
from spark_outbox.worker.refusals import Refused, persevere

Called = tuple[int, int]
"""An event's id and its handler's number."""


def book(
    called: Sequence[Called],
    error: BaseException | None,
    registry: Registry,
    *,
    session: int = 0,
    is_guess: bool = False,
    using: str,
) -> list[int]:
    """Count attempts that ended with `error`, and with the connection on which they were made.

    `called` has what the worker was calling, `session` is that of the worker, 0 if it had none. Each
    attempt of a session is counted once; if `error` is a guess, it does not replace another. Waits
    for up to CRASH_PATIENCE until the server sees that the connection is gone. Without an error nobody
    is to blame, as the process was stopped: detached handlers are put back, and nothing is counted.
    Returns the events that can't be marked as failed either.
    """
    booking = _Booking(error, registry, session, is_guess, len(called) > 1, using)
    left = list(called)
    deadline = time.monotonic() + settle.CRASH_PATIENCE
    while left and time.monotonic() < deadline:
        left = [each for each in left if not booking.book(*each)]
        if left:
            time.sleep(settle.PAUSE)
    if left and error is not None:
        settle.log_uncounted([event_id for event_id, _ in left], type(error).__qualname__)
    return booking.stuck


@dataclass(slots=True)
class _Booking:
    """One end of several calls at once."""

    error: BaseException | None
    registry: Registry
    session: int
    is_guess: bool
    together: bool
    """An event that was called with others need not be the one that is at fault: it is tried again by
    itself."""
    using: str
    stuck: list[int] = field(default_factory=list)
    counted: set[Running] = field(default_factory=set)
    """Attempts of this session that others have counted."""

    def book(self, event_id: int, number: int) -> bool:
        """Count one attempt; return whether that is settled, or to be tried again.

        If PostgreSQL refuses, let the event fail, or note that it is stuck.
        """
        handler = self.registry.handlers[number]
        try:
            return persevere(partial(self._book, event_id, handler), using=self.using)
        except Refused as refused:
            if not settle.write_unsettled(event_id, refused.error, using=self.using):
                self.stuck.append(event_id)
        return True

    def _book(self, event_id: int, handler: Handler) -> bool:
        """Until the server has seen that the connection is gone, the event's row is locked, and the
        session is: return False."""
        using, error = self.using, self.error
        ours = Running(event_id, handler.name, self.session)
        with transaction.atomic(using=using):
            state = self._put_back(ours, handler.kind)
            if state != "owed" or error is None:
                return state != "held"
            if not claiming.claim_one(event_id, using=using):
                return not (claiming.is_unfinished(event_id, using=using) or self._is_guessed(ours))
            (row,) = reading.events_by_id([event_id], using=using)
            event = Event.from_row(row, References())
            handlers = self.registry.handlers_for(event.group)
            found = settling.deliveries([event_id], using=using).get(event_id, {})
            stored = known_deliveries(found, handlers)
            event.attempt = next_attempt(handler, stored)
            if self.together:
                error = of_a_list(handler, error)
            results = {handler.name: failure(handler, event, error, 0.0)}
            settle.write([Work(event, handlers, stored, (), results)], using=using)
            if self.session:
                detached.sign(ours, using=using)
                sessions.forget_call([self.session], using=using)
        return True

    def _is_guessed(self, ours: Running) -> bool:
        """Return whether somebody has just counted this attempt, with a guess for its error."""
        holder, _ = detached.held_by(ours.event_id, ours.handler, using=self.using)
        return not self.is_guess and holder == self.session != 0

    def _put_back(self, ours: Running, kind: Kind) -> Literal["owed", "held", "over"]:
        """Make the delivery that a worker of this `session` was at pending, if it is `running`.

        A worker that finds what a dead one has left counts it, too, but can only guess what it died of:
        so that is undone, in order to count it with its cause. But it is "over", once another attempt
        has begun. It is "held" until the server has seen that the worker is gone.
        """
        using, session, to_settle = self.using, self.session, self.error is not None
        holder, is_running = detached.held_by(ours.event_id, ours.handler, using=using)
        done = True
        if is_running and (holder == session or not session or kind is not Kind.DETACHED):
            running = ours._replace(session=holder)
            done = sessions.is_session_gone(holder, using=using) and bool(
                detached.take_back([running], to_settle=to_settle, using=using)
            )
        elif holder and holder == session:
            if self.is_guess:
                return "over"
            self.counted.add(ours)
            done = detached.undo_count(ours, to_settle=to_settle, using=using)
            if done and not to_settle:
                waking.wake_others(using=using)  # they need not have known of it
        elif session and (kind is Kind.DETACHED or ours in self.counted):
            return "over"
        return "owed" if done else "held"
