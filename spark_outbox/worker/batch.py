"""One transaction's events, and what has become of them so far. Runs no SQL and calls no handler."""

import datetime as dt
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spark_outbox.events.event import Event
from spark_outbox.observing.hooks import HandlerCall
from spark_outbox.registry.handlers import Handler
from spark_outbox.store.reading import EVERY_OTHER
from spark_outbox.store.settling import Stored
from spark_outbox.worker.breaker import Turn
from spark_outbox.worker.outcome import DONE, Fate, Result, put_aside
from spark_outbox.worker.pauses import Paused

logger = logging.getLogger(__name__)

DEPLOYMENT = 3600.0
"""Seconds for which a worker keeps a delivery whose handler it does not have: in a rolling deployment
the next release may have it."""


@dataclass(eq=False, slots=True)
class Call:
    """One call of a handler with one event."""

    handler: Handler
    event: Event
    """If the call is not made at once, a copy with this handler's attempt."""
    turn: Turn = "new"
    error: BaseException | None = None
    seconds: float = 0.0
    has_ended: bool = False
    session: int = 0
    """The session under which its delivery is `running`, if it goes on after the commit."""
    result: Result | None = None
    """To be settled, after that."""
    started: float = 0.0
    """If it goes on by itself: when it began, by the monotonic clock."""
    observed: HandlerCall | None = None
    """The same call, for those that listen to signals."""


@dataclass(slots=True)
class Work:
    """An event that did not simply succeed: it has deliveries, or gets some."""

    event: Event
    handlers: Sequence[Handler]
    """The handlers that match its group."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """Its deliveries before this batch, by handler."""
    owed: Sequence[Handler] = ()
    """The handlers to be called in this batch."""
    results: dict[str, Result] = field(default_factory=dict)
    """The results of its calls, by handler. A handler that is `owed` and has none simply succeeded."""

    def holds_up(self, failed_head: str) -> bool:
        """Return whether later events of its ordering key have to wait for this one."""
        status = self.fate().status
        return status in {"pending", "running"} or (status == "failed" and failed_head == "block")

    def fate(self) -> Fate:
        """Decide the next status of the event. The first rule that applies counts."""
        statuses = self._statuses()
        due_now = self._owes_a_call(statuses)
        waits = self._waits_for_others()
        if "running" in statuses.values():
            return self._to("running")
        if due_now or waits or "pending" in statuses.values():
            return self._to("pending")._replace(due_now=due_now, look_again=look_again(waits))
        if "failed" in statuses.values():
            return self._to("failed")
        if "done" in statuses.values():
            return Fate(self.event.id, "done")  # without the error of one that was discarded
        return self._to("discarded")

    def abandoned(self) -> list[str]:
        """Return the handlers of pending deliveries that no worker seems to have any more."""
        known = {handler.name for handler in self.handlers}
        return [
            name
            for name, stored in self.stored.items()
            if name not in known and stored.status == "pending"
        ]

    def _to(self, status: str) -> Fate:
        tracebacks = (result.traceback for result in reversed(self.results.values()))
        return Fate(self.event.id, status, next(filter(None, tracebacks), ""))

    def _statuses(self) -> dict[str, str]:
        """Return the deliveries' statuses: of handlers that are registered, or at work elsewhere."""
        known = {handler.name for handler in self.handlers}
        stored = {
            name: before.status
            for name, before in self.stored.items()
            if name in known or before.status == "running"
        }
        return stored | {name: result.status for name, result in self.results.items()}

    def _owes_a_call(self, statuses: Mapping[str, str]) -> bool:
        """Return whether a handler is due that was not called in this batch."""
        for handler in self.handlers:
            before = self.stored.get(handler.name)
            if handler.name not in statuses:
                return True
            is_due = before is not None and before.status == "pending" and before.is_due
            if is_due and handler.name not in self.results:
                return True
        return False

    def _waits_for_others(self) -> list[float | None]:
        """Return for how many seconds deliveries have been due that another worker may have a handler
        for; None for one that is not due."""
        due_for = [self.stored[name].due_for for name in self.abandoned()]
        return [seconds for seconds in due_for if seconds is None or seconds < DEPLOYMENT]


@dataclass(slots=True)
class Batch:
    """One transaction's events."""

    events: Sequence[Event] = ()
    elsewhere: int = 0
    """How many of them were not in the ready queue: they are due, or ordered."""
    stored: dict[int, dict[str, Stored]] = field(default_factory=dict)
    """The deliveries of those that were tried before, by event and handler."""
    done: list[int] = field(default_factory=list)
    """Events that simply succeeded."""
    unhandled: list[int] = field(default_factory=list)
    works: list[Work] = field(default_factory=list)
    """The others."""
    calls: list[Call] = field(default_factory=list)
    """Calls to begin, or to go on with, after the commit."""
    reached: int = 0
    """How many events were looked at."""
    passed: set[int] = field(default_factory=set)
    """Of those, events that were left as they are, since there was no room for their async handlers."""
    blocked: set[str] = field(default_factory=set)
    """Ordering keys whose later events have to wait."""
    paused: Paused = field(default_factory=dict)
    """What is not to be called."""
    cut: bool = False
    """Dispatch stopped early: the next claim is smaller."""

    @property
    def count(self) -> int:
        """How many events are settled."""
        return len(self.done) + len(self.unhandled) + len(self.works)

    @property
    def event_ids(self) -> list[int]:
        """The events that are settled."""
        return [*self.done, *self.unhandled, *(work.event.id for work in self.works)]

    @property
    def has_killed(self) -> bool:
        """A handler of the first event has died with its worker before: it is alone in its batch."""
        return any(each.died for each in self.stored.get(self.events[0].id, {}).values())

    @property
    def leaves_to_others(self) -> bool:
        """Deliveries that are due wait for a worker that has their handlers."""
        return any(work.fate().look_again is not None for work in self.works)

    @property
    def failures(self) -> int:
        """How many deliveries have failed for good."""
        results = (result for work in self.works for result in work.results.values())
        return sum(result.status == "failed" for result in results)

    def with_killers_alone(self) -> "Batch":
        """Return the events before one that has killed its worker; or that alone, if it is first."""
        for place, event in enumerate(self.events):
            if any(each.died for each in self.stored.get(event.id, {}).values()):
                events = self.events[: max(1, place)]
                return Batch(events, min(self.elsewhere, len(events)), self.stored)
        return self

    def owed(self, event: Event, handlers: Sequence[Handler]) -> Sequence[Handler]:
        """Return the handlers to call: all that are pending and due. If somebody has made the event
        ready by hand, those that wait for another attempt, too."""
        stored = self.stored.get(event.id)
        if stored is None:
            return handlers
        ready = event.available_at is None
        return [
            handler
            for handler in handlers
            if (before := stored.get(handler.name)) is None
            or (before.status == "pending" and (ready or before.is_due))
        ]

    def put_aside(self, event: Event, owed: Sequence[Handler]) -> dict[str, Result]:
        """Return the results of those calls that a pause prevents."""
        by_group = self.paused.get(("group", event.group))
        marks = {each.name: by_group or self.paused.get(("handler", each.name)) for each in owed}
        return {name: put_aside(mark) for name, mark in marks.items() if mark}

    def close(self, work: Work) -> None:
        """All calls with an event have been made, or will be after the commit: note what is to be
        written."""
        if not (work.results or work.stored):
            self.done.append(work.event.id)
            return
        for handler in work.owed:
            work.results.setdefault(handler.name, DONE)
        self.works.append(work)

    def pass_by(self, event: Event) -> None:
        """Leave an event as it is, with those that come after it in order."""
        self.passed.add(event.id)
        if event.ordering_key is not None:
            self.blocked.add(event.ordering_key)


def known_deliveries(stored: dict[str, Stored], handlers: Sequence[Handler]) -> dict[str, Stored]:
    """Return an event's deliveries by handler. That of EVERY_OTHER, which a replay has written, stands
    for the handlers without one of their own."""
    others = stored.get(EVERY_OTHER)
    if others is None:
        return stored
    return {handler.name: others for handler in handlers} | {
        name: each for name, each in stored.items() if name != EVERY_OTHER
    }


def look_again(waits: Sequence[float | None]) -> dt.timedelta | None:
    """Return when to look again at deliveries that have been due for so many seconds, and whose handlers
    another worker may have: often at first. None if none of them is due."""
    due = [due_for for due_for in waits if due_for is not None]
    return dt.timedelta(seconds=max(1.0, min(due) / 10)) if due else None


def next_attempt(handler: Handler, stored: Mapping[str, Stored]) -> int:
    return max(stored[handler.name].attempts, 0) + 1 if handler.name in stored else 1


def turn_of(handler: Handler, stored: Mapping[str, Stored] | None) -> Turn:
    before = stored.get(handler.name) if stored else None
    if before is None:
        return "new"
    return "retry" if before.attempts > 0 else "untried"


def log(batch: Batch) -> None:
    if batch.unhandled:
        unhandled = set(batch.unhandled)
        groups = sorted({event.group for event in batch.events if event.id in unhandled})
        context = {
            "event_ids": batch.unhandled[:20],
            "events": len(batch.unhandled),
            "groups": ", ".join(groups[:10]) + (" and others" if groups[10:] else ""),
        }
        logger.warning("No handler matched %(events)s events of %(groups)s.", context, extra=context)
    if logger.isEnabledFor(logging.DEBUG):
        for event in batch.events[: batch.count]:
            done = {"event_id": event.id, "group": event.group, "attempt": event.attempt}
            logger.debug("Dispatched event %(event_id)s of group %(group)r.", done, extra=done)
