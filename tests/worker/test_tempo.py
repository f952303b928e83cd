"""While events come fast, a worker polls rather than sleeps, so that nobody has to notify."""

import time

import pytest

from spark_outbox import emit, emit_many
from spark_outbox.models import OutboxEvent
from spark_outbox.processes.watch import OwnWatch
from spark_outbox.worker import unordered
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.tempo import POLL, Tempo
from tests.tools import (
    Clock,
    connect,
    eventually,
    note,
    notifications,
    status,
    wait_until_done,
    worker_thread,
)


def fast_after(steps):
    """Return whether events come fast, after so many seconds each with so many events."""
    clock = Clock()
    tempo = Tempo(clock)
    for seconds, count in steps:
        clock.now += seconds
        tempo.note(count)
    return tempo.is_fast


@pytest.mark.parametrize(
    ("steps", "fast"),
    [
        ([(0.05, 1)] * 100, False),  # 20 a second
        ([(0.01, 1)] * 100, False),  # 100 a second
        ([(0.0025, 1)] * 100, True),  # 400 a second
        ([(0.05, 25)] * 10, True),
        ([(0, 500)], True),
        ([(0, 500), (0.05, 0)], False),  # it is soon quiet again
        ([(0, 500), *[(0, 0)] * 20], False),  # also if the clock stands still
        ([(0, 500), *[(POLL, 0)] * 5], True),
    ],
)
def test_events_come_fast_from_about_200_a_second(steps, fast):
    assert fast_after(steps) == fast


@pytest.mark.django_db(transaction=True)
def test_a_busy_worker_does_not_make_emitters_notify(own_registry):
    own_registry.add_handler(note, group="")
    with connect() as listener, worker_thread(poll_interval=3600):
        listener.execute("listen spark_outbox")
        for number in range(40):
            emit_many({"group": "g", "key": f"{number}-{n}"} for n in range(20))
        wait_until_done(800)
        heard = notifications(listener)
    assert heard < 20


@pytest.mark.django_db(transaction=True)
def test_a_busy_worker_soon_finds_an_event_that_was_committed_after_later_ones(
    own_registry, monkeypatch
):
    """Its id is below those that were handled, and the worker claims from there on."""
    monkeypatch.setattr(unordered, "SWEEP_INTERVAL", 3600)
    monkeypatch.setattr(Tempo, "is_fast", True)  # it never sleeps
    own_registry.add_handler(note, group="")
    emit("g", "late", delay=3600)
    with worker_thread():
        for number in range(3):
            emit("g", f"{number}")
        wait_until_done(3)
        OutboxEvent.objects.filter(key="late").update(available_at=None)
        eventually(lambda: status("late") == "done")


@pytest.mark.django_db(transaction=True)
def test_a_process_that_has_lost_the_watch_rests_however_fast_events_come(own_registry, monkeypatch):
    """Else all would look every few milliseconds, and each find a little."""
    monkeypatch.setattr(Tempo, "is_fast", True)
    own_registry.add_handler(note, group="")
    looks = []

    def claim(*arguments, **options):
        looks.append(time.monotonic())
        return claims_next(*arguments, **options)

    claims_next = Claims.next
    monkeypatch.setattr(Claims, "next", claim)
    watch = OwnWatch()
    with worker_thread(poll_interval=3600, watch=watch):
        emit("g", "one")
        wait_until_done(1)
        eventually(lambda: len(looks) > 20)
        watch.is_ours = False
        time.sleep(0.2)
        before = len(looks)
        time.sleep(0.2)
        assert len(looks) == before
