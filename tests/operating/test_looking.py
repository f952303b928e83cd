"""The commands that look: spark_status, spark_events, spark_health. And those that repair."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from django.core.management import CommandError, call_command

from spark_outbox import __version__, emit, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.operating import look, repair
from spark_outbox.worker.loop import Worker
from tests.postgres import ROOT
from tests.tools import (
    HOUR,
    connect,
    conninfo,
    eventually,
    manage,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def run(command, *arguments):
    """Run a command in this process; return what it prints, its errors, and its exit code."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    try:
        call_command(command, *arguments, stdout=out, stderr=errors)
    except CommandError as error:
        errors.write(str(error))
        code = error.returncode
    except SystemExit as end:
        code = end.code
    return out.getvalue(), errors.getvalue(), code


@pytest.fixture
def failing(own_registry):
    """A handler that fails for good on each event whose payload says how."""

    def handle(event):
        if event.get("error"):
            raise ValueError(event.error)

    handler("", name="shop.mail", max_attempts=1)(handle)


# spark_status


def test_the_status_is_a_table(failing):
    for number in range(3):
        emit("order", f"order {number}")
    emit("mail", "later", delay=HOUR)
    emit("mail", "bad", error="no such user")
    Worker().drain()
    emit("order", "new")
    out, errors, code = run("spark_status")
    assert (errors, code) == ("", 0)
    lines = [line.split() for line in out.splitlines()]
    names = "group late ready delayed retrying running failed unhandled done/h oldest"
    assert lines[1] == names.split()
    assert lines[2] == ["order", "0s", "1", "0", "0", "0", "0", "0", "3", "0s"]
    assert lines[3] == ["mail", "0", "1", "0", "0", "1", "0", "0", "0s"]
    assert "critical: 0 worker processes are there." in out
    assert "    Start one: manage.py spark_worker." in out
    assert "warning: 1 events have failed for good." in out
    assert "lag" not in out
    out, _, _ = run("spark_status", "--failures")
    assert "shop.mail: 1 failed, 0 to be tried again; last 20" in out
    assert "    builtins.ValueError: no such user\n    for example bad\n" in out


def test_the_status_has_the_workers(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    with worker_thread(groups="^order"):
        wait_until_asleep()
        out, _, _ = run("spark_status")
    (line,) = [line for line in out.splitlines() if ":" + str(os.getpid()) in line]
    assert re.search(rf":{os.getpid()}  watch +\d+s +20.* \^order +{re.escape(__version__)}$", line)


def test_the_status_as_json_is_one_document(failing):
    emit("order", "order")
    found = json.loads(run("spark_status", "--json")[0])
    assert list(found) == ["groups", "workers", "pauses", "health"]
    assert found["groups"][0]["group"] == "order"
    assert found["groups"][0]["ready"] == 1
    assert list(json.loads(run("spark_status", "--json", "--failures")[0])) == [*found, "failures"]


def test_the_status_needs_no_time_zones(settings):
    settings.USE_TZ = False
    out, errors, _ = run("spark_status")
    assert (out.splitlines()[0][-6], errors) == ("+", "")


def test_an_empty_outbox_has_a_status(own_registry):
    out, errors, code = run("spark_status")
    assert (errors, code) == ("", 0)
    assert "group" in out


def test_the_status_is_watched_until_ctrl_c(own_registry):
    here, there = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, ROOT / "manage.py", "spark_status", "--watch", "0.05"],
        stdin=there,
        stdout=there,
        stderr=there,
        env={**os.environ, "DATABASE_URL": conninfo(), "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(there)
    said = ""
    while said.count("\x1b[2J") < 3:
        said += os.read(here, 4096).decode()
    process.send_signal(signal.SIGINT)
    while True:
        try:
            said += os.read(here, 4096).decode()
        except OSError:
            break
    assert process.wait(30) == 0
    os.close(here)
    assert "Traceback" not in said
    assert "0 worker processes are there" in said


def test_a_circuit_is_closed_by_hand(own_registry):
    emit("g", "key", delay=HOUR)
    waiting = {"handler": "h", "error": "spark_outbox: not called, its circuit is open"}
    OutboxEvent.objects.get().deliveries.create(**waiting)
    assert "circuit" in run("spark_status")[0]
    assert run("spark_status", "--close-circuit", "h")[0] == "1 events of h are ready.\n"
    assert OutboxEvent.objects.get().available_at is None


# spark_pause and spark_resume


def test_a_handler_is_paused_and_resumed(failing):
    paused = run("spark_pause", "--handler", "shop.mail", "--why", "the server moves")
    assert paused[::2] == ("The handler shop.mail is paused.\n", 0)
    assert "No worker that can be seen has a handler 'shop.mail'." in paused[1]
    emit("order", "order_1")
    Worker().drain()
    assert status("order_1") == "pending"
    header, line = run("spark_pause")[0].splitlines()
    assert header.split() == ["kind", "name", "since", "by", "waiting", "why"]
    assert re.search(r"^handler +shop\.mail +20.* +1  the server moves$", line)
    (found,) = json.loads(run("spark_pause", "--json")[0])
    assert (found["kind"], found["name"], found["waiting"]) == ("handler", "shop.mail", 1)
    shown = run("spark_status")[0]
    assert re.search(r"warning: The handler shop\.mail is paused since 20.*: the server moves", shown)
    assert "; 1 events wait for it." in shown
    (header, line) = shown.splitlines()[1:3]
    assert dict(zip(header.split(), line.split(), strict=True))["paused"] == "1"
    assert "is paused since" in run("spark_events", "order_1")[0]
    assert "order_1" in run("spark_events", "--handler", "shop.mail")[0]
    resumed = run("spark_resume", "--handler", "shop.mail")
    assert resumed == ("The handler shop.mail is not paused any more.\n", "", 0)
    assert run("spark_pause") == ("", "Nothing is paused.\n", 0)
    Worker().drain()
    assert status("order_1") == "done"


def test_a_group_is_paused_by_all_of_its_name(failing):
    assert run("spark_pause", "--group", "order", "--json")[1:] == ("", 0)
    for group in ("order", "order_paid"):
        emit(group, group)
    Worker().drain()
    assert statuses() == {"order": "pending", "order_paid": "done"}
    found = json.loads(run("spark_resume", "--group", "order", "--json")[0])
    assert (found["kind"], found["name"], found["why"]) == ("group", "order", "")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("pause", ["--handler", "shop.mial"], "The most similar ones:\n  shop.mail\n"),
        ("pause", ["--why", "x"], "Give --handler or --group."),
        ("pause", ["--group", "twice"], "The group 'twice' is paused already. Nothing was changed."),
        ("resume", ["--group", "never"], "The group 'never' is not paused. Nothing was changed."),
        ("resume", [], "one of the arguments --handler --group is required"),
        ("pause", ["--group", "g", "--handler", "shop.mail"], "not allowed with argument"),
    ],
)
def test_what_can_not_be_paused_or_resumed_is_refused(failing, command, arguments, message):
    run("spark_pause", "--group", "twice")
    _, errors, code = run(f"spark_{command}", *arguments)
    assert message in errors
    assert code == 1


# spark_events


@pytest.fixture
def various(failing):
    emit("order", "order_1", number=1)
    emit("order", "order_2", error="order 2 is bad")
    emit("mail", "mail_1", error="order 1 is bad")
    Worker().drain()
    emit("order", "order_3", delay=HOUR)
    emit("order", "order_4")
    emit("order", "order_5", ordering_key="o")
    with connect() as other:
        other.execute(
            "update spark_outbox_event set created_at = now() - interval '3 days' where key = 'order_1'"
        )


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ([], ["order_5", "order_4", "order_3", "mail_1", "order_2", "order_1"]),
        (["--state", "failed"], ["mail_1", "order_2"]),
        (["--state", "pending"], ["order_5", "order_4", "order_3"]),
        (["--state", "done"], ["order_1"]),
        (["--state", "unhandled"], []),
        (["--group", "^m"], ["mail_1"]),
        (["--key-prefix", "order_"], ["order_5", "order_4", "order_3", "order_2", "order_1"]),
        (["--handler", "shop.mail"], ["mail_1", "order_2"]),
        (["--handler", "shop.mail", "--group", "order"], ["order_2"]),
        (["--fingerprint", "builtins.ValueError: order # is bad"], ["mail_1", "order_2"]),
        (["--fingerprint", "nope"], []),
        (["--older-than", "2d"], ["order_1"]),
        (["--limit", "2"], ["order_5", "order_4"]),
    ],
)
def test_events_are_listed(various, options, keys):
    out, errors, code = run("spark_events", "--json", *options)
    assert (errors, code) == ("", 0)
    assert [event["key"] for event in json.loads(out)] == keys
    out, errors, _ = run("spark_events", *options)
    assert [line.split()[1] for line in out.splitlines()[1:]] == keys
    assert errors == ("" if keys else "No such event.\n")


def test_the_list_has_the_reason_of_a_failure(various):
    assert "  ValueError: order 2 is bad\n" in run("spark_events", "--state", "failed")[0]


def test_an_event_is_shown_whole(various):
    out, errors, code = run("spark_events", "order_2")
    assert (errors, code) == ("", 0)
    assert re.search(r"^key +order_2$", out, re.MULTILINE)
    assert re.search(r"^status +failed$", out, re.MULTILINE)
    assert "The handler shop.mail has failed 1 times" in out
    assert '"error": "order 2 is bad"' in out
    assert "shop.mail: failed, 1 attempts, the last at 20" in out
    assert "Traceback (most recent call last):" in out
    found = json.loads(run("spark_events", "order_2", "--json")[0])
    assert found["payload"] == {"error": "order 2 is bad"}
    assert found["deliveries"][0]["status"] == "failed"
    assert len(found["explanation"]) == 2
    _, errors, code = run("spark_events", "nope")
    assert "There is no event with this key" in errors
    assert code == 1


@pytest.mark.parametrize(
    "number", ["123456789.123456789123456789", "1e5000", f"{'9' * 5000}", "0.1", "12"]
)
def test_numbers_are_shown_as_they_are(own_registry, number):
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, payload) "
            f"values ('key', 'g', '{{\"n\": {number}}}')"
        )
        ((stored,),) = other.execute("select payload ->> 'n' from spark_outbox_event").fetchall()
    assert str(json.loads(run("spark_events", "key", "--json")[0])["payload"]["n"]) == stored


def hide(document):
    return {"hidden": len(document)}


def test_what_is_not_to_be_shown_is_not(own_registry, settings):
    user = {"token": "s3cret", "name": "anna"}
    pairs = {1: {"iban": "x1"}, "token": "s3cret", (2, 3): [{4: 5, "iban": "x1"}]}
    emit("g", "key", headers={"token": "t0p"}, user=user, n=[{"iban": "x1"}], pairs=pairs)
    settings.SPARK_OUTBOX = {"REDACT": ["token", "iban"]}
    out, _, _ = run("spark_events", "key")
    assert "anna" in out
    assert out.count("[redacted]") == 6
    assert not re.search("s3cret|x1|t0p", out)
    settings.SPARK_OUTBOX = {"REDACT": f"{__name__}.hide"}
    assert json.loads(run("spark_events", "key", "--json")[0])["payload"] == {"hidden": 3}


def test_a_pruned_event_is_not_listed_but_shown(own_registry):
    emit("g", "key")
    OutboxEvent.objects.update(status="done", digest=1, payload={})
    assert json.loads(run("spark_events", "--json")[0]) == []
    assert "It has been pruned" in run("spark_events", "key")[0]


# spark_health


def test_the_exit_code_says_how_bad_it_is(failing):
    out, _, code = run("spark_health")
    assert code == 2
    assert "critical workers: 0 worker processes are there." in out
    with worker_thread():
        out, _, code = run("spark_health")
        assert code == 0
        assert set(re.findall(r"^(\w+) ", out, re.MULTILINE)) == {"ok"}
        emit("g", "bad", error="no")
        eventually(lambda: status("bad") == "failed")
        out, _, code = run("spark_health")
        assert code == 1
        assert "warning  failed: 1 events have failed for good." in out
        assert run("spark_health", "--fail-on", "critical")[2] == 0
        found = json.loads(run("spark_health", "--json")[0])
        assert {check["name"]: check["status"] for check in found}["failed"] == "warning"


def test_the_lag_is_what_somebody_bears(own_registry):
    emit("g", "key")
    with connect() as other:
        other.execute("update spark_outbox_event set created_at = now() - interval '5 minutes'")

    def lag(*options):
        found = json.loads(run("spark_health", "--json", *options)[0])
        return {check["name"]: check["status"] for check in found}["lag"]

    assert lag() == "warning"
    assert lag("--max-lag", "10m") == "ok"
    assert lag("--max-lag", "4m") == "critical"


def test_a_database_that_is_away_is_critical():
    done = manage("spark_health", "--json", url="postgresql://nobody@127.0.0.1:1/none")
    assert done.returncode == 2
    assert json.loads(done.stdout)[0]["name"] == "database"


def test_what_can_not_be_seen_is_no_alarm(own_registry, settings, wake_mode):
    def checks():
        found = json.loads(run("spark_health", "--json")[0])
        return {check["name"]: check["status"] for check in found}

    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    assert checks()["workers"] == "ok"
    settings.SPARK_OUTBOX = {"WAKE": "always"}
    assert checks()["trigger"] == "warning"
    wake_mode("never")
    assert checks()["trigger"] == "ok"


# spark_retry and spark_discard


@pytest.fixture
def failed(failing):
    for number in range(5):
        emit("g", f"{number}", error=f"order {number} is bad")
    emit("g", "other", error="no")
    Worker().drain()


def test_events_are_retried_by_their_keys(failed):
    emit("g", "done")
    Worker().drain()
    out, errors, code = run("spark_retry", "1", "3", "done", "nope")
    assert (out, code) == ("2 events are to be handled now.\n", 0)
    assert errors.splitlines() == [
        "The event 'done' is left out: it is done.",
        "There is no event with the key 'nope'.",
    ]
    assert [key for key, value in statuses().items() if value == "pending"] == ["1", "3"]


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--failed"], {"0", "1", "2", "3", "4", "other"}),
        (["--handler", "shop.mail"], {"0", "1", "2", "3", "4", "other"}),
        (["--handler", "nope"], set()),
        (["--fingerprint", "builtins.ValueError: order # is bad"], {"0", "1", "2", "3", "4"}),
        (["--failed", "--max", "2"], {"0", "1"}),
        (["--since", "1h"], {"0", "1", "2", "3", "4", "other"}),
    ],
)
@pytest.mark.parametrize("verb", ["retry", "discard"])
def test_all_that_failed_alike_are_changed(failed, monkeypatch, verb, options, keys):
    monkeypatch.setattr(repair, "CHUNK_SIZE", 2)
    if verb == "discard":
        options = [*options, "--why", "a test"]
    _, errors, code = run(f"spark_{verb}", *options, "--dry-run")
    assert (errors, code) == (f"{len(keys)} events have failed so.\n", 0)
    assert set(statuses().values()) == {"failed"}
    out, _, code = run(f"spark_{verb}", *options, "--yes", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["events"], set(found["changed"])) == (len(keys), keys)
    wanted = {"retry": "pending", "discard": "discarded"}[verb]
    assert {key for key, value in statuses().items() if value == wanted} == keys


def test_events_are_given_up_with_a_reason(failed):
    out, _, _ = run("spark_discard", "1", "--why", "a test order")
    assert out == "1 events are given up.\n"
    assert "a test order" in OutboxEvent.objects.get(key="1").last_error
    assert "a test order" in run("spark_events", "1")[0]


def test_what_a_worker_holds_is_passed_over(failed):
    with connect(autocommit=False) as other:
        other.execute("select id from spark_outbox_event where key in ('0', '1') for no key update")
        out, _, _ = run("spark_retry", "--failed", "--yes")
    assert out == "4 events are to be handled now.\n"
    assert [key for key, value in statuses().items() if value == "failed"] == ["0", "1"]


def test_only_what_has_failed_is_given_up_and_nothing_stops_at_others(failed, monkeypatch):
    """Events that are pending again, or that SQL has ended, came first and were changed, or were all."""
    monkeypatch.setattr(repair, "CHUNK_SIZE", 2)
    OutboxEvent.objects.filter(key__in=["0", "1"]).update(status="pending")
    OutboxEvent.objects.filter(key="2").update(status="done")
    out, errors, _ = run("spark_discard", "--handler", "shop.mail", "--why", "x", "--yes")
    assert (out, errors) == ("3 events are given up.\n", "3 events have failed so.\n")
    assert statuses()["0"] == statuses()["1"] == "pending"


def test_an_event_that_failed_without_a_delivery_is_retried(own_registry):
    emit("g", "key")
    OutboxEvent.objects.update(status="failed")
    assert run("spark_retry", "--failed", "--yes")[0] == "1 events are to be handled now.\n"


def test_keys_of_which_none_is_changed_are_an_error(own_registry):
    _, errors, code = run("spark_retry", "nope")
    assert "There is no event with the key 'nope'." in errors
    assert "Nothing was changed." in errors
    assert code == 1
    assert run("spark_retry", "nope", "--dry-run")[0] == "1 events are named.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give keys, or --failed, --handler, --fingerprint or --since."),
        (["key", "--failed"], "Give keys, or --failed"),
        (["--failed"], "There is no terminal to ask on: give --yes, or --dry-run."),
        (["--since", "x"], "'x' is no duration"),
    ],
)
def test_what_makes_no_sense_is_refused(failed, arguments, message):
    done = manage("spark_retry", *arguments, url=conninfo())
    assert message in done.stderr
    assert done.returncode > 0
    assert set(statuses().values()) == {"failed"}


def test_with_rich_or_without_a_table_says_the_same(various, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    plain = run("spark_events")[0]
    monkeypatch.delitem(sys.modules, "rich")
    assert run("spark_events")[0] == plain  # into a pipe
    assert Delivery.objects.count() == 2
    assert look.worst([{"status": "ok"}]) == 0
