"""Detached handlers (atomic=False): they run in no transaction, and what they have written stays."""

import asyncio
import signal
import threading

import pytest
from django.db import connection, transaction

from spark_outbox import emit, handler
from spark_outbox.errors import SettingsError
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.testing import drain
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import (
    Flags,
    WorkerProcess,
    connect,
    deliveries,
    eventually,
    handled,
    make_ready,
    note,
    start_a_handler,
    status,
    statuses,
    work,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def state_of(pid):
    with connect() as other:
        return other.execute("select state from pg_stat_activity where pid = %s", [pid]).fetchone()[0]


def test_a_detached_handler_runs_in_no_transaction(own_registry):
    own_registry.add_handler(note, group="", name="plain")
    seen = []

    @handler("", name="h", atomic=False)
    def run(event):
        with connect() as other:
            query = "select status from spark_outbox_event where key = 'key'"
            seen.append((state_of(connection.connection.info.backend_pid), *other.execute(query)))
            seen.append(other.execute("select key from challenges_handled").fetchall())
        with transaction.atomic(durable=True):
            Handled.objects.create(key="mine", handler="h")

    emit("g", "key")
    work()
    assert seen == [("idle", ("running",)), [("key",)]]  # the plain one's writes are committed
    assert status() == "done"
    assert deliveries() == {"plain": ("done", 1), "h": ("done", 1)}
    assert Delivery.objects.get(handler="h").duration
    assert handled() == ["key", "mine"]


def test_a_detached_handler_that_fails_is_tried_again_and_its_own_writes_stay(own_registry):
    @handler("", name="h", atomic=False, backoff=3600, max_attempts=2)
    def run(event):
        note(event)
        raise RuntimeError(event.attempt)

    emit("g", "key")
    work()
    event = OutboxEvent.objects.get()
    assert (event.status, event.attempts) == ("pending", 1)
    assert event.available_at > event.created_at
    assert "RuntimeError: 1" in event.last_error
    make_ready()
    work()
    assert deliveries() == {"h": ("failed", 2)}
    assert status() == "failed"
    assert handled() == ["key", "key"]


def test_several_detached_handlers_of_an_event_run_once_each_one_after_the_other(own_registry):
    calls = []
    for name in "abc":
        handler("", name=name, atomic=False)(lambda event, name=name: calls.append(name))
    emit("g", "1", ordering_key="o")
    emit("g", "2", ordering_key="o")
    work()
    assert calls == ["a", "b", "c", "a", "b", "c"]
    assert set(statuses().values()) == {"done"}


def leave_atomic_open(event):
    transaction.atomic().__enter__()
    note(event)


def leave_a_transaction_open(event):
    connection.cursor().execute("begin")
    note(event)


def set_autocommit(event):
    transaction.set_autocommit(False)
    note(event)


@pytest.mark.parametrize("leave", [leave_atomic_open, leave_a_transaction_open, set_autocommit])
def test_a_detached_handler_that_leaves_a_transaction_open_fails_and_loses_it(own_registry, leave):
    own_registry.add_handler(leave, group="^bad", name="h", atomic=False)
    own_registry.add_handler(note, group="^good")
    emit("bad", "1")
    emit("good", "2")
    work()
    assert statuses() == {"1": "pending", "2": "done"}
    assert "BrokenTransaction" in Delivery.objects.get().error
    assert handled() == ["2"]


def test_a_detached_handler_may_close_the_connection(own_registry):
    @handler("", name="h", atomic=False)
    def run(event):
        connection.close()

    emit("g", "key")
    work()
    assert status() == "done"


def test_the_queries_of_a_detached_handler_end_with_its_time(own_registry):
    @handler("", name="h", atomic=False, timeout=0.02, max_attempts=1)
    def run(event):
        connection.cursor().execute("select pg_sleep(3600)")

    emit("g", "key")
    work()
    assert "statement timeout" in Delivery.objects.get().error
    with connection.cursor() as cursor:
        cursor.execute("show statement_timeout")
        assert cursor.fetchone() == ("0",)


def test_a_detached_handler_may_be_async(own_registry):
    release = threading.Event()

    @handler("^g$", name="h", atomic=False)
    async def run(event):
        while not release.is_set():
            await asyncio.sleep(0.005)
        await Handled.objects.acreate(key=event.key, handler="h")

    own_registry.add_handler(note, group="^plain$")
    with worker_thread():
        emit("g", "key")
        eventually(lambda: status() == "running")
        emit("plain", "other")
        eventually(lambda: status("other") == "done")
        release.set()
        eventually(lambda: status() == "done")
    assert handled() == ["other", "key"]


@pytest.mark.django_db(transaction=False)
def test_in_peoples_tests_detached_handlers_run_too(own_registry):
    @handler("", name="h", atomic=False)
    def run(event):
        note(event)

    @handler("", name="async", atomic=False)
    async def run_async(event):
        await Handled.objects.acreate(key="async", handler="async")

    emit("g", "key")
    drain()
    assert (status(), handled()) == ("done", ["key", "async"])


def test_a_running_event_that_a_person_gave_up_stays_so(own_registry):
    @handler("", name="h", atomic=False)
    def run(event):
        OutboxEvent.objects.update(status="discarded")
        Delivery.objects.update(status="discarded")

    emit("g", "key")
    work()
    assert (status(), deliveries()) == ("discarded", {"h": ("discarded", 0)})


def test_a_stopped_worker_lets_a_detached_handler_finish_and_burns_no_attempt_if_it_takes_too_long(
    flags,
):
    with WorkerProcess("--shutdown-timeout", "0.2") as worker:
        worker.wait_until_ready()
        start_a_handler(flags, "probe_detached")
        assert status() == "running"
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert deliveries() == {"detached": ("pending", 0), "sibling": ("done", 1)}
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        flags.wait()
        assert status() == "running"
        worker.signal(signal.SIGTERM)
        flags.go.touch()
        assert worker.wait() == 0
    assert (status(), deliveries()) == ("done", {"detached": ("done", 1), "sibling": ("done", 1)})


def test_a_crash_of_a_detached_handler_is_counted():
    emit("probe_detached_crash", "key")
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        eventually(lambda: status() == "failed")
    assert deliveries() == {"detached crash": ("failed", 2)}
    assert "SIGSEGV" in Delivery.objects.get().error


def test_detached_handlers_need_a_session_that_lasts(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    handler("", name="mine", atomic=False)(note)
    for attempt in (work, Worker().drain):
        with pytest.raises(SettingsError, match="mine: handlers with atomic=False need a session"):
            attempt()


def test_a_second_signal_in_a_detached_handler_burns_no_attempt(flags: Flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags, "probe_detached")
        for number in (15, 15):
            worker.process.send_signal(number)
            eventually(lambda: worker.has_message() or worker.process.poll() is not None)
        assert worker.wait() == -15
    assert deliveries() == {"detached": ("pending", 0), "sibling": ("done", 1)}
