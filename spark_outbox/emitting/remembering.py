"""Events that their emitter handles itself: the outbox only keeps their keys, as django-spark did."""

from spark_outbox.emitting.emit import AnyEvent, announce, prepare, writable, write
from spark_outbox.errors import UnstorableValue
from spark_outbox.events.event import Event
from spark_outbox.store import emitting
from spark_outbox.store.emitting import NewRow


def remember(event: AnyEvent, *, using: str | None = None) -> NewRow | None:
    """Write an event of django-spark's shape as done: no worker handles it.

    If a value can't be stored, the payload stays empty: its emitter has it. Return None if its key
    exists. Raises the other errors of `emit`.
    """
    new = Event.plain(event)
    try:
        row = prepare(new)
    except UnstorableValue:
        row = prepare(Event(new.group, new.key))
    return row if write([row], as_done=True, using=writable(using)) else None


def hand_over(event: AnyEvent, kept: NewRow, *, using: str | None = None) -> bool:
    """Have a worker handle an event after all that `remember` has written as `kept`. It may have been
    given other values since. Return False if it has been handed over already, or was rolled back."""
    alias = writable(using)
    row = prepare(Event.plain(event))
    is_changed = (row.group, row.payload) != (kept.group, kept.payload)
    is_reopened = emitting.reopen(row, is_changed=is_changed, using=alias)
    if is_reopened:
        announce(alias)
    return is_reopened
