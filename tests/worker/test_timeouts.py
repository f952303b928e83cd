"""Handlers past their timeout: what interrupts them, in Python and in the database."""

import contextlib
import signal
import threading
import time
from datetime import timedelta

import pytest
from django.db import connection

from spark_outbox import emit, handler
from spark_outbox.models import Delivery
from spark_outbox.processes.guard import Guard
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import deliveries, note, statuses
from tests.worker.failing import division_by_zero

pytestmark = pytest.mark.django_db(transaction=True)


def spin(event):
    while True:
        with contextlib.suppress(Exception):
            connection.ensure_connection()


def sleep_in_python(event):
    time.sleep(60)


def sleep_in_the_database(event):
    with connection.cursor() as cursor:
        cursor.execute("select pg_sleep(60)")


def catch_everything(event):
    for _ in range(2):
        with contextlib.suppress(BaseException):
            threading.Event().wait(60)
    raise RuntimeError("a second alarm rang")


@pytest.mark.parametrize("handle", [spin, sleep_in_python, sleep_in_the_database, catch_everything])
def test_a_handler_past_its_timeout_is_interrupted_rolled_back_and_tried_again(own_registry, handle):
    def write_and_handle(event):
        note(event)
        handle(event)

    handler("", name="h", timeout=0.05)(write_and_handle)
    own_registry.add_handler(note, group="", name="other")
    emit("g", "key")
    assert Worker(guard=Guard()).drain() == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert deliveries() == {"h": ("pending", 1), "other": ("done", 1)}
    assert [handled.handler for handled in Handled.objects.all()] == ["note"]


def test_a_handler_within_its_timeout_is_left_alone(own_registry):
    handler("", name="h", timeout=timedelta(minutes=1))(note)
    emit("g", "key")
    Worker(guard=Guard()).drain()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert statuses() == {"key": "done"}


def test_a_timeout_cuts_off_queries_also_without_an_alarm_and_those_of_its_handler_alone(own_registry):
    seen = []

    def look(event):
        with connection.cursor() as cursor:
            cursor.execute("show statement_timeout")
            seen.append((event.key, *cursor.fetchone()))
        note(event)
        if event["fails"]:
            division_by_zero(event)

    handler("^g", name="slow", timeout=0.05)(sleep_in_the_database)
    handler("^h", name="limited", timeout=90)(look)
    own_registry.add_handler(look, group="", name="free")
    for number, group in enumerate(("g", "h", "h", "i", "h", "i")):
        emit(group, f"{number}", fails=number in (2, 3))
    Worker().drain()
    assert "statement timeout" in Delivery.objects.get(handler="slow").error
    assert seen == [
        ("0", "0"),
        ("1", "90s"),
        ("1", "0"),
        ("2", "90s"),
        ("2", "0"),
        ("3", "0"),
        ("4", "90s"),
        ("4", "0"),
        ("5", "0"),
    ]


def test_the_settings_have_a_timeout_for_all(own_registry, settings):
    settings.SPARK_OUTBOX = {"TIMEOUT": timedelta(milliseconds=50)}
    own_registry.add_handler(sleep_in_python, group="", name="h")
    handler("", name="patient", timeout=60)(note)
    emit("g", "key")
    Worker(guard=Guard()).drain()
    assert deliveries() == {"h": ("pending", 1), "patient": ("done", 1)}


def test_the_server_ends_a_transaction_that_is_idle_for_longer_than_its_handlers_may_be(own_registry):
    seen = []

    @handler("^g$", name="h", timeout=60)
    def look(event):
        with connection.cursor() as cursor:
            cursor.execute("show idle_in_transaction_session_timeout")
            seen.extend(cursor.fetchone())

    emit("g", "1")
    Worker(guard=Guard()).run(drain=True)
    connection.close()
    emit("g", "2")
    Worker().run(drain=True)  # nothing would interrupt it
    connection.close()
    handler("^other$", name="as long as it likes")(note)
    emit("g", "3")
    Worker(guard=Guard()).run(drain=True)
    assert seen == ["90s", "0", "0"]
    connection.close()
