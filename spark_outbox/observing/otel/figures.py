"""The metrics."""

from collections import Counter
from typing import Any

from opentelemetry import metrics
from opentelemetry.metrics import MeterProvider

import spark_outbox
from spark_outbox.observing import facts
from spark_outbox.observing.hooks import Emission, HandlerCall
from spark_outbox.observing.otel import conventions

DURATIONS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
"""The buckets that the conventions ask for."""

MOST_GROUPS = 50
OTHER = "other"


class Figures:
    """Makes the metrics. The first groups that come have time series of their own."""

    def __init__(self, provider: MeterProvider | None) -> None:
        meter = metrics.get_meter("spark_outbox", spark_outbox.__version__, provider, conventions.SCHEMA)
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Events that were emitted, or were to be."
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Events that handlers were called with."
        )
        self._duration = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "The duration of calls of handlers.",
            explicit_bucket_boundaries_advisory=DURATIONS,
        )
        self._groups: set[str] = set()

    def emission_finished(self, emission: Emission, **_: Any) -> None:
        common = conventions.operation("send", emission.using, has_type=False)
        common |= conventions.error_type(emission.error)
        sent = emission.events if emission.error is not None else emission.new
        for group, count in Counter(event.group for event in sent).items():
            self._sent.add(count, common | self._destination(group))

    def delivery_finished(self, call: HandlerCall, **_: Any) -> None:
        common = conventions.operation("process", call.using, has_type=False)
        common["messaging.consumer.group.name"] = call.handler
        for event in call.events:
            own = self._destination(event.group) | conventions.error_type(facts.error_of(call, event))
            self._consumed.add(1, common | own)
        group = facts.common_group(call.events)
        error = call.error if facts.failed_events(call) else None
        own = conventions.error_type(error) | ({} if group is None else self._destination(group))
        self._duration.record(call.seconds, common | own)

    def _destination(self, group: str) -> conventions.Attributes:
        if group not in self._groups:
            if len(self._groups) >= MOST_GROUPS:
                group = OTHER
            else:
                self._groups.add(group)
        return {"messaging.destination.name": group}
