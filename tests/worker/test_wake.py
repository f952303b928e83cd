"""The wake protocol: a worker that polls once an hour hears of every event, and writers stay silent
while no worker sleeps."""

import random
import threading
import time
from contextlib import contextmanager

import pytest
from django.db import connection, transaction

from spark_outbox import emit, emit_many
from spark_outbox.models import OutboxEvent
from spark_outbox.registry.policy import Policy
from spark_outbox.store import resting, waking
from spark_outbox.store.connection import fetch_value, past_wrappers
from spark_outbox.worker.context import make_context
from spark_outbox.worker.event_loop import poll
from spark_outbox.worker.wake import MAX_PAUSE, Wake
from tests.challenges.models import Handled
from tests.statements import Statements
from tests.tools import (
    HOUR,
    PATIENCE,
    WorkerProcess,
    connect,
    eventually,
    notifications,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)

INSERT = "insert into spark_outbox_event (key, event_group) values (%s, 'g')"


@pytest.fixture
def handled(own_registry):
    """The keys that were handled, in order."""
    keys = []
    own_registry.add_handler(lambda event: keys.append(event.key), group="", name="note")
    return keys


def sql(statement):
    with connection.cursor() as cursor:
        cursor.execute(statement)


@pytest.mark.parametrize(
    ("emit_some", "count"),
    [
        (lambda: emit("g"), 1),
        (lambda: emit_many({"group": "g"} for _ in range(50)), 50),
        (
            lambda: sql(
                "insert into spark_outbox_event (key, event_group) "
                "select 'key-' || n, 'g' from generate_series(1, 50) as n"
            ),
            50,
        ),
        (lambda: sql("select spark_emit('g', 'key')"), 1),
        (lambda: sql("copy spark_outbox_event (key, event_group) from program 'echo k,g' csv"), 1),
    ],
    ids=["emit", "emit_many", "bulk insert", "spark_emit", "copy"],
)
def test_a_sleeping_worker_is_woken_by(handled, emit_some, count):
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        emit_some()
        eventually(lambda: len(handled) == count)


def test_a_sleeping_worker_wakes_when_a_delayed_event_is_due(handled):
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        emit("g", "later", delay=0.2)
        emit("g", "now")
        eventually(lambda: len(handled) == 2)
    assert handled == ["now", "later"]
    later = OutboxEvent.objects.get(key="later")
    assert later.finished_at >= later.available_at


def test_a_worker_that_starts_finds_what_is_there(handled):
    emit("g", "ready")
    emit("g", "due", delay=-1)
    with worker_thread(poll_interval=HOUR):
        eventually(lambda: sorted(handled) == ["due", "ready"])


# The race that the gate must not lose


@pytest.fixture
def hold_up(own_registry):
    """A handler that stays busy with the event "busy" until it may go on; and what it handled."""
    busy, go, handled = threading.Event(), threading.Event(), []

    def handle(event):
        if event.key == "busy":
            busy.set()
            assert go.wait(PATIENCE)
        handled.append(event.key)

    own_registry.add_handler(handle, group="g")
    yield busy, go, handled
    go.set()


def test_an_emit_that_began_while_the_worker_was_busy_and_committed_after_it_slept_is_found(hold_up):
    """Nobody slept when the trigger ran, so it was silent: K tells the worker that it is out there."""
    busy, go, handled = hold_up
    with worker_thread(poll_interval=HOUR), connect() as emitter, connect() as listener:
        wait_until_asleep()
        emit("g", "busy")
        assert busy.wait(PATIENCE)
        listener.execute("listen spark_outbox")
        with emitter.transaction():
            emitter.execute(INSERT, ["straggler"])
            go.set()
            wait_until_asleep()  # it holds S, though the straggler holds K
        eventually(lambda: handled == ["busy", "straggler"])
        assert notifications(listener) == 0  # it was found in silence


def test_the_worker_that_ignores_k_would_lose_that_race(hold_up, monkeypatch):
    """The test above bites: without the probe of K the same steps leave the event lying."""
    busy, go, handled = hold_up
    ignoring_k = resting.FALL_ASLEEP.replace(waking.PROBE_K, "select true")
    monkeypatch.setattr(resting, "FALL_ASLEEP", ignoring_k)
    with worker_thread(poll_interval=HOUR), connect() as emitter:
        wait_until_asleep()
        emit("g", "busy")
        assert busy.wait(PATIENCE)
        with emitter.transaction():
            emitter.execute(INSERT, ["straggler"])
            go.set()
            wait_until_asleep()
            eventually(lambda: idle_workers() == 1)
        with pytest.raises(AssertionError, match="still False"):
            eventually(lambda: "straggler" in handled, patience=1)
        emit("g", "next")
        eventually(lambda: set(handled) == {"busy", "straggler", "next"})


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"status": "failed"}, {"status": "pending"}),
        ({"status": "discarded"}, {"status": "pending", "available_at": None}),
        ({"available_at": "2100-01-01T00:00Z"}, {"available_at": "2020-01-01T00:00Z"}),
        ({"available_at": "2100-01-01T00:00Z"}, {"available_at": None}),
    ],
)
def test_a_worker_that_sleeps_notices_what_sql_makes_ready(fields, changed, handled):
    """By any client, and without `notify`."""
    OutboxEvent.objects.create(key="one", group="g", **fields)
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        OutboxEvent.objects.update(**changed)
        eventually(lambda: handled == ["one"])


def test_what_workers_put_back_or_reopen_wakes_nobody(listener):
    """They go on with it themselves; a worker of an older release would put it aside once more."""
    OutboxEvent.objects.create(key="aside", group="g", status="unhandled")
    OutboxEvent.objects.create(key="running", group="g", status="running")
    with connect() as sleeper:
        sleeper.execute(waking.TAKE_S)
        OutboxEvent.objects.update(status="pending")
        assert notifications(listener) == 0
        OutboxEvent.objects.update(status="failed")
        OutboxEvent.objects.update(status="pending")
        assert notifications(listener) == 1


def test_what_workers_write_wakes_nobody(own_registry, listener):
    calls = []

    def fail_once(event):
        calls.append(event.key)
        if len(calls) <= 3:
            raise ValueError("not yet")

    own_registry.add_handler(fail_once, group="", name="h", policy=Policy(backoff=[0.05]))
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        for number in range(3):
            emit("g", f"{number}")
        eventually(lambda: len(calls) == 6)
        wait_until_done(3)
    assert notifications(listener) <= 3  # of emits: not of retries, and not of what is done


def idle_workers():
    with connection.cursor() as cursor:
        cursor.execute(
            "select count(*) from pg_stat_activity "
            "where starts_with(application_name, 'spark_worker ') and state = 'idle' "
            "and query ~ 'select min|outlook'"
        )
        return cursor.fetchone()[0]


def test_the_race_is_not_lost_in_thousands_of_rounds_with_random_pauses(handled):
    rounds, writers = 2000, 3
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    seen = handled

    def write(number):
        pauses = random.Random(seed + number)
        with connect() as emitter:
            for turn in range(rounds):
                key = f"{number}-{turn}"
                with emitter.transaction():
                    emitter.execute(INSERT, [key])
                    time.sleep(pauses.choice([0, 0.0002, 0.001, 0.003]) * pauses.random())
                if pauses.random() < 0.7:  # else the next begins while this one is handled
                    eventually(lambda key=key: key in seen[-20 * writers :] or key in seen)

    with worker_thread(poll_interval=HOUR):
        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: len(seen) == rounds * writers)
    assert len(set(seen)) == rounds * writers


# Silence


@pytest.fixture
def listener():
    with connect() as listening:
        listening.execute("listen spark_outbox")
        yield listening


def test_a_duplicate_emit_notifies_nobody(listener, handled):
    emit("g", "key")
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        connection.close()  # the server tells duplicates apart unless this session has emitted lately
        assert emit("g", "key") is None
        assert emit_many([{"group": "g", "key": "key"}]) == 0
        sql("select spark_emit('g', 'key')")
        assert notifications(listener) == 0
        emit("g", "another")
        assert notifications(listener) == 1


def test_an_emit_notifies_nobody_while_no_worker_sleeps(listener):
    emit("g")
    assert notifications(listener) == 0


def test_64_writers_on_a_busy_worker_cause_almost_no_notify(listener, own_registry):
    writers, rounds = 64, 50
    done, handled = threading.Event(), []

    def handle(event):
        handled.append(event.key)
        if len(handled) == 1:
            assert done.wait(PATIENCE)

    own_registry.add_handler(handle, group="g")

    def write(number):
        with connect() as emitter:
            barrier.wait(PATIENCE)
            for turn in range(rounds):
                emitter.execute(INSERT, [f"{number}-{turn}"])

    barrier = threading.Barrier(writers)
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        emit("g", "first")
        eventually(lambda: handled)
        assert notifications(listener) == 1  # that one woke the worker
        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        heard = notifications(listener)
        done.set()
        eventually(lambda: len(handled) == 1 + writers * rounds)
    print(f"{heard} notifications for {writers * rounds} events")
    assert heard <= writers * rounds // 20


def test_writers_whose_worker_keeps_up_notify_for_few_of_their_events(listener, handled):
    writers, rounds = 16, 100

    def write(number):
        with connect() as emitter:
            for turn in range(rounds):
                emitter.execute(INSERT, [f"{number}-{turn}"])

    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: len(handled) == writers * rounds)
        heard = notifications(listener)
    print(f"{heard} notifications for {writers * rounds} events")
    assert heard < writers * rounds / 4


# What must not stop it


def test_a_lock_on_s_that_an_interrupted_writer_left_behind_does_not_stop_a_worker(handled):
    oid = fetch_value(waking.OUTBOX_OID, using="default")
    with connect() as interrupted:
        interrupted.execute("select pg_advisory_lock(7531002, %s)", [oid])
        with worker_thread(poll_interval=HOUR):
            emit("g", "one")
            eventually(lambda: handled == ["one"])
            emit("g", "two")
            eventually(lambda: handled == ["one", "two"])


def test_a_prepared_transaction_that_has_emitted_does_not_stop_a_worker(handled, settings):
    with prepared_emit(), worker_thread(poll_interval=HOUR):
        emit("g", "other")  # while K is held for as long as the transaction stays prepared
        eventually(lambda: handled == ["other"])
        wait_until_asleep()
        emit("g", "another")
        eventually(lambda: handled == ["other", "another"])
    assert not OutboxEvent.objects.filter(key="prepared").exists()


@pytest.mark.parametrize(("verdict", "found"), [("commit", True), ("rollback", False)])
def test_a_worker_process_works_on_while_a_prepared_transaction_holds_an_emit(verdict, found):
    with prepared_emit("probe") as end, WorkerProcess() as worker:
        worker.wait_until_ready()
        for number in range(5):
            emit("probe", f"{number}")
            eventually(lambda number=number: Handled.objects.filter(key=f"{number}").exists())
            wait_until_asleep()
        assert not OutboxEvent.objects.filter(key="prepared").exists()
        end(verdict)
        emit("probe", "last")
        expected = {*"01234", "last", *(["prepared"] if found else [])}
        eventually(lambda: set(Handled.objects.values_list("key", flat=True)) == expected)
        wait_until_asleep()
        assert OutboxEvent.objects.filter(key="prepared", status="done").exists() == found
        assert Handled.objects.count() == len(expected)


def test_a_worker_does_not_spin_while_a_prepared_transaction_holds_an_emit(handled, monkeypatch):
    """It pauses for as long as it ever does then, and each pause costs a handful of statements."""
    pauses = []

    def record(descriptors, seconds):
        pauses.append((seconds, len(statements.sql)))
        return poll(descriptors, seconds)

    monkeypatch.setattr("spark_outbox.worker.event_loop.poll", record)
    with prepared_emit(), Statements() as statements, worker_thread(poll_interval=HOUR):
        emit("g", "other")
        eventually(lambda: handled == ["other"])
        begun = len(pauses)
        eventually(lambda: len(pauses) > begun + 30)
    lasting = [seconds for seconds, _ in pauses[begun + 10 :]]
    assert min(lasting) == MAX_PAUSE
    (_, first), (_, last) = pauses[begun], pauses[begun + 30]
    assert last - first <= 30 * 12


@contextmanager
def prepared_emit(group="g"):
    """Prepare a transaction that has emitted, in silence since no worker sleeps.

    Yields what ends it by a verdict; without one it is rolled back in the end.
    """
    with connection.cursor() as cursor:
        cursor.execute("show max_prepared_transactions")
        if cursor.fetchone() == ("0",):
            pytest.skip("this server has max_prepared_transactions = 0")
        ended = []

        def end(verdict):
            ended.append(verdict)
            sql(f"{verdict} prepared 'spark_outbox_test'")

        cursor.execute("begin")
        emit(group, "prepared")
        cursor.execute("prepare transaction 'spark_outbox_test'")
        try:
            yield end
        finally:
            if not ended:
                end("rollback")


def test_a_worker_whose_neighbour_holds_events_looks_again_soon(handled):
    """What a worker has claimed is free at once when it dies: somebody must look."""
    emit("g", "held")
    with connect() as neighbour:
        neighbour.execute("begin")
        neighbour.execute("select from spark_outbox_event for no key update")
        with worker_thread(poll_interval=HOUR):
            eventually(lambda: idle_workers() == 1)
            assert handled == []
            neighbour.execute("rollback")  # as the server does for a worker that died
            eventually(lambda: handled == ["held"])


# Settings


def test_wake_always_notifies_with_each_commit(wake_mode, listener, handled):
    wake_mode("always")
    emit("g", "one")
    assert notifications(listener) == 1
    with worker_thread(poll_interval=HOUR):
        eventually(lambda: idle_workers() == 1)
        emit("g", "two")
        eventually(lambda: handled == ["one", "two"])


def test_what_comes_between_the_last_claim_and_the_last_look_ends_the_wait(handled, monkeypatch):
    """The look can't tell it from others' event, which is there all the time."""
    look, looks = resting.look, []

    def look_later(**options):
        looks.append(options)
        if len(looks) == 1:
            with connect() as other:
                other.execute("insert into spark_outbox_event (key, event_group) values ('1', 'ours')")
        return look(**options)

    emit("theirs", "0", ordering_key="key")
    monkeypatch.setattr(resting, "look", look_later)
    with worker_thread(groups="^ours$", poll_interval=HOUR):
        eventually(lambda: handled == ["1"], patience=10)
    assert looks


def backlog_beside_a_long_handler(hold_up):
    """Return how much of the server's queue of notifications is in use, after megabytes of them."""
    busy, go, _ = hold_up
    with worker_thread(poll_interval=HOUR), connect() as others:
        wait_until_asleep()
        emit("g", "busy")
        assert busy.wait(PATIENCE)
        for _ in range(300):
            others.execute("select pg_notify('theirs', repeat('x', 7000))")
        usage = others.execute("select pg_notification_queue_usage()").fetchone()[0]
        go.set()
        return usage


@pytest.mark.parametrize("mode", ["gated", "always"])
def test_a_worker_in_a_long_transaction_does_not_hold_back_the_queue_of_notifications(
    hold_up, wake_mode, mode
):
    wake_mode(mode)
    assert backlog_beside_a_long_handler(hold_up) < 0.0001


def test_a_worker_that_listened_meanwhile_would_hold_it_back(hold_up, monkeypatch):
    """The test above bites."""
    monkeypatch.setattr(waking, "UNLISTEN", "select 1")
    assert backlog_beside_a_long_handler(hold_up) > 0.0002


def test_wake_never_notifies_nobody_and_polling_finds_everything(wake_mode, listener, handled):
    wake_mode("never")
    with worker_thread(poll_interval=0.05):
        eventually(lambda: idle_workers() == 1)
        emit("g", "one")
        eventually(lambda: handled == ["one"])
    assert notifications(listener) == 0


def test_with_wake_never_a_transaction_that_emits_can_be_prepared(wake_mode):
    wake_mode("never")
    with worker_thread(poll_interval=0.05):
        eventually(lambda: idle_workers() == 1)
        with prepared_emit():
            pass


def test_without_a_listen_database_a_worker_polls(settings, handled):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    with worker_thread(poll_interval=0.05):
        eventually(lambda: idle_workers() == 1)
        emit("g", "one")
        eventually(lambda: handled == ["one"])


def test_interrupt_ends_a_wait_at_once_also_one_that_has_not_begun(settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    wake = Wake(make_context(), poll=poll)
    wake.interrupt()  # before it is open: there is nothing to interrupt
    wake.open()
    wake.interrupt()
    assert wake.wait(HOUR)
    threading.Timer(0.05, wake.interrupt).start()
    assert wake.wait(HOUR)
    assert not wake.wait(0.001)


def test_a_notification_that_comes_with_an_answer_of_the_server_ends_the_wait():
    """psycopg is not asked for what the worker reads past it, and the socket has nothing more."""
    wake = Wake(make_context(), poll=poll)
    wake.open()
    connection.close()
    wake.start()
    wake.fall_asleep()
    with connect() as other:
        other.execute("notify spark_outbox")
    past_wrappers("select pg_sleep(0.05)", "default")
    assert wake.wait(HOUR)
    connection.close()


def test_an_emit_holds_k_until_its_transaction_ends():
    with transaction.atomic():
        emit("g")
        with connect() as other:
            held = other.execute(
                "select mode from pg_locks where locktype = 'advisory' and classid = 7531001"
            ).fetchall()
        assert held == [("ShareLock",)]
