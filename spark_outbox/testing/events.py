"""The events that are stored, with what has become of them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spark_outbox.errors import HandlingError
from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.store import testing
from spark_outbox.store.testing import Found

MOST_SHOWN = 30
"""How many events the message of a failed assertion lists."""


class EmittedEvent(Event):
    """A stored event, as a test sees it."""

    __slots__ = ("last_error", "status")

    status: str
    """`event["status"]` is that of its payload."""
    last_error: str
    """A traceback, or empty."""


def emitted(group: str = "", *, using: str = "default") -> list[EmittedEvent]:
    """Return the stored events of any status whose group matches the regex `group`, in order."""
    return _matching(testing.events_after(0, using=using), group)


@contextmanager
def capture_events(group: str = "", *, using: str = "default") -> Iterator[list[EmittedEvent]]:
    """Collect the events that are emitted inside the `with` block; the list is filled at its end."""
    before = testing.last_id(using=using)
    captured: list[EmittedEvent] = []
    yield captured
    captured += _matching(testing.events_after(before, using=using), group)


def find(key: str, *, using: str) -> EmittedEvent | None:
    """Return the event with this key; None if there is none."""
    return next(iter(_matching(testing.events_by_key(key, using=using), "")), None)


def _matching(found: list[Found], group: str) -> list[EmittedEvent]:
    events = []
    references = References()
    for row, status, last_error in found:
        event = EmittedEvent.from_row(row, references)
        event.status, event.last_error = status, last_error
        events.append(event)
    references.add(events)
    return [event for event in events if re.search(group, event.group)]


# Assertions


def assert_emitted(
    group: str, key: str | None, payload: Mapping[str, Any], *, using: str
) -> EmittedEvent:
    """Return the first event of this group, with this key, and with at least these values."""
    events = emitted(using=using)
    for event in events:
        if _fits(event, group, key, payload):
            return event
    raise AssertionError(f"No event {_wanted(group, key, payload)} was emitted. {_listed(events)}")


def assert_not_emitted(group: str, key: str | None, payload: Mapping[str, Any], *, using: str) -> None:
    found = [event for event in emitted(using=using) if _fits(event, group, key, payload)]
    if found:
        raise AssertionError(
            f"An event {_wanted(group, key, payload)} was emitted after all. {_listed(found)}"
        )


def _fits(event: Event, group: str, key: str | None, payload: Mapping[str, Any]) -> bool:
    if not re.search(group, event.group) or key not in (None, event.key):
        return False
    missing = object()
    return all(_value(event, name, missing) == value for name, value in payload.items())


def _value(event: Event, name: str, otherwise: object) -> object:
    try:
        return event.payload.get(name, otherwise)
    except HandlingError as error:  # such as a row that is gone
        return error


def _wanted(group: str, key: str | None, payload: Mapping[str, Any]) -> str:
    parts = [f"of group {group!r}"]
    if key is not None:
        parts.append(f"with the key {key!r}")
    if payload:
        parts.append(f"with {_pairs(payload)}")
    return " ".join(parts)


def _listed(events: list[EmittedEvent]) -> str:
    if not events:
        return "There are no events at all."
    lines = [f"  {_described(event)}" for event in events[-MOST_SHOWN:]]
    if len(events) > MOST_SHOWN:
        lines.insert(0, f"  … {len(events) - MOST_SHOWN} older ones")
    return "There are these:\n" + "\n".join(lines)


def _described(event: EmittedEvent) -> str:
    try:
        payload = _pairs({name: _value(event, name, None) for name in event.payload})
    except HandlingError as error:
        payload = str(error)
    return f"{event.group} {event.key!r} ({event.status}) {payload}".rstrip()


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001, the message is about something else
        text = f"<{type(value).__name__}, whose repr() raises {error!r}>"
    return text if len(text) <= 200 else f"{text[:199]}…"
