"""Say what the result of a call is, and learn from it; and whether an open circuit prevents it."""

import logging
from collections.abc import Mapping, Sequence

from spark_outbox.errors import BatchFailed, Discard, Retry
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler
from spark_outbox.registry.policy import HOPELESS
from spark_outbox.store.settling import Stored
from spark_outbox.worker.batch import Call, turn_of
from spark_outbox.worker.context import Context
from spark_outbox.worker.outcome import Result, failure, of_a_list, put_off

logger = logging.getLogger(__name__)


def held_back(
    handler: Handler, event: Event, stored: Mapping[str, Stored] | None, context: Context
) -> Result | None:
    """Return the result of a call that an open circuit prevents; None if it is to be made."""
    turn = turn_of(handler, stored)
    by_hand = event.available_at is None and turn != "new"
    wait = context.experience.breakers.remaining(handler.name, event.id, turn, by_hand=by_hand)
    return put_off(wait) if wait else None


def result_of(call: Call, context: Context, *, together: Sequence[Event] = ()) -> Result | None:
    """Return the result of a call that has ended; None if it simply succeeded.

    `together` are the events of a list that has failed as a whole: one failure to the circuit.
    """
    handler, event, error = call.handler, call.event, call.error
    if isinstance(error, BatchFailed):
        error = error.errors.get(event)
    if error is None:
        note_success(handler, context)
        return None
    if context.on_error is not None:
        context.on_error(event, handler, error)
    if not isinstance(error, (Retry, Discard, *HOPELESS)):
        _count_failure(call, together[0] if together else event, context)
    if len(together) > 1:
        error = of_a_list(handler, error)
    return failure(handler, event, error, call.seconds)


def note_success(handler: Handler, context: Context) -> None:
    breakers = context.experience.breakers
    if breakers.any and breakers.succeeded(handler.name):
        logger.warning("Circuit of %(handler)s is closed again.", {"handler": handler.name})


def _count_failure(call: Call, event: Event, context: Context) -> None:
    pause = context.experience.breakers.failed(call.handler.name, event.id, call.turn)
    if pause:
        details = {"handler": call.handler.name, "seconds": round(pause)}
        logger.warning(
            "Circuit of %(handler)s is open: its events wait %(seconds)s s, new ones less.",
            details,
            extra=details,
        )
