"""Handlers that fail: their policies, their own words, and what is written down about it."""

import contextlib
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.utils import timezone

from spark_outbox import Discard, Retry, emit, handler
from spark_outbox.errors import DuplicateKey, InvalidEvent, RegistrationError
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.processes.guard import Guard
from spark_outbox.registry.backoff import delay
from spark_outbox.registry.policy import Policy
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.unhandled import PUT_BACK_INTERVAL
from tests.challenges.models import Donation, Handled
from tests.tools import (
    PATIENCE,
    Clock,
    connect,
    deliveries,
    eventually,
    make_challenge,
    make_ready,
    note,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def raising(error):
    def fail(event):
        note(event)
        raise error

    return fail


# Independent handlers


def integrity_error(event):
    OutboxEvent.objects.create(key=event.key, group="twice")


def division_by_zero(event):
    with connection.cursor() as cursor:
        cursor.execute("select 1 / 0")


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


def test_an_event_that_one_handler_discards_and_another_handles_is_done_without_an_error(own_registry):
    @handler("", name="discards")
    def discard(event):
        raise Discard("no")

    handler("", name="handles")(note)
    emit("g", "key")
    Worker().drain()
    assert (status(), OutboxEvent.objects.get().last_error) == ("done", "")
    assert deliveries() == {"discards": ("discarded", 1), "handles": ("done", 1)}


# What is written down


def test_the_delivery_tells_all_about_the_last_attempt(own_registry):
    own_registry.add_handler(raising(ValueError("no\0 \ud800")), group="", name="h")
    emit("g", "key")
    Worker().drain()
    delivery = Delivery.objects.get()
    assert delivery.error == "builtins.ValueError: no\\0 \\ud800"
    assert delivery.traceback.startswith("Traceback (most recent call last)")
    assert "test_failures.py" in delivery.traceback
    assert delivery.worker == f"{socket.gethostname()}:{os.getpid()}"
    assert timedelta(0) < delivery.duration < timedelta(seconds=10)
    assert delivery.attempted_at >= OutboxEvent.objects.get().created_at
    assert delivery.available_at == OutboxEvent.objects.get().available_at
    assert delivery.traceback == OutboxEvent.objects.get().last_error


# Policies


def test_out_of_attempts_the_delivery_and_its_event_have_failed(own_registry, caplog):
    @handler("", name="h", max_attempts=3)
    def h(event):
        raise RuntimeError(f"attempt {event.attempt}")

    emit("g", "key")
    for attempt in (1, 2, 3):
        assert statuses() == {"key": "pending"}
        make_ready()
        Worker().drain()
        assert deliveries()["h"][1] == attempt
    assert statuses() == {"key": "failed"}
    assert deliveries() == {"h": ("failed", 3)}
    event = OutboxEvent.objects.get()
    assert "attempt 3" in event.last_error
    assert event.finished_at
    assert "Handler h on event" in caplog.text
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING", "ERROR"]


def test_each_handler_has_its_own_policy_and_the_event_waits_for_all(own_registry):
    @handler("", name="gives up", max_attempts=1)
    def gives_up(event):
        raise RuntimeError

    @handler("", name="recovers", backoff=[5, 60])
    def recovers(event):
        if event.attempt < 3:
            raise RuntimeError

    emit("g", "key")
    Worker().drain()
    assert deliveries() == {"gives up": ("failed", 1), "recovers": ("pending", 1)}
    event, delivery = OutboxEvent.objects.get(), Delivery.objects.get(handler="recovers")
    assert event.available_at == delivery.available_at
    assert abs(delivery.available_at - delivery.attempted_at - timedelta(seconds=5)) < timedelta(
        seconds=1
    )
    make_ready()
    Worker().drain()
    delivery.refresh_from_db()
    assert abs(delivery.available_at - delivery.attempted_at - timedelta(minutes=1)) < timedelta(
        seconds=1
    )
    make_ready()
    Worker().drain()
    assert deliveries() == {"gives up": ("failed", 1), "recovers": ("done", 3)}
    assert statuses() == {"key": "failed"}


def test_a_delivery_that_is_not_due_yet_is_left_alone_when_another_of_its_event_is(own_registry):
    calls = []

    @handler("", name="soon", backoff=[0.01])
    def soon(event):
        calls.append("soon")
        if event.attempt < 3:
            raise RuntimeError

    @handler("", name="late", backoff=[3600])
    def late(event):
        calls.append("late")
        raise RuntimeError

    emit("g", "key")
    with worker_thread():
        eventually(lambda: deliveries().get("soon") == ("done", 3))
    assert calls.count("late") == 1
    event = OutboxEvent.objects.get()
    assert event.available_at > timezone.now() + timedelta(minutes=50)


def test_a_delivery_that_falls_due_while_another_of_its_event_fails_is_not_put_off(own_registry):
    calls = []

    @handler("", name="slow", backoff=[0.01, 3600])
    def slow(event):
        calls.append("slow")
        if event.attempt == 2:
            time.sleep(0.3)  # meanwhile the other's time comes
        raise RuntimeError

    @handler("", name="quick", backoff=[0.2])
    def quick(event):
        calls.append("quick")
        if event.attempt == 1:
            raise RuntimeError

    emit("g", "key")
    with worker_thread():
        eventually(lambda: deliveries().get("quick") == ("done", 2))
    assert calls == ["slow", "quick", "slow", "quick"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyError("x"), "discarded"),
        (ConnectionResetError("x"), "pending"),
        (ValueError("x"), "failed"),
        (Discard("not for us"), "discarded"),
        (Retry("busy"), "pending"),
    ],
)
def test_retry_for_and_discard_for_sort_the_exceptions(own_registry, error, status):
    handler("", name="h", retry_for=(OSError,), discard_for=(LookupError,))(raising(error))
    emit("g", "key")
    Worker().drain()
    assert deliveries() == {"h": (status, 1)}
    assert statuses() == {"key": status}
    assert not Handled.objects.exists()  # rolled back, whatever became of it


def test_an_event_that_one_handler_discards_and_another_handles_is_done(own_registry):
    own_registry.add_handler(raising(Discard("no")), group="", name="discards")
    own_registry.add_handler(note, group="", name="handles")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}
    assert deliveries() == {"discards": ("discarded", 1), "handles": ("done", 1)}
    assert Delivery.objects.get(handler="discards").error == "spark_outbox.errors.Discard: no"


@pytest.mark.parametrize(
    "after",
    [lambda: timedelta(hours=2), lambda: 7200, lambda: timezone.now() + timedelta(hours=2)],
    ids=["delta", "s", "time"],
)
def test_a_handler_may_say_itself_when_to_be_called_again(own_registry, after):
    own_registry.add_handler(raising(Retry("later", after=after())), group="", name="h")
    emit("g", "key")
    Worker().drain()
    event = OutboxEvent.objects.get()
    assert abs(event.available_at - timezone.now() - timedelta(hours=2)) < timedelta(minutes=5)
    assert event.status == "pending"


def test_retry_refuses_what_is_no_time():
    for nonsense in ("soon", timezone.now().replace(tzinfo=None)):
        with pytest.raises(TypeError, match="after"):
            Retry(after=nonsense)


def test_project_defaults_come_from_the_settings(own_registry, settings):
    settings.SPARK_OUTBOX = {"MAX_ATTEMPTS": 2, "BACKOFF": 100, "MAX_BACKOFF": 1000}
    own_registry.add_handler(raising(RuntimeError()), group="", name="h")
    emit("g", "key")
    Worker().drain()
    delivery = Delivery.objects.get()
    waits = delivery.available_at - delivery.attempted_at
    assert timedelta(seconds=49) < waits < timedelta(seconds=101)
    make_ready()
    Worker().drain()
    assert statuses() == {"key": "failed"}


def test_delays_double_with_jitter_or_are_what_they_are_told_to_be():
    assert [delay(n, jitter=0) for n in (1, 2, 3, 12, 13, 99)] == [1, 2, 4, 2048, 3600, 3600]
    assert delay(3, jitter=1) == 2
    assert 2 <= delay(3) <= 4
    assert delay(3, timedelta(minutes=1), longest=100, jitter=0) == 100
    assert [delay(n, [1, timedelta(seconds=5)]) for n in (1, 2, 3)] == [1, 5, 5]
    assert delay(4, lambda attempt: timedelta(minutes=attempt)) == 240
    assert delay(4, lambda attempt: -1) == 0


@pytest.mark.parametrize("answer", [lambda: 1 / 0, lambda: "soon", lambda: None])
def test_a_backoff_that_makes_no_sense_costs_no_more_than_a_delay(own_registry, caplog, answer):
    handler("", name="h", backoff=lambda attempt: answer())(raising(OSError("x")))
    emit("g", "key")
    emit("g", "other")
    Worker().drain()
    assert statuses() == {"key": "pending", "other": "pending"}
    assert deliveries() == {"h": ("pending", 1)}
    assert "The backoff of h failed" in caplog.text


@pytest.mark.parametrize(
    "policy",
    [
        {"max_attempts": 0},
        {"max_attempts": "3"},
        {"backoff": -1},
        {"backoff": []},
        {"backoff": ["1"]},
        {"backoff": "1"},
        {"timeout": 0},
        {"timeout": "1"},
        {"retry_for": ValueError},
        {"discard_for": ("ValueError",)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy):
    with pytest.raises(RegistrationError, match=next(iter(policy))):
        Policy(**policy)


def test_a_handler_registered_later_is_owed_by_an_event_that_waits(own_registry):
    own_registry.add_handler(raising(RuntimeError()), group="", name="fails")
    emit("g", "key")
    Worker().drain()
    own_registry.add_handler(note, group="", name="new")
    make_ready()
    Worker().drain()
    assert deliveries() == {"fails": ("pending", 2), "new": ("done", 1)}


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


# Timeouts


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


# Unhandled


def test_a_worker_that_starts_puts_back_the_unhandled_events_that_it_can_handle(own_registry):
    for group in ("new", "newer", "unknown"):
        emit(group, group)
    Worker().drain()
    assert set(statuses().values()) == {"unhandled"}
    own_registry.add_handler(note, group="^new", name="h")
    with worker_thread(groups="^newe?r?$"):
        eventually(lambda: Handled.objects.count() == 2)
    assert statuses() == {"new": "done", "newer": "done", "unknown": "unhandled"}


def test_a_worker_at_rest_puts_back_what_another_has_just_had_no_handler_for(own_registry):
    """In a rolling deployment the new release may start before the old one ends."""
    clock, tomorrow = Clock(), timezone.now() + timedelta(days=1)
    own_registry.add_handler(note, group="^key$|^later$", name="h")
    with worker_thread(poll_interval=0.05, clock=clock):
        wait_until_asleep()
        for key in ("key", "later", "other"):
            OutboxEvent.objects.create(group=key, key=key, status="unhandled", attempts=1)
        Delivery.objects.create(
            event=OutboxEvent.objects.get(key="later"), handler="h", attempts=1, available_at=tomorrow
        )
        clock.now = PUT_BACK_INTERVAL
        eventually(lambda: status("key") == "done")
    assert statuses() == {"key": "done", "later": "pending", "other": "unhandled"}
    assert OutboxEvent.objects.get(key="later").available_at == tomorrow


# Keys that disagree


def test_on_duplicate_says_what_an_existing_key_means():
    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    assert emit("g", "key", n=1, challenge=challenge, on_duplicate="raise")
    assert emit("g", "key", n=2) is None
    assert emit("g", "key", challenge=challenge, n=1, on_duplicate="check") is None
    with transaction.atomic():
        for different in ({"n": 2, "challenge": challenge}, {"n": 1}, {}):
            with pytest.raises(DuplicateKey, match="another group or payload"):
                emit("g", "key", **different, on_duplicate="check")
        with pytest.raises(DuplicateKey, match="another group or payload"):
            emit("h", "key", n=1, challenge=challenge, on_duplicate="check")
        with pytest.raises(DuplicateKey, match="already"):
            emit("g", "key", n=1, challenge=challenge, on_duplicate="raise")
        assert emit("g", "other")  # the transaction is healthy
    with pytest.raises(InvalidEvent, match="ignore, raise, check"):
        emit("g", "key", on_duplicate="replace")
    assert OutboxEvent.objects.count() == 2
    assert not Donation.objects.exists()


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
