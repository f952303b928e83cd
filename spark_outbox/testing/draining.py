"""Be the worker, on the connection of the test."""

from spark_outbox.errors import Discard, Retry
from spark_outbox.events.event import Event
from spark_outbox.registry.handlers import Handler
from spark_outbox.testing.faults import is_injected
from spark_outbox.worker.loop import Worker


def drain(*, using: str = "default", raise_exceptions: bool = True) -> int:
    """Handle the ready events on the current connection, as a worker would; return how many.

    Events that handlers emit meanwhile are handled, too. Delayed events, and those that wait for
    another attempt, are not. At the end the first exception of a handler is raised again, unless
    `raise_exceptions` is False, or the test has injected it. Its event is postponed, as by a worker.
    """
    errors: list[BaseException] = []

    def remember(event: Event, handler: Handler, error: BaseException) -> None:
        if isinstance(error, Discard | Retry) or is_injected(error):
            return  # the handler's own decision, or the test's
        error.add_note(f"raised by handler {handler.name} on {event!r}")
        errors.append(error)

    handled = Worker(using=using, on_error=remember).drain()
    if errors and raise_exceptions:
        raise errors[0]
    return handled
