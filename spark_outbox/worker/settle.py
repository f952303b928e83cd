"""Write what became of events: in a batch, alone, with a detached handler, or a process that died."""

import logging
import os
import socket
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Literal

from django.db import transaction

from spark_outbox import store
from spark_outbox.errors import NotSettled, describe
from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Handler, Registry
from spark_outbox.store import Ended, Running
from spark_outbox.worker.dispatch import of_a_list
from spark_outbox.worker.outcome import Call, Open, Outcomes, as_text, judge, next_attempt
from spark_outbox.worker.refusals import Refused, persevere, refusals

logger = logging.getLogger(__name__)

GONE = "spark_outbox.errors.WorkerDied: The worker that ran this handler is gone."
"""The error of a delivery that another worker has taken over."""

CRASH_PATIENCE = 5.0
"""Seconds to wait until the rows of a process that died, or a connection that was lost, are free."""

PAUSE = 0.02
"""Seconds between two looks whether they are."""


def write(outcomes: Outcomes, *, session: int = 0, using: str) -> None:
    """Write what became of claimed events. A lost claim is logged, and overwrites nothing.

    Raises NotSettled if an event is still as it was claimed, though PostgreSQL raised no error: then
    nothing may be committed, or the event would be handled again, and again.
    """
    applied = postponed = 0
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
        postponed = store.postpone(outcomes.postponed, using=using)
        applied += postponed
    if outcomes.ended:
        applied += store.end(outcomes.ended, using=using)
    if outcomes.retried:
        store.discard_deliveries(outcomes.retried, using=using)
    if applied != outcomes.count:
        if store.count_pending(outcomes.event_ids, using=using) > postponed:
            raise NotSettled(
                "The outbox's own UPDATE did not apply to this event. Look for a trigger or a row-level "
                "security policy on spark_outbox_event that keeps it from being changed."
            )
        tell_lost(outcomes.count - applied)


def write_alone(alone: dict[int, Outcomes], *, using: str) -> list[int]:
    """Write what became of events whose batch was rolled back, each in a transaction of its own; unless
    others have them by now. Return those that can't even be marked as failed."""
    return [event_id for event_id in alone if not _write_one(event_id, alone[event_id], using)]


def _write_one(event_id: int, outcomes: Outcomes, using: str) -> bool:
    try:
        if not _until_free(partial(_claim_and_write, event_id, outcomes, using), using=using):
            _tell_uncounted([event_id], "an error")
    except Refused as refused:
        # What may pass is left as it is: the event is handled again.
        return refused.may_pass or write_unsettled(event_id, refused.error, using=using)
    return True


def _claim_and_write(event_id: int, outcomes: Outcomes, using: str) -> bool:
    """Write what became of an event; return whether that is settled, or to be tried again: the server
    need not have seen yet that the connection is gone on which it was locked."""
    with transaction.atomic(using=using):
        if not store.claim_one(event_id, using=using):
            return not store.is_unfinished(event_id, using=using)
        write(outcomes, using=using)
    return True


def _until_free(write: Callable[[], bool], *, using: str) -> bool:
    """Call `write`, which is a transaction, until it returns True; for up to CRASH_PATIENCE."""
    deadline = time.monotonic() + CRASH_PATIENCE
    while not persevere(write, using=using):
        if time.monotonic() >= deadline:
            return False
        time.sleep(PAUSE)
    return True


def write_unsettled(event_id: int, error: BaseException, *, using: str) -> bool:
    """Let an event fail of which nothing else can be written: else it would be handled for ever.

    Return whether that is settled. If PostgreSQL refuses even that, nobody can settle the event.
    """
    write_it = partial(_claim_and_write, event_id, _unsettled(event_id, error), using)
    otherwise = "This worker passes it over until it is restarted."
    return _let_fail(event_id, error, write_it, otherwise, using=using)


def _let_fail(
    event_id: int, error: BaseException, write_it: Callable[[], bool], otherwise: str, *, using: str
) -> bool:
    """Write that an event has failed, and log it; or, if that is refused, what happens `otherwise`."""
    try:
        if not _until_free(write_it, using=using):
            return True  # somebody else has it: it is handled again
    except Refused as refused:
        context = {"event_id": event_id, "error": describe(refused.error), "otherwise": otherwise}
        logger.error(
            "Event %(event_id)s can't be settled, and not be marked as failed either (%(error)s). "
            "%(otherwise)s",
            context,
            extra=context,
        )
        return False
    context = {"event_id": event_id, "error": describe(error)}
    logger.error(
        "Event %(event_id)s failed for good: it can't be settled (%(error)s).", context, extra=context
    )
    return True


def write_calls(calls: Sequence[Call], registry: Registry, *, using: str) -> list[Call]:
    """Write what became of detached calls: of those that still are ours.

    If PostgreSQL refuses, of each by itself; an event that it refuses alone fails. Returns those that it
    refuses for what may pass: they are to be written later.
    """
    try:
        persevere(partial(_write_calls, calls, registry, using), using=using)
    except Refused as refused:
        if len(calls) > 1:
            return [left for call in calls for left in write_calls([call], registry, using=using)]
        if refused.may_pass:
            return list(calls)
        _write_unsettled_call(calls[0], refused.error, using=using)
    return []


def _write_unsettled_call(call: Call, error: BaseException, *, using: str) -> None:
    event_id = call.event.id

    def take_back_and_write() -> bool:
        with transaction.atomic(using=using):
            running = [Running(event_id, call.handler.name, call.session)]
            if store.take_back(running, to_settle=True, using=using):
                write(_unsettled(event_id, error), using=using)
        return True

    _let_fail(event_id, error, take_back_and_write, "It stays running.", using=using)


def _unsettled(event_id: int, error: BaseException) -> Outcomes:
    return Outcomes(ended=[Ended(event_id, "failed", as_text(error))])


def _write_calls(calls: Sequence[Call], registry: Registry, using: str) -> None:
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


def take_over(
    *,
    session: int = 0,
    mine: Container[tuple[int, str]] = (),
    known: Container[int] = (),
    using: str,
) -> set[int]:
    """Put back what workers have begun that are gone, and running events of which nothing runs.

    It counts as an attempt, since the handler may have taken its host with it. Whether that was the last
    one is decided by a worker that has the handler, when it claims the event.
    What is `mine` is left alone. The rest of our own `session`, 0 if there is none, has not begun, and
    does not count: if a connection was lost in the commit, nobody knew of it.

    Returns the events that PostgreSQL refuses to put back. Each is logged, unless it is `known`.
    """
    refused: dict[int, Exception] = {}
    for each in store.running_sessions(using=using):
        death = "" if session and each == session else GONE
        take = partial(_take_over, each, mine, death, using)
        refused |= _put_back_all(take, partial(store.running_events, each, using=using), using)
    refused |= _put_back_all(partial(_reopen_strays, using), partial(store.strays, using=using), using)
    for event_id in refused:
        if event_id not in known:
            context = {"event_id": event_id, "error": describe(refused[event_id])}
            logger.warning(
                "Event %(event_id)s is running, but its worker is gone; and it can't be put back "
                "(%(error)s).",
                context,
                extra=context,
            )
    return set(refused)


def _put_back_all(
    put_back: Callable[[list[int] | None], None], find: Callable[[], list[int]], using: str
) -> dict[int, Exception]:
    """Put back all events, or, if PostgreSQL refuses that, of those that are found each that it does not
    refuse; return the others, and why."""
    try:
        with refusals(using=using):
            put_back(None)
    except Refused:
        refused: dict[int, Exception] = {}
        parts = [find()]
        while parts:
            part = parts.pop()
            try:
                with refusals(using=using):
                    put_back(part)
            except Refused as refusal:
                if len(part) == 1:
                    refused[part[0]] = refusal.error
                elif part:
                    middle = len(part) // 2
                    parts += [part[:middle], part[middle:]]
        return refused
    return {}


def _reopen_strays(using: str, only: list[int] | None) -> None:
    strays = store.reopen_strays(only, using=using)
    if strays:
        context = {"events": strays}
        logger.warning(
            "Reopened %(events)s running events of which no delivery runs.", context, extra=context
        )


def _take_over(
    session: int | None,
    mine: Container[tuple[int, str]],
    death: str,
    using: str,
    only: list[int] | None,
) -> None:
    """Take over deliveries of a session, `only` those of some events; without `death`, it is our own."""
    with transaction.atomic(using=using):
        if death and not store.is_session_gone(session, using=using):
            return
        running = [
            each
            for each in store.running_of(session, using=using)
            if each[:2] not in mine and (only is None or each.event_id in only)
        ]
        taken = store.take_back(running, to_settle=False, death=death, using=using) if running else ()
    if taken:
        context = {"deliveries": len(taken)}
        logger.warning(
            "Took over %(deliveries)s deliveries of a worker that is gone.", context, extra=context
        )


def book(
    in_hand: Sequence[tuple[int, int]],
    error: BaseException | None,
    registry: Registry,
    *,
    session: int = 0,
    using: str,
) -> list[int]:
    """Count attempts that ended with `error`, and with the connection on which they were made.

    `in_hand` has pairs of an event's id and its handler's number, `session` is that of the worker, 0 if
    it had none. Waits for up to CRASH_PATIENCE until the server sees that the connection is gone.
    Without an error nobody is to blame, as the process was stopped: detached handlers are put back, and
    nothing is counted. Returns the events that can't be marked as failed either.
    """
    stuck: list[int] = []
    left = list(in_hand)
    whole = len(left) > 1
    deadline = time.monotonic() + CRASH_PATIENCE
    while left and time.monotonic() < deadline:
        left = [
            (event_id, number)
            for event_id, number in left
            if not _book_or_fail(
                event_id, number, error, registry, stuck, session=session, whole=whole, using=using
            )
        ]
        if left:
            time.sleep(PAUSE)
    if left and error is not None:
        _tell_uncounted([event_id for event_id, _ in left], type(error).__qualname__)
    return stuck


def _book_or_fail(
    event_id: int,
    number: int,
    error: BaseException | None,
    registry: Registry,
    stuck: list[int],
    *,
    session: int,
    whole: bool,
    using: str,
) -> bool:
    """Count one attempt; if PostgreSQL refuses that, let the event fail, or note that it is `stuck`."""
    write_it = partial(
        _book_one, event_id, number, error, registry, session=session, whole=whole, using=using
    )
    try:
        return persevere(write_it, using=using)
    except Refused as refused:
        if not write_unsettled(event_id, refused.error, using=using):
            stuck.append(event_id)
    return True


def _book_one(
    event_id: int,
    number: int,
    error: BaseException | None,
    registry: Registry,
    *,
    session: int,
    whole: bool,
    using: str,
) -> bool:
    """Count one attempt; return whether that is settled, or to be tried again: until the server has seen
    that the connection is gone, the event's row is locked, and the session is.

    An event that was in hand with others, as a `whole`, need not be the one that is at fault: it is
    tried again by itself.
    """
    handler = registry.handlers[number]
    with transaction.atomic(using=using):
        state = _put_back(event_id, handler, error, session=session, using=using)
        if state != "owed" or error is None:
            return state != "held"
        if not store.claim_one(event_id, using=using):
            return not store.is_unfinished(event_id, using=using)
        (row,) = store.events_by_id([event_id], using=using)
        event = Event.from_row(row, References())
        earlier = store.deliveries([event_id], using=using).get(event_id, {})
        event.attempt = next_attempt(handler, earlier)
        if whole and handler.policy.is_final(error):
            error = of_a_list(error)
        attempts = {handler.name: judge(handler, event, error, 0.0)}
        opened = Open(event, registry.handlers_for(event.group), [], earlier, attempts)
        write(opened.alone(), using=using)
    return True


def _put_back(
    event_id: int, handler: Handler, error: BaseException | None, *, session: int, using: str
) -> Literal["owed", "held", "over"]:
    """Make the delivery that a worker of this `session` was at pending, if it is `running`.

    Whoever takes over a running delivery counts it, too, but does not know what it died of: so that is
    undone, in order to count it with its cause. But it is "over", once another attempt has begun. It is
    "held" until the server has seen that the worker is gone.
    """
    to_settle = error is not None
    holder, is_running = store.held_by(event_id, handler.name, using=using)
    running = Running(event_id, handler.name, holder)
    done = True
    if is_running and (holder == session or not session or handler.atomic):
        done = store.is_session_gone(holder, using=using) and bool(
            store.take_back([running], to_settle=to_settle, using=using)
        )
    elif holder and holder == session:
        done = store.undo_take_over(running, to_settle=to_settle, using=using)
        if done and error is None:
            store.wake_others(using=using)  # they need not have known of it
    elif session and not handler.atomic:
        return "over"
    return "owed" if done else "held"


def _tell_uncounted(event_ids: list[int], error: str) -> None:
    events = {"event_ids": event_ids, "error": error}
    logger.warning(
        "Attempts that ended with %(error)s could not be counted: events %(event_ids)s.",
        events,
        extra=events,
    )


def tell_lost(count: int) -> None:
    lost = {"events": count}
    logger.warning("Lost the claim on %(events)s events.", lost, extra=lost)
