"""Hand events to their handlers, and say what became of them. Runs no SQL of its own."""

import datetime as dt
import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spark_outbox import backoff
from spark_outbox.events import Event
from spark_outbox.isolation import Isolation
from spark_outbox.registry import Handler
from spark_outbox.store import Failure, Settled

logger = logging.getLogger(__name__)

MAX_ERROR_LENGTH = 20_000


@dataclass(slots=True)
class Batch:
    """Claimed events, and the handlers that are through with those that were tried before."""

    events: Sequence[Event]
    due: int = 0
    """How many of them, the first, were not in the ready queue."""
    settled: dict[int, set[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Outcomes:
    """What a dispatched batch comes to, in the store's terms."""

    done: list[int] = field(default_factory=list)
    unhandled: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    retried: list[int] = field(default_factory=list)
    """Those done that have deliveries from earlier attempts."""
    deliveries: list[Settled] = field(default_factory=list)
    cut: bool = False
    """The batch ended before its last event, or might as well have."""

    @property
    def count(self) -> int:
        return len(self.done) + len(self.unhandled) + len(self.failures)


class Dispatcher:
    """Calls handlers, and remembers which of them are slow.

    Locks that a handler took are held until its batch commits, so nobody shall wait there for a
    stranger's slow handler: one whose recent runs outlast the commit interval only starts a batch.
    """

    def __init__(
        self,
        handlers_for: Callable[[str], tuple[Handler, ...]],
        *,
        commit_interval: float,
        clock: Callable[[], float],
        on_error: Callable[[Event, Handler, Exception], None] | None = None,
    ) -> None:
        self._handlers_for = handlers_for
        self._commit_interval = commit_interval
        self._clock = clock
        self._on_error = on_error
        self._slow: dict[str, float] = {}  # handler name -> recent seconds, if above the interval

    def dispatch(self, batch: Batch, isolation: Isolation, stopping: Callable[[], bool]) -> Outcomes:
        """Run the handlers of one event after the other, until the commit interval is over."""
        outcomes = Outcomes()
        deadline = self._clock() + self._commit_interval
        for event in batch.events:
            handlers = self._handlers_for(event.group)
            if self._slow and outcomes.count and any(h.name in self._slow for h in handlers):
                outcomes.cut = True
                break
            contended = self._handle(event, handlers, batch, isolation, outcomes)
            if contended or isolation.full or self._clock() >= deadline or stopping():
                outcomes.cut = True
                break
        return outcomes

    def _handle(
        self,
        event: Event,
        handlers: tuple[Handler, ...],
        batch: Batch,
        isolation: Isolation,
        outcomes: Outcomes,
    ) -> bool:
        """Run one event's handlers; return whether one lost a fight for locks."""
        if not handlers:
            outcomes.unhandled.append(event.id)
            return False
        settled = batch.settled.get(event.id, ())
        owed = [h for h in handlers if h.name not in settled] if settled else handlers
        errors = {}
        for handler in owed:
            error = self._call(handler, event, isolation)
            if error is not None:
                errors[handler.name] = error
        if not errors:
            outcomes.done.append(event.id)
            if event.attempt > 1:
                outcomes.retried.append(event.id)
                outcomes.deliveries += [Settled(event.id, h.name, "done", "") for h in owed]
            return False
        self._fail(event, owed, errors, outcomes)
        return any(is_contention(error) for error in errors.values())

    def _call(self, handler: Handler, event: Event, isolation: Isolation) -> Exception | None:
        started = self._clock()
        isolation.begin()
        event.start_over()
        try:
            handler.function(event)
            isolation.end()
        except Exception as error:  # noqa: BLE001, whatever a handler raises is its delivery's fate
            isolation.undo()
            if self._on_error is not None:
                self._on_error(event, handler, error)
            return error
        finally:
            self._note_duration(handler.name, self._clock() - started)
        return None

    def _note_duration(self, name: str, seconds: float) -> None:
        if seconds > self._commit_interval or name in self._slow:
            recent = (self._slow.get(name, seconds) + seconds) / 2
            self._slow[name] = recent
            if recent < self._commit_interval:
                del self._slow[name]

    def _fail(
        self,
        event: Event,
        owed: Sequence[Handler],
        errors: dict[str, Exception],
        outcomes: Outcomes,
    ) -> None:
        seconds = backoff.delay(event.attempt)
        texts = {name: error_text(error) for name, error in errors.items()}
        for handler in owed:
            if handler.name in errors:
                outcomes.deliveries.append(
                    Settled(event.id, handler.name, "pending", texts[handler.name])
                )
            else:
                outcomes.deliveries.append(Settled(event.id, handler.name, "done", ""))
        outcomes.failures.append(
            Failure(event.id, dt.timedelta(seconds=seconds), "\n".join(texts.values()))
        )
        for name, error in errors.items():
            context = {
                "handler": name,
                "event_id": event.id,
                "attempt": event.attempt,
                "error": type(error).__qualname__,
                "seconds": round(seconds, 1),
            }
            logger.warning(
                "Handler %(handler)s failed on event %(event_id)s (attempt %(attempt)s, %(error)s); "
                "it is tried again in %(seconds)s s.",
                context,
                extra=context,
            )


def error_text(error: BaseException) -> str:
    """Return the traceback as text that PostgreSQL can store; the end, if it is very long."""
    text = "".join(traceback.format_exception(error)).replace("\0", "\\0")
    return text.encode("utf-8", "backslashreplace").decode()[-MAX_ERROR_LENGTH:]


def is_contention(error: BaseException) -> bool:
    """Return whether `error` is a deadlock or a lock timeout: others wait for what we hold."""
    cause = error.__cause__ or error
    return getattr(cause, "sqlstate", None) in {"40P01", "55P03"}
