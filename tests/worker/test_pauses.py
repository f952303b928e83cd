"""Handlers and groups that are paused by hand: what waits, what goes on, and how all comes back."""

import random
import threading
import time
from collections import Counter

import pytest
from django.db import OperationalError, transaction

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.store import pausing, settling
from spark_outbox.worker import pauses
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.outcome import put_off
from spark_outbox.worker.pauses import Pauses
from tests.challenges.models import Handled
from tests.statements import Statements
from tests.tools import (
    Clock,
    WorkerProcess,
    connect,
    deliveries,
    elsewhere,
    eventually,
    make_due,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)
from tests.worker.sql import run

pytestmark = pytest.mark.django_db(transaction=True)


def pause(kind, name, why=""):
    return run("select name from spark_pause(%s, %s, %s)", [kind, name, why])


def resume(kind, name):
    return run("select name from spark_resume(%s, %s)", [kind, name])


def waiting():
    """Return how many events wait for each pause."""
    return dict(run("select name, waiting from spark_outbox_pauses"))


def put_aside():
    return Delivery.objects.filter(error__contains="it is paused").count()


@pytest.fixture
def calls(own_registry):
    """Two handlers, `mail` and `other`; which of them was called with which event."""
    made = []
    for name in ("mail", "other"):
        own_registry.add_handler(
            lambda event, name=name: made.append((name, event.key)), group="", name=name
        )
    return made


@pytest.fixture
def clock():
    return Clock()


# What waits, and what does not


def test_a_handler_that_is_paused_is_not_called_and_others_are(calls, clock):
    worker = Worker(clock=clock)
    assert pause("handler", "mail") == [("mail",)]
    for key in ("one", "two"):
        emit("g", key)
    worker.drain()
    assert calls == [("other", "one"), ("other", "two")]
    assert set(statuses().values()) == {"pending"}
    assert set(Delivery.objects.values_list("handler", "status", "attempts")) == {
        ("mail", "pending", 0),
        ("other", "done", 1),
    }
    assert waiting() == {"mail": 2}
    worker.drain()
    assert len(calls) == 2  # they are not even claimed
    assert resume("handler", "mail") == [("mail",)]
    clock.now += 1
    worker.drain()
    assert calls[2:] == [("mail", "one"), ("mail", "two")]
    assert set(statuses().values()) == {"done"}


def test_of_a_group_that_is_paused_no_handler_is_called(calls, clock):
    pause("group", "g")
    emit("g", "paused")
    emit("gg", "another")
    worker = Worker(clock=clock)
    worker.drain()
    assert calls == [("mail", "another"), ("other", "another")]
    assert waiting() == {"g": 1}
    resume("group", "g")
    clock.now += 1
    worker.drain()
    assert calls[2:] == [("mail", "paused"), ("other", "paused")]
    assert status("paused") == "done"


@pytest.mark.parametrize("kind", ["plain", "list", "async", "detached"])
def test_handlers_of_every_kind_are_paused(own_registry, clock, kind):
    made = []

    async def call_async(event):
        made.append(event.key)

    if kind == "plain":
        own_registry.add_handler(lambda event: made.append(event.key), group="", name="h")
    elif kind == "list":
        own_registry.add_handler(
            lambda events: made.extend(event.key for event in events), group="", name="h", batch=2
        )
    elif kind == "async":
        own_registry.add_handler(call_async, group="", name="h")
    else:
        own_registry.add_handler(lambda event: made.append(event.key), group="", name="h", atomic=False)
    pause("handler", "h")
    keys = [f"{number}" for number in range(5)]
    emit_many({"group": "g", "key": key} for key in keys)
    worker = Worker(clock=clock)
    worker.drain()
    assert (made, waiting()) == ([], {"h": 5})
    resume("handler", "h")
    clock.now += 1
    worker.drain()
    assert sorted(made) == keys
    assert set(statuses().values()) == {"done"}


def test_what_a_paused_group_has_is_not_even_read(calls, clock):
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, payload) "
            """values ('key', 'g', '{"x": {"$": "nonsense"}}')"""
        )
    pause("group", "g")
    worker = Worker(clock=clock)
    worker.drain()
    assert status() == "pending"
    with connect() as other:
        other.execute("update spark_outbox_event set payload = '{}'")  # mended
    resume("group", "g")
    clock.now += 1
    worker.drain()
    assert status() == "done"


def test_an_event_that_waits_holds_up_its_ordering_key_and_nobody_else(own_registry, clock):
    made = []
    own_registry.add_handler(lambda event: made.append(event.key), group="", name="h")
    pause("group", "paused")
    for number, group in enumerate(["g", "paused", "g", "paused", "g"]):
        emit(group, f"o{number}", ordering_key="o")
        emit(group, f"{number}")
    worker = Worker(clock=clock)
    worker.drain()
    assert sorted(made) == ["0", "2", "4", "o0"]
    resume("group", "paused")
    clock.now += 1
    worker.drain()
    assert [key for key in made if key.startswith("o")] == ["o0", "o1", "o2", "o3", "o4"]
    assert set(statuses().values()) == {"done"}


def test_what_another_handler_owes_keeps_its_own_time(own_registry, clock):
    """A resume calls no handler before its next attempt is due."""
    made = []

    def fail(event):
        made.append("fails")
        raise ValueError

    own_registry.add_handler(lambda event: made.append("mail"), group="", name="mail")
    own_registry.add_handler(fail, group="", name="fails")
    pause("handler", "mail")
    emit("g", "key")
    worker = Worker(clock=clock)
    worker.drain()
    with connect() as other:
        other.execute(
            "update spark_outbox_event set available_at = now() + interval '1 hour'; "
            "update spark_outbox_delivery set available_at = now() + interval '1 hour' "
            "where handler = 'fails'"
        )
    resume("handler", "mail")
    clock.now += 1
    worker.drain()
    assert made == ["fails", "mail"]
    assert deliveries() == {"mail": ("done", 1), "fails": ("pending", 1)}
    assert OutboxEvent.objects.get().available_at is not None
    make_due()
    worker.drain()
    assert made == ["fails", "mail", "fails"]


def test_a_retry_waits_as_well_and_keeps_its_attempts(own_registry, clock):
    bad = [True]

    def fail(event):
        if bad[0]:
            raise ValueError

    own_registry.add_handler(fail, group="", name="h")
    emit("g", "key")
    worker = Worker(clock=clock)
    worker.drain()
    pause("handler", "h")
    clock.now += 1
    for _ in range(3):
        make_due()
        worker.drain()
    assert deliveries() == {"h": ("pending", 1)}
    bad[0] = False
    resume("handler", "h")
    clock.now += 1
    worker.drain()
    assert deliveries() == {"h": ("done", 2)}


def test_a_call_that_is_under_way_ends_as_usual(own_registry):
    started, go = threading.Event(), threading.Event()

    def wait(event):
        started.set()
        assert go.wait(30)

    own_registry.add_handler(wait, group="", name="h", atomic=False)
    with worker_thread():
        emit("g", "key")
        assert started.wait(30)
        pause("handler", "h")
        go.set()
        eventually(lambda: status() == "done")


def test_a_retry_by_hand_does_not_end_a_pause(calls, clock):
    pause("handler", "mail")
    emit("g", "key")
    worker = Worker(clock=clock)
    worker.drain()
    for _ in range(2):
        run("select key from spark_retry('key')")
        worker.drain()
        assert calls == [("other", "key")]
        assert waiting() == {"mail": 1}
    resume("handler", "mail")
    clock.now += 1
    worker.drain()
    assert calls == [("other", "key"), ("mail", "key")]


def test_resuming_a_group_frees_nothing_that_a_handler_s_pause_holds_and_the_other_way_round(
    calls, clock
):
    for first, second in ((("group", "g"), ("handler", "mail")), (("handler", "mail"), ("group", "g"))):
        calls.clear()
        worker = Worker(clock=clock)
        pause(*first)
        pause(*second)
        key = f"{first[0]} first"
        emit("g", key)
        clock.now += 1
        worker.drain()
        assert calls == []
        resume(*first)
        clock.now += 1
        worker.drain()
        assert ("mail", key) not in calls
        assert waiting() == {second[1]: 1}
        resume(*second)
        clock.now += 1
        worker.drain()
        assert sorted(calls) == [("mail", key), ("other", key)]
        assert status(key) == "done"


def test_in_process_pauses_are_heeded(settings, calls, monkeypatch):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    monkeypatch.setattr(pauses, "READ_INTERVAL", 0)
    emit("g", "before")
    pause("handler", "mail")
    emit("g", "meanwhile")
    with transaction.atomic():
        emit("g", "too")
    assert waiting() == {"mail": 2}
    resume("handler", "mail")
    elsewhere(lambda: emit("g", "after"))
    assert set(statuses().values()) == {"done"}
    assert Counter(key for _, key in calls) == dict.fromkeys(("before", "meanwhile", "too", "after"), 2)


def test_no_handler_is_called_before_the_pauses_have_been_read(calls, clock, monkeypatch):
    """The first look fails: so does the batch, and the next looks again."""
    pause("handler", "mail")
    emit("g", "key")
    worker, read = Worker(clock=clock), pausing.paused

    def fail(*, using):
        monkeypatch.setattr(pausing, "paused", read)
        raise OperationalError

    monkeypatch.setattr(pausing, "paused", fail)
    with pytest.raises(OperationalError):
        worker.drain()
    worker.drain()
    assert calls == [("other", "key")]


def test_threads_that_begin_together_all_heed_a_pause(monkeypatch):
    shared, read, both = Pauses(time.monotonic), pausing.paused, threading.Barrier(2)
    pause("handler", "mail")

    def read_together(*, using):
        both.wait(30)
        return read(using=using)

    monkeypatch.setattr(pausing, "paused", read_together)
    looks = []
    threads = [
        threading.Thread(target=elsewhere, args=(lambda: looks.append(shared.look(using="default")),))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [list(look) for look in looks] == [[("handler", "mail")]] * 2


def die(handler):
    """Note that the last worker has died of this delivery."""
    run(
        "update spark_outbox_delivery set error = 'spark_outbox.errors.WorkerDied: gone', "
        "available_at = now(), session = 7 where handler = %s",
        [handler],
    )
    run("update spark_outbox_event set available_at = now()")


def failed_once(own_registry):
    def fail(event):
        raise ValueError("first\nsecond")

    own_registry.add_handler(fail, group="", name="mail")
    emit("g", "key")
    Worker().drain()
    delivery = Delivery.objects.get()
    assert delivery.traceback
    return delivery


def test_an_error_and_its_traceback_outlast_pauses(own_registry):
    before = failed_once(own_registry)
    for _ in range(2):
        make_due()
        pause("handler", "mail")
        pause("group", "g")
        worker = Worker()
        worker.drain()
        make_due()  # somebody has it looked at again
        worker.drain()
        held = Delivery.objects.get()
        assert "it is paused" in held.error.split("\n")[0]
        assert held.error.split("\n", 1)[1] == before.error
        assert held.traceback == before.traceback
        assert waiting() == {"mail": 0, "g": 1}
        run("delete from spark_outbox_pause")
        ((handler, mark),) = pausing.ended(using="default")
        assert pausing.put_back(handler, mark, limit=10, using="default") == 1
        after = Delivery.objects.get()
        assert (after.error, after.traceback, after.attempts) == (before.error, before.traceback, 1)


def test_an_event_that_has_killed_its_worker_is_known_for_it_while_it_waits(own_registry):
    event_id = failed_once(own_registry).event_id
    die("mail")

    def died():
        return settling.deliveries([event_id], using="default")[event_id]["mail"].died

    assert died()
    pause("handler", "mail")
    Worker().drain()
    assert put_aside() == 1
    assert died()
    run("delete from spark_outbox_pause")
    ((handler, mark),) = pausing.ended(using="default")
    pausing.put_back(handler, mark, limit=10, using="default")
    assert not put_aside()
    assert died()


def test_an_error_outlasts_an_open_circuit_which_is_closed_by_hand_all_the_same(own_registry):
    before = failed_once(own_registry)
    row = (before.event_id, "mail", *put_off(100))
    for _ in range(2):
        settling.record_results([row], worker="w", session=0, using="default")
        held = Delivery.objects.get()
        assert held.error == f"spark_outbox: not called, its circuit is open\n{before.error}"
        assert held.traceback == before.traceback
    assert run("select event_group, waits_for_circuit from spark_outbox_status") == [("g", 1)]
    run("select spark_outbox_close_circuit('mail')")
    assert OutboxEvent.objects.get().available_at is None


# What it costs


def test_while_nothing_is_paused_a_worker_reads_that_now_and_then(calls, clock):
    worker = Worker(clock=clock)
    emit_many({"group": "g", "key": f"{number}"} for number in range(100))
    with Statements() as statements:
        worker.drain()
        clock.now += 0.7
        emit("g", "another")
        worker.drain()
        assert statements.count("spark_outbox_pause$") == 1
        clock.now += 0.2
        worker.drain()
        assert statements.count("spark_outbox_pause$") == 2
    assert not Delivery.objects.exists()


# The end of a pause


def test_2500_events_that_waited_all_come_back_once(calls):
    pause("group", "g")
    with worker_thread():
        emit_many({"group": "g", "key": f"{number}"} for number in range(2500))
        eventually(lambda: waiting() == {"g": 2500})
        emit("other", "key")  # they stand in front of nobody
        eventually(lambda: status() == "done")
        resume("group", "g")
        wait_until_done(2501)
    assert set(Counter(key for _, key in calls).values()) == {2}
    assert not put_aside()


def test_a_resume_makes_no_more_than_a_thousand_ready_and_wakes_a_worker(calls, clock):
    pause("handler", "mail")
    emit_many({"group": "g", "key": f"{number:04}"} for number in range(1500))
    Worker(clock=clock).drain()
    resume("handler", "mail")
    assert OutboxEvent.objects.exclude(available_at=None).count() == 1500
    ((due,),) = run("select count(*) from spark_outbox_event where available_at <= now()")
    assert due == 1000
    with worker_thread():  # it has begun after that
        wait_until_done(1500)


def test_a_worker_that_puts_aside_while_the_pause_ends_puts_back_itself(own_registry):
    """It has read the pauses before, and commits after the resume has looked for what waits."""
    made, started, go = [], threading.Event(), threading.Event()

    def hold(event):
        started.set()
        assert go.wait(30)

    own_registry.add_handler(lambda event: made.append(event.key), group="", name="mail")
    own_registry.add_handler(hold, group="", name="slow")
    pause("handler", "mail")
    with worker_thread():  # which looks for what others have left now, and in a minute
        emit("g", "key")
        assert started.wait(30)
        resume("handler", "mail")
        go.set()
        eventually(lambda: made == ["key"])
    assert status() == "done"


def test_a_worker_that_sleeps_sees_the_end_of_a_pause_though_nobody_says_so(calls):
    pause("handler", "mail")
    with worker_thread():
        emit("g", "key")
        eventually(lambda: waiting() == {"mail": 1})
        wait_until_asleep()
        with connect() as other:
            other.execute("delete from spark_outbox_pause")
        eventually(lambda: status() == "done")
    assert calls == [("other", "key"), ("mail", "key")]


def test_what_is_paused_again_meanwhile_waits_on(calls, clock):
    worker = Worker(clock=clock)
    for number in range(3):
        pause("handler", "mail")
        clock.now += 1
        emit("g", f"{number}")
        worker.drain()
        assert waiting() == {"mail": number + 1}
        resume("handler", "mail")
    clock.now += 1
    worker.drain()
    assert set(statuses().values()) == {"done"}
    assert len(calls) == 6


def test_what_is_held_at_that_moment_comes_back_within_a_minute(calls, clock):
    pause("handler", "mail")
    emit("g", "held")
    emit("g", "free")
    worker = Worker(clock=clock)
    worker.drain()
    with connect(autocommit=False) as other:
        other.execute("select id from spark_outbox_event where key = 'held' for no key update")
        resume("handler", "mail")
        clock.now += 1
        worker.drain()
    assert statuses() == {"held": "pending", "free": "done"}
    clock.now += 60
    worker.drain()
    assert status("held") == "done"


def test_a_detached_sibling_that_runs_keeps_nothing_from_coming_back(own_registry, clock):
    made = []
    own_registry.add_handler(lambda event: made.append(event.key), group="", name="mail")
    started, go = threading.Event(), threading.Event()

    def wait(event):
        started.set()
        assert go.wait(30)

    own_registry.add_handler(wait, group="", name="detached", atomic=False)
    pause("handler", "mail")
    with worker_thread():
        emit("g", "key")
        assert started.wait(30)
        assert status() == "running"
        resume("handler", "mail")
        go.set()
        eventually(lambda: status() == "done")
    assert made == ["key"]


def test_pauses_that_come_and_go_under_load_lose_nothing_and_repeat_nothing(calls, monkeypatch):
    monkeypatch.setattr(pauses, "READ_INTERVAL", 0.01)
    monkeypatch.setattr(pauses, "PUT_BACK_INTERVAL", 1.0)
    every = [("handler", "mail"), ("handler", "other"), ("group", "a"), ("group", "b")]
    chance = random.Random(14)
    with worker_thread(), worker_thread():
        for number in range(60):
            kind, name = chance.choice(every)
            if not pause(kind, name):
                resume(kind, name)
            emit_many(
                {
                    "group": chance.choice("abc"),
                    "key": f"{number} {n}",
                    "ordering_key": chance.choice([None, "o", "p"]),
                }
                for n in range(20)
            )
        for kind, name in every:
            resume(kind, name)
        wait_until_done(1200)
    assert len(calls) == len(set(calls)) == 2400
    assert not put_aside()


@pytest.mark.parametrize("ended", ["discarded", "done"])
def test_what_somebody_has_ended_by_an_update_is_not_looked_at_again_and_again(calls, clock, ended):
    pause("group", "g")
    for number in range(5):
        emit("g", f"{number}")
    Worker(clock=clock).drain()
    run("update spark_outbox_event set status = %s, finished_at = now()", [ended])
    resume("group", "g")
    for handler, mark in pausing.ended(using="default"):
        assert pausing.put_back(handler, mark, limit=3, using="default") == 3
        assert pausing.put_back(handler, mark, limit=3, using="default") == 2
    assert not put_aside()
    Worker(clock=clock).drain()
    assert set(statuses().values()) == {ended}
    assert calls == []


def test_what_waits_to_be_put_back_counts_as_late(calls, clock):
    pause("handler", "mail")
    emit_many({"group": "g", "key": f"{number}"} for number in range(1200))
    Worker(clock=clock).drain()
    run("update spark_outbox_delivery set attempted_at = now() - interval '1 h' where handler = 'mail'")
    resume("handler", "mail")
    ((paused, is_late),) = run("select paused, late > interval '50 min' from spark_outbox_status")
    assert (paused, is_late) == (200, True)
    ((state, said),) = run("select status, detail from spark_outbox_health where name = 'pauses'")
    assert state == "warning"
    assert "200 events wait to be put back after a pause" in said
    Worker(clock=clock).drain()
    assert run("select sum(paused), count(late) from spark_outbox_status") == [(0, 0)]


def test_a_commit_puts_back_no_more_than_one_chunk(settings, calls, monkeypatch):
    monkeypatch.setattr(pauses, "READ_INTERVAL", 0)
    monkeypatch.setattr(pauses, "PUT_BACK_CHUNK", 10)
    pause("handler", "mail")
    emit_many({"group": "g", "key": f"{number}"} for number in range(25))
    Worker().drain()
    run("delete from spark_outbox_pause")
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    for left in (15, 5, 0):
        emit("g", f"then {left} are left")
        assert put_aside() == left


# Real processes


def test_all_workers_heed_a_pause_and_its_end():
    emit_many({"group": "probe", "key": f"before {number}"} for number in range(5))
    with WorkerProcess("--processes", "2") as one, WorkerProcess("--processes", "2") as two:
        for worker in (one, two):
            worker.wait_until_ready()
        wait_until_done(5)
        ((then,),) = run("select now() from spark_pause('handler', 'tests.probe.handlers.probe')")
        emitted = 0

        def are_all_put_aside():
            """Emit more, until of the last twenty none was handled."""
            nonlocal emitted
            emit_many({"group": "probe", "key": f"{emitted + n}"} for n in range(20))
            emitted += 20
            eventually(lambda: not OutboxEvent.objects.filter(available_at=None, status="pending"))
            last = [f"{emitted - n}" for n in range(1, 21)]
            return not Handled.objects.filter(key__in=last).exists()

        eventually(are_all_put_aside)
        ((late,),) = run(
            "select coalesce(max(finished_at - %s), '0') > interval '2 s' from spark_outbox_event "
            "where status = 'done'",
            [then],
        )
        assert not late  # by the database's clock
        run("select name from spark_resume('handler', 'tests.probe.handlers.probe')")
        wait_until_done(5 + emitted)
    assert Handled.objects.count() == 5 + emitted


def test_kill_9_of_the_worker_that_has_put_events_aside_loses_none_of_them():
    pause("group", "probe")
    with WorkerProcess("--poll-interval", "3600") as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        emit_many({"group": "probe", "key": f"{number}"} for number in range(1200))
        eventually(lambda: put_aside() == 1200)
        worker.kill()
    resume("group", "probe")
    with WorkerProcess("--drain") as worker:
        assert worker.wait() == 0
    wait_until_done(1200)
    assert Handled.objects.count() == 1200
