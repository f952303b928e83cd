"""Handlers that fail, in whatever way: they hurt no other, and what is written down about it."""

import contextlib
import os
import socket
import threading
from datetime import timedelta

import pytest
from django.db import IntegrityError, connection, transaction

from spark_outbox import emit, emit_many, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import (
    PATIENCE,
    Clock,
    connect,
    deliveries,
    eventually,
    make_challenge,
    make_ready,
    note,
    statuses,
    wait_until_asleep,
    worker_thread,
)
from tests.worker.failing import division_by_zero, raising

pytestmark = pytest.mark.django_db(transaction=True)


# Independent handlers


def test_a_failing_handler_hurts_neither_its_siblings_nor_other_events(own_registry):
    def fail(event):
        note(event)
        if event.key == "5":
            raise RuntimeError("no")

    own_registry.add_handler(lambda event: note(event), group="", name="before")
    own_registry.add_handler(fail, group="", name="fail")
    own_registry.add_handler(lambda event: note(event), group="", name="after")
    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    Worker().drain()

    assert {key for key, status in statuses().items() if status == "pending"} == {"5"}
    assert Handled.objects.filter(key="5").count() == 2
    assert Handled.objects.count() == 9 * 3 + 2
    failed = OutboxEvent.objects.get(key="5")
    assert failed.attempts == 1
    assert "RuntimeError: no" in failed.last_error
    assert failed.available_at > failed.created_at


def integrity_error(event):
    OutboxEvent.objects.create(key=event.key, group="twice")


def statement_timeout(event):
    with connection.cursor() as cursor:
        cursor.execute("set local statement_timeout = '5ms'")
        cursor.execute("select pg_sleep(10)")


def lock_timeout(event):
    with connect() as other, other.transaction():
        other.execute("select from challenges_challenge for update")
        with connection.cursor() as cursor:
            cursor.execute("set local lock_timeout = '5ms'")
            cursor.execute("select from challenges_challenge for update")


def broken_transaction(event):
    with contextlib.suppress(Exception):
        division_by_zero(event)


def set_rollback(event):
    transaction.set_rollback(True)


def set_autocommit(event):
    transaction.set_autocommit(True)


def system_exit(event):
    raise SystemExit(3)


def durable_atomic(event):
    with transaction.atomic(durable=True):
        note(event)


def keyboard_interrupt(event):
    raise KeyboardInterrupt


def leave_atomic_open(event):
    transaction.atomic().__enter__()
    note(event)


def leave_durable_open(event):
    with transaction.atomic():
        transaction.atomic().__enter__()


@pytest.mark.parametrize(
    "fail",
    [
        integrity_error,
        division_by_zero,
        statement_timeout,
        lock_timeout,
        broken_transaction,
        set_rollback,
        set_autocommit,
        system_exit,
        keyboard_interrupt,
        durable_atomic,
        leave_atomic_open,
        leave_durable_open,
    ],
)
def test_a_handler_that_fails_in_whatever_way_hurts_no_other_and_is_retried_alone(
    own_registry, settings, fail
):
    settings.SPARK_OUTBOX = {"BACKOFF": 3600}
    make_challenge()
    OutboxEvent.objects.all().delete()
    calls = []

    def fine(event):
        Handled.objects.create(key=event.key, handler="fine")
        calls.append("fine")

    def fails(event):
        Handled.objects.create(key=event.key, handler="fails")
        calls.append("fails")
        fail(event)

    def fails_first(event):
        calls.append("fails first")
        fail(event)

    own_registry.add_handler(fine, group="^g", name="fine")
    own_registry.add_handler(fails, group="^g", name="fails")
    own_registry.add_handler(fails_first, group="^g", name="fails first")
    own_registry.add_handler(note, group="^other", name="other")
    emit("g", "key")
    emit("other", "other")
    with worker_thread():
        eventually(lambda: statuses().get("other") == "done")
        eventually(lambda: OutboxEvent.objects.get(key="key").attempts == 1)
        wait_until_asleep()
    assert statuses() == {"key": "pending", "other": "done"}
    assert sorted(Handled.objects.values_list("handler", flat=True)) == ["fine", "note"]
    assert deliveries() == {
        "fine": ("done", 1),
        "fails": ("pending", 1),
        "fails first": ("pending", 1),
    }
    assert calls == ["fine", "fails", "fails first"]

    calls.clear()
    make_ready()
    emit("other", "another")
    with worker_thread():
        eventually(lambda: OutboxEvent.objects.get(key="key").attempts == 2)
        eventually(lambda: statuses().get("another") == "done")
    assert calls == ["fails", "fails first"]
    assert Handled.objects.filter(handler="fine").count() == 1


def test_who_needs_a_durable_atomic_is_told_of_atomic_false(own_registry):
    own_registry.add_handler(durable_atomic, group="", name="h")
    emit("g", "key")
    Worker().drain()
    assert "Register it with atomic=False" in Delivery.objects.get().error


def test_a_handler_that_closes_the_connection_is_told_and_hurts_no_other(own_registry):
    def close(event):
        if event.key == "bad":
            connection.close()
        note(event)

    own_registry.add_handler(close, group="")
    for key in ("one", "bad", "two"):
        emit("g", key)
    with worker_thread():
        eventually(lambda: statuses() == {"one": "done", "bad": "pending", "two": "done"})
        eventually(lambda: OutboxEvent.objects.get(key="bad").attempts >= 1)
    assert sorted(Handled.objects.values_list("key", flat=True)) == ["one", "two"]
    (delivery,) = Delivery.objects.all()
    assert "connection" in delivery.error


def test_a_handler_that_commits_by_itself_is_told_and_does_not_loop(own_registry):
    def commit(event):
        note(event)
        connection.connection.commit()

    own_registry.add_handler(commit, group="")
    emit("g", "bad")
    with worker_thread():
        eventually(lambda: OutboxEvent.objects.get(key="bad").attempts >= 1)
    assert statuses() == {"bad": "pending"}


def test_the_database_going_away_burns_no_attempt(own_registry):
    calls = []

    def handle(event):
        calls.append(event.attempt)
        if len(calls) < 3:
            with connection.cursor() as cursor:
                cursor.execute("select pg_terminate_backend(pg_backend_pid())")

    handler("", name="h", max_attempts=1)(handle)
    emit("g", "key")
    with worker_thread():
        eventually(lambda: statuses() == {"key": "done"})
    assert calls == [1, 1, 1]


def test_a_deadlock_is_one_handlers_failure(own_registry):
    one, two = make_challenge("1"), make_challenge("2")
    OutboxEvent.objects.all().delete()
    lock = "select from challenges_challenge where id = %s for update"
    holds_two, go = threading.Event(), threading.Event()

    def be_the_other():
        with connect() as other, other.transaction():
            other.execute("set deadlock_timeout = '1h'")  # so that the handler is the victim
            other.execute(lock, [two.pk])
            holds_two.set()
            assert go.wait(PATIENCE)
            other.execute(lock, [one.pk])

    def lock_both(event):
        note(event)
        with connection.cursor() as cursor:
            cursor.execute("set local deadlock_timeout = '10ms'")
            cursor.execute(lock, [one.pk])
            go.set()
            cursor.execute(lock, [two.pk])

    own_registry.add_handler(lock_both, group="^g", name="h")
    emit("g", "key")
    thread = threading.Thread(target=be_the_other)
    thread.start()
    assert holds_two.wait(PATIENCE)
    Worker().drain()
    thread.join(PATIENCE)
    assert statuses() == {"key": "pending"}
    assert "deadlock detected" in Delivery.objects.get().error
    assert not Handled.objects.exists()


# What is written down


def test_the_delivery_tells_all_about_the_last_attempt(own_registry):
    own_registry.add_handler(raising(ValueError("no\0 \ud800")), group="", name="h")
    emit("g", "key")
    Worker().drain()
    delivery = Delivery.objects.get()
    assert delivery.error == "builtins.ValueError: no\\0 \\ud800"
    assert delivery.traceback.startswith("Traceback (most recent call last)")
    assert "tests/worker/failing.py" in delivery.traceback
    assert delivery.worker == f"{socket.gethostname()}:{os.getpid()}"
    assert timedelta(0) < delivery.duration < timedelta(seconds=10)
    assert delivery.attempted_at >= OutboxEvent.objects.get().created_at
    assert delivery.available_at == OutboxEvent.objects.get().available_at
    assert delivery.traceback == OutboxEvent.objects.get().last_error


@pytest.mark.parametrize("batch", [None, 2])
def test_a_call_that_costs_the_batch_its_transaction_has_a_duration_like_any_other(own_registry, batch):
    clock = Clock()

    def close(event):
        clock.now += 3
        connection.close()

    own_registry.add_handler(close, group="", name="h", batch=batch)
    emit("g", "key")
    Worker(clock=clock).drain()
    assert Delivery.objects.get().duration == timedelta(seconds=3)


def test_integrity_errors_of_a_handler_are_its_own(own_registry):
    errors = []
    own_registry.add_handler(
        lambda event: OutboxEvent.objects.create(key=event.key, group="x"), group="", name="h"
    )
    emit("g", "key")
    Worker(on_error=lambda event, handler, error: errors.append(error)).drain()
    assert [type(error) for error in errors] == [IntegrityError]
