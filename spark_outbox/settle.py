"""Write what became of events: in a batch, alone, with a detached handler, or a process that died."""

import logging
import os
import socket
import time
from collections.abc import Container, Sequence

from django.db import transaction

from spark_outbox import store
from spark_outbox.errors import WorkerDied
from spark_outbox.events import Event
from spark_outbox.outcomes import Call, Open, Outcomes, as_text, judge, next_attempt
from spark_outbox.references import References
from spark_outbox.registry import Registry
from spark_outbox.store import Ended, Running

logger = logging.getLogger(__name__)

GONE = "spark_outbox.errors.WorkerDied: The worker that ran this handler is gone."
"""The error of a delivery that another worker has taken over."""

CRASH_PATIENCE = 5.0
"""Seconds to wait until the rows of a process that died are free."""


def write(outcomes: Outcomes, *, session: int = 0, using: str) -> None:
    """Write what became of claimed events; a lost claim is told, and overwrites nothing."""
    applied = 0
    if outcomes.done:
        applied += store.finish(outcomes.done, "done", using=using)
    if outcomes.unhandled:
        applied += store.finish(outcomes.unhandled, "unhandled", using=using)
    if outcomes.attempts:
        who = f"{socket.gethostname()}:{os.getpid()}"
        store.record_attempts(outcomes.attempts, worker=who, session=session, using=using)
    if outcomes.running:
        applied += store.run(outcomes.running, using=using)
    if outcomes.postponed:
        applied += store.postpone(outcomes.postponed, using=using)
    if outcomes.ended:
        applied += store.end(outcomes.ended, using=using)
    if outcomes.retried:
        store.discard_deliveries(outcomes.retried, using=using)
    if applied != outcomes.count:
        tell_lost(outcomes.count - applied)


def write_alone(alone: dict[int, Outcomes], *, using: str) -> None:
    """Write what became of events whose batch was rolled back; unless others have them by now."""
    for event_id, outcomes in alone.items():
        with transaction.atomic(using=using):
            if store.claim_one(event_id, using=using):
                write(outcomes, using=using)


def write_unsettled(event_id: int, error: BaseException, *, using: str) -> None:
    """Let an event fail of which nothing else can be written: else it would be handled for ever."""
    logger.error("Event %(event_id)s failed for good: it can't be settled.", {"event_id": event_id})
    failed = Outcomes(ended=[Ended(event_id, "failed", as_text(error))])
    write_alone({event_id: failed}, using=using)


def write_calls(calls: Sequence[Call], registry: Registry, *, using: str) -> None:
    """Write what became of detached calls: of those that still are ours."""
    with transaction.atomic(using=using):
        running = [Running(call.event.id, call.handler.name, call.session) for call in calls]
        taken = store.take_back(running, to_settle=True, using=using)
        if len(taken) < len(calls):
            tell_lost(len(calls) - len(taken))
        earlier = store.deliveries([event_id for event_id, _ in taken], using=using)
        outcomes = Outcomes()
        opened: dict[int, Open] = {}
        for call in calls:
            event = call.event
            if call.attempt is not None and (event.id, call.handler.name) in taken:
                handlers = registry.handlers_for(event.group)
                known = Open(event, handlers, [], earlier.get(event.id, {}), {})
                opened.setdefault(event.id, known).attempts[call.handler.name] = call.attempt
        for each in opened.values():
            each.close(outcomes)
        write(outcomes, using=using)


def take_over(*, session: int = 0, mine: Container[tuple[int, str]] = (), using: str) -> None:
    """Put back what workers have begun that are gone, and running events of which nothing runs.

    It counts as an attempt, since the handler may have taken its host with it. Whether that was the last
    one is decided by a worker that has the handler, when it claims the event.
    What is `mine` is left alone. The rest of our own `session`, 0 if there is none, has not begun, and
    does not count: if a connection was lost in the commit, nobody knew of it.
    """
    for each in store.running_sessions(using=using):
        ours = bool(session) and each == session
        with transaction.atomic(using=using):
            if not ours and not store.is_session_gone(each, using=using):
                continue
            running = [
                delivery for delivery in store.running_of(each, using=using) if delivery[:2] not in mine
            ]
            death = "" if ours else GONE
            taken = (
                store.take_back(running, to_settle=False, death=death, using=using) if running else ()
            )
        if taken:
            context = {"deliveries": len(taken)}
            logger.warning(
                "Took over %(deliveries)s deliveries of a worker that is gone.", context, extra=context
            )
    if strays := store.reopen_strays(using=using):
        context = {"events": strays}
        logger.warning(
            "Reopened %(events)s running events of which no delivery runs.", context, extra=context
        )


def book_crash(
    in_hand: Sequence[tuple[int, int]], cause: str, registry: Registry, *, using: str
) -> None:
    """Count the attempts that ended with a process; wait for the server to see that it is gone.

    `in_hand` has pairs of an event's id and its handler's number. Without a `cause` nobody is to blame,
    as the process was stopped: detached handlers are put back, and nothing is counted.
    """
    left = list(in_hand)
    deadline = time.monotonic() + CRASH_PATIENCE
    while left and time.monotonic() < deadline:
        left = [
            (event_id, number)
            for event_id, number in left
            if not write_crash(event_id, number, cause, registry, using=using)
        ]
        if left:
            time.sleep(0.02)
    if left and cause:
        events = {"event_ids": [event_id for event_id, _ in left]}
        logger.warning(
            "Attempts that ended with their process could not be counted: events %(event_ids)s.",
            events,
            extra=events,
        )


def write_crash(event_id: int, number: int, cause: str, registry: Registry, *, using: str) -> bool:
    """Count an attempt that ended with its process; return whether that is settled, or to be tried
    again: until the server has seen that the process is gone, its rows are locked, and its session is.

    Whoever takes over a running delivery counts it, too. So this one is put back and counted in one
    transaction, unless it has been taken over since the process died.
    """
    handler = registry.handlers[number]
    with transaction.atomic(using=using):
        session, taken_over = store.held_by(event_id, handler.name, GONE, using=using)
        if session is not None:
            if not store.is_session_gone(session, using=using):
                return False
            running = Running(event_id, handler.name, session)
            if not store.take_back([running], to_settle=bool(cause), using=using):
                return True  # taken over in this moment
        if taken_over or not cause:
            return True
        if not store.claim_one(event_id, using=using):
            return not store.is_unfinished(event_id, using=using)
        (row,) = store.events_by_id([event_id], using=using)
        event = Event.from_row(row, References())
        earlier = store.deliveries([event_id], using=using).get(event_id, {})
        event.attempt = next_attempt(handler, earlier)
        error = WorkerDied(f"The worker process died of {cause} while it ran this handler.")
        attempts = {handler.name: judge(handler, event, error, 0.0)}
        opened = Open(event, registry.handlers_for(event.group), [], earlier, attempts)
        write(opened.alone(), using=using)
    return True


def tell_lost(count: int) -> None:
    lost = {"events": count}
    logger.warning("Lost the claim on %(events)s events.", lost, extra=lost)
