"""For the tests of projects that use spark_outbox. Everything works inside TestCase's transaction."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from spark_outbox.errors import Discard, Retry
from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.registry.handlers import Handler
from spark_outbox.store import reading
from spark_outbox.worker.loop import Worker


def drain(*, using: str = "default", raise_exceptions: bool = True) -> int:
    """Handle the ready events on the current connection, as a worker would; return how many.

    Events that handlers emit meanwhile are handled, too. Delayed events, and those that wait for
    another attempt, are not. At the end the first exception of a handler is raised again, unless
    `raise_exceptions` is False. Its event is postponed, as by a worker.
    """
    errors: list[BaseException] = []

    def remember(event: Event, handler: Handler, error: BaseException) -> None:
        if isinstance(error, Discard | Retry):
            return  # the handler's own decision, not a failure
        error.add_note(f"raised by handler {handler.name} on {event!r}")
        errors.append(error)

    handled = Worker(using=using, on_error=remember).drain()
    if errors and raise_exceptions:
        raise errors[0]
    return handled


def emitted(group: str = "", *, using: str = "default") -> list[Event]:
    """Return the stored events of any status whose group matches the regex `group`, in order."""
    return _events_after(0, group, using)


@contextmanager
def capture_events(group: str = "", *, using: str = "default") -> Iterator[list[Event]]:
    """Collect the events that are emitted inside the `with` block; the list is filled at its end."""
    before = reading.last_id(using=using)
    captured: list[Event] = []
    yield captured
    captured += _events_after(before, group, using)


def _events_after(last: int, group: str, using: str) -> list[Event]:
    events = Event.from_rows(reading.events_after(last, using=using), References())
    return [event for event in events if re.search(group, event.group)]
