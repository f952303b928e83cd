"""Put back what workers that are gone have begun. The lock of a session tells that its worker is
there."""

import logging
from collections.abc import Callable, Container
from functools import partial

from django.db import transaction

from spark_outbox.errors import describe
from spark_outbox.store import detached, repairing, sessions
from spark_outbox.worker.refusals import Refused, refusals

logger = logging.getLogger(__name__)

GONE = "spark_outbox.errors.WorkerDied: The worker that ran this handler is gone."
"""The error of a delivery that another worker has taken over."""


def take_over(
    *,
    session: int = 0,
    mine: Container[tuple[int, str]] = (),
    known: Container[int] = (),
    using: str,
) -> set[int]:
    """Put back what workers have begun that are gone, and running events of which nothing runs.

    It counts as an attempt, since the handler may have taken its host with it. Whether that was the
    last one is decided by a worker that has the handler, when it claims the event. Deliveries that are
    `mine` are left alone. The rest of our own `session`, 0 if there is none, has not begun, and does
    not count: if a connection was lost in the commit, nobody knew of it.

    Returns the events that PostgreSQL refuses to put back. Each is logged, unless it is `known`.
    """
    refused: dict[int, Exception] = {}
    for each in detached.running_sessions(using=using):
        death = "" if session and each == session else GONE
        take = partial(_take_over, each, mine, death, using)
        refused |= _put_back_all(take, partial(detached.running_events, each, using=using), using)
    refused |= _put_back_all(
        partial(_reopen_strays, using), partial(repairing.strays, using=using), using
    )
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
    strays = repairing.reopen_strays(only, using=using)
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
        if death and not sessions.is_session_gone(session, using=using):
            return
        running = [
            each
            for each in detached.running_of(session, using=using)
            if each[:2] not in mine and (only is None or each.event_id in only)
        ]
        taken = detached.take_back(running, to_settle=False, death=death, using=using) if running else ()
    if taken:
        context = {"deliveries": len(taken)}
        logger.warning(
            "Took over %(deliveries)s deliveries of a worker that is gone.", context, extra=context
        )
