"""Sentry: errors and spans, with the real SDK and a transport that writes into files. The SDK patches
whatever it finds, so it only runs in processes of its own."""

import json

import pytest

from spark_outbox.models import OutboxEvent
from tests.observing.telemetry.running import MANY, SECRET, emit_elsewhere, handle_elsewhere
from tests.tools import statuses

pytestmark = pytest.mark.django_db(transaction=True)

EMIT = f"""
import sentry_sdk

emit("seen_plain", "the first")
with sentry_sdk.start_transaction(name="request"):
    emit("seen_plain", "plain", secret={SECRET!r})
    emit("seen_plain", "plain")
    emit_many({MANY!r})
    for name in ("async", "fails", "discarded", "retries"):
        emit(f"seen_{{name}}", name, secret={SECRET!r})
"""

HANDLE = """
from spark_outbox.worker.loop import Worker

Worker().run(drain=True)
"""


def of_type(exports, wanted):
    return [document for kind, document in exports if kind == wanted]


def transactions(exports, name):
    return [each for each in of_type(exports, "transaction") if each["transaction"] == name]


def spans(exports, op):
    return [
        span
        for document in of_type(exports, "transaction")
        for span in document["spans"]
        if span["op"] == op
    ]


def errors(exports):
    """Return of each error its handler, group, attempt, level, and message."""
    return sorted(
        (
            each["tags"]["spark_outbox.handler"],
            each["tags"]["spark_outbox.group"],
            each["contexts"]["spark_outbox"].get("attempt"),
            each["level"],
            each["exception"]["values"][-1]["value"],
        )
        for each in of_type(exports, "event")
    )


BROKEN = f"broken, with {len(SECRET)} characters"


def test_errors_arrive_once_and_traces_go_on_in_the_worker(tmp_path):
    emitter = emit_elsewhere(tmp_path / "emitter", EMIT, settings="sentry")
    worker = handle_elsewhere(tmp_path / "worker", settings="sentry")
    assert {key for key, status in statuses().items() if status == "failed"} == {
        "fails",
        "bad",
        "retries",
    }
    assert errors(emitter) == []
    assert errors(worker) == [
        ("fails", "seen_fails", 1, "warning", BROKEN),
        ("fails", "seen_fails", 2, "error", BROKEN),
        ("list", "seen_list", 1, "error", "broken, with 2 secrets"),
        ("retries", "seen_retries", 2, "error", "not yet"),
    ]
    assert SECRET not in json.dumps([emitter, worker])
    (error,) = [each for each in of_type(worker, "event") if each["level"] == "warning"]
    (raised,) = error["exception"]["values"]
    assert raised["mechanism"]["type"] == "spark_outbox"
    frames = raised["stacktrace"]["frames"]
    assert frames[-1]["module"] == "tests.observing.telemetry.handlers"
    assert '"vars"' not in json.dumps(worker)

    (request,) = transactions(emitter, "request")
    trace = request["contexts"]["trace"]["trace_id"]
    published = spans(emitter, "queue.publish")
    assert [span["description"] for span in published] == [
        "seen_plain",
        "seen_plain",
        "seen_list",
        "seen_async",
        "seen_fails",
        "seen_discarded",
        "seen_retries",
    ]
    assert {span["parent_span_id"] for span in published} == {request["contexts"]["trace"]["span_id"]}
    assert (
        published[0]["data"].items()
        >= {
            "messaging.system": "spark_outbox",
            "messaging.destination.name": "seen_plain",
            "messaging.message.id": "plain",
            "messaging.message.body.size": len(json.dumps({"secret": SECRET}, separators=(",", ":"))),
        }.items()
    )
    inserts = [
        span for span in spans(emitter, "db") if "insert into spark_outbox_event" in span["description"]
    ]
    assert {span["span_id"] for span in published} >= {span["parent_span_id"] for span in inserts}

    processed = spans(worker, "queue.process")
    (plain,) = [each for each in processed if each["data"].get("messaging.message.id") == "plain"]
    assert plain["trace_id"] == trace
    assert plain["status"] == "ok"
    assert (
        plain["data"].items()
        >= {
            "messaging.system": "spark_outbox",
            "messaging.destination.name": "seen_plain",
            "messaging.message.retry.count": 0,
        }.items()
    )
    assert plain["data"]["messaging.message.receive.latency"] >= 0
    assert plain["data"]["messaging.message.body.size"] > len(SECRET)
    fails = [each for each in processed if each["description"] == "fails"]
    assert [each["data"]["messaging.message.retry.count"] for each in fails] == [0, 1]
    assert [each["status"] for each in fails] == ["internal_error", "internal_error"]
    later = [each for each in processed if each["description"] == "async call"]
    assert {each["trace_id"] for each in fails + later} == {trace}
    (several,) = [each for each in processed if each["description"] == "list"]
    assert several["data"]["messaging.batch.message_count"] == 2
    assert several["trace_id"] != trace
    (outer, *_) = transactions(worker, "plain")
    assert outer["contexts"]["trace"]["op"] == "queue.task.spark_outbox"
    traced = [
        each for each in of_type(worker, "event") if each["tags"]["spark_outbox.handler"] == "fails"
    ]
    assert {each["contexts"]["trace"]["trace_id"] for each in traced} == {trace}


def test_only_what_is_final_arrives_if_that_is_wanted_and_no_key_that_is_redacted(tmp_path):
    script = f"""
from django.conf import settings
settings.SPARK_OUTBOX = {{"REDACT": ["key"]}}
{EMIT.replace('"plain", secret', '"a secret key", secret')}
{HANDLE}
"""
    exports = emit_elsewhere(tmp_path / "one", script, settings="sentry", FINAL_ONLY="1")
    assert errors(exports) == [
        ("fails", "seen_fails", 2, "error", BROKEN),
        ("list", "seen_list", 1, "error", "broken, with 2 secrets"),
        ("retries", "seen_retries", 2, "error", "not yet"),
    ]
    assert "a secret key" not in json.dumps(exports)


def test_what_a_handler_logs_has_no_variables(tmp_path):
    script = f'emit("seen_reports", "reports", secret={SECRET!r})\n{HANDLE}'
    options = '{"attach_stacktrace": true}'
    exports = emit_elsewhere(tmp_path / "one", script, settings="sentry", SENTRY_OPTIONS=options)
    (event,) = of_type(exports, "event")
    (thread,) = event["threads"]["values"]
    assert "report" in [frame["function"] for frame in thread["stacktrace"]["frames"]]
    assert SECRET not in json.dumps(exports)


def test_an_event_that_has_a_trace_gets_nothing_of_another(tmp_path):
    given = {"sentry-trace": f"{'a' * 32}-{'b' * 16}-1"}
    script = f"""
import sentry_sdk

with sentry_sdk.start_transaction(name="request"):
    emit("g", "given", headers={given!r})
    emit("g", "without")
"""
    emit_elsewhere(tmp_path / "one", script, settings="sentry")
    headers = dict(OutboxEvent.objects.values_list("key", "headers"))
    assert headers["given"] == given
    assert headers["without"].keys() == {"sentry-trace", "baggage"}


def test_it_works_where_spans_are_streamed_and_where_there_is_no_tracing(tmp_path):
    plain = 'emit("seen_fails", "1", secret="?")\n'
    without = emit_elsewhere(
        tmp_path / "without",
        plain + HANDLE,
        settings="sentry",
        SENTRY_OPTIONS='{"traces_sample_rate": null}',
    )
    assert len(errors(without)) == 2
    assert of_type(without, "transaction") == []
    streamed = """
import sentry_sdk

with sentry_sdk.traces.start_span("request"):
    emit("seen_fails", "2", secret="?")
"""
    exports = emit_elsewhere(
        tmp_path / "streamed",
        streamed + HANDLE,
        settings="sentry",
        SENTRY_OPTIONS='{"trace_lifecycle": "stream"}',
    )
    assert len(errors(exports)) == 2
    found = [item for kind, document in exports if kind == "span" for item in document["items"]]
    by_op = {}
    for span in found:
        op = span["attributes"].get("sentry.op", {"value": ""})
        by_op.setdefault(op["value"], []).append(span)
    (published,), processed = by_op["queue.publish"], by_op["queue.process"]
    assert [each["status"] for each in processed] == ["error", "error"]
    assert {each["trace_id"] for each in processed} == {published["trace_id"]}
    assert processed[0]["attributes"]["messaging.message.id"]["value"] == "2"


def test_a_worker_that_dies_of_an_event_arrives_by_the_log(tmp_path):
    emit_elsewhere(tmp_path / "emitter", 'emit("probe_crash", "1")\n', settings="sentry")
    worker = handle_elsewhere(tmp_path / "worker", settings="sentry")
    assert statuses() == {"1": "failed"}
    logged = [each["extra"] for each in of_type(worker, "event") if "handler" in each["extra"]]
    assert [(each["handler"], each["error"]) for each in logged] == [("crash", "WorkerDied")]


def test_a_call_in_the_process_that_emits_leaves_the_request_alone(tmp_path):
    script = """
import sentry_sdk
from django.conf import settings

settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
with sentry_sdk.start_transaction(name="request") as request:
    emit("seen_fails", "1", secret="?")
    assert sentry_sdk.get_current_span() is request
    sentry_sdk.capture_message("and on it goes")
"""
    exports = emit_elsewhere(tmp_path / "one", script, settings="sentry")
    (request,), (call, *_) = transactions(exports, "request"), transactions(exports, "fails")
    (published,) = [each for each in request["spans"] if each["op"] == "queue.publish"]
    assert call["contexts"]["trace"]["parent_span_id"] == published["span_id"]
    assert call["contexts"]["trace"]["trace_id"] == request["contexts"]["trace"]["trace_id"]
    (message,) = [each for each in of_type(exports, "event") if "message" in each]
    assert "spark_outbox.handler" not in message.get("tags", {})
