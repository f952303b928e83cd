"""Traces and metrics by OpenTelemetry's conventions for messaging, v1.44.

They need the extra `opentelemetry`, and whichever SDK the project exports with.

    send      a statement of emit() or emit_many(); its context goes into the headers of the events
    process   a call of a handler; links to the spans that sent its events
    settle    a batch that was committed; links to them, too

Neither payloads nor the messages of errors are exported, as these may quote a payload or a row.
"""

import logging
import os
from collections.abc import Callable
from typing import Any, ClassVar

from django.dispatch import Signal
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider

from spark_outbox.observing import hooks
from spark_outbox.observing.otel.figures import Figures
from spark_outbox.observing.otel.spans import Spans

logger = logging.getLogger(__name__)

PARENT = "OTEL_PYTHON_SPARK_OUTBOX_PARENT"
"""The environment variable that is the default of `instrument(parent=…)`."""


class SparkOutboxInstrumentor:
    """Switches traces and metrics on, for this process and those that it forks.

    `opentelemetry-instrument` finds it by itself. It needs neither Django's settings nor the app
    registry.
    """

    _connected: ClassVar[list[tuple[Signal, Callable[..., None]]]] = []

    @property
    def is_instrumented_by_opentelemetry(self) -> bool:
        return bool(self._connected)

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        parent: bool | None = None,
        **_: Any,
    ) -> None:
        """Begin. With `parent`, the span of a handler that is called with one event continues the trace
        in which it was emitted; otherwise it has a trace of its own, and a link."""
        if self._connected:
            logger.warning("spark_outbox is instrumented already.")
            return
        if parent is None:
            parent = os.environ.get(PARENT, "").strip().lower() == "true"
        spans, figures = Spans(tracer_provider, parent=parent), Figures(meter_provider)
        for signal, receiver in (
            (hooks.emission_started, spans.emission_started),
            (hooks.emission_finished, spans.emission_finished),
            (hooks.delivery_started, spans.delivery_started),
            (hooks.delivery_finished, spans.delivery_finished),
            (hooks.batch_settled, spans.batch_settled),
            (hooks.emission_finished, figures.emission_finished),
            (hooks.delivery_finished, figures.delivery_finished),
        ):
            signal.connect(receiver, weak=False)
            self._connected.append((signal, receiver))

    def uninstrument(self, **_: Any) -> None:
        while self._connected:
            signal, receiver = self._connected.pop()
            signal.disconnect(receiver)
