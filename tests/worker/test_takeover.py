"""Calls whose worker is gone: another takes them over, and each is counted once."""

import threading

import pytest
from django.db import connection

from spark_outbox import emit, handler
from spark_outbox.errors import HandlerTimeout, WorkerDied
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.handlers import Registry
from spark_outbox.store import repairing
from spark_outbox.worker import booking, takeover
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import (
    HOUR,
    PATIENCE,
    WorkerProcess,
    connect,
    deliveries,
    eventually,
    handled,
    make_ready,
    note,
    start_a_handler,
    status,
    wait_until_done,
    work,
    worker_thread,
)
from tests.worker.sessions import look, private_sessions

pytestmark = pytest.mark.django_db(transaction=True)


# Who takes over, and what it counts


def leave_running(*, attempts=0, since="statement_timestamp()", session=1):
    """Have a worker begin a delivery, and be gone."""
    event = emit("g", "key")
    OutboxEvent.objects.update(status="running", attempts=1)
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_delivery "
            "(event_id, handler, status, session, attempts, attempted_at) "
            f"values (%s, 'h', 'running', %s, %s, {since})",
            [event.id, session, attempts],
        )
    return event


def test_a_take_over_counts_as_an_attempt(own_registry):
    calls = []

    @handler("", name="h", atomic=False, max_attempts=2)
    def run(event):
        calls.append(event.attempt)

    leave_running()
    takeover.take_over(using="default")
    assert deliveries() == {"h": ("pending", 1)}
    assert "WorkerDied" in Delivery.objects.get().error
    Worker().run(drain=True)
    assert (calls, status()) == ([2], "done")


@pytest.mark.parametrize("is_async", [False, True])
def test_out_of_attempts_it_has_failed_and_is_not_called_again(own_registry, is_async):
    calls = []

    def run(event):
        calls.append(event.attempt)

    async def run_async(event):
        run(event)

    function = run_async if is_async else run
    own_registry.add_handler(function, group="", name="h", atomic=is_async)
    leave_running(attempts=19)
    Worker().run(drain=True)
    assert calls == []
    assert deliveries() == {"h": ("failed", 20)}
    assert status() == "failed"
    assert "WorkerDied" in OutboxEvent.objects.get().last_error
    Delivery.objects.update(status="pending", attempts=0)
    OutboxEvent.objects.update(status="pending", available_at=None)
    Worker().run(drain=True)
    assert (calls, status()) == ([1], "done")


def test_a_worker_that_lacks_the_handler_only_counts(own_registry):
    leave_running(attempts=19)
    other = Registry()
    other.add_handler(note, group="", name="of the old release")
    Worker(registry=other).run(drain=True)
    assert deliveries() == {"h": ("pending", 20), "of the old release": ("done", 1)}
    assert (status(), handled()) == ("pending", ["key"])
    own_registry.add_handler(lambda event: 1 / 0, group="", name="h", atomic=False)
    make_ready()
    Worker().run(drain=True)
    assert deliveries() == {"h": ("failed", 20), "of the old release": ("done", 1)}
    assert status() == "failed"


@pytest.mark.parametrize(
    "left",
    [
        {"since": "pg_postmaster_start_time() - interval '1 second'"},  # the server was restarted
        {"session": None},  # SQL has put it there
    ],
)
def test_what_ended_through_no_fault_of_its_handler_is_not_counted(own_registry, left):
    leave_running(**left)
    takeover.take_over(using="default")
    assert deliveries() == {"h": ("pending", 0)}


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


# A crash that both a take-over and the supervisor see


def crash(event, error, registry):
    """Book what the supervisor has seen: the worker of session 1 died of this event's handler."""
    booking.book([(event.id, 0)], error, registry, session=1, using="default")


def test_a_crash_that_was_taken_over_already_is_not_counted_twice(own_registry):
    own_registry.add_handler(note, group="", name="h", atomic=False)
    event = leave_running()
    takeover.take_over(using="default")
    crash(event, WorkerDied("It died of signal SIGSEGV."), own_registry)
    assert deliveries() == {"h": ("pending", 1)}


@pytest.mark.parametrize(("max_attempts", "judged"), [(1, False), (1, True), (2, False)])
def test_the_cause_of_a_crash_is_known_also_if_it_was_taken_over_first(
    own_registry, max_attempts, judged
):
    """Whoever takes over knows only that the worker is gone; the supervisor knows why."""
    calls = []
    handler("", name="h", atomic=False, max_attempts=max_attempts, backoff=HOUR)(calls.append)
    event = leave_running()
    takeover.take_over(using="default")
    if judged:
        Worker().run(drain=True)
        assert deliveries() == {"h": ("failed", 1)}
    crash(event, HandlerTimeout("It ran longer than its timeout."), own_registry)
    failed = "failed" if max_attempts == 1 else "pending"
    assert deliveries() == {"h": (failed, 1)}
    assert Delivery.objects.get().error.startswith("spark_outbox.errors.HandlerTimeout: It ran longer")
    assert "HandlerTimeout" in Delivery.objects.get().traceback
    found = OutboxEvent.objects.get()
    assert "HandlerTimeout" in found.last_error
    assert found.status == failed
    assert (found.finished_at is None) == (failed == "pending")
    Worker().run(drain=True)
    assert calls == []  # it waits for its backoff, or has failed


def test_a_worker_that_was_stopped_has_burned_no_attempt_also_if_it_was_taken_over_first(own_registry):
    own_registry.add_handler(note, group="", name="h", atomic=False)
    event = leave_running()
    takeover.take_over(using="default")
    crash(event, None, own_registry)
    assert deliveries() == {"h": ("pending", 0)}
    assert status() == "pending"
    Worker().run(drain=True)
    assert (status(), handled()) == ("done", ["key"])


@pytest.mark.parametrize("outcome", ["fails", "runs", "dies"])
def test_a_crash_that_is_booked_after_the_next_attempt_changes_nothing_of_that(own_registry, outcome):
    """Which another worker has begun in the meantime: the first was counted as it was taken over."""

    @handler("", name="h", atomic=False, max_attempts=5, backoff=HOUR)
    def run(event):
        if outcome == "fails":
            raise OSError("another reason")

    event = leave_running()
    takeover.take_over(using="default")
    if outcome == "fails":
        Worker().run(drain=True)
    else:
        OutboxEvent.objects.update(status="running")
        Delivery.objects.update(status="running", session=2)
    with connect() as other:
        other.execute("select pg_advisory_lock(7531003, 2)")
        if outcome == "runs":
            crash(event, HandlerTimeout(), own_registry)
            assert deliveries() == {"h": ("running", 1)}
    if outcome == "dies":
        eventually(lambda: not look())  # the server may see a moment later that the connection is gone
    crash(event, HandlerTimeout(), own_registry)
    assert "HandlerTimeout" not in Delivery.objects.get().error
    assert Delivery.objects.get().attempts == (1 if outcome == "runs" else 2)


def test_a_crash_is_not_counted_by_a_take_over_as_well(own_registry):
    own_registry.add_handler(note, group="", name="h", atomic=False)
    event = leave_running()
    crash(event, WorkerDied("It died of signal SIGSEGV."), own_registry)
    takeover.take_over(using="default")
    assert deliveries() == {"h": ("pending", 1)}
    assert "SIGSEGV" in Delivery.objects.get().error
    assert OutboxEvent.objects.get().attempts == 1


# Workers that are cut off, and live


def cut_off():
    """End the sessions of the worker that runs the calling handler: that of its lock as well."""
    with connect() as other:
        pids = [connection.connection.info.backend_pid, *private_sessions()]
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


# Running events of which nothing runs


def test_an_event_that_sql_has_made_running_is_handled(own_registry):
    own_registry.add_handler(note, group="")
    OutboxEvent.objects.create(key="key", group="g", status="running")
    with worker_thread():
        wait_until_done(1)
    assert handled() == ["key"]


def test_an_event_whose_delivery_a_person_gives_up_as_it_runs_ends(own_registry):
    @handler("", name="h", atomic=False)
    def run(event):
        Delivery.objects.update(status="discarded")

    with worker_thread():
        emit("g", "key")
        eventually(lambda: status() == "discarded")
    assert deliveries() == {"h": ("discarded", 0)}


def test_a_running_event_that_nobody_else_works_on_is_looked_for_by_an_index(django_db_blocker):
    with connection.cursor() as cursor:
        cursor.execute("set enable_seqscan = off")
        cursor.execute(f"explain {repairing.REOPEN_STRAYS}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
        cursor.execute("reset enable_seqscan")
    assert "spark_outbox_event_aside" in plan
