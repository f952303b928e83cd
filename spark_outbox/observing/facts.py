"""What traces and error reports say of emissions and calls, in whichever format."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spark_outbox.errors import BatchFailed, InstanceGone, UnreadablePayload
from spark_outbox.events.event import Event, available_from
from spark_outbox.observing.hooks import OUTCOMES, HandlerCall, Outgoing, ReceiverQuery

SYSTEM = "spark_outbox"

ROLLED_BACK = "rolled_back"


def shown_key(key: str) -> str | None:
    """Return a key, unless SPARK_OUTBOX["REDACT"] has the name "key", or its function changes the key of
    the document {"key": …}."""
    from spark_outbox.operating.look import redacted

    with contextlib.suppress(Exception):  # the function is the project's, and made for payloads
        if redacted({"key": key})["key"] == key:
            return key
    return None


def common_group(events: Iterable[Event | Outgoing]) -> str | None:
    """Return the group of events that are all of the same."""
    groups = {event.group for event in events}
    return groups.pop() if len(groups) == 1 else None


def headers_of(event: Event | Outgoing, names: Iterable[str]) -> dict[str, str]:
    """Return those of these headers that the event has, and that are text. Runs no query."""
    headers: Mapping[str, Any]
    headers = event.headers if isinstance(event, Event) else json.loads(event.headers)
    found = {}
    with contextlib.suppress(UnreadablePayload, InstanceGone, ReceiverQuery):
        for name in names:
            if isinstance(value := headers.get(name), str):
                found[name] = value
    return found


def error_of(call: HandlerCall, event: Event) -> BaseException | None:
    """Return why one event of a call is not done; None if it is, or if it was discarded."""
    status = call.statuses.get(event.id)
    if status in {"done", "discarded"}:
        return None
    return call.error.errors.get(event) if isinstance(call.error, BatchFailed) else call.error


def failed_events(call: HandlerCall) -> Sequence[Event]:
    return [event for event in call.events if error_of(call, event) is not None]


def outcome_of(call: HandlerCall, event: Event) -> str:
    return OUTCOMES.get(call.statuses.get(event.id, ""), ROLLED_BACK)


def latency(call: HandlerCall, event: Event) -> float | None:
    """Return for how many seconds an event could have been handled before this call; by the clocks of
    the worker and of the database."""
    with contextlib.suppress(OverflowError, ValueError):  # years that a clock does not have
        if since := available_from(event):
            return max(0.0, call.started_at - since)
    return None
