"""Async handlers: they run side by side, on connections of their own, within a bound."""

import asyncio
import contextlib
import threading
import time

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction

from spark_outbox import Discard, Retry, aemit, emit, emit_many, handler
from spark_outbox.errors import InstanceGone
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.processes.guard import Guard, Unguarded
from spark_outbox.processes.slot import Slot
from spark_outbox.testing import drain
from tests.challenges.models import Challenge, Handled
from tests.tools import (
    PATIENCE,
    connect,
    deliveries,
    eventually,
    handled,
    make_challenge,
    make_ready,
    note,
    sleeping_workers,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    work,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


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

    sessions = "select pid from pg_stat_activity where starts_with(application_name, 'spark_worker ')"
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
        wait_until_asleep()
        worker.stop()
        eventually(lambda: sleeping_workers() == 0)  # whoever emits meanwhile need not notify
        assert status() == "running"
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


@pytest.mark.django_db(transaction=False)
@pytest.mark.parametrize("atomic", [True, False])
def test_in_peoples_tests_they_get_model_instances_too(own_registry, atomic):
    @handler("", name="h", atomic=atomic)
    async def write(event):
        await Handled.objects.acreate(key=event["challenge"].title, handler="h")

    emit("g", "key", challenge=make_challenge("Mine"))
    assert drain() == 1
    assert handled() == ["Mine"]
