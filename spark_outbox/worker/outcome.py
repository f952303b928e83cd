"""What becomes of a batch's events, in the store's terms. Runs no SQL and calls no handler."""

import datetime as dt
import logging
import random
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from spark_outbox.errors import WorkerDied
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler
from spark_outbox.registry.policy import Verdict
from spark_outbox.store import Attempt, Begun, Earlier, Ended, Postponed
from spark_outbox.worker.breaker import Turn

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 20_000

DEPLOYMENT = 3600.0
"""Seconds for which a delivery is kept for other workers by one that does not have its handler: in a
rolling deployment the next release may have it."""


@dataclass(slots=True)
class Batch:
    """Claimed events, and what is known of those that were tried before."""

    events: Sequence[Event]
    elsewhere: int = 0
    """How many of them were not in the ready queue: they are due, or ordered."""
    earlier: dict[int, dict[str, Earlier]] = field(default_factory=dict)

    @property
    def has_killed(self) -> bool:
        """A handler of the first event has died with its worker before: the event is handled alone."""
        return any(each.died for each in self.earlier.get(self.events[0].id, {}).values())

    def with_killers_alone(self) -> "Batch":
        """Return the events before one that has killed its worker; or that alone, if it is first."""
        for place, event in enumerate(self.events):
            if any(each.died for each in self.earlier.get(event.id, {}).values()):
                events = self.events[: max(1, place)]
                return Batch(events, min(self.elsewhere, len(events)), self.earlier)
        return self

    def owed(self, event: Event, handlers: Sequence[Handler]) -> list[Handler]:
        """Return the handlers that an event tried before owes: those due, or all that are pending if
        somebody has made it ready by hand."""
        earlier = self.earlier[event.id]
        ready = event.available_at is None
        return [
            handler
            for handler in handlers
            if (before := earlier.get(handler.name)) is None
            or (before.status == "pending" and (ready or before.due))
        ]


@dataclass(eq=False, slots=True)
class Call:
    """A handler at work on an event, outside of the order in which a batch is dispatched."""

    handler: Handler
    event: Event
    """A copy, with this handler's attempt."""
    ended: bool = False
    error: BaseException | None = None
    seconds: float = 0.0
    session: int = 0
    """Under which its delivery is `running`, if it is detached, or has outlived its batch."""
    attempt: Attempt | None = None
    """What came of it, to be written."""
    turn: Turn = "new"


@dataclass(slots=True)
class Open:
    """An event in the course of being handled."""

    event: Event
    handlers: Sequence[Handler]
    owed: Sequence[Handler]
    """Those that are called in this pass."""
    earlier: dict[str, Earlier]
    attempts: dict[str, Attempt]
    """By handler, what came of the calls that did not simply succeed."""

    def close(self, outcomes: "Outcomes") -> None:
        """Add to `outcomes` what the event comes to, all calls having been made."""
        if self.attempts or self.earlier:
            for handler in self.owed:
                self.attempts.setdefault(handler.name, Attempt(self.event.id, handler.name, "done"))
            outcomes.settle(self.event, self.handlers, self.attempts, self.earlier)
        else:
            outcomes.done.append(self.event.id)

    def alone(self) -> "Outcomes":
        """Return what the event comes to by itself."""
        outcomes = Outcomes()
        self.close(outcomes)
        return outcomes


@dataclass(slots=True)
class Outcomes:
    """What a dispatched batch comes to, in the store's terms."""

    done: list[int] = field(default_factory=list)
    unhandled: list[int] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    postponed: list[Postponed] = field(default_factory=list)
    running: list[Begun] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    retried: list[int] = field(default_factory=list)
    """Finished events that have deliveries."""
    calls: list[Call] = field(default_factory=list)
    """Of the running events: to begin or to go on with after the commit."""
    reached: int = 0
    """How many events of the batch were looked at."""
    passed: set[int] = field(default_factory=set)
    """Of those, events that were left as they are: there is no room for calls of async handlers."""
    blocked: set[str] = field(default_factory=set)
    """Ordering keys of which later events had to wait."""
    cut: bool = False
    """The batch ended before its last event, or might as well have."""

    def holds_up(self, event: Event, failed_head: str) -> bool:
        """Return whether later events of its ordering key have to wait for the last one handled."""
        if self.postponed and self.postponed[-1].event_id == event.id:
            return True
        if self.running and self.running[-1].event_id == event.id:
            return True
        failed = self.ended and self.ended[-1][:2] == (event.id, "failed")
        return bool(failed) and failed_head == "block"

    @property
    def count(self) -> int:
        settled = (self.done, self.unhandled, self.ended, self.postponed, self.running)
        return sum(len(each) for each in settled)

    @property
    def event_ids(self) -> list[int]:
        """The events that it counts."""
        others = (self.ended, self.postponed, self.running)
        return [*self.done, *self.unhandled, *(each[0] for several in others for each in several)]

    @property
    def leaves_to_others(self) -> bool:
        """Deliveries that are due wait for a worker that has their handlers."""
        return any(each.pause is not None for each in self.postponed)

    def settle(
        self,
        event: Event,
        handlers: Iterable[Handler],
        attempts: dict[str, Attempt],
        earlier: dict[str, Earlier],
    ) -> None:
        """Say what an event comes to that was not, or is not, finished in one go."""
        self.attempts += attempts.values()
        registered = {handler.name for handler in handlers}
        statuses = {
            name: before.status
            for name, before in earlier.items()
            if name in registered or before.status == "running"
        }
        statuses.update((name, attempt.status) for name, attempt in attempts.items())
        error = next((a.traceback for a in reversed(attempts.values()) if a.traceback), "")
        owed = bool(registered - statuses.keys()) or any(
            before.status == "pending" and before.due and name not in attempts
            for name, before in earlier.items()
            if name in registered
        )
        unknown = {
            name: before.due_for
            for name, before in earlier.items()
            if name not in registered and before.status == "pending"
        }
        waits = [due_for for due_for in unknown.values() if due_for is None or due_for < DEPLOYMENT]
        if "running" in statuses.values():
            self.running.append(Begun(event.id, error))
            return
        if owed or waits or "pending" in statuses.values():
            self.postponed.append(Postponed(event.id, error, owed, look_again(waits)))
            return
        for name in unknown:
            context = {"handler": name, "event_id": event.id}
            logger.warning(
                "No worker has handler %(handler)s: what event %(event_id)s owes to it is discarded.",
                context,
                extra=context,
            )
        self.retried.append(event.id)
        if "failed" in statuses.values():
            self.ended.append(Ended(event.id, "failed", error))
        elif "done" in statuses.values():
            self.done.append(event.id)
        else:
            self.ended.append(Ended(event.id, "discarded", error))


def look_again(waits: Iterable[float | None]) -> dt.timedelta | None:
    """Return when to look again at deliveries that have been due for so many seconds, and whose handlers
    another worker may have: often at first. None if none of them is due."""
    due = [due_for for due_for in waits if due_for is not None]
    return dt.timedelta(seconds=max(1.0, min(due) / 10)) if due else None


def next_attempt(handler: Handler, earlier: dict[str, Earlier]) -> int:
    return max(earlier[handler.name].attempts, 0) + 1 if handler.name in earlier else 1


def turn_of(handler: Handler, earlier: dict[str, Earlier] | None) -> Turn:
    before = earlier.get(handler.name) if earlier else None
    if before is None:
        return "new"
    return "retry" if before.attempts > 0 else "untried"


def succeeded(call: Call) -> Attempt:
    duration = dt.timedelta(seconds=call.seconds)
    return Attempt(call.event.id, call.handler.name, "done", duration=duration)


def begun(call: Call) -> Attempt:
    """Return what stands for a call that outlives its batch's transaction."""
    return Attempt(call.event.id, call.handler.name, "running", counts=False)


def postponed_by_breaker(handler: Handler, event: Event, wait: float) -> Attempt:
    """Return what stands for a call that was not made; it burns no attempt."""
    spread = wait * random.uniform(1, 1.5)  # noqa: S311, so that not all come back at once
    return Attempt(
        event.id,
        handler.name,
        "pending",
        error="spark_outbox: not called, its circuit is open",
        delay=dt.timedelta(seconds=spread),
        counts=False,
    )


def worn_out(handler: Handler, event: Event) -> Attempt:
    """Return what stands for a call that is not made: there have been all attempts that the handler has.

    Those by workers that are gone were counted by others, who may not have the handler to judge them by.
    """
    error = WorkerDied(
        "There have been all attempts, and the worker that made the last one is gone. To try again, set "
        "the delivery's attempts to 0."
    )
    event.attempt -= 1  # there is none of this number
    return judge(handler, event, error, 0.0)._replace(counts=False)


def judge(handler: Handler, event: Event, error: BaseException, seconds: float) -> Attempt:
    """Say what becomes of a delivery whose handler raised, and log it."""
    try:
        verdict = handler.policy.judge(error, event.attempt)
    except Exception as broken:  # noqa: BLE001, a backoff function is the project's
        context = {"handler": handler.name, "error": type(broken).__qualname__}
        logger.error(
            "The backoff of %(handler)s failed (%(error)s): its delay is the default.",
            context,
            extra=context,
        )
        verdict = replace(handler.policy, backoff=None).judge(error, event.attempt)
    log_verdict(handler, event, error, verdict)
    return Attempt(
        event.id,
        handler.name,
        verdict.status,
        error=storable(f"{type(error).__module__}.{type(error).__qualname__}: {_message(error)}"),
        traceback=as_text(error),
        duration=dt.timedelta(seconds=seconds),
        delay=verdict.delay,
        at=verdict.at,
    )


def log_verdict(handler: Handler, event: Event, error: BaseException, verdict: Verdict) -> None:
    level, what = {
        "failed": (logging.ERROR, "failed for good"),
        "discarded": (logging.INFO, "discarded"),
        "pending": (logging.WARNING, "failed, to be tried again"),
    }[verdict.status]
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
