"""A worker that runs for long: it outlives its connections, and does not grow."""

import gc

import pytest
from django.db import connection, connections

from spark_outbox import emit, emit_many
from spark_outbox.models import OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import eventually, note, statuses, wait_until_asleep, worker_thread

pytestmark = pytest.mark.django_db(transaction=True)


def test_the_worker_gets_over_a_connection_that_the_server_terminates(own_registry, caplog):
    own_registry.add_handler(note, group="")
    with worker_thread():
        for number in range(3):
            emit("g", f"{number}")
            eventually(lambda number=number: Handled.objects.count() == number + 1)
            wait_until_asleep()
            with connection.cursor() as cursor:
                cursor.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where starts_with(application_name, 'spark_worker ')"
                )
            eventually(lambda number=number: caplog.text.count("trying again") == number + 1)
            wait_until_asleep()  # it LISTENs again
        emit("g", "last")
        eventually(lambda: Handled.objects.count() == 4)


def test_an_event_whose_connection_is_lost_in_the_handler_loses_no_attempt(own_registry):
    terminated = []

    def handle(event):
        note(event)
        if not terminated:
            terminated.append(True)
            with connection.cursor() as cursor:
                cursor.execute("select pg_terminate_backend(pg_backend_pid())")
        note(event)

    own_registry.add_handler(handle, group="")
    emit("g", "key")
    with worker_thread():
        eventually(lambda: statuses() == {"key": "done"})
    assert OutboxEvent.objects.get().attempts == 1
    assert Handled.objects.count() == 2


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_other_connections_are_closed_as_at_request_boundaries(own_registry):
    seen = []

    def handle(event):
        with connections["other"].cursor() as cursor:
            cursor.execute("select 1")
        seen.append(connections["other"].connection)

    own_registry.add_handler(handle, group="")
    with worker_thread():
        emit("g", "key")
        eventually(lambda: seen and seen[0].closed)  # CONN_MAX_AGE is 0
        emit("g", "key 2")
        eventually(lambda: len(seen) == 2)
    assert set(statuses().values()) == {"done"}


def test_under_debug_the_query_log_does_not_grow(own_registry, settings):
    settings.DEBUG = True
    lengths = []

    def handle(event):
        note(event)
        lengths.append(len(connection.queries_log))

    own_registry.add_handler(handle, group="")
    with worker_thread():
        for number in range(5):
            emit("g", f"{number}")
            eventually(lambda number=number: len(lengths) == number + 1)
            wait_until_asleep()
    assert max(lengths[1:]) < 30  # the first has the queries of its start


def test_memory_does_not_grow_with_the_events(own_registry):
    own_registry.add_handler(lambda event: event.get("n"), group="", name="h")
    worker = Worker()

    def handle_some(start):
        emit_many({"group": f"group {start + n}", "key": f"{start + n}", "n": n} for n in range(3000))
        worker.drain()
        gc.collect()
        return len(gc.get_objects())

    handle_some(0)
    before = handle_some(10_000)
    after = handle_some(20_000)
    assert after - before < 300
