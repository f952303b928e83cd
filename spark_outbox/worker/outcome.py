"""The result of a call, and the fate of an event. Pure."""

import datetime as dt
import logging
import random
import traceback
from dataclasses import replace
from typing import NamedTuple

from spark_outbox.errors import BrokenTransaction, Retry, WorkerDied
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 20_000

NEVER = dt.datetime(9999, 1, 1, tzinfo=dt.UTC)
"""Rather than PostgreSQL's `infinity`, which Python can't read."""


class Result(NamedTuple):
    """The result of one handler's call with one event, or of the decision not to call it now.

    `status` is the delivery's next one: `pending` (to be tried again at `at`, or after `delay`),
    `running` (the call goes on after the commit), `done`, `failed` or `discarded`.
    """

    status: str
    error: str = ""
    traceback: str = ""
    duration: dt.timedelta | None = None
    delay: dt.timedelta | None = None
    at: dt.datetime | None = None
    counts: bool = True
    """It was an attempt."""


DONE = Result("done")
RUNNING = Result("running", counts=False)


class Fate(NamedTuple):
    """The next status of an event that did not simply succeed."""

    event_id: int
    status: str
    error: str = ""
    """The last traceback; empty to keep the one before."""
    due_now: bool = False
    """If pending: a handler that was not called yet is to be called at once."""
    look_again: dt.timedelta | None = None
    """If pending: when to look again at deliveries whose handler only another worker has."""

    @property
    def is_final(self) -> bool:
        return self.status not in {"pending", "running"}


def done(seconds: float) -> Result:
    return Result("done", duration=dt.timedelta(seconds=seconds))


def put_off(seconds: float) -> Result:
    """Return the result of a call that an open circuit prevents. It uses up no attempt."""
    spread = seconds * random.uniform(1, 1.5)  # noqa: S311, so that not all come back at once
    return Result(
        "pending",
        error="spark_outbox: not called, its circuit is open",
        delay=dt.timedelta(seconds=spread),
        counts=False,
    )


def put_aside(mark: str) -> Result:
    """Return the result of a call that a pause prevents, until it ends. It uses up no attempt."""
    return Result("pending", error=mark, at=NEVER, counts=False)


def worn_out(handler: Handler, event: Event) -> Result:
    """Return the result of a call that is not made, since the handler has used up its attempts.

    Workers that died made the last ones. Another worker counted them, which may not have the handler to
    know its policy.
    """
    error = WorkerDied(
        "There have been all attempts, and the worker that made the last one is gone. To try again, set "
        "the delivery's attempts to 0."
    )
    event.attempt -= 1  # there is none of this number
    return failure(handler, event, error, 0.0)._replace(counts=False)


def failure(handler: Handler, event: Event, error: BaseException, seconds: float) -> Result:
    """Return the result of a call that raised, by the handler's policy; log it."""
    result = Result(
        "failed",
        error=storable(f"{type(error).__module__}.{type(error).__qualname__}: {_message(error)}"),
        traceback=as_text(error),
        duration=dt.timedelta(seconds=seconds),
    )
    if handler.policy.discards(error):
        result = result._replace(status="discarded")
    else:
        match _next_try(handler, event, error):
            case dt.timedelta() as delay:
                result = result._replace(status="pending", delay=delay)
            case dt.datetime() as at:
                result = result._replace(status="pending", at=at)
    _log(handler, event, error, result.status)
    return result


def _next_try(handler: Handler, event: Event, error: BaseException) -> dt.timedelta | dt.datetime | None:
    policy = handler.policy
    try:
        return policy.next_try(error, event.attempt)
    except Exception as broken:  # noqa: BLE001, a backoff function is the project's
        context = {"handler": handler.name, "error": type(broken).__qualname__}
        logger.error(
            "The backoff of %(handler)s failed (%(error)s): its delay is the default.",
            context,
            extra=context,
        )
        return replace(policy, backoff=None).next_try(error, event.attempt)


def _log(handler: Handler, event: Event, error: BaseException, status: str) -> None:
    level, what = {
        "failed": (logging.ERROR, "failed for good"),
        "discarded": (logging.INFO, "discarded"),
        "pending": (logging.WARNING, "failed, to be tried again"),
    }[status]
    context = {
        "handler": handler.name,
        "event_id": event.id,
        "attempt": event.attempt,
        "error": type(error).__qualname__,
        "what": what,
    }
    logger.log(
        level,
        "Handler %(handler)s on event %(event_id)s: %(what)s (attempt %(attempt)s, %(error)s).",
        context,
        extra=context,
    )


def explain(raised: BaseException, loss: str = "") -> BaseException:
    """Return the error of a handler that raised, or a better one: `loss` says how it has ended the
    transaction that it shares."""
    if loss and not isinstance(raised, BrokenTransaction):
        return BrokenTransaction(loss)
    if type(raised) is RuntimeError and "durable atomic block" in str(raised):
        error = BrokenTransaction(
            "The handler uses atomic(durable=True), but shares the transaction in which its event is "
            "marked done. Register it with atomic=False: it then runs in no transaction but its own."
        )
        error.__cause__ = raised
        return error
    return raised


def of_a_list(handler: Handler, error: BaseException) -> BaseException:
    """Return the error of each event of a list that failed as a whole.

    An error that is final would be so for one of them, but nobody knows for which: each is tried again
    by itself.
    """
    if not handler.policy.is_final(error):
        return error
    retry = Retry("An event of this list has failed for good; each is tried again by itself.")
    retry.__cause__ = error
    return retry


def is_contention(error: BaseException) -> bool:
    """Return whether `error` is a deadlock or a lock timeout: others wait for the worker's locks."""
    cause = error.__cause__ or error
    return getattr(cause, "sqlstate", None) in {"40P01", "55P03"}


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001, a handler's exceptions may be of any make
        return "(its message can't be read)"


def as_text(error: BaseException) -> str:
    return storable("".join(traceback.format_exception(error)))


def storable(text: str) -> str:
    """Return text that PostgreSQL can store; the end of it, if it is very long."""
    text = text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
    return text[-MAX_ERROR_LENGTH:]
