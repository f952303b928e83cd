"""Events that share an ordering key: one at a time, in the order of their ids, whatever happens."""

from collections import defaultdict

import pytest

from spark_outbox import Retry, emit, emit_many, handler, store
from spark_outbox.models import OutboxEvent
from spark_outbox.worker import Worker
from tests.tools import (
    HOUR,
    Clock,
    WorkerProcess,
    connect,
    eventually,
    handled,
    make_ready,
    note,
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
    keys = store.KEYS_AT_ONCE * 3 + 5
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
