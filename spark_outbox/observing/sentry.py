"""Errors of handlers, and traces, for Sentry. Needs `sentry-sdk`.

    sentry_sdk.init(dsn=…, integrations=[SparkOutboxIntegration()])

Each error arrives once, with the handler, the group, the key and the attempt. What arrives of a call has
no local variables, which may hold what is in a payload. Our log of the same error is a breadcrumb only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import sentry_sdk
from sentry_sdk.consts import OP, SPANDATA
from sentry_sdk.integrations import Integration
from sentry_sdk.integrations.django import DjangoIntegration
from sentry_sdk.scope import Scope, add_global_event_processor
from sentry_sdk.utils import current_stacktrace, event_from_exception

from spark_outbox.errors import BatchFailed, Retry
from spark_outbox.events.event import Event, size_of
from spark_outbox.observing import facts, hooks
from spark_outbox.observing.hooks import Emission, HandlerCall, Outgoing

ORIGIN = "auto.queue.spark_outbox"

HEADERS = ("sentry-trace", "baggage")

SIGNALS = (
    hooks.emission_started,
    hooks.emission_finished,
    hooks.delivery_started,
    hooks.delivery_finished,
)

LOGGER = "spark_outbox.worker.outcome"
"""Logs the errors of handlers."""

Data = dict[str, Any]

AnySpan = Any
"""A Span; or a StreamedSpan, if the client streams spans."""


class SparkOutboxIntegration(Integration):
    """With `retries=False`, an error arrives only if no further attempt will be made."""

    identifier = "spark_outbox"

    def __init__(self, *, retries: bool = True) -> None:
        self.retries = retries

    @staticmethod
    def setup_once() -> None:
        reporter = Reporter()
        for signal, receiver in zip(SIGNALS, reporter.receivers, strict=True):
            signal.connect(receiver, weak=False)
        add_global_event_processor(reporter.drop_logged)


class Reporter:
    """Listens, for whichever client is active. What a span needs is kept with the signal's object."""

    def __init__(self) -> None:
        self._sends: WeakKeyDictionary[Emission, tuple[Scope, AnySpan]] = WeakKeyDictionary()
        self._calls: WeakKeyDictionary[HandlerCall, list[AnySpan]] = WeakKeyDictionary()
        self._under_way: set[tuple[str, int]] = set()
        """Handlers and events of the calls that are not settled yet."""
        self.receivers: tuple[Callable[..., None], ...] = (
            self.emission_started,
            self.emission_finished,
            self.delivery_started,
            self.delivery_finished,
        )

    def emission_started(self, emission: Emission, **_: Any) -> None:
        if _integration() is None:
            return
        scope = Scope.get_current_scope()
        if _is_tracing():
            inner = scope.fork()
            Scope.set_current_scope(inner)
            name = facts.common_group(emission.events) or "emit_many"
            data = _messages(emission.events)
            data["messaging.message.body.size"] = sum(len(event.payload) for event in emission.events)
            self._sends[emission] = scope, _begin(OP.QUEUE_PUBLISH, name, data)
            scope = inner
        emission.add(dict(scope.iter_trace_propagation_headers()))

    def emission_finished(self, emission: Emission, **_: Any) -> None:
        if emission in self._sends:
            scope, span = self._sends.pop(emission)
            _end(span, is_ok=emission.error is None)
            Scope.set_current_scope(scope)

    def delivery_started(self, call: HandlerCall, **_: Any) -> None:
        """Give the call scopes of its own, until the context ends in which it is made."""
        if _integration() is None:
            return
        scope = Scope.get_isolation_scope().fork()
        Scope.set_isolation_scope(scope)
        Scope.set_current_scope(Scope.get_current_scope().fork())
        scope.clear_breadcrumbs()
        scope.add_event_processor(_without_variables)
        _identify(scope, call, call.events)
        self._under_way |= _pairs(call)
        headers, data = {}, _messages(call.events)
        if len(call.events) == 1:
            (event,) = call.events
            headers = facts.headers_of(event, HEADERS)
            data[SPANDATA.MESSAGING_MESSAGE_RETRY_COUNT] = event.attempt - 1
            if (seconds := facts.latency(call, event)) is not None:
                data[SPANDATA.MESSAGING_MESSAGE_RECEIVE_LATENCY] = seconds * 1000
            if (size := size_of(event)) is not None:
                data["messaging.message.body.size"] = size
        self._calls[call] = [
            _begin("queue.task.spark_outbox", call.handler, {}, continues=headers),
            _begin(OP.QUEUE_PROCESS, call.handler, data),
        ]

    def delivery_finished(self, call: HandlerCall, **_: Any) -> None:
        integration = _integration()
        if integration is not None:
            for error, events in _errors(call):
                is_final = any(call.statuses[event.id] == "failed" for event in events)
                if is_final or (integration.retries and not isinstance(error, Retry)):
                    _capture(error, call, events, is_final=is_final)
        self._under_way -= _pairs(call)
        is_ok = not facts.failed_events(call)
        if call in self._calls:
            outer, span = self._calls.pop(call)
            _end(span, is_ok=is_ok, at=call.started_at + call.seconds)
            _end(outer, is_ok=is_ok)

    def drop_logged(self, event: Any, hint: Mapping[str, Any]) -> Any:
        """Drop what Sentry makes of a line in the log about an error that arrives by itself."""
        record = hint.get("log_record")
        if record is not None and record.name == LOGGER and hasattr(record, "event_id"):
            return None if (record.handler, record.event_id) in self._under_way else event
        return event


def _integration() -> SparkOutboxIntegration | None:
    client = sentry_sdk.get_client()
    integration = client.get_integration(SparkOutboxIntegration)
    django = client.get_integration(DjangoIntegration)
    if django is not None and SIGNALS[0] not in django.signals_denylist:
        django.signals_denylist = [*django.signals_denylist, *SIGNALS]  # no span for each receiver
    return integration


# Errors


def _errors(call: HandlerCall) -> Iterator[tuple[BaseException, Sequence[Event]]]:
    """Yield the errors of a call, each with its events. What was rolled back will be handled again."""
    failed = [event for event in facts.failed_events(call) if event.id in call.statuses]
    if isinstance(call.error, BatchFailed):
        yield from ((call.error.errors[event], [event]) for event in failed)
    elif failed and call.error is not None:
        yield call.error, failed


def _capture(
    error: BaseException, call: HandlerCall, events: Sequence[Event], *, is_final: bool
) -> None:
    report, hint = event_from_exception(
        error,
        client_options=sentry_sdk.get_client().options,
        mechanism={"type": "spark_outbox", "handled": not is_final},
    )
    report["level"] = "error" if is_final else "warning"
    with sentry_sdk.new_scope() as scope:
        _identify(scope, call, events)
        sentry_sdk.capture_event(report, hint=hint)


def _without_variables(event: Any, _hint: Any) -> Any:
    """Drop the local variables of all frames."""
    traces = [event.get("stacktrace")]
    for kind in ("exception", "threads"):
        traces += [each.get("stacktrace") for each in (event.get(kind) or {}).get("values", [])]
    for trace in filter(None, traces):
        for frame in trace.get("frames", []):
            frame.pop("vars", None)
    if sentry_sdk.get_client().options["attach_stacktrace"] and not any(traces):
        # Or the client does it after this, with variables.
        trace = current_stacktrace(include_local_variables=False)
        event["threads"] = {"values": [{"stacktrace": trace, "crashed": False, "current": True}]}
    return event


def _identify(scope: Scope, call: HandlerCall, events: Sequence[Event]) -> None:
    """Say which call everything in this scope belongs to."""
    found: Data = {"handler": call.handler, "group": facts.common_group(events)}
    if len(events) == 1:
        found["attempt"] = events[0].attempt
    for name, value in found.items():
        if value is not None:
            scope.set_tag(f"spark_outbox.{name}", value)
    keys = [key for event in events[:10] if (key := facts.shown_key(event.key)) is not None]
    scope.set_context("spark_outbox", {**found, "keys": keys, "events": len(events)})


def _pairs(call: HandlerCall) -> set[tuple[str, int]]:
    return {(call.handler, event.id) for event in call.events}


# Spans


def _messages(events: Sequence[Event | Outgoing]) -> Data:
    data: Data = {SPANDATA.MESSAGING_SYSTEM: facts.SYSTEM}
    if (group := facts.common_group(events)) is not None:
        data[SPANDATA.MESSAGING_DESTINATION_NAME] = group
    if len(events) > 1:
        data["messaging.batch.message_count"] = len(events)
    elif (key := facts.shown_key(events[0].key)) is not None:
        data[SPANDATA.MESSAGING_MESSAGE_ID] = key
    return data


def _streams() -> bool:
    """Return whether the client sends spans one by one, which has functions of its own."""
    return bool(sentry_sdk.get_client().options.get("trace_lifecycle") == "stream")


def _is_tracing() -> bool:
    """Return whether a span would be part of something."""
    current = sentry_sdk.traces if _streams() else sentry_sdk
    return current.get_current_span() is not None


def _begin(op: str, name: str, data: Data, *, continues: Mapping[str, str] | None = None) -> AnySpan:
    """Begin a span in the current scope. With headers that it `continues`, it is a root."""
    if _streams():
        attributes = {"sentry.op": op, "sentry.origin": ORIGIN, **data}
        if continues is None:
            return sentry_sdk.traces.start_span(name, attributes)
        sentry_sdk.traces.continue_trace(dict(continues))
        attributes["sentry.segment.name.source"] = "task"
        return sentry_sdk.traces.start_span(name, attributes, parent_span=None)
    span: AnySpan
    if continues is None:
        span = sentry_sdk.start_span(op=op, name=name, origin=ORIGIN)
    else:
        span = sentry_sdk.start_transaction(
            sentry_sdk.continue_trace(dict(continues), op=op, name=name, source="task", origin=ORIGIN)
        )
    for key, value in data.items():
        span.set_data(key, value)
    return span.__enter__()


def _end(span: AnySpan, *, is_ok: bool, at: float | None = None) -> None:
    if _streams():
        span.status = "ok" if is_ok else "error"
        span.end(at)
        return
    span.set_status("ok" if is_ok else "internal_error")
    if at is not None:
        span.finish(end_timestamp=at)
    span.__exit__(None, None, None)
