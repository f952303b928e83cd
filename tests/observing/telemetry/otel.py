"""The demo project with OpenTelemetry, whose exporters keep everything until the process ends."""

import atexit
import json
import os
from pathlib import Path

from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from spark_outbox.observing.otel import SparkOutboxInstrumentor
from tests.settings import *  # noqa: F403

INSTALLED_APPS += ["tests.observing.telemetry"]  # noqa: F405

_exporter = InMemorySpanExporter()
_reader = InMemoryMetricReader()
_tracers = TracerProvider()
_tracers.add_span_processor(SimpleSpanProcessor(_exporter))
trace.set_tracer_provider(_tracers)
metrics.set_meter_provider(MeterProvider([_reader]))
SparkOutboxInstrumentor().instrument()


@atexit.register
def _write() -> None:
    metrics_data = _reader.get_metrics_data()
    found = {
        "spans": [json.loads(span.to_json()) for span in _exporter.get_finished_spans()],
        "metrics": json.loads(metrics_data.to_json()) if metrics_data is not None else None,
    }
    Path(os.environ["TELEMETRY"], f"{os.getpid()}.json").write_text(json.dumps(found))
