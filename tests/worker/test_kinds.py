"""Handlers that are not called one by one in the batch's transaction: async, batch and detached."""

import asyncio
import contextlib
import signal
import threading
import time

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction

from spark_outbox import BatchFailed, Discard, Retry, aemit, emit, emit_many, handler
from spark_outbox.errors import HandlerTimeout, InstanceGone, RegistrationError, SettingsError
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.processes.guard import Guard, Unguarded
from spark_outbox.processes.slot import Slot
from spark_outbox.registry.policy import Policy
from spark_outbox.testing import drain
from spark_outbox.worker import takeover
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge, Handled
from tests.tools import (
    PATIENCE,
    WorkerProcess,
    connect,
    deliveries,
    eventually,
    handled,
    make_challenge,
    make_ready,
    note,
    start_a_handler,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def work(**options):
    """Be a worker, in this thread, until nothing is ready."""
    Worker(**options).run(drain=True)


# Async handlers


class Gauge:
    """Counts how many calls are under way at once."""

    def __init__(self):
        self.now = self.peak = self.calls = 0

    @contextlib.contextmanager
    def __call__(self):
        self.now += 1
        self.calls += 1
        self.peak = max(self.peak, self.now)
        try:
            yield
        finally:
            self.now -= 1


def test_async_handlers_run_side_by_side_within_their_bound(own_registry):
    gauge = Gauge()

    @handler("", name="h")
    async def call(event):
        with gauge():
            await asyncio.sleep(0.1)

    emit_many({"group": "g", "key": f"{n}"} for n in range(200))
    work(async_concurrency=70, commit_interval=5)  # none outlasts its batch
    assert set(statuses().values()) == {"done"}
    assert (gauge.calls, gauge.peak) == (200, 70)
    assert not Delivery.objects.exists()  # the happy path: one INSERT and one UPDATE an event


def backend():
    with connection.cursor() as cursor:
        cursor.execute("select pg_backend_pid()")
        return cursor.fetchone()[0]


def test_async_handlers_have_connections_of_their_own_and_a_payload_that_is_loaded(own_registry):
    pids = set()

    @handler("^g$", name="h")
    async def write(event):
        pids.add(await sync_to_async(backend)())
        await Handled.objects.acreate(key=event["challenge"].title, handler="h")
        await aemit("noted", f"noted {event.key}")
        if "raise" in event:
            raise Discard("what it has written stays")

    own_registry.add_handler(note, group="noted")
    challenge = make_challenge("Run")
    OutboxEvent.objects.all().delete()
    emit("g", "1", challenge=challenge)
    emit("g", "2", challenge=challenge, **{"raise": True})
    work()
    assert statuses() == {"1": "done", "2": "discarded", "noted 1": "done", "noted 2": "done"}
    assert sorted(handled()) == ["Run", "Run", "noted 1", "noted 2"]
    assert len(pids) == 1
    assert backend() not in pids


def test_an_instance_that_is_gone_is_told_to_the_async_handler_that_asks_for_it(own_registry):
    asked = []

    @handler("", name="asks")
    async def asks(event):
        event["challenge"]

    @handler("", name="does not")
    async def does_not(event):
        asked.append(event["other"])

    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    emit("g", "key", challenge=challenge, other=1)
    Challenge.objects.all().delete()
    work()
    assert asked == [1]
    assert deliveries() == {"asks": ("failed", 1), "does not": ("done", 1)}
    assert InstanceGone.__name__ in OutboxEvent.objects.get().last_error


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), Retry()]
)
def test_an_async_handler_that_fails_is_a_failed_delivery_like_any_other(own_registry, error):
    own_registry.add_handler(note, group="", name="plain")

    @handler("", name="fails", backoff=3600)
    async def fails(event):
        await asyncio.sleep(0)
        raise error

    @handler("", name="fine")
    async def fine(event):
        await Handled.objects.acreate(key=event.key, handler="fine")

    emit("g", "key")
    work()
    expected = {"plain": ("done", 1), "fine": ("done", 1)}
    assert deliveries() == {**expected, "fails": ("pending", 1)}
    assert type(error).__name__ in Delivery.objects.get(handler="fails").traceback
    make_ready()
    work()
    assert deliveries() == {**expected, "fails": ("pending", 2)}
    assert handled() == ["key", "key"]


def test_an_async_handler_past_its_timeout_is_cancelled(own_registry):
    @handler("", name="h", timeout=0.02, max_attempts=1)
    async def hang(event):
        await asyncio.sleep(3600)

    emit("g", "key")
    work()
    assert deliveries() == {"h": ("failed", 1)}
    assert "HandlerTimeout" in Delivery.objects.get().error


def test_an_async_handler_that_blocks_the_loop_is_interrupted_and_no_other(own_registry):
    @handler("^bad$", name="bad", timeout=0.05, max_attempts=1)
    async def spin(event):
        while True:
            pass

    @handler("^good$", name="good")
    async def good(event):
        await asyncio.sleep(0.01)

    emit("good", "1")
    emit("bad", "2")
    emit("good", "3")
    work(guard=Guard())
    assert statuses() == {"1": "done", "2": "failed", "3": "done"}


def test_one_slow_call_does_not_hold_up_the_outcomes_of_others(own_registry):
    release = threading.Event()
    gauge = Gauge()

    @handler("", name="h")
    async def call(event):
        with gauge():
            while event.key == "slow" and not release.is_set():
                await asyncio.sleep(0.005)

    with worker_thread():
        wait_until_asleep()
        emit_many({"group": "g", "key": key} for key in ["slow", *map(str, range(30))])
        wait_until_done(30)
        assert status("slow") == "running"
        emit("g", "later")  # and the worker goes on with what comes
        eventually(lambda: status("later") == "done")
        assert status("slow") == "running"
        assert gauge.now == 1
        release.set()
        eventually(lambda: status("slow") == "done")
    assert gauge.calls == 32
    delivery = Delivery.objects.get()
    assert (delivery.status, delivery.session) == ("done", None)


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_slow_call_goes_on_when_the_worker_loses_its_connection_in_another_batch(
    own_registry, settings
):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}  # that one is not lost
    calls, release = [], threading.Event()

    @handler("", name="h")
    async def call(event):
        calls.append(event.attempt)
        while not release.is_set():
            await asyncio.sleep(0.005)

    sessions = "select pid from pg_stat_activity where application_name = 'spark_worker'"
    with worker_thread(), connect() as other:
        emit("g", "key")
        eventually(lambda: status() == "running")
        ((pid,),) = other.execute(sessions).fetchall()
        other.execute("select pg_terminate_backend(%s, 10000)", [pid])
        other.execute("notify spark_outbox")
        eventually(lambda: other.execute(sessions).fetchone() not in {None, (pid,)})
        release.set()
        eventually(lambda: status() == "done")
    assert calls == [1]
    assert deliveries() == {"h": ("done", 1)}


def test_a_worker_that_is_stopped_lets_its_calls_finish(own_registry):
    started, release = threading.Event(), threading.Event()

    @handler("", name="h")
    async def call(event):
        started.set()
        while not release.is_set():
            await asyncio.sleep(0.005)

    slot = Slot(0)
    with worker_thread(guard=Unguarded(slot)) as worker:
        emit("g", "key")
        assert started.wait(PATIENCE)
        eventually(lambda: status() == "running")
        worker.stop()
        release.set()
    assert status() == "done"
    assert slot.in_hand() == []


def test_without_a_lasting_session_a_batch_waits_for_all_of_its_calls(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}

    @handler("", name="h")
    async def call(event):
        await asyncio.sleep(0.2 if event.key == "slow" else 0)

    emit_many({"group": "g", "key": key} for key in ("fast", "slow"))
    work(commit_interval=0.01)
    assert set(statuses().values()) == {"done"}
    assert not Delivery.objects.exists()


def test_events_of_one_ordering_key_are_one_at_a_time_also_if_async(own_registry):
    gauge, order = Gauge(), []

    @handler("", name="h")
    async def call(event):
        with gauge():
            await asyncio.sleep(0.001)
            order.append(event.key)

    for n in range(10):
        emit("g", f"{n}", ordering_key="o")
    work()
    assert order == [f"{n}" for n in range(10)]
    assert gauge.peak == 1


def test_an_async_call_goes_on_while_its_worker_is_busy(own_registry):
    """Also if it takes many steps, and the worker never sleeps."""
    steps = []

    @handler("^call$", name="call", timeout=0.5, max_attempts=1)
    async def call(event):
        for step in range(20):
            await asyncio.sleep(0.001)
            steps.append(step)

    @handler("^busy$", name="busy")
    def stay_busy(event):
        time.sleep(0.01)
        if not OutboxEvent.objects.filter(key="call", status="done").exists():
            emit("busy")  # so that the worker never sleeps

    with worker_thread(commit_interval=0.01):
        with transaction.atomic():  # in one batch, which does not wait for the call
            emit("call", "call")
            emit("busy")
        eventually(lambda: status("call") == "done")
    assert len(steps) == 20


def test_the_time_in_which_the_event_loop_stood_still_is_not_the_handlers(own_registry):
    @handler("^call$", name="call", timeout=0.2, max_attempts=1)
    async def call(event):
        await asyncio.sleep(0.1)

    @handler("^slow$", name="slow")
    def slow(event):
        time.sleep(0.4)  # twice as long as the call may take

    with worker_thread(commit_interval=0.01):
        with transaction.atomic():
            emit("call", "call")
            for _ in range(4):
                emit("slow")
        eventually(lambda: status("call") in {"done", "failed"})
    assert status("call") == "done"


@pytest.mark.parametrize("delay", [None, -1])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("groups", [None, "^(call|plain)$"])
def test_events_behind_async_ones_that_wait_for_room_are_handled(own_registry, delay, ordered, groups):
    release, calls = threading.Event(), []

    @handler("^call$", name="call")
    async def call(event):
        calls.append(event.key)
        while not release.is_set():
            await asyncio.sleep(0.005)

    own_registry.add_handler(note, group="^plain$")

    def emit_some(group, count):
        for n in range(count):
            emit(group, f"{group} {n:02}", delay=delay, ordering_key=f"{group} {n}" if ordered else None)

    with worker_thread(async_concurrency=2, batch_size=4, groups=groups):
        wait_until_asleep()
        emit_some("call", 30)
        eventually(lambda: len(calls) == 2)
        emit_some("plain", 30)
        eventually(lambda: len(handled()) == 30)
        assert len(calls) == 2
        emit("plain", "later")  # and it is woken by what comes
        eventually(lambda: len(handled()) == 31)
        release.set()
        wait_until_done(61)  # as there is room, the others have their turn
    assert len(calls) == len(set(calls)) == 30


def test_async_events_of_one_ordering_key_that_wait_for_room_keep_their_order(own_registry):
    release, calls = threading.Event(), []

    @handler("", name="call")
    async def call(event):
        calls.append(event.key)
        while event.group == "slow" and not release.is_set():
            await asyncio.sleep(0.005)

    with worker_thread(async_concurrency=1):
        emit("slow", "slow")
        eventually(lambda: status("slow") == "running")
        for n in range(10):
            emit("g", f"{n}", ordering_key="o")
        release.set()
        wait_until_done(11)
    assert calls == ["slow", *(f"{n}" for n in range(10))]


@pytest.mark.parametrize(
    ("direct", "timeouts", "seconds"),
    [
        ("", {"plain": 10, "async": 100}, 40),  # its calls outlive the batch
        (None, {"plain": 10, "async": 100}, 165),  # the batch waits for its calls
        (None, {"plain": 10, "async": None}, None),
        (None, {"plain": None, "async": 100}, None),
        (None, {"async": 60}, 105),
    ],
)
def test_the_server_bears_silence_for_as_long_as_a_batch_may_wait(
    own_registry, settings, direct, timeouts, seconds
):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": direct}

    async def call(event):
        pass

    for name, timeout in timeouts.items():
        function = call if name == "async" else note
        own_registry.add_handler(function, group="", name=name, policy=Policy(timeout=timeout))
    assert Worker(guard=Guard())._session._longest_silence() == seconds
    assert Worker()._session._longest_silence() is None  # nothing would interrupt them


@pytest.mark.django_db(transaction=False)
def test_in_peoples_tests_async_handlers_see_the_test_s_own_data(own_registry):
    @handler("", name="h")
    async def write(event):
        challenge = await Challenge.objects.aget(title="Mine")
        await Handled.objects.acreate(key=challenge.title, handler="h")

    make_challenge("Mine")
    OutboxEvent.objects.all().delete()
    emit("g", "key")
    assert drain() == 1
    assert handled() == ["Mine"]


# Batch handlers


def test_a_batch_handler_gets_lists(own_registry):
    lists = []

    @handler("", name="h", batch=100)
    def take(events):
        lists.append([event.key for event in events])
        for event in events:
            note(event)

    keys = [f"{n:03}" for n in range(250)]
    emit_many({"group": "g", "key": key} for key in keys)
    assert Worker().drain() == 250
    assert sorted(handled()) == keys
    assert [key for each in lists for key in each] == keys
    assert max(map(len, lists)) == 100
    assert len(lists) < 10
    assert not Delivery.objects.exists()


def test_events_of_a_list_that_failed_are_tried_again_alone_so_that_one_takes_no_others_with_it(
    own_registry,
):
    lists = []

    @handler("", name="h", batch=10, max_attempts=2)
    def take(events):
        lists.append(len(events))
        for event in events:
            note(event)
            if event.key == "3":
                raise ValueError(event.key)

    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    Worker().drain()
    assert handled() == []
    assert {(d.status, d.attempts) for d in Delivery.objects.all()} == {("pending", 1)}
    make_ready()
    Worker().drain()
    assert lists == [10] + 10 * [1]
    assert statuses() == {f"{n}": "failed" if n == 3 else "done" for n in range(10)}
    assert len(handled()) == 9


def test_batch_failed_fails_some(own_registry):
    own_registry.add_handler(note, group="", name="plain")

    @handler("", name="h", batch=10, backoff=3600)
    def take(events):
        errors = {}
        for event in events:
            try:
                with transaction.atomic():
                    Handled.objects.create(key=event.key, handler="h")
                    if event["n"] == 1:
                        raise ValueError(event.key)
                    if event["n"] == 2:
                        raise Discard("enough")
            except (ValueError, Discard) as error:
                errors[event] = error
        if errors:
            raise BatchFailed(errors)

    emit_many({"group": "g", "key": f"{n}", "n": n} for n in range(4))
    Worker().drain()
    assert statuses() == {"0": "done", "1": "pending", "2": "done", "3": "done"}
    assert sorted(Handled.objects.filter(handler="h").values_list("key", flat=True)) == ["0", "3"]
    of = {(d.event.key, d.handler): (d.status, d.attempts) for d in Delivery.objects.all()}
    assert of == {
        ("1", "plain"): ("done", 1),
        ("1", "h"): ("pending", 1),
        ("2", "plain"): ("done", 1),
        ("2", "h"): ("discarded", 1),
    }
    assert "ValueError: 1" in OutboxEvent.objects.get(key="1").last_error
    make_ready()
    Worker().drain()  # alone, and the plain one is not called again
    assert Delivery.objects.get(event__key="1", handler="h").attempts == 2
    assert Handled.objects.filter(handler="note").count() == 4


@pytest.mark.parametrize(
    "options", [{}, {"retry_for": (OSError,)}, {"discard_for": (InstanceGone, ValueError)}]
)
@pytest.mark.parametrize("bad", ["gone", "ValueError"])
def test_what_is_final_for_one_event_of_a_list_is_not_for_the_others(own_registry, options, bad):
    """Nobody knows whose it was: so each is tried again alone, and then it is known."""
    calls = []

    @handler("", name="h", batch=10, backoff=0.01, max_attempts=2, **options)
    def take(events):
        calls.append([event.key for event in events])
        for event in events:
            if event.key == "bad" and bad == "ValueError":
                raise ValueError
            event.get("challenge")

    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    for key in ("1", "bad", "2"):
        emit("g", key, **({"challenge": challenge} if key == "bad" else {}))
    Challenge.objects.all().delete()
    Worker().handle_batch()
    assert calls == [["1", "bad", "2"]]
    assert set(statuses().values()) == {"pending"}
    if options or bad == "gone":
        assert "each is tried again by itself" in OutboxEvent.objects.get(key="1").last_error
    make_ready()
    Worker().drain()
    assert calls[1:] == [["1"], ["bad"], ["2"]]
    ended = "discarded" if "discard_for" in options else "failed"
    assert statuses() == {"1": "done", "bad": ended, "2": "done"}


def test_a_list_that_fails_is_one_failure_to_its_circuit(own_registry):
    """Else one bad event in a list of ten or more would keep all the others waiting."""
    calls = []

    @handler("", name="h", batch=50)
    def take(events):
        calls.append(len(events))
        if any(event.key == "bad" for event in events):
            raise ValueError

    emit_many({"group": "g", "key": key} for key in ["bad", *map(str, range(59))])
    worker = Worker()
    worker.drain()
    assert sum(calls) == 60
    assert sorted(set(statuses().values())) == ["done", "pending"]
    make_ready()
    worker.drain()
    assert {key for key, status in statuses().items() if status == "pending"} == {"bad"}


def test_batch_failed_must_name_events_of_its_list(own_registry):
    @handler("^list", name="list", batch=10, backoff=3600)
    def take(events):
        note(events[0])
        raise BatchFailed({"nothing": ValueError()})

    @handler("^plain", name="plain", backoff=3600)
    def plain(event):
        note(event)
        raise BatchFailed({event: ValueError()})

    emit("list", "1")
    emit("plain", "2")
    Worker().drain()
    assert handled() == []
    assert deliveries() == {"list": ("pending", 1), "plain": ("pending", 1)}
    assert all(
        "BatchFailed is for" in error for error in Delivery.objects.values_list("error", flat=True)
    )
    with pytest.raises(TypeError):
        BatchFailed({})


def test_a_list_holds_one_event_of_an_ordering_key(own_registry):
    lists = []

    @handler("", name="h", batch=10)
    def take(events):
        lists.append([event.key for event in events])

    for n in range(3):
        for key in "ab":
            emit("g", f"{key}{n}", ordering_key=key)
    Worker().drain()
    assert lists == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]


def test_a_list_that_ends_the_transaction_fails_alone(own_registry):
    own_registry.add_handler(note, group="", name="plain")

    @handler("^bad", name="h", batch=2, backoff=3600)
    def take(events):
        connection.cursor().execute("rollback")

    emit_many({"group": group, "key": group} for group in ("bad 1", "bad 2", "good"))
    Worker().drain()
    assert statuses() == {"bad 1": "pending", "bad 2": "pending", "good": "done"}
    assert Delivery.objects.filter(handler="h", status="pending", attempts=1).count() == 2
    assert sorted(handled()) == ["bad 1", "bad 2", "good"]


# Detached handlers


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


LOCK = "select pid from pg_stat_activity where application_name = 'spark_worker lock'"


def cut_off():
    """End the sessions of the worker that runs the calling handler: that of its lock as well."""
    with connect() as other:
        pids = [connection.connection.info.backend_pid, *(pid for (pid,) in other.execute(LOCK))]
        for pid in pids:
            other.execute("select pg_terminate_backend(%s, 10000)", [pid])


def test_a_cut_off_worker_settles_what_nobody_has_taken_over(own_registry):
    """The outage is over before anybody noticed: the work is not lost, and not done twice."""
    calls = []

    @handler("", name="h", atomic=False)
    def run(event):
        calls.append(event.attempt)
        cut_off()

    emit("g", "key")
    work()
    assert (status(), calls) == ("done", [1])


def test_a_cut_off_worker_that_is_replaced_cannot_overwrite_its_successor_s_outcome(
    own_registry, caplog
):
    calls = []

    @handler("", name="h", atomic=False)
    def run(event):
        calls.append(event.attempt)
        if len(calls) == 1:
            cut_off()
            successor = threading.Thread(target=in_a_thread)
            successor.start()
            successor.join(PATIENCE)
            assert status_elsewhere() == "done"
            raise RuntimeError("too late")

    def in_a_thread():
        try:
            work()
        finally:
            connection.close()

    def status_elsewhere():
        with connect() as other:
            return other.execute("select status from spark_outbox_event").fetchone()[0]

    emit("g", "key")
    work()
    assert calls == [1, 2]  # it looks as if the first had taken its worker with it
    assert status() == "done"
    assert deliveries() == {"h": ("done", 2)}
    assert "too late" not in Delivery.objects.get().traceback
    assert any("Lost the claim" in record.message for record in caplog.records)


def test_a_session_that_is_alive_is_not_taken_over(own_registry):
    states = []

    @handler("", name="h", atomic=False)
    def run(event):
        def look():
            takeover.take_over(using="default")
            states.append(status())
            connection.close()

        thread = threading.Thread(target=look)
        thread.start()
        thread.join(PATIENCE)

    emit("g", "key")
    work()
    assert states == ["running"]
    assert status() == "done"


def test_what_a_worker_does_not_know_that_it_has_begun_is_taken_over_by_itself(own_registry):
    """As after a connection that was lost in the commit, when the server had it already."""
    calls = []

    @handler("", name="h", atomic=False)
    def run(event):
        calls.append(event.key)
        if event.key == "orphan":
            return
        with connect() as other:
            other.execute(
                """
                with orphan as (
                    insert into spark_outbox_event (key, event_group, status, attempts)
                    values ('orphan', 'g', 'running', 1) returning id
                )
                insert into spark_outbox_delivery (event_id, handler, status, session)
                select orphan.id, handler, delivery.status, session
                from orphan, spark_outbox_delivery as delivery
                """
            )

    with worker_thread():
        emit("g", "key")
        eventually(lambda: calls == ["key", "orphan"])
        eventually(lambda: not OutboxEvent.objects.exclude(status="done").exists())


def test_a_running_event_that_a_person_gave_up_stays_so(own_registry):
    @handler("", name="h", atomic=False)
    def run(event):
        OutboxEvent.objects.update(status="discarded")
        Delivery.objects.update(status="discarded")

    emit("g", "key")
    work()
    assert (status(), deliveries()) == ("discarded", {"h": ("discarded", 0)})


@pytest.mark.parametrize("group", ["probe_detached", "probe_async"])
def test_kill_9_frees_a_running_delivery_to_another_worker(flags, group):
    """Within about a second; what its siblings have done is not done again."""
    with WorkerProcess() as first:
        first.wait_until_ready()
        assert first.owns(start_a_handler(flags, group))
        eventually(lambda: status() == "running")
        with WorkerProcess() as second:
            second.wait_until_ready()
            first.kill()
            flags.go.touch()
            eventually(lambda: status() == "done")
            (pid,) = {int(handled.note) for handled in Handled.objects.filter(handler="after")}
            assert second.owns(pid)
    assert deliveries() == {group[6:]: ("done", 2), "sibling": ("done", 1)}  # a death is an attempt
    assert Handled.objects.filter(handler="sibling").count() == 1


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is the most events"),
        ({"batch": "many"}, "batch is the most events"),
        ({"batch": 10, "atomic": False}, "shares the worker's transaction"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(own_registry, options, message):
    with pytest.raises(RegistrationError, match=message):
        handler("", **options)(note)


def test_a_batch_handler_is_not_async(own_registry):
    async def take(events): ...

    with pytest.raises(RegistrationError, match="shares the worker's transaction"):
        handler("", batch=10)(take)


@pytest.fixture
def late_guard():
    """A guard whose alarm rings as it is about to be stopped, once a handler `is_late`."""

    class LateGuard(Guard):
        is_late = False

        def stop(self):
            if self.is_late:  # Python runs signal handlers as a function begins, too
                self.is_late = False
                raise HandlerTimeout
            super().stop()

    before = signal.getsignal(signal.SIGALRM)
    yield LateGuard()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_an_alarm_that_rings_as_a_handler_returns_does_not_ring_again(
    own_registry, late_guard, atomic, error
):
    @handler("", name="h", atomic=atomic, timeout=PATIENCE)
    def run(event):
        late_guard.is_late = True
        if error is not None:
            raise error

    emit("g", "key")
    Worker(guard=late_guard).drain()
    assert not late_guard.is_late
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert deliveries() == {"h": ("pending", 1)}


def test_an_alarm_that_rings_as_the_event_loop_comes_to_rest_ends_no_worker(own_registry, late_guard):
    @handler("", name="h", timeout=PATIENCE)
    async def run(event):
        late_guard.is_late = True

    emit("g", "key")
    work(guard=late_guard)
    assert not late_guard.is_late
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert statuses() == {"key": "done"}
