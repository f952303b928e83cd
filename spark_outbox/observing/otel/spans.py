"""The spans; and the context that travels in headers from the one that sends to those that process."""

import time
from collections.abc import Sequence
from contextvars import Token
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import Error
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode, TracerProvider

import spark_outbox
from spark_outbox.errors import describe
from spark_outbox.observing import facts
from spark_outbox.observing.hooks import Emission, HandlerCall
from spark_outbox.observing.otel import conventions


class Traced(NamedTuple):
    """A call of a handler that was not settled yet."""

    span: Span
    origins: list[SpanContext]
    """The contexts in which its events were emitted."""


class Spans:
    """Makes the spans. What a span needs until its end is kept with the object of the signal."""

    def __init__(self, provider: TracerProvider | None, *, parent: bool) -> None:
        self._tracer = trace.get_tracer(
            "spark_outbox", spark_outbox.__version__, provider, conventions.SCHEMA
        )
        self._parent = parent
        self._sends: WeakKeyDictionary[Emission, tuple[Span, Token[Context]]] = WeakKeyDictionary()
        self._calls: WeakKeyDictionary[HandlerCall, Traced] = WeakKeyDictionary()

    def emission_started(self, emission: Emission, **_: Any) -> None:
        events = emission.events
        given = [conventions.origin(event) for event in events if event.headers != "{}"]
        given = [context for context in given if context.is_valid]
        span = self._tracer.start_span(
            conventions.name("send", events),
            kind=SpanKind.PRODUCER if len(given) < len(events) else SpanKind.CLIENT,
            links=[Link(context) for context in given],
            attributes=conventions.operation("send", emission.using) | conventions.messages(events),
        )
        context = trace.set_span_in_context(span)
        headers: dict[str, str] = {}
        propagate.inject(headers, context)
        baggage = headers.pop("baggage", None)
        emission.add(headers)
        if baggage is not None:
            emission.add({"baggage": baggage})
        self._sends[emission] = span, contexts.attach(context)

    def emission_finished(self, emission: Emission, **_: Any) -> None:
        if emission not in self._sends:  # it began before we did
            return
        span, token = self._sends.pop(emission)
        contexts.detach(token)
        if emission.error is not None:
            _fail(span, emission.error)
        elif duplicates := len(emission.events) - len(emission.new):
            span.set_attribute("messaging.spark_outbox.duplicate_count", duplicates)
        span.end()

    def delivery_started(self, call: HandlerCall, **_: Any) -> None:
        events = call.events
        ambient = inside = contexts.get_current()
        origins = [conventions.origin(event) for event in events]
        links = [
            Link(origin, conventions.message(event) if len(events) > 1 else None)
            for event, origin in zip(events, origins, strict=True)
            if origin.is_valid
        ]
        if len(events) == 1:
            inside = propagate.extract(conventions.carrier(events[0]), ambient)
            around = trace.get_current_span(ambient).get_span_context()
            if self._parent and links and around.is_valid:
                links.append(Link(around))
        span = self._tracer.start_span(
            conventions.name("process", events),
            context=inside if self._parent else ambient,
            kind=SpanKind.CONSUMER,
            links=links,
            start_time=conventions.nanoseconds(call.started_at),
            attributes=conventions.operation("process", call.using)
            | conventions.messages(events)
            | {"messaging.consumer.group.name": call.handler},
        )
        if len(events) == 1:
            span.set_attribute("messaging.spark_outbox.message.delivery_attempt", events[0].attempt)
        contexts.attach(trace.set_span_in_context(span, inside))  # until this call's own context ends
        self._calls[call] = Traced(span, [origin for origin in origins if origin.is_valid])

    def delivery_finished(self, call: HandlerCall, **_: Any) -> None:
        if call not in self._calls:
            return
        span = self._calls.pop(call).span
        outcomes = {facts.outcome_of(call, event) for event in call.events}
        if len(outcomes) == 1:
            span.set_attribute("messaging.spark_outbox.outcome", outcomes.pop())
        if call.error is not None and facts.failed_events(call):
            _fail(span, call.error)
        span.end(conventions.nanoseconds(call.started_at + call.seconds))

    def batch_settled(
        self, using: str, events: int, commit_seconds: float, calls: Sequence[HandlerCall], **_: Any
    ) -> None:
        if not events:
            return
        traced = [self._calls[call] for call in calls if call in self._calls]
        origins = {(each.trace_id, each.span_id): each for _, found in traced for each in found}
        settled = [event for call in calls for event in call.events]
        end = time.time()
        self._tracer.start_span(
            conventions.name("settle", settled),
            context=trace.set_span_in_context(traced[0].span) if len(traced) == 1 else None,
            kind=SpanKind.CLIENT,
            links=[Link(origin) for origin in origins.values()],
            start_time=conventions.nanoseconds(end - commit_seconds),
            attributes=conventions.operation("settle", using)
            | conventions.destination(settled)
            | {"messaging.batch.message_count": events},
        ).end(conventions.nanoseconds(end))


def _fail(span: Span, error: BaseException) -> None:
    span.set_attributes(conventions.error_type(error))
    # `describe` quotes some messages of the database, and these may quote a payload.
    span.set_status(StatusCode.ERROR, None if isinstance(error, Error) else describe(error))
