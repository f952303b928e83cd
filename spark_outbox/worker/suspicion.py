"""Find the event that is at fault, when a batch can't be settled or costs the worker its connection."""

import logging
import random
from collections.abc import Callable

from spark_outbox.errors import ConnectionLost, describe
from spark_outbox.worker import booking, settle
from spark_outbox.worker.batch import Batch
from spark_outbox.worker.booking import Called
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.context import Context
from spark_outbox.worker.refusals import TIMES, Refused, Suspects

logger = logging.getLogger(__name__)

REFUSED_PAUSES = (0.1, 0.3)
"""Seconds before an event is handled again whose settling was refused for what may pass."""


class Suspicion:
    """One worker's. `pause` waits for some seconds, unless the worker is stopped."""

    def __init__(self, context: Context, claims: Claims, pause: Callable[[float], object]) -> None:
        self._context = context
        self._claims = claims
        self._pause = pause
        self._suspects = Suspects()
        self._convicted: list[Called] = []  # to count an attempt for, once there is a connection

    def clear(self, batch: Batch) -> None:
        """The batch went well."""
        if self._suspects:
            self._suspects.clear(batch.event_ids)

    def refused(self, batch: Batch, refused: Refused) -> bool:
        """After PostgreSQL has refused to settle a batch: doubt its events, or the only one.

        Return whether that event is settled now, or passed over. Otherwise handle them again.
        """
        event = batch.events[0]
        if not self._claims.careful or len(batch.events) > 1:
            details = {"events": len(batch.events), "error": describe(refused.error)}
            logger.warning(
                "PostgreSQL refused to settle %(events)s events (%(error)s): they are handled alone.",
                details,
                extra=details,
            )
            self._claims.doubt(batch)
            return False
        if not refused.may_pass:
            if not settle.write_unsettled(event.id, refused.error, using=self._context.using):
                self._claims.pass_over([event.id])
            return True
        if not self._suspects.is_at_fault(event.id):
            self._pause(random.uniform(*REFUSED_PAUSES))  # noqa: S311
            return False
        self._book(self._calls_of(batch), refused.error)
        return True

    def cut_off(self, batch: Batch) -> None:
        """After a lost connection: if that has always come with the same event, it is the event's fault.

        From now on events are handled one by one, so that the next loss has a single suspect. There is
        no current call any more if the connection was lost as the event was settled, through a deferred
        trigger say. Before it was dispatched there is none yet: then it is nobody's fault.
        """
        if not batch.events:
            return
        called = self._context.guard.in_hand()
        if not called and len(batch.events) == 1 and batch.reached:
            called = self._calls_of(batch)
        at_fault = {event_id for event_id in dict(called) if self._suspects.is_at_fault(event_id)}
        self._convicted = [pair for pair in called if pair[0] in at_fault]
        self._claims.doubt(batch)

    def book(self) -> None:
        """Count an attempt for what has cost the worker its connection, now that it has another."""
        convicted, self._convicted = self._convicted, []
        if convicted:
            error = ConnectionLost(
                f"The worker's database connection was lost {TIMES} times in a row while this handler "
                "ran: by a limit such as transaction_timeout, by pg_terminate_backend(), or since the "
                "server can't bear its query. The server's log says why."
            )
            self._book(convicted, error)

    def _book(self, called: list[Called], error: Exception) -> None:
        stuck = booking.book(called, error, self._context.registry, using=self._context.using)
        self._claims.pass_over(stuck)

    def _calls_of(self, batch: Batch) -> list[Called]:
        """Return the calls that were made with the only event of a batch.

        If it is the event's fault, nobody knows which handler's; but of none that was not called, as one
        that is detached. If none was, each that is owed is charged: else the event would stay for ever.
        """
        (event,) = batch.events
        if event.id in batch.passed:
            return []
        owed = batch.owed(event, self._context.registry.handlers_for(event.group))
        uncalled = {
            name for work in batch.works for name, result in work.results.items() if not result.counts
        }
        called = [handler for handler in owed if handler.name not in uncalled]
        return [(event.id, handler.number) for handler in called or owed]
