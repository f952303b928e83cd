"""What is never logged, on no level: payloads, keys, tracebacks, and rows that the server quotes."""

import io
import re
import signal

import pytest
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from spark_outbox import emit, source
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge
from tests.probe.handlers import WAYS
from tests.tools import WorkerProcess, eventually, make_challenge, status, wait_until_ended

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "x7Qw-correct-horse"


@pytest.fixture
def refused_rows():
    """A deferred constraint that refuses some rows, and quotes them."""
    with connection.cursor() as cursor:
        cursor.execute(
            "create function refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'refused: %', new.note; end $$; "
            "create constraint trigger refuse after insert on challenges_handled "
            "deferrable initially deferred for each row when (new.handler = 'refused') "
            "execute function refuse()"
        )
    yield
    with connection.cursor() as cursor:
        cursor.execute("drop function refuse cascade")


@pytest.mark.parametrize(
    ("verbosity", "debug"), [("1", "0"), ("3", "0"), ("3", "1")], ids=["default", "verbose", "debug"]
)
def test_whatever_happens_to_an_event_its_data_and_tracebacks_stay_out_of_the_log(
    logins, refused_rows, verbosity, debug
):
    for way in WAYS:
        emit(f"leak_{way}", f"{way} {SECRET}", secret=SECRET, headers={"trace": SECRET})
    emit("nothing", SECRET, secret=SECRET)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            insert into spark_outbox_event (key, event_group, payload) values
                ('unreadable', 'leak_raise', jsonb_build_object('secret', jsonb_build_object(
                    '$', jsonb_build_array('nope', %s))))
            """,
            [SECRET],
        )
    with WorkerProcess("-v", verbosity, "--no-reload", url=logins.url("worker"), DEBUG=debug) as worker:
        worker.wait_until_ready()
        wait_until_ended()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        output = worker.output
    assert SECRET not in output
    assert "Traceback" not in output
    assert "Handler leak raise on event" in output
    assert {way: status(f"{way} {SECRET}") for way in WAYS} == {
        way: ended for way, (_, ended) in WAYS.items()
    }
    # The tables have it all.
    told = Delivery.objects.filter(status="failed", traceback__contains=SECRET)
    assert set(told.values_list("handler", flat=True)) >= {
        f"leak {way}" for way in ("raise", "chain", "value", "unique", "commit", "batch", "async")
    }
    assert SECRET in OutboxEvent.objects.get(key="unreadable").last_error


def test_a_worker_that_dies_of_a_bug_says_where_and_no_more():
    emit("sabotage", "key", secret=SECRET)
    with WorkerProcess("-v", "3") as worker:
        eventually(lambda: "The worker process dies of ValueError at " in worker.output)
        eventually(lambda: re.search(r"ERROR The worker process \d+ died of exit code 1", worker.output))
        assert "in _write" in worker.output
        assert SECRET not in worker.output


def test_a_source_that_raises_is_reported_without_what_it_said(own_registry):
    challenge = make_challenge(SECRET)

    @source(Challenge)
    def bad(challenge):
        raise ValueError(challenge.title)

    def report(**options):
        err = io.StringIO()
        with pytest.raises(CommandError):
            call_command("process_spark_sources", stderr=err, stdout=io.StringIO(), **options)
        return err.getvalue()

    assert report().startswith(f"challenges.Challenge {challenge.pk}: ")
    assert "raised ValueError at " in report()
    assert SECRET not in report()
    assert f"ValueError: {SECRET}" in report(traceback=True)


def test_what_goes_wrong_after_the_commit_neither_hurts_the_caller_nor_tells_of_rows(
    own_registry, settings, caplog
):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    own_registry.add_handler(lambda event: None, group="", name="h")
    with connection.cursor() as cursor:
        cursor.execute(
            "create function refuse() returns trigger language plpgsql as "
            "$$ begin raise exception 'refused: %', new.key; end $$; "
            "create trigger refuse before update on spark_outbox_event "
            "for each row execute function refuse()"
        )
    try:
        with transaction.atomic():
            emit("g", SECRET)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("drop function refuse cascade")
    assert status(SECRET) == "pending"
    assert (
        "can't be settled, and not be marked as failed either (ProgrammingError P0001)"
        in (caplog.messages[-1])
    )
    assert SECRET not in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    Worker().drain()
    assert status(SECRET) == "done"


def test_events_that_cannot_even_be_claimed_after_the_commit_are_left_to_the_next_call(
    own_registry, settings, caplog, logins
):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    own_registry.add_handler(lambda event: None, group="", name="h")
    with connection.cursor() as cursor:
        try:
            with transaction.atomic():
                emit("g", SECRET)
                cursor.execute(f"set role {logins.names['emitter']}")
        finally:
            cursor.execute("reset role")
    assert status(SECRET) == "pending"
    assert caplog.messages[-1].startswith(
        "Events of database default could not be handled after the commit (ProgrammingError: permission"
    )
    assert SECRET not in caplog.text
    Worker().drain()
    assert status(SECRET) == "done"
