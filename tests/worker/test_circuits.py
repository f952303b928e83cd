"""Circuit breakers at work: what has to wait for one, and what a person sees of it, and does."""

import time
from collections import Counter

import pytest
from django.db import transaction
from django.test import TestCase

from spark_outbox import Discard, Retry, emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.policy import Policy
from spark_outbox.worker.loop import Worker
from tests.tools import (
    Clock,
    elsewhere,
    eventually,
    make_due,
    note,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)
from tests.worker.sql import run

pytestmark = pytest.mark.django_db(transaction=True)


# A worker


class Mails:
    """A handler that fails on bad events, and on all while the server is down."""

    def __init__(self, registry, *, down=False):
        self.down = down
        self.calls = []
        policy = Policy(max_attempts=1000, backoff=3600)  # nothing is due before `make_due`
        registry.add_handler(self.handle, group="", name="mail", policy=policy)

    def handle(self, event):
        self.calls.append(event.key)
        if self.down or event.key.startswith("bad"):
            raise ConnectionRefusedError


def emit_all(prefix, count):
    return emit_many({"group": "g", "key": f"{prefix} {number:05}"} for number in range(count))


def attempts():
    """Return how many deliveries of mails have how many attempts behind them."""
    found = Delivery.objects.filter(handler="mail").values_list("attempts", flat=True)
    return dict(sorted(Counter(found).items()))


def test_a_mail_server_that_is_down_for_a_minute_burns_no_attempt_of_the_events_that_wait(
    own_registry, caplog
):
    clock, others = Clock(), []
    mails = Mails(own_registry, down=True)
    own_registry.add_handler(others.append, group="", name="other")
    emit_all("mail", 2_000)
    worker = Worker(clock=clock)
    worker.drain()
    assert mails.calls == [f"mail {number:05}" for number in range(10)]
    assert attempts() == {0: 1_990, 1: 10}
    assert Delivery.objects.filter(error__contains="its circuit is open").count() == 1_990
    assert len(others) == 2_000  # no other handler had to wait
    assert "Circuit of mail is open: its events wait 5 s, new ones less." in caplog.text

    make_due()
    worker.drain()
    assert len(mails.calls) == 10  # not yet
    for number, moment in enumerate((6, 20, 50)):
        clock.now = moment
        make_due()
        worker.drain()
        assert len(mails.calls) == 10 + 2 * (number + 1)  # one that was never called, and one retry
    assert "its events wait 40 s" in caplog.text

    clock.now = 100
    mails.down = False
    make_due()
    worker.drain()
    assert set(statuses().values()) == {"done"}
    assert "Circuit of mail is closed again." in caplog.text
    assert len(mails.calls) == 2_016
    assert sum(failed * count for failed, count in attempts().items()) == 2_016
    assert attempts()[1] >= 1_984


def test_retries_of_bad_events_do_not_keep_healthy_ones_waiting(own_registry):
    Mails(own_registry)
    for number in range(10):
        emit_all(f"bad {number}", 5)
        emit("g", f"good {number}")
    clock = Clock()
    worker = Worker(clock=clock)
    worker.drain()
    for attempt in range(2, 6):
        make_due()
        worker.drain()  # fifty failures in a row
        assert attempts() == {attempt: 50}
        emit("g", f"good {attempt}")
        worker.drain()
        assert status(f"good {attempt}") == "done"


def test_a_new_event_is_tried_before_the_many_bad_ones_that_wait(own_registry):
    Mails(own_registry)
    clock = Clock()
    worker = Worker(clock=clock)
    emit_all("bad", 300)
    worker.drain()
    assert attempts() == {0: 290, 1: 10}
    clock.now = 0.5
    emit("g", "good")
    worker.drain()
    assert status("good") == "done"
    for number in range(40):
        make_due()
        worker.drain()
        emit("g", f"good {number}")
        worker.drain()  # without the clock having moved
        assert status(f"good {number}") == "done"
    assert 0 not in attempts()


def test_in_a_quiet_database_with_bad_events_alone_a_new_one_is_handled_at_once(own_registry):
    Mails(own_registry)
    clock = Clock()
    worker = Worker(clock=clock)
    emit_all("bad", 30)
    for _ in range(100):
        worker.drain()
        clock.now += 60
        make_due()
    assert clock.now == 6000
    emit("g", "good")
    worker.drain()
    assert status("good") == "done"


def test_if_there_are_retries_alone_one_of_them_finds_out_that_the_handler_works_again(own_registry):
    mails, clock = Mails(own_registry, down=True), Clock()
    worker = Worker(clock=clock)
    emit_all("mail", 10)
    worker.drain()
    for moment in (6, 12, 18):
        clock.now = moment
        make_due()
        worker.drain()
    assert len(mails.calls) == 13  # one a pause, which does not grow
    mails.down = False
    clock.now = 24
    make_due()
    worker.drain()
    assert set(statuses().values()) == {"done"}
    assert len(mails.calls) == 23


def test_a_handler_that_always_fails_the_first_time_has_its_second(own_registry):
    clock = Clock()

    def fail_first(event):
        if event.attempt == 1:
            raise OSError

    own_registry.add_handler(fail_first, group="", name="h")
    emit_all("mail", 100)
    worker = Worker(clock=clock)
    for _ in range(20):
        worker.drain()
        clock.now += 6
        make_due()
    assert set(statuses().values()) == {"done"}


@pytest.mark.parametrize("kind", ["list", "async", "detached"])
def test_handlers_of_every_kind_have_circuits(own_registry, kind):
    calls, clock, bad = [], Clock(), [True]

    def call(events):
        calls.append(len(events))
        if bad[0]:
            raise OSError

    async def call_async(event):
        call([event])

    if kind == "list":
        own_registry.add_handler(call, group="", name="h", batch=2)
    elif kind == "async":
        own_registry.add_handler(call_async, group="", name="h")
    else:
        own_registry.add_handler(lambda event: call([event]), group="", name="h", atomic=False)
    worker = Worker(clock=clock, async_concurrency=1)
    for number in range(60):
        emit("g", f"{number}")
        emit("g", f"{number} too")
        worker.drain()
    assert len(calls) == 10
    bad[0] = False
    clock.now = 0.5
    emit("g", "new")
    worker.drain()
    assert status("new") == "done"
    make_due()
    worker.drain()
    assert set(statuses().values()) == {"done"}


def test_retry_and_discard_open_no_circuit(own_registry):
    calls = []

    def speak(event):
        calls.append(event.key)
        raise Discard if event["discard"] else Retry

    own_registry.add_handler(speak, group="")
    emit_many({"group": "g", "key": f"{n}", "discard": n % 2 == 0} for n in range(40))
    Worker().drain()
    assert len(calls) == 40


# What a person sees, and does


def waits_for_circuit():
    return dict(run("select event_group, waits_for_circuit from spark_outbox_status"))


def close_circuit(name):
    ((count,),) = run("select spark_outbox_close_circuit(%s)", [name])
    return count


def test_the_status_view_says_what_waits_for_a_circuit(own_registry):
    mails, clock = Mails(own_registry, down=True), Clock()
    emit_all("mail", 30)
    emit("other", "later", delay=3600)
    worker = Worker(clock=clock)
    assert waits_for_circuit() == {"g": 0, "other": 0}
    worker.drain()
    assert waits_for_circuit() == {"g": 20, "other": 0}
    make_due()
    worker.drain()
    assert waits_for_circuit() == {"g": 30, "other": 1}  # retries, too
    clock.now = 5
    mails.down = False
    make_due()
    worker.drain()
    assert waits_for_circuit() == {"g": 0, "other": 0}


def test_a_circuit_is_closed_by_hand(own_registry):
    mails, clock = Mails(own_registry, down=True), Clock()
    emit_all("mail", 100)
    worker = Worker(clock=clock)
    worker.drain()
    mails.down = False
    assert close_circuit("another") == 0
    assert close_circuit("mail") == 90
    worker.drain()  # its clock stands still
    assert attempts() == {1: 100}
    assert Delivery.objects.filter(status="done").count() == 90
    assert waits_for_circuit() == {"g": 0}


def test_a_circuit_that_is_closed_by_hand_too_soon_burns_no_attempt_but_one(own_registry):
    mails, clock = Mails(own_registry, down=True), Clock()
    emit_all("mail", 100)
    worker = Worker(clock=clock)
    worker.drain()
    for closed in range(1, 4):
        clock.now += 1
        assert close_circuit("mail") == 91 - closed
        worker.drain()
        assert len(mails.calls) == 10 + closed
        assert waits_for_circuit() == {"g": 90 - closed}


def test_a_retry_that_is_made_ready_by_hand_is_called_though_the_circuit_is_open(own_registry):
    mails = Mails(own_registry, down=True)
    emit_all("mail", 30)
    worker = Worker(clock=Clock())
    worker.drain()
    mails.down = False
    OutboxEvent.objects.filter(key="mail 00003").update(available_at=None)
    worker.drain()
    assert status("mail 00003") == "done"


def test_a_circuit_that_is_closed_by_hand_wakes_the_workers(own_registry):
    mails = Mails(own_registry, down=True)
    with worker_thread(clock=Clock()):  # no pause ends by itself
        emit_all("mail", 30)
        eventually(lambda: waits_for_circuit() == {"g": 20})
        wait_until_asleep()
        mails.down = False
        assert close_circuit("mail") == 20
        eventually(lambda: OutboxEvent.objects.filter(status="done").count() == 20)


# DISPATCH = "on_commit"


@pytest.fixture
def on_commit(settings):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}


def test_in_process_a_circuit_outlives_the_commit_and_the_thread(on_commit, own_registry):
    mails = Mails(own_registry, down=True)
    for number in range(5):
        emit("g", f"{number}")
    elsewhere(lambda: emit_all("thread", 5))
    assert len(mails.calls) == 10
    emit_all("mail", 20)
    elsewhere(lambda: emit_all("more", 20))
    assert len(mails.calls) < 20  # a probe or two, if that took its time
    assert waits_for_circuit()["g"] > 30


def test_in_process_it_is_remembered_which_handlers_are_slow(settings, own_registry):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit", "COMMIT_INTERVAL": 0.01}
    transactions = []

    def write(event):
        note(event)
        transactions.extend(run("select pg_current_xact_id()::text"))
        if event.group == "slow":
            time.sleep(0.03)

    for group in ("slow", "quick"):
        own_registry.add_handler(write, group=group, name=group)
    emit("slow", "1")
    with transaction.atomic():
        emit("quick", "2")
        emit("slow", "3")
    assert len(set(transactions)) == 3


def test_in_a_testcase_no_circuit_outlives_a_test(on_commit, own_registry):
    mails = Mails(own_registry, down=True)
    for number in range(30):
        with transaction.atomic():  # TestCase's own
            with TestCase.captureOnCommitCallbacks(execute=True):
                emit("g", f"{number}")
            transaction.set_rollback(True)
    assert len(mails.calls) == 30


def test_in_process_new_settings_begin_with_closed_circuits(settings, on_commit, own_registry):
    mails = Mails(own_registry, down=True)
    emit_all("mail", 20)
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit", "BREAK_AFTER": None}
    emit_all("more", 20)
    assert len(mails.calls) >= 30
