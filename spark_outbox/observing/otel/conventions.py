"""The conventions' words: attributes and names of spans and metrics, and how contexts travel."""

from collections.abc import Iterable, Sequence
from functools import cache

from django.db import connections
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext
from opentelemetry.util.types import AttributeValue

from spark_outbox.events.event import Event
from spark_outbox.observing import facts
from spark_outbox.observing.hooks import Outgoing

SCHEMA = "https://opentelemetry.io/schemas/1.44.0"

Attributes = dict[str, AttributeValue]


@cache
def system(using: str) -> Attributes:
    """Return the attributes of everything that has to do with one outbox."""
    settings = connections[using].settings_dict
    attributes: Attributes = {"messaging.system": facts.SYSTEM}
    if host := settings["HOST"]:
        attributes["server.address"] = host
    if (port := str(settings["PORT"])).isdigit():
        attributes["server.port"] = int(port)
    return attributes


def operation(name: str, using: str, *, has_type: bool = True) -> Attributes:
    named = system(using) | {"messaging.operation.name": name}
    return named | {"messaging.operation.type": name} if has_type else named


def name(operation: str, events: Sequence[Event | Outgoing]) -> str:
    group = facts.common_group(events)
    return operation if group is None else f"{operation} {group}"


def destination(events: Iterable[Event | Outgoing]) -> Attributes:
    group = facts.common_group(events)
    return {} if group is None else {"messaging.destination.name": group}


def message(event: Event | Outgoing) -> Attributes:
    key = facts.shown_key(event.key)
    return destination([event]) | ({} if key is None else {"messaging.message.id": key})


def messages(events: Sequence[Event | Outgoing]) -> Attributes:
    """Return the attributes of one event, or what several have in common."""
    if len(events) == 1:
        return message(events[0])
    return destination(events) | {"messaging.batch.message_count": len(events)}


def carrier(event: Event | Outgoing) -> dict[str, str]:
    return facts.headers_of(event, propagate.get_global_textmap().fields)


def origin(event: Event | Outgoing) -> SpanContext:
    """Return the context in which the event was emitted; an invalid one if its headers have none."""
    return trace.get_current_span(propagate.extract(carrier(event), Context())).get_span_context()


def error_type(error: BaseException | None) -> Attributes:
    if error is None:
        return {}
    kind = type(error)
    prefix = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return {"error.type": f"{prefix}{kind.__qualname__}"}


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
