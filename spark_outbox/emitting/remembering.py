"""Events that their emitter handles itself: the outbox only keeps their keys, as django-spark did."""

from spark_outbox.emitting.emit import AnyEvent, announce, prepare, writable, write
from spark_outbox.events.event import Event
from spark_outbox.store import emitting


def remember(event: AnyEvent, *, using: str | None = None) -> Event | None:
    """Write an event of django-spark's shape as done: no worker handles it.

    Return None if its key exists. Raises the errors of `emit`.
    """
    new = Event.plain(event)
    return new if write([prepare(new)], as_done=True, using=writable(using)) else None


def hand_over(key: str, *, using: str | None = None) -> None:
    """Have a worker handle an event after all that `remember` has written."""
    alias = writable(using)
    if emitting.reopen(key, using=alias):
        announce(alias)
