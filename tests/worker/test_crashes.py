"""A worker and its supervisor that are killed together: what was being called is not forgotten."""

import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from django.db import OperationalError, connection
from django.db.models.expressions import RawSQL

from spark_outbox import emit, emit_many, handler
from spark_outbox.errors import WorkerDied
from spark_outbox.models import Delivery, WorkerSession
from spark_outbox.store import claiming, detached, sessions
from spark_outbox.worker import booking, running
from spark_outbox.worker.loop import Worker
from tests.tools import (
    PATIENCE,
    WorkerProcess,
    connect,
    deliveries,
    elsewhere,
    eventually,
    note,
    start_a_handler,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def run_until_killed_or(probe):
    """Start a worker, as systemd would; return whether it was killed before `probe` was true."""
    with WorkerProcess(EXTRA_APPS="tests.probe") as worker:
        eventually(lambda: probe() or worker.process.poll() is not None)
        return worker.process.poll() == -signal.SIGKILL


def lives():
    """Start workers until one survives, and all is done; return how many were killed."""
    killed = 0
    while run_until_killed_or(lambda: not {"pending", "running"} & {*statuses().values()}):
        killed += 1
        assert killed < 10
    return killed


@pytest.mark.parametrize("kind", ["plain", "detached"])
def test_an_event_that_kills_the_whole_service_each_time_is_charged_for_it(tmp_path, kind):
    calls = tmp_path / "calls"
    emit(f"probe_kill_all_{kind}", "key", calls=str(calls))
    emit("probe", "behind")
    killed = lives()
    assert deliveries()["kill all" if kind == "plain" else "kill all, detached"] == ("failed", 2)
    assert "WorkerDied" in Delivery.objects.get().error
    assert status("behind") == "done"
    # Three times to be sure, the first of them before anybody looked; and then at once.
    assert killed == len(calls.read_text()) <= 4


def test_others_are_handled_meanwhile_and_none_is_charged(tmp_path):
    emit_many({"group": "probe", "key": f"before {n}"} for n in range(3))
    emit("probe_kill_all_plain", "key", calls=str(tmp_path / "calls"))
    emit_many({"group": "probe", "key": f"behind {n}"} for n in range(3))
    lives()
    assert {key for key, was in statuses().items() if was != "done"} == {"key"}
    assert set(deliveries()) == {"kill all"}


def test_a_worker_that_is_killed_by_a_person_costs_an_event_no_attempt(flags):
    emit("probe", "key", **flags.payload)
    for _ in range(2):
        with WorkerProcess(EXTRA_APPS="tests.probe") as worker:
            worker.owns(flags.wait())
            worker.kill()
    flags.go.touch()
    with WorkerProcess(EXTRA_APPS="tests.probe"):
        wait_until_done(1)
    assert not Delivery.objects.exists()


def test_a_worker_that_stops_leaves_nothing_behind(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread(), worker_thread():
        emit("g", "key")
        wait_until_done(1)
        assert WorkerSession.objects.count() == 2
        assert set(WorkerSession.objects.values_list("event_id", "handler")) == {(None, "")}
        (name,) = set(WorkerSession.objects.values_list("name", flat=True))
        assert name.endswith(f":{os.getpid()}")
    assert not WorkerSession.objects.exists()


def test_after_an_unclean_end_the_next_worker_looks_closely_for_a_while(own_registry):
    own_registry.add_handler(note, group="")
    WorkerSession.objects.create(session=1, name="dead")
    emit_many({"group": "g", "key": f"{n}"} for n in range(20))
    noted = set()
    with worker_thread(batch_size=10):
        wait_until_done(20)
        eventually(lambda: not WorkerSession.objects.filter(name="dead").exists())
        wait_until_asleep()
        noted |= set(WorkerSession.objects.values_list("event_id", flat=True))
    assert noted == {None}  # what was written is taken back with the done mark


def test_a_worker_that_lives_is_not_taken_for_a_dead_one(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread():
        with worker_thread():
            emit("g", "key")
            wait_until_done(1)
        assert WorkerSession.objects.count() == 1


def test_an_outage_of_its_connection_is_not_taken_for_a_workers_end(own_registry):
    """A call that it makes was counted, as if the worker had died of it."""
    release, started = threading.Event(), threading.Event()

    def wait(event):
        if not started.is_set():
            started.set()
            assert release.wait(PATIENCE)

    handler("", name="h")(wait)
    event = emit("g", "key")
    with worker_thread():
        assert started.wait(PATIENCE)
        WorkerSession.objects.update(event_id=event.id, handler="h", times=2)
        with connect() as other:
            other.execute(
                "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
                "where starts_with(application_name, 'spark_worker ')"
            )
        Worker().run(drain=True)
        assert status() == "done"
        assert WorkerSession.objects.get().times == 2
        release.set()
    assert not Delivery.objects.exists()


@pytest.mark.parametrize(("since", "attempts"), [("-1 second", []), ("1 second", [("h", 1)])])
def test_a_restart_of_the_server_is_no_workers_end(own_registry, since, attempts):
    own_registry.add_handler(note, group="", name="h")
    event = emit("g", "key", delay=3600)
    WorkerSession.objects.create(
        session=1,
        name="dead",
        event_id=event.id,
        handler="h",
        times=2,
        started_at=RawSQL("pg_postmaster_start_time() + %s::interval", [since]),
    )
    Worker().run(drain=True)
    assert list(Delivery.objects.values_list("handler", "attempts")) == attempts


@pytest.mark.parametrize("first", ["supervisor", "newcomer"])
def test_a_death_is_counted_once_and_with_its_cause_by_whomever_it_is_found_first(own_registry, first):
    """The supervisor knows of what its child died, a worker that starts at that moment does not."""

    def supervise():
        error = WorkerDied("A worker process died of signal SIGSEGV.")
        booking.book([(event.id, 0)], error, own_registry, session=1, using="default")

    handler("", name="h", max_attempts=2, backoff=3600)(note)
    event = emit("g", "key")
    WorkerSession.objects.create(session=1, name="dead", event_id=event.id, handler="h", times=2)
    if first == "supervisor":
        supervise()
    Worker().run(drain=True)
    if first == "newcomer":
        assert deliveries() == {"h": ("pending", 1)}
        supervise()
    assert deliveries() == {"h": ("pending", 1)}
    assert "died of signal SIGSEGV" in Delivery.objects.get().error


def test_a_death_is_counted_once_also_if_the_next_attempt_fails_meanwhile(own_registry, monkeypatch):
    handler("", name="h", max_attempts=5, backoff=3600)(note)
    event = emit("g", "key")
    tried = threading.Event()
    undo_count = detached.undo_count

    def undo(*arguments, **options):
        try:
            return undo_count(*arguments, **options)
        finally:
            tried.set()

    def book(error, **options):
        booking.book([(event.id, 0)], error, own_registry, session=1, using="default", **options)
        connection.close()

    monkeypatch.setattr(detached, "undo_count", undo)
    book(WorkerDied("A guess."), is_guess=True)
    with connect(autocommit=False) as next_attempt, ThreadPoolExecutor() as pool:
        next_attempt.execute("select from spark_outbox_event for no key update")
        booked = pool.submit(book, WorkerDied("The cause."))
        assert tried.wait(PATIENCE)
        next_attempt.execute(
            "update spark_outbox_delivery set session = null, attempts = 2, error = 'the second'"
        )
        next_attempt.commit()
        booked.result(PATIENCE)
    assert deliveries() == {"h": ("pending", 2)}
    assert Delivery.objects.get().error == "the second"


def test_the_cause_replaces_a_guess_that_comes_in_between(own_registry, monkeypatch):
    handler("", name="h", max_attempts=1)(note)
    event = emit("g", "key")
    book = partial(booking.book, [(event.id, 0)], registry=own_registry, session=1, using="default")
    claim_one = claiming.claim_one

    def claim(*arguments, **options):
        monkeypatch.setattr(claiming, "claim_one", claim_one)
        elsewhere(lambda: book(WorkerDied("A guess."), is_guess=True))
        return claim_one(*arguments, **options)

    monkeypatch.setattr(claiming, "claim_one", claim)
    book(WorkerDied("The cause."))
    assert deliveries() == {"h": ("failed", 1)}
    assert "The cause." in Delivery.objects.get().error


def test_a_worker_that_was_cut_off_has_its_row_again(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread():
        WorkerSession.objects.all().delete()  # as another does that took it for dead
        with connect() as other:
            other.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where starts_with(application_name, 'spark_worker ')"
            )
        eventually(lambda: WorkerSession.objects.count() == 1)


def test_in_the_ordinary_case_no_call_is_noted(flags):
    with WorkerProcess(EXTRA_APPS="tests.probe").wait_until_ready() as worker:
        worker.owns(start_a_handler(flags))
        with connect() as other:
            rows = other.execute("select event_id, handler from spark_outbox_session").fetchall()
            assert rows == [(None, "")]
        flags.go.touch()
        eventually(lambda: status() == "done")


def test_a_noted_call_of_a_handler_that_is_gone_is_passed_over(own_registry):
    own_registry.add_handler(note, group="")
    event = emit("g", "key")
    WorkerSession.objects.create(session=1, name="dead", event_id=event.id, handler="renamed")
    with worker_thread(batch_size=1):
        wait_until_done(1)
        emit("g", "another")
        eventually(lambda: not WorkerSession.objects.filter(name="dead").exists())
    assert not Delivery.objects.exists()


@pytest.mark.parametrize("atomic", [True, False])
def test_a_note_ends_with_its_call(own_registry, atomic):
    def fail(event):
        if atomic:
            connection.connection.close()
        raise OSError

    handler("", name="h", atomic=atomic, backoff=3600)(fail)
    WorkerSession.objects.create(session=1, name="dead")
    emit("g", "key")
    with worker_thread():
        eventually(lambda: deliveries() == {"h": ("pending", 1)})
        eventually(lambda: not WorkerSession.objects.exclude(event_id=None).exists())


def test_workers_that_find_the_same_dead_one_do_not_wait_for_each_other(own_registry):
    release, started = threading.Event(), threading.Event()

    def wait(event):
        started.set()
        assert release.wait(PATIENCE)

    handler("^slow$", name="slow")(wait)
    own_registry.add_handler(note, group="^g$")
    WorkerSession.objects.create(session=1, name="dead")
    with (
        worker_thread(batch_size=1, groups="^slow$"),
        worker_thread(batch_size=1, groups="^g$"),
    ):
        emit("slow", "held")
        assert started.wait(PATIENCE)
        emit_many({"group": "g", "key": f"{n}"} for n in range(3))
        eventually(lambda: [status(f"{n}") for n in range(3)] == ["done"] * 3)
        release.set()


def test_a_handler_that_ends_its_process_with_0_has_crashed(tmp_path):
    emit("probe_exit", "key", calls=str(tmp_path / "calls"))
    emit("probe", "behind")
    with WorkerProcess("--drain", EXTRA_APPS="tests.probe") as worker:
        assert worker.wait() == 0
    assert status("behind") == "done"
    assert deliveries() == {"exit": ("pending", 1)}


def test_a_call_under_way_goes_on_if_the_connection_is_lost_just_after_its_batch(
    own_registry, monkeypatch
):
    release, calls, lost, dismiss = threading.Event(), [], [], sessions.dismiss

    def lose(sessions, *, using):
        if not lost:
            lost.append(sessions)
            raise OperationalError("server closed the connection")
        dismiss(sessions, using=using)

    @handler("^async$", name="async")
    async def run(event):
        calls.append(event.key)
        while not release.is_set():
            await asyncio.sleep(0.005)

    own_registry.add_handler(note, group="^plain$")
    monkeypatch.setattr(sessions, "dismiss", lose)
    monkeypatch.setattr(running, "TAKE_OVER_INTERVAL", 0)
    WorkerSession.objects.create(session=1, name="dead")
    with worker_thread(batch_size=1):
        for group, key in (("plain", "first"), ("async", "slow"), ("plain", "1"), ("plain", "2")):
            emit(group, key)
            eventually(lambda key=key: status(key) in {"done", "running"})
        eventually(lambda: not WorkerSession.objects.filter(name="dead").exists())
        release.set()
        eventually(lambda: status("slow") == "done")
    assert lost == [[1]]
    assert calls == ["slow"]
    assert deliveries() == {"async": ("done", 1)}
