"""OpenTelemetry: spans, their links across processes, and metrics; with the SDK's own exporters."""

import asyncio
import json
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
from asgiref.sync import sync_to_async
from django.db import OperationalError, connection, connections
from opentelemetry import baggage, context, trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode

from spark_outbox import aemit, emit, emit_many, handler
from spark_outbox.models import OutboxEvent
from spark_outbox.observing.otel import SparkOutboxInstrumentor
from spark_outbox.observing.otel.figures import DURATIONS
from spark_outbox.testing import drain
from spark_outbox.worker import settle
from tests.challenges.models import Handled
from tests.observing.telemetry.running import MANY, SECRET, emit_elsewhere, handle_elsewhere
from tests.postgres import ROOT
from tests.tools import make_challenge, note, statuses, work

pytestmark = pytest.mark.django_db(transaction=True)


class Telemetry:
    """What this process exports."""

    def __init__(self):
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers, self.meters = TracerProvider(), MeterProvider([self._reader])
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.instrumentor = SparkOutboxInstrumentor()

    def begin(self, **options):
        providers = {"tracer_provider": self.tracers, "meter_provider": self.meters}
        self.instrumentor.uninstrument()
        self.instrumentor.instrument(**providers, **options)

    def span(self, name):
        """Return the one span of this name."""
        (found,) = self.spans(name)
        return found

    def spans(self, start=""):
        return [span for span in self._exporter.get_finished_spans() if span.name.startswith(start)]

    def points(self, name):
        return points(json.loads(self._reader.get_metrics_data().to_json()), name)


@pytest.fixture
def telemetry():
    telemetry = Telemetry()
    telemetry.begin()
    yield telemetry
    telemetry.instrumentor.uninstrument()


def points(metrics, name):
    """Return the data points of one metric."""
    (scope,) = [scope for resource in metrics["resource_metrics"] for scope in resource["scope_metrics"]]
    assert scope["scope"]["schema_url"] == "https://opentelemetry.io/schemas/1.44.0"
    (metric,) = [metric for metric in scope["metrics"] if metric["name"] == name]
    return metric["data"]["data_points"]


def headers(key="key"):
    return OutboxEvent.objects.get(key=key).headers


def traceparent(span):
    found = span.context
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def linked(span):
    return [link.context.span_id for link in span.links]


# Two processes

EMIT = f"""
import json
from asgiref.sync import sync_to_async
from django.db import connection, connections
from opentelemetry import baggage, context, propagate, trace

context.attach(baggage.set_baggage("tenant", "acme"))
with trace.get_tracer("tests").start_as_current_span("request"):
    emit_many({MANY!r})
    for name in ("plain", "async", "detached", "fails", "discarded", "plain"):
        emit(f"seen_{{name}}", name, secret={SECRET!r})
    headers = {{}}
    propagate.inject(headers)
    with connection.cursor() as cursor:
        cursor.execute("select spark_emit('seen_plain', 'sql', '{{}}', %s)", [json.dumps(headers)])
"""


def named(exports, name):
    return [span for export in exports for span in export["spans"] if span["name"] == name]


def of_key(exports, name, key):
    (found,) = [s for s in named(exports, name) if s["attributes"].get("messaging.message.id") == key]
    return found


def test_a_trace_goes_from_the_process_that_emits_to_the_worker_and_on(tmp_path):
    emitter = emit_elsewhere(tmp_path / "emitter", EMIT, settings="otel")
    worker = handle_elsewhere(tmp_path / "worker", settings="otel")
    assert statuses() == {
        "plain": "done",
        "async": "done",
        "detached": "done",
        "fails": "failed",
        "discarded": "discarded",
        "good": "done",
        "bad": "failed",
        "sql": "done",
        "after plain": "done",
        "after sql": "done",
    }
    notes = dict(Handled.objects.values_list("key", "note"))
    assert notes == dict.fromkeys(
        ["plain", "async", "detached", "sql", "after plain", "after sql"], "acme"
    )
    assert SECRET not in json.dumps([emitter, worker])
    (request,) = named(emitter, "request")
    sent, duplicate = named(emitter, "send seen_plain")
    assert sent["parent_id"] == request["context"]["span_id"]
    assert sent["kind"] == "SpanKind.PRODUCER"
    assert (
        sent["attributes"].items()
        >= {
            "messaging.system": "spark_outbox",
            "messaging.operation.name": "send",
            "messaging.operation.type": "send",
            "messaging.destination.name": "seen_plain",
            "messaging.message.id": "plain",
        }.items()
    )
    assert duplicate["attributes"]["messaging.spark_outbox.duplicate_count"] == 1

    plain = of_key(worker, "process seen_plain", "plain")
    assert plain["context"]["trace_id"] != request["context"]["trace_id"]
    assert plain["parent_id"] is None
    assert [link["context"]["span_id"] for link in plain["links"]] == [sent["context"]["span_id"]]
    assert plain["kind"] == "SpanKind.CONSUMER"
    assert plain["status"] == {"status_code": "UNSET"}
    assert (
        plain["attributes"].items()
        >= {
            "messaging.system": "spark_outbox",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": "seen_plain",
            "messaging.consumer.group.name": "plain",
            "messaging.message.id": "plain",
            "messaging.spark_outbox.message.delivery_attempt": 1,
            "messaging.spark_outbox.outcome": "handled",
        }.items()
    )
    sql = of_key(worker, "process seen_plain", "sql")
    assert [link["context"]["span_id"] for link in sql["links"]] == [request["context"]["span_id"]]
    onward = of_key(worker, "send seen_follow_up", "after plain")
    assert onward["parent_id"] == plain["context"]["span_id"]
    assert onward["context"]["trace_id"] == plain["context"]["trace_id"]
    for name in ("async", "detached"):
        (span,) = named(worker, f"process seen_{name}")
        (link,) = span["links"]
        assert link["context"]["span_id"] == named(emitter, f"send seen_{name}")[0]["context"]["span_id"]

    attempts = named(worker, "process seen_fails")
    attributes = [span["attributes"] for span in attempts]
    assert [
        (each["messaging.spark_outbox.message.delivery_attempt"], each["messaging.spark_outbox.outcome"])
        for each in attributes
    ] == [(1, "retried"), (2, "failed")]
    assert {each["error.type"] for each in attributes} == {"ValueError"}
    assert {span["status"]["status_code"] for span in attempts} == {"ERROR"}
    assert all("handlers.py" in span["status"]["description"] for span in attempts)
    (discarded,) = named(worker, "process seen_discarded")
    assert "error.type" not in discarded["attributes"]
    assert discarded["status"]["status_code"] == "UNSET"

    (sent_list,) = named(emitter, "send seen_list")
    (process_list,) = named(worker, "process seen_list")
    for span in (sent_list, process_list):
        assert span["attributes"]["messaging.batch.message_count"] == 2
        assert "messaging.message.id" not in span["attributes"]
    assert [
        (link["context"]["span_id"], link["attributes"]["messaging.message.id"])
        for link in process_list["links"]
    ] == [(sent_list["context"]["span_id"], key) for key in ("good", "bad")]
    assert process_list["attributes"]["error.type"] == "spark_outbox.errors.BatchFailed"

    settles = [
        span for export in worker for span in export["spans"] if span["name"].startswith("settle")
    ]
    assert {span["kind"] for span in settles} == {"SpanKind.CLIENT"}
    assert {span["attributes"]["messaging.operation.type"] for span in settles} == {"settle"}
    settled = {link["context"]["span_id"] for span in settles for link in span["links"]}
    assert {sent["context"]["span_id"], sent_list["context"]["span_id"]} <= settled

    (exported,) = [export["metrics"] for export in emitter]
    assert {
        point["attributes"]["messaging.destination.name"]: point["value"]
        for point in points(exported, "messaging.client.sent.messages")
    } == {
        "seen_plain": 1,
        "seen_async": 1,
        "seen_detached": 1,
        "seen_fails": 1,
        "seen_discarded": 1,
        "seen_list": 2,
    }
    (exported,) = [export["metrics"] for export in worker if export["spans"]]
    assert {
        (
            point["attributes"]["messaging.consumer.group.name"],
            point["attributes"].get("error.type"),
            point["value"],
        )
        for point in points(exported, "messaging.client.consumed.messages")
    } == {
        ("plain", None, 2),
        ("follow up", None, 2),
        ("async call", None, 1),
        ("detached call", None, 1),
        ("fails", "ValueError", 2),
        ("discards", None, 1),
        ("list", None, 1),
        ("list", "ValueError", 1),
    }
    durations = points(exported, "messaging.process.duration")
    assert {tuple(point["explicit_bounds"]) for point in durations} == {DURATIONS}
    assert sum(point["count"] for point in durations) == 10


# What is written into headers


def test_nothing_is_written_unless_instrumented_and_with_an_sdk():
    emit("g", "not instrumented")
    instrumentor = SparkOutboxInstrumentor()
    instrumentor.instrument(tracer_provider=NoOpTracerProvider(), meter_provider=NoOpMeterProvider())
    try:
        emit("g", "without an SDK")
    finally:
        instrumentor.uninstrument()
    emit("g", "not any more")
    assert list(OutboxEvent.objects.values_list("headers", flat=True)) == [{}, {}, {}]


async def emit_async():
    await aemit("two", "2")
    await sync_to_async(connections.close_all)()


def test_every_way_to_emit_writes_the_context_and_the_statement_is_part_of_its_span(telemetry):
    inside = []

    def note_span(execute, sql, *args):
        if "insert into spark_outbox_event" in sql:
            inside.append(trace.get_current_span())
        return execute(sql, *args)

    with telemetry.tracers.get_tracer("tests").start_as_current_span("request") as request:
        token = context.attach(baggage.set_baggage("tenant", "acme"))
        with connection.execute_wrapper(note_span):
            emit("one", "1")
        asyncio.run(emit_async())
        emit_many([{"group": "three", "key": "3"}, {"group": "four", "key": "4"}])
        challenge = make_challenge()
        context.detach(token)
        assert trace.get_current_span() is request
    names = {"1": "send one", "2": "send two", "3": "send", "4": "send"}
    names[f"challenge_created_{challenge.pk}"] = "send challenge_created"
    for key, name in names.items():
        span = telemetry.span(name) if name != "send" else telemetry.spans("send")[2]
        assert headers(key) == {"traceparent": traceparent(span), "baggage": "tenant=acme"}
        assert span.parent.span_id == request.get_span_context().span_id
    assert [span.get_span_context() for span in inside] == [telemetry.span("send one").context]


def test_a_context_that_the_emitter_gives_stays_and_is_linked(telemetry):
    given = {"traceparent": f"00-{1:032x}-{2:016x}-01", "baggage": "mine=1"}
    emit("g", "key", headers=given)
    assert headers() == given
    span = telemetry.span("send g")
    assert (linked(span), span.kind) == ([2], SpanKind.CLIENT)


def test_an_emit_that_fails_is_an_error(telemetry):
    with pytest.raises(ZeroDivisionError), connection.execute_wrapper(lambda *_: 1 / 0):
        emit("g", "key")
    span = telemetry.span("send g")
    assert (span.status.status_code, span.attributes["error.type"]) == (
        StatusCode.ERROR,
        "ZeroDivisionError",
    )
    (point,) = telemetry.points("messaging.client.sent.messages")
    assert (point["value"], point["attributes"]["error.type"]) == (1, "ZeroDivisionError")


# How handlers continue it


def test_with_parent_a_handler_continues_the_trace_and_links_its_surroundings(
    own_registry, telemetry, monkeypatch
):
    own_registry.add_handler(note, group="", name="note")
    monkeypatch.setenv("OTEL_PYTHON_SPARK_OUTBOX_PARENT", "true")
    telemetry.begin()
    emit("g", "1")
    work()
    first = telemetry.span("send g")
    process = telemetry.span("process g")
    assert (process.context.trace_id, process.parent.span_id) == (
        first.context.trace_id,
        first.context.span_id,
    )
    assert linked(process) == [first.context.span_id]
    emit("g", "2")
    with telemetry.tracers.get_tracer("tests").start_as_current_span("around") as around:
        drain()
    process, second = telemetry.spans("process g")[1], telemetry.spans("send g")[1]
    assert process.parent.span_id == second.context.span_id
    assert linked(process) == [second.context.span_id, around.get_span_context().span_id]


def test_without_parent_a_handler_stays_in_the_trace_that_it_is_called_in(own_registry, telemetry):
    own_registry.add_handler(note, group="", name="note")
    emit("g", "key")
    with telemetry.tracers.get_tracer("tests").start_as_current_span("around") as around:
        drain()
    process = telemetry.span("process g")
    assert process.parent.span_id == around.get_span_context().span_id
    assert linked(process) == [telemetry.span("send g").context.span_id]


def test_the_context_of_one_call_is_not_that_of_the_next(own_registry, telemetry):
    seen = []

    @handler("", name="h")
    def see(event):
        seen.append((baggage.get_baggage("tenant"), trace.get_current_span().get_span_context()))

    token = context.attach(baggage.set_baggage("tenant", "acme"))
    emit("g", "1")
    context.detach(token)
    emit("g", "2")
    work()
    processes = telemetry.spans("process g")
    assert seen == [("acme", processes[0].context), (None, processes[1].context)]
    assert processes[0].context.trace_id != processes[1].context.trace_id
    assert not trace.get_current_span().get_span_context().is_valid


def test_the_spans_end_of_one_call_is_that_of_the_call_and_settling_follows_it(own_registry, telemetry):
    own_registry.add_handler(note, group="", name="note")
    emit("g", "key")
    work()
    process, settled = telemetry.span("process g"), telemetry.span("settle g")
    assert settled.parent.span_id == process.context.span_id
    assert process.start_time <= process.end_time
    assert settled.attributes["messaging.batch.message_count"] == 1
    assert linked(settled) == linked(process)


@pytest.mark.parametrize(
    ("odd", "links"),
    [
        ('{"traceparent": 5, "baggage": ["a"]}', []),
        ('{"traceparent": "nonsense", "tracestate": "=", "baggage": "?"}', []),
        ('{"traceparent": {"$": ["model", "challenges.challenge", 1, "default"]}}', []),
        (json.dumps({"traceparent": f"00-{1:032x}-{2:016x}-01", "large": "x" * 20_000}), [2]),
    ],
)
def test_odd_headers_do_no_harm(own_registry, telemetry, odd, links):
    own_registry.add_handler(note, group="", name="note")
    with connection.cursor() as cursor:
        cursor.execute("select spark_emit('g', 'key', '{}', %s)", [odd])
    work()
    assert statuses() == {"key": "done"}
    assert linked(telemetry.span("process g")) == links


def test_a_payload_that_cannot_be_read_is_an_error_of_the_handler(own_registry, telemetry):
    own_registry.add_handler(note, group="", name="note")
    OutboxEvent.objects.create(group="g", key="key", payload={"a": {"$": ["?"]}})
    work()
    attributes = telemetry.span("process g").attributes
    assert attributes["error.type"] == "spark_outbox.errors.UnreadablePayload"


def test_no_span_quotes_an_error_of_the_database(own_registry, telemetry):
    def fail(event):
        raise OperationalError("no stock for anna@example.com")

    handler("", name="fails", max_attempts=1)(fail)
    emit("g", "key")
    work()
    span = telemetry.span("process g")
    assert span.attributes["error.type"] == "django.db.utils.OperationalError"
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)


def test_calls_that_are_rolled_back_with_their_batch_say_so(
    own_registry, telemetry, unhurried, monkeypatch
):
    own_registry.add_handler(note, group="", name="note")
    write, refused = settle.write, []

    def refuse_once(*args, **options):
        if not refused:
            refused.append(True)
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        write(*args, **options)

    monkeypatch.setattr(settle, "write", refuse_once)
    emit("g", "key")
    work()
    spans = telemetry.spans("process g")
    outcomes = [span.attributes["messaging.spark_outbox.outcome"] for span in spans]
    assert outcomes == ["rolled_back", "handled"]
    assert all("error.type" not in span.attributes for span in spans)


# What is not said


def hide_keys(document):
    return {name: "…" if name == "key" else value for name, value in document.items()}


@pytest.mark.parametrize("redact", [["key"], f"{__name__}.hide_keys", f"{__name__}.broken"])
def test_a_redacted_key_is_in_no_span(own_registry, telemetry, settings, redact):
    settings.SPARK_OUTBOX = {"REDACT": redact}
    own_registry.add_handler(note, group="", name="note")
    own_registry.add_handler(lambda events: None, group="", name="list", batch=10)
    emit("g", "a secret")
    emit_many([{"group": "g", "key": "two secrets"}, {"group": "g", "key": "secrets"}])
    work()
    assert len(telemetry.spans()) >= 6
    assert "secret" not in "".join(span.to_json() for span in telemetry.spans())


def broken(document):
    return {"payload": document["amount"]}


def test_groups_without_number_make_no_time_series_without_number(telemetry):
    emit_many({"group": f"group {n}"} for n in range(60))
    counts = {
        point["attributes"]["messaging.destination.name"]: point["value"]
        for point in telemetry.points("messaging.client.sent.messages")
    }
    assert len(counts) == 51
    assert counts["other"] == 10


# Switching it on


def test_it_is_switched_on_once_and_off_again(telemetry, caplog):
    assert telemetry.instrumentor.is_instrumented_by_opentelemetry
    SparkOutboxInstrumentor().instrument(tracer_provider=telemetry.tracers)
    assert "instrumented already" in caplog.text
    emit("g", "1")
    assert len(telemetry.spans()) == 1
    SparkOutboxInstrumentor().uninstrument()
    emit("g", "2")
    assert len(telemetry.spans()) == 1


def test_automatic_instrumentation_finds_it_and_needs_no_settings():
    group = "opentelemetry_instrumentor"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = [EntryPoint(*item, group) for item in project["entry-points"][group].items()]
    assert entry.load() is SparkOutboxInstrumentor
    script = f"import {entry.module} as m; m.{entry.attr}().instrument(skip_dep_check=True)"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
