"""Write what became of events: in a batch, alone, or after a call that has outlived its batch."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from django.db import transaction

from spark_outbox.errors import NotSettled, describe
from spark_outbox.registry.handlers import Registry
from spark_outbox.store import claiming, detached, settling
from spark_outbox.store.detached import Running
from spark_outbox.worker.batch import Call, Work, known_deliveries
from spark_outbox.worker.identity import identity
from spark_outbox.worker.outcome import Fate, as_text
from spark_outbox.worker.refusals import Refused, persevere

logger = logging.getLogger(__name__)

CRASH_PATIENCE = 5.0
"""Seconds to wait until the rows of a process that died, or a connection that was lost, are free."""

PAUSE = 0.02
"""Seconds between two looks whether they are."""

NOT_APPLIED = (
    "The outbox's own UPDATE did not apply to this event. Look for a trigger or a row-level security "
    "policy on spark_outbox_event that keeps it from being changed."
)


def write(
    works: Sequence[Work],
    *,
    done: Sequence[int] = (),
    unhandled: Sequence[int] = (),
    session: int = 0,
    using: str,
) -> None:
    """Write what became of claimed events: those that are simply `done`, and the others' fates.

    A lost claim is logged, and overwrites nothing. Raises NotSettled if an event is still as it was
    claimed, though PostgreSQL raised no error: then nothing may be committed, or the event would be
    handled again, and again.
    """
    applied = postponed = 0
    if done:
        applied += settling.finish(done, "done", using=using)
    if unhandled:
        applied += settling.finish(unhandled, "unhandled", using=using)
    if works:
        statuses = _write_works(works, session, using)
        applied += len(statuses)
        postponed = statuses.count("pending")
    count = len(done) + len(unhandled) + len(works)
    if applied != count:
        event_ids = [*done, *unhandled, *(work.event.id for work in works)]
        if settling.count_pending(event_ids, using=using) > postponed:
            raise NotSettled(NOT_APPLIED)
        log_lost(count - applied)


def _write_works(works: Sequence[Work], session: int, using: str) -> list[str]:
    """Write deliveries, then their events; return the statuses of the events to which that applied."""
    results = [(w.event.id, name, *result) for w in works for name, result in w.results.items()]
    if results:
        settling.record_results(results, worker=identity(), session=session, using=using)
    fates = [work.fate() for work in works]
    statuses = settling.settle(fates, using=using)
    ended = [work for work, fate in zip(works, fates, strict=True) if fate.is_final]
    abandoned = [(work.event.id, name) for work in ended for name in work.abandoned()]
    for event_id, name in abandoned:
        context = {"handler": name, "event_id": event_id}
        logger.warning(
            "No worker has handler %(handler)s: what event %(event_id)s owes to it is discarded.",
            context,
            extra=context,
        )
    if abandoned:
        settling.discard_deliveries([event_id for event_id, _ in abandoned], using=using)
    return statuses


def write_alone(works: Sequence[Work], *, using: str) -> list[int]:
    """Write what became of events whose batch was rolled back, each in a transaction of its own; unless
    others have them by now. Return those that can't even be marked as failed."""
    return [work.event.id for work in works if not _write_one(work, using)]


def _write_one(work: Work, using: str) -> bool:
    event_id = work.event.id
    try:
        if not until_free(partial(_claim_and, event_id, partial(write, [work]), using), using=using):
            log_uncounted([event_id], "an error")
    except Refused as refused:
        # A refusal that may pass: the event stays as it is, and is handled again.
        return refused.may_pass or write_unsettled(event_id, refused.error, using=using)
    return True


def _claim_and(event_id: int, write_it: Callable[..., None], using: str) -> bool:
    """Lock an event and write what became of it; return whether that is settled, or to be tried again:
    the server need not have seen yet that the connection is gone on which it was locked."""
    with transaction.atomic(using=using):
        if not claiming.claim_one(event_id, using=using):
            return not claiming.is_unfinished(event_id, using=using)
        write_it(using=using)
    return True


def until_free(write: Callable[[], bool], *, using: str) -> bool:
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
    write_it = partial(_claim_and, event_id, partial(_fail, event_id, error), using)
    otherwise = "This worker passes it over until it is restarted."
    return _let_fail(event_id, error, write_it, otherwise, using=using)


def _fail(event_id: int, error: BaseException, *, using: str) -> None:
    """Mark a locked event as failed, and write nothing else."""
    applied = settling.settle([Fate(event_id, "failed", as_text(error))], using=using)
    if not applied and settling.count_pending([event_id], using=using):
        raise NotSettled(NOT_APPLIED)


def _let_fail(
    event_id: int, error: BaseException, write_it: Callable[[], bool], otherwise: str, *, using: str
) -> bool:
    """Write that an event has failed, and log it; or, if that is refused, what happens `otherwise`."""
    try:
        if not until_free(write_it, using=using):
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

    def take_back_and_fail() -> bool:
        with transaction.atomic(using=using):
            running = [Running(event_id, call.handler.name, call.session)]
            if detached.take_back(running, to_settle=True, using=using):
                _fail(event_id, error, using=using)
        return True

    _let_fail(event_id, error, take_back_and_fail, "It stays running.", using=using)


def _write_calls(calls: Sequence[Call], registry: Registry, using: str) -> None:
    with transaction.atomic(using=using):
        running = [Running(call.event.id, call.handler.name, call.session) for call in calls]
        taken = detached.take_back(running, to_settle=True, using=using)
        if len(taken) < len(calls):
            log_lost(len(calls) - len(taken))
        stored = settling.deliveries([event_id for event_id, _ in taken], using=using)
        works: dict[int, Work] = {}
        for call in calls:
            event = call.event
            if call.result is not None and (event.id, call.handler.name) in taken:
                handlers = registry.handlers_for(event.group)
                before = known_deliveries(stored.get(event.id, {}), handlers)
                work = Work(event, handlers, before)
                works.setdefault(event.id, work).results[call.handler.name] = call.result
        write(list(works.values()), using=using)
    for call in calls:
        if (call.event.id, call.handler.name) not in taken:
            call.result = None  # it came to nothing: others have it


def log_uncounted(event_ids: list[int], error: str) -> None:
    context = {"event_ids": event_ids, "error": error}
    logger.warning(
        "Attempts that ended with %(error)s could not be counted: events %(event_ids)s.",
        context,
        extra=context,
    )


def log_lost(count: int) -> None:
    context = {"events": count}
    logger.warning("Lost the claim on %(events)s events.", context, extra=context)
