"""Claims: which events a worker takes, in which turn, and whose it leaves alone."""

import pytest

from spark_outbox import emit, emit_many
from spark_outbox.models import OutboxEvent
from spark_outbox.store import scanning
from spark_outbox.worker.loop import Worker
from tests.tools import (
    HOUR,
    Clock,
    connect,
    eventually,
    handled,
    note,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def test_the_floor_follows_the_handled_and_a_lower_id_that_commits_later_is_still_found(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    clock = Clock()
    worker = Worker(clock=clock)
    with connect() as late:
        late.execute("begin")
        late.execute("insert into spark_outbox_event (key, event_group) values ('late', 'g')")
        emit("g", "early")
        assert worker.handle_batch() == 1
        assert worker._claims.looks["ready"].floor == OutboxEvent.objects.get(key="early").id + 1
        late.execute("commit")
    assert worker.handle_batch() == 0  # below the floor
    clock.now += 1.5
    assert worker.handle_batch() == 1  # the sweep
    assert set(statuses().values()) == {"done"}


def test_delayed_events_get_their_turn_while_there_is_a_backlog(own_registry):
    order = []
    own_registry.add_handler(lambda event: order.append(event.key), group="", name="h")
    emit_many({"group": "g", "key": f"ready {n}"} for n in range(200))
    emit_many({"group": "g", "key": f"due {n}", "delay": -1} for n in range(50))
    Worker(batch_size=20, commit_interval=1e-9).drain()
    assert len(order) == 250
    assert any(key.startswith("ready") for key in order[-20:])
    assert any(key.startswith("due") for key in order[:40])


def add_slow_handler(registry):
    """Add a handler that takes a second; return its clock, and the keys of its events in order."""
    clock, order = Clock(), []

    def slow(event):
        order.append(event.key)
        clock.now += 1

    registry.add_handler(slow, group="")
    return clock, order


def test_a_backlog_of_due_events_does_not_starve_ready_ones_of_a_slow_handler(own_registry):
    clock, order = add_slow_handler(own_registry)
    emit_many({"group": "g", "key": f"due {n}", "delay": -1} for n in range(20))
    emit_many({"group": "g", "key": f"ready {n}"} for n in range(20))
    worker = Worker(clock=clock)
    for _ in range(20):
        worker.handle_batch()
    assert sum(key.startswith("ready") for key in order) >= 5
    assert sum(key.startswith("due") for key in order) >= 5


@pytest.mark.parametrize("groups", [None, "^g$"])
def test_ready_due_and_ordered_events_take_turns_if_each_takes_long(own_registry, groups):
    clock, order = add_slow_handler(own_registry)
    emit_many({"group": "g", "key": f"due {n}", "delay": -1} for n in range(20))
    emit_many({"group": "g", "key": f"ready {n}"} for n in range(20))
    emit_many({"group": "g", "key": f"ordered {n}", "ordering_key": "o"} for n in range(20))
    worker = Worker(clock=clock, groups=groups)
    for _ in range(21):
        worker.handle_batch()
    for kind in ("due", "ready", "ordered"):
        assert sum(key.startswith(kind) for key in order) >= 5


@pytest.mark.parametrize("delay", [None, -1])
@pytest.mark.parametrize("piece", [5, 1000])
def test_a_worker_of_some_groups_finds_all_of_its_events_among_others(
    own_registry, monkeypatch, delay, piece
):
    monkeypatch.setattr(scanning, "PIECE", piece)
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit_many({"group": "theirs" if n % 7 else "ours", "delay": delay} for n in range(100))
    assert Worker(groups="^ours$").drain() == 15
    assert OutboxEvent.objects.filter(status="done", group="ours").count() == 15


def test_events_of_a_group_that_somebody_else_holds_are_found_when_they_are_free(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit_many({"group": "g", "key": f"{n}"} for n in range(30))
    with connect() as neighbour:
        neighbour.execute("begin")
        neighbour.execute("select from spark_outbox_event for no key update")
        with worker_thread(groups="^g$", batch_size=4):
            wait_until_asleep()
            neighbour.execute("rollback")  # as the server does for a worker that died
            wait_until_done(30)


@pytest.mark.parametrize("backlog", [3, 60])
def test_a_worker_of_some_groups_finds_what_is_committed_late_beside_a_backlog_of_others(
    own_registry, monkeypatch, backlog
):
    monkeypatch.setattr(scanning, "PIECE", 10)
    own_registry.add_handler(note, group="")
    emit_many({"group": "theirs"} for _ in range(backlog))
    with worker_thread(groups="^ours$"), connect() as late:
        wait_until_asleep()
        late.execute("begin")
        late.execute("insert into spark_outbox_event (key, event_group) values ('late', 'ours')")
        emit("ours", "early")
        eventually(lambda: handled() == ["early"])
        late.execute("commit")
        eventually(lambda: handled() == ["early", "late"])


def test_what_is_handled_in_the_sweep_before_sleep_counts_towards_max_events(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    worker = Worker(max_events=1, poll_interval=HOUR)
    fall_asleep = worker._wake.fall_asleep

    def emit_and_fall_asleep():
        emit("g", "key")
        return fall_asleep()

    worker._wake.fall_asleep = emit_and_fall_asleep
    worker.run()  # returns
    assert statuses() == {"key": "done"}


def test_groups_leaves_other_groups_to_others(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    for group in ("mail", "webhook", "mailing"):
        emit(group, group)
        emit(group, f"{group} due", delay=-1)
    assert Worker(groups="^mail$").drain() == 2
    assert statuses() == {
        "mail": "done",
        "mail due": "done",
        "webhook": "pending",
        "webhook due": "pending",
        "mailing": "pending",
        "mailing due": "pending",
    }


def test_rows_that_somebody_else_has_locked_are_passed_by(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    for key in ("held", "free"):
        emit("g", key)
    with connect() as other, other.transaction():
        other.execute("select from spark_outbox_event where key = 'held' for no key update")
        assert Worker().drain() == 1
    assert statuses() == {"held": "pending", "free": "done"}


def test_an_outcome_does_not_overwrite_what_somebody_decided_meanwhile(own_registry, caplog):
    def discard_itself(event):
        OutboxEvent.objects.filter(id=event.id).update(status="discarded")

    own_registry.add_handler(discard_itself, group="")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "discarded"}
    assert "Lost the claim on 1 events" in caplog.text
