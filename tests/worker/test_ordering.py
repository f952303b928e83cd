"""Events that share an ordering key: one at a time, in the order of their ids, whatever happens."""

import math
import threading
from collections import defaultdict

import pytest
from django.db import connection

from spark_outbox import Retry, emit, emit_many, handler
from spark_outbox.models import OutboxEvent
from spark_outbox.store import ordering, scanning
from spark_outbox.worker import pauses
from spark_outbox.worker.loop import Worker
from tests.tools import (
    HOUR,
    PATIENCE,
    Clock,
    WorkerProcess,
    connect,
    eventually,
    handled,
    make_ready,
    note,
    notifications,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def emit_in_order(count, *, key="o", group="g", start=0):
    for n in range(start, start + count):
        emit(group, f"{key} {n:03}", ordering_key=key)


def test_events_of_a_key_are_handled_in_the_order_of_their_ids(own_registry):
    own_registry.add_handler(note, group="")
    emit_in_order(50)
    Worker().drain()
    assert handled() == [f"o {n:03}" for n in range(50)]


def test_a_batch_holds_a_run_of_one_key(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit_in_order(16)
    assert Worker().handle_batch(sweep=True) == 16


def test_several_workers_keep_the_order_of_each_key_also_through_retries(own_registry):
    calls = defaultdict(list)
    failed = set()

    @handler("", name="h", backoff=0.001)
    def flaky(event):
        calls[event.ordering_key].append(event.key)
        if event["n"] % 7 == 0 and event.key not in failed:
            failed.add(event.key)
            raise RuntimeError

    total = 240
    with worker_thread(batch_size=7), worker_thread(batch_size=7), worker_thread(batch_size=7):
        wait_until_asleep(3)
        for n in range(total):
            emit("g", f"{n:03}", ordering_key=f"key {n % 6}", n=n)
        wait_until_done(total)
    for keys in calls.values():
        first_calls = list(dict.fromkeys(keys))
        assert first_calls == sorted(first_calls)
        assert keys == sorted(keys)  # a retry comes before whatever is behind it
    assert sum(map(len, calls.values())) == total + len(failed)


def test_others_pass_a_key_by_that_waits(own_registry):
    def fail(event):
        if event.key == "o 000":
            raise Retry(after=HOUR)
        note(event)

    own_registry.add_handler(fail, group="", name="h")
    emit_in_order(5)
    emit_in_order(5, key="p")
    emit("g", "free")
    Worker().drain()
    assert sorted(handled()) == ["free", *(f"p {n:03}" for n in range(5))]
    make_ready()
    own_registry.clear()
    own_registry.add_handler(note, group="", name="h")
    Worker().drain()
    assert handled()[-5:] == [f"o {n:03}" for n in range(5)]


@pytest.mark.parametrize(("setting", "later"), [("block", "pending"), ("skip", "done")])
def test_the_settings_say_what_a_failed_head_does_to_those_behind_it(
    own_registry, settings, setting, later
):
    settings.SPARK_OUTBOX = {"FAILED_HEAD": setting}

    @handler("", name="h", max_attempts=1)
    def fail(event):
        if event.key == "o 001":
            raise RuntimeError

    emit_in_order(4)
    Worker().drain()
    Worker().drain()
    assert statuses() == {"o 000": "done", "o 001": "failed", "o 002": later, "o 003": later}
    OutboxEvent.objects.filter(status="failed").update(status="discarded")
    Worker().drain()
    assert statuses()["o 003"] == "done"


def test_a_delayed_event_holds_up_those_behind_it(own_registry):
    own_registry.add_handler(note, group="")
    emit("g", "first", ordering_key="o", delay=0.3)
    emit("g", "second", ordering_key="o")
    with worker_thread():
        eventually(lambda: handled() == ["first", "second"])


def test_a_worker_passes_a_key_by_that_another_holds_and_takes_over_if_that_dies(flags):
    emit("probe", "o 0", ordering_key="o", **flags.payload)
    emit("probe", "o 1", ordering_key="o")
    with WorkerProcess() as first:
        assert first.owns(flags.wait())
        with WorkerProcess("--poll-interval", "3600") as second:
            second.wait_until_ready()
            emit("probe", "p", ordering_key="p")
            eventually(lambda: statuses()["p"] == "done")
            assert statuses()["o 1"] == "pending"
            first.kill()
            flags.go.touch()
            eventually(lambda: statuses()["o 1"] == "done")
            assert second.process.poll() is None
    assert handled() == ["p", "o 0", "o 1"]


def test_a_sleeping_worker_wakes_for_ordered_events(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread():
        for n in range(3):
            wait_until_asleep()
            emit_in_order(2, start=n * 2)
            eventually(lambda n=n: len(handled()) == n * 2 + 2)


def test_polling_alone_finds_ordered_events_too(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    own_registry.add_handler(note, group="")
    with worker_thread(poll_interval=0.05):
        emit_in_order(1)
        eventually(lambda: len(handled()) == 1)
        emit_in_order(1, start=1)
        eventually(lambda: len(handled()) == 2)


def test_more_keys_than_are_looked_at_at_once_all_get_their_turn(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    keys = ordering.KEYS_AT_ONCE * 3 + 5
    emit_many({"group": "g", "ordering_key": f"key {n}"} for n in range(keys) for _ in range(2))
    assert Worker().drain() == keys * 2


def test_a_hot_key_leaves_others_their_time_and_they_it(own_registry):
    clock, order = Clock(), []

    def slow(event):
        clock.now += 1
        order.append(event.key)

    own_registry.add_handler(slow, group="")
    emit_in_order(30)
    emit_many({"group": "g", "key": f"free {n}"} for n in range(30))
    worker = Worker(clock=clock)
    for _ in range(20):
        worker.handle_batch()
    assert sum(key.startswith("free") for key in order) >= 5
    assert sum(key.startswith("o") for key in order) >= 5


def test_an_event_of_a_group_that_this_worker_does_not_handle_holds_up_its_key(own_registry):
    own_registry.add_handler(note, group="")
    emit("theirs", "1", ordering_key="o")
    emit("ours", "2", ordering_key="o")
    assert Worker(groups="^ours$").drain() == 0
    assert Worker(groups="^theirs$").drain() == 1
    assert Worker(groups="^ours$").drain() == 1


def test_a_lower_id_that_is_committed_late_is_the_head_from_then_on(own_registry):
    own_registry.add_handler(note, group="")
    with connect() as late:
        late.execute("begin")
        late.execute(
            "insert into spark_outbox_event (key, event_group, ordering_key) values ('late', 'g', 'o')"
        )
        emit_in_order(1)
        Worker().drain()
        late.execute("commit")
    emit_in_order(1, start=1)
    Worker().drain()
    assert handled() == ["o 000", "late", "o 001"]


def test_a_hot_key_leaves_other_keys_their_time(own_registry):
    clock, order = Clock(), []

    def slow(event):
        clock.now += 1
        order.append(event.key)

    own_registry.add_handler(slow, group="")
    emit_in_order(30, key="hot")
    emit_in_order(30, key="other")
    worker = Worker(clock=clock)
    for _ in range(20):
        worker.handle_batch()
    assert sum(key.startswith("hot") for key in order) >= 5
    assert sum(key.startswith("other") for key in order) >= 5


# Many keys, and workers that look at a few at a time


@pytest.fixture
def small_looks(monkeypatch):
    monkeypatch.setattr(scanning, "PIECE", 10)
    monkeypatch.setattr("spark_outbox.worker.ordered.KEYS_AT_ONCE", 4)


def fill(count, *, key, status="pending", delay=None, events=1, group="g"):
    """Write `events` of each of `count` ordering keys; `status` and `delay` are those of the first."""
    with connection.cursor() as cursor:
        for number in range(events):
            cursor.execute(
                "insert into spark_outbox_event (key, event_group, ordering_key, status, available_at) "
                "select %(key)s || ' ' || n || '-' || %(number)s, %(group)s, %(key)s || ' ' || n, "
                "%(status)s, statement_timestamp() + %(delay)s * interval '1 second' "
                "from generate_series(1, %(count)s) as n",
                {
                    "key": key,
                    "number": number,
                    "count": count,
                    "group": group,
                    "status": "pending" if number else status,
                    "delay": None if number else delay,
                },
            )


def done(key):
    return OutboxEvent.objects.filter(key__startswith=key, status="done").count()


def test_what_a_dead_worker_held_is_taken_over_also_if_it_is_hundreds_of_keys(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    fill(150, key="held")
    fill(100, key="waits", delay=HOUR)  # they come later in the order of keys
    with connect() as neighbour:
        neighbour.execute("begin")
        neighbour.execute("select from spark_outbox_event where key ~ 'held' for no key update")
        with worker_thread():
            wait_until_asleep()
            neighbour.execute("rollback")  # as the server does for a worker that died
            eventually(lambda: done("held") == 150)


@pytest.mark.usefixtures("small_looks")
def test_what_a_dead_worker_held_is_taken_over_also_if_it_is_more_than_is_remembered(
    own_registry, monkeypatch
):
    monkeypatch.setattr("spark_outbox.worker.rounds.MAX_HELD", 5)
    own_registry.add_handler(lambda event: None, group="", name="h")
    fill(50, key="held")
    with connect() as neighbour:
        neighbour.execute("begin")
        neighbour.execute("select from spark_outbox_event for no key update")
        with worker_thread():
            wait_until_asleep()
            neighbour.execute("rollback")
            eventually(lambda: done("held") == 50)


@pytest.mark.usefixtures("small_looks")
def test_a_new_event_is_found_among_many_keys_that_are_blocked(own_registry):
    own_registry.add_handler(note, group="")
    fill(60, key="blocked", status="failed", events=2)
    fill(60, key="waits", delay=HOUR, events=2)
    with worker_thread():
        wait_until_asleep()
        for n in range(5):
            emit("g", f"{n}", ordering_key=f"k{n}")
            eventually(lambda n=n: len(handled()) == n + 1)
            wait_until_asleep()


@pytest.mark.usefixtures("small_looks")
@pytest.mark.parametrize("blocked", [3, 60])
def test_an_event_that_is_committed_late_is_found_among_many_that_are_blocked(own_registry, blocked):
    """It has a lower id than events that were looked at before."""
    own_registry.add_handler(note, group="")
    fill(blocked, key="blocked", status="failed", events=2)
    with worker_thread(), connect() as late:
        wait_until_asleep()
        late.execute("begin")
        late.execute(
            "insert into spark_outbox_event (key, event_group, ordering_key) values ('late', 'g', 'o')"
        )
        emit("g", "early", ordering_key="p")
        eventually(lambda: handled() == ["early"])
        late.execute("commit")
        eventually(lambda: handled() == ["early", "late"])


@pytest.mark.usefixtures("small_looks")
def test_a_key_that_a_person_sets_free_is_found_among_many_that_are_blocked(own_registry):
    own_registry.add_handler(note, group="")
    fill(60, key="blocked", status="failed", events=2)
    with worker_thread(), connect() as person:
        for n in (7, 53):
            wait_until_asleep()
            person.execute(
                "update spark_outbox_event set status = 'discarded' where key = %s", [f"blocked {n}-0"]
            )
            person.execute("notify spark_outbox")
            eventually(lambda n=n: f"blocked {n}-1" in handled())


@pytest.mark.usefixtures("small_looks")
def test_after_a_look_at_many_keys_that_are_blocked_a_worker_comes_to_rest(own_registry, monkeypatch):
    monkeypatch.setattr(pauses, "PUT_BACK_INTERVAL", math.inf)
    own_registry.add_handler(note, group="")
    fill(60, key="blocked", status="failed", events=2)
    clock, waits = Clock(), []

    def wait(seconds):
        waits.append(seconds)
        if seconds == HOUR and waits.count(HOUR) == 1:
            emit("g", "key", ordering_key="o")
            return True
        clock.now += seconds
        if seconds == HOUR or len(waits) > 20:
            worker.stop()
        return False

    worker = Worker(clock=clock, poll_interval=HOUR)
    worker._wake.wait = wait
    worker._retention._next_at = math.inf
    worker.run()
    assert handled() == ["key"]
    assert waits[-1] == HOUR
    assert len(waits) <= 6  # it has looked at all of them once more, and then no more


@pytest.mark.usefixtures("small_looks")
def test_many_keys_whose_retries_are_due_at_once_are_all_handled(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    fill(60, key="retried", delay=-1, events=3)
    assert Worker().drain() == 180


@pytest.mark.usefixtures("small_looks")
def test_nothing_is_forgotten_by_workers_of_different_groups_with_many_keys_and_retries(own_registry):
    """Each hears of what is new, and of what another has left to it: they poll once an hour."""
    calls = defaultdict(list)
    failed = set()

    @handler("", name="h", backoff=0.001)
    def flaky(event):
        calls[event.ordering_key].append(event.key)
        if event["n"] % 11 == 0 and event.key not in failed:
            failed.add(event.key)
            raise RuntimeError

    fill(30, key="blocked", status="failed", events=2, group="a")
    total = 300
    with (
        worker_thread(groups="^a", batch_size=7),
        worker_thread(groups="^a", batch_size=7),
        worker_thread(groups="^b", batch_size=7),
        worker_thread(batch_size=7),
    ):
        wait_until_asleep(4)
        for n in range(total):
            emit("ab"[n % 2], f"{n:03}", ordering_key=f"key {n % 9}", n=n)
        wait_until_done(total)
    for keys in calls.values():
        assert keys == sorted(keys)
    assert sum(map(len, calls.values())) == total + len(failed)


# From one worker to another: who handles the head wakes whoever handles what follows


def test_a_key_whose_groups_have_workers_of_their_own_goes_from_one_to_the_other(own_registry):
    started, go = threading.Event(), threading.Event()

    def handle(event):
        if event.key == "0":
            started.set()
            assert go.wait(PATIENCE)
        note(event)

    own_registry.add_handler(handle, group="")
    with worker_thread(groups="^a$"), worker_thread(groups="^b$"):
        wait_until_asleep(2)
        emit("a", "0", ordering_key="o")
        assert started.wait(PATIENCE)
        for n in range(1, 10):
            emit("ab"[n % 2], f"{n}", ordering_key="o")
        wait_until_asleep()  # the one that has to wait for the other
        go.set()
        eventually(lambda: handled() == [f"{n}" for n in range(10)])


@pytest.mark.parametrize("atomic", [True, False])
def test_a_worker_that_stops_hands_over_what_follows_to_those_that_sleep(own_registry, atomic):
    started, go = threading.Event(), threading.Event()

    @handler("^a$", name="a", atomic=atomic)
    def handle(event):
        started.set()
        assert go.wait(PATIENCE)

    own_registry.add_handler(note, group="^b$")
    with worker_thread(groups="^b$"), worker_thread(groups="^a$") as first:
        wait_until_asleep(2)
        emit("a", "1", ordering_key="o")
        assert started.wait(PATIENCE)
        emit("b", "2", ordering_key="o")
        wait_until_asleep()
        first.stop()
        go.set()
        eventually(lambda: handled() == ["2"])


def test_a_head_of_another_group_wakes_nobody_again_and_again(own_registry):
    own_registry.add_handler(note, group="")
    emit("theirs", "1", ordering_key="o")
    emit("ours", "2", ordering_key="o")
    with worker_thread(groups="^ours$"), connect() as listener:
        wait_until_asleep()
        listener.execute("listen spark_outbox")
        listener.execute("notify spark_outbox")
        assert notifications(listener) == 1
        wait_until_asleep()
        emit("ours", "3")
        eventually(lambda: handled() == ["3"])
        wait_until_asleep()
        assert notifications(listener) <= 1  # of that emit


def test_a_worker_without_groups_notifies_nobody_of_what_follows(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread(), connect() as listener:
        wait_until_asleep()
        listener.execute("listen spark_outbox")
        emit_in_order(3)
        eventually(lambda: len(handled()) == 3)
        wait_until_asleep()
        assert notifications(listener) <= 3
