"""A refusal is not an outage: PostgreSQL answers, and says no."""

import asyncio
import contextlib
import threading

import pytest
from django.db import DataError, ProgrammingError, connection

from spark_outbox import emit, emit_many, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.store import claiming
from spark_outbox.store.connection import fetch_value
from spark_outbox.worker import running as detached_calls
from spark_outbox.worker import takeover
from spark_outbox.worker.loop import Worker
from tests.tools import connect, deliveries, eventually, handled, note, status, statuses, worker_thread
from tests.worker.sessions import terminate

pytestmark = pytest.mark.django_db(transaction=True)


@contextlib.contextmanager
def trigger(body, when):
    """Have a trigger of the project's run `body` before a matching event is changed."""
    with connect() as other:
        other.execute(
            f"create function no() returns trigger language plpgsql as $$ begin {body} end $$; "
            f"create trigger no before update on spark_outbox_event for each row when ({when}) "
            "execute function no()"
        )
        try:
            yield
        finally:
            other.execute("drop function no cascade")


def raising(code):
    return f"raise exception 'not this one' using errcode = '{code}';"


BAD_IS_DONE = "new.key = 'bad' and new.status = 'done'"
NOT_APPLIED = "return null;"
REFUSALS = {
    "another state": raising("45000"),
    "read only": raising("25006"),
    "denied": raising("42501"),
    "internal": raising("XX000"),
    "undefined": "perform from nowhere;",
    "not applied": NOT_APPLIED,
}


def ways():
    """Return what handles all events that are ready: a worker, and drain()."""

    def run():
        with worker_thread():
            eventually(lambda: set(statuses().values()) <= {"done", "failed"})

    def drain():
        Worker().drain()

    return [run, drain]


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("reason", REFUSALS)
def test_whatever_postgresql_refuses_to_settle_fails_alone(own_registry, caplog, reason, way):
    own_registry.add_handler(note, group="")
    emit_many({"group": "g", "key": key} for key in ("1", "bad", "2"))
    with trigger(REFUSALS[reason], BAD_IS_DONE):
        way()
    assert statuses() == {"1": "done", "bad": "failed", "2": "done"}
    assert sorted(handled()) == ["1", "2"]
    expected = {"not applied": "did not apply", "undefined": "nowhere"}.get(reason, "not this one")
    assert expected in OutboxEvent.objects.get(key="bad").last_error
    assert "can't be settled" in caplog.text
    assert "Database default failed" not in caplog.text


@pytest.mark.parametrize("code", ["57014", "40P01", "55P03"])
def test_a_refusal_that_may_pass_and_does_not_is_an_attempt(own_registry, code):
    """As if somebody's lock were in the way for long."""
    handler("", name="h", max_attempts=2, backoff=0.01)(lambda event: calls.append(event.attempt))
    calls = []
    emit("g", "bad")
    with trigger(raising(code), BAD_IS_DONE), worker_thread():
        eventually(lambda: statuses() == {"bad": "failed"})
    assert calls == [1] * 4 + [2]  # the first time it was not known to be alone
    assert deliveries() == {"h": ("failed", 2)}
    assert "not this one" in Delivery.objects.get().error


def test_a_refusal_that_passes_is_nobodys_fault(own_registry):
    """As after a deadlock with somebody else's transaction, or a pg_cancel_backend()."""
    calls = []
    own_registry.add_handler(lambda event: calls.append(event.key), group="", name="h")
    emit("g", "bad")
    with connect() as other:
        other.execute("create sequence refusals")
    body = f"if nextval('refusals') < 3 then {raising('40001')} end if; return new;"
    try:
        with trigger(body, BAD_IS_DONE):
            Worker().drain()
    finally:
        with connect() as other:
            other.execute("drop sequence refusals")
    assert calls == ["bad"] * 3
    assert statuses() == {"bad": "done"}


@pytest.mark.parametrize("body", [raising("P0001"), NOT_APPLIED])
@pytest.mark.parametrize("ordering_key", [None, "o"])
def test_an_event_that_nobody_can_change_is_passed_over(own_registry, caplog, body, ordering_key):
    own_registry.add_handler(note, group="")
    emit("g", "bad", ordering_key=ordering_key)
    emit("g", "behind", ordering_key=ordering_key)
    emit("g", "another", ordering_key=ordering_key and "p")
    waits = "pending" if ordering_key else "done"  # for an event of its order that never ends
    with trigger(body, "new.key = 'bad'"), worker_thread():
        eventually(lambda: statuses() == {"bad": "pending", "behind": waits, "another": "done"})
        emit("g", "later")
        eventually(lambda: status("later") == "done")
    assert caplog.text.count("not be marked as failed either") == 1
    with worker_thread():
        eventually(lambda: set(statuses().values()) == {"done"})
    assert sorted(handled()) == ["another", "bad", "behind", "later"]


def test_in_peoples_tests_too(own_registry):
    own_registry.add_handler(note, group="")
    emit_many({"group": "g", "key": key} for key in ("1", "bad", "2"))
    with trigger(NOT_APPLIED, "new.key = 'bad'"):
        Worker().drain()
    assert statuses() == {"1": "done", "bad": "pending", "2": "done"}
    assert handled() == ["1", "2"]


@pytest.mark.parametrize("body", [raising("23514"), raising("25006"), NOT_APPLIED])
@pytest.mark.parametrize("kind", ["detached", "async"])
def test_a_call_outside_the_batch_that_cannot_be_settled_stops_no_worker(own_registry, body, kind):
    release = threading.Event()

    @handler("^detached$", name="detached", atomic=False)
    def run(event):
        pass

    @handler("^async$", name="async")
    async def run_slowly(event):
        while not release.is_set():
            await asyncio.sleep(0.005)

    own_registry.add_handler(note, group="^plain$")
    with trigger(body, BAD_IS_DONE), worker_thread():
        emit(kind, "good")
        emit(kind, "bad")
        emit("plain", "plain")
        eventually(lambda: status("plain") == "done")
        release.set()
        eventually(lambda: statuses() == {"good": "done", "bad": "failed", "plain": "done"})
        emit("plain", "later")
        eventually(lambda: status("later") == "done")
    assert deliveries()[kind][0] != "running"


def test_a_detached_call_that_cannot_be_written_at_all_stops_no_worker(own_registry, caplog):
    own_registry.add_handler(note, group="^plain$")

    @handler("^detached$", name="detached", atomic=False)
    def run(event):
        pass

    with trigger(raising("P0001"), "new.key = 'bad' and old.status = 'running'"):
        with worker_thread():
            emit("detached", "bad")
            eventually(lambda: "It stays running" in caplog.text)
            emit("plain", "later")
            eventually(lambda: status("later") == "done")
        with worker_thread():  # which would take it over
            emit("plain", "last")
            eventually(lambda: status("last") == "done")
        assert status("bad") == "running"
    with worker_thread():
        eventually(lambda: status("bad") == "done")


def test_a_refused_commit_closes_no_connection_and_costs_no_running_call(own_registry, caplog):
    release = threading.Event()
    sessions = set()

    @handler("^async$", name="async")
    async def run(event):
        while not release.is_set():
            await asyncio.sleep(0.005)

    def plain(event):
        sessions.add(connection.connection.info.backend_pid)

    own_registry.add_handler(plain, group="^plain$", name="plain")
    with trigger(raising("P0001"), BAD_IS_DONE), worker_thread():
        emit("async", "slow")
        eventually(lambda: status("slow") == "running")
        emit_many({"group": "plain", "key": key} for key in ("1", "bad", "2"))
        eventually(lambda: (status("bad"), status("2")) == ("failed", "done"))
        release.set()
        eventually(lambda: status("slow") == "done")
    assert len(sessions) == 1
    assert Delivery.objects.get(handler="async").attempts == 1
    assert "failed (" not in caplog.text.replace("failed for good", "")
    assert "Took over" not in caplog.text


def test_a_call_under_way_is_cancelled_and_made_again_if_its_own_batch_is_refused(own_registry):
    release, calls, cancelled = threading.Event(), [], []

    @handler("^async$", name="async")
    async def run(event):
        calls.append(event.attempt)
        try:
            while not release.is_set():
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            cancelled.append(event.key)
            raise

    own_registry.add_handler(note, group="^plain$")
    emit_many([{"group": "async", "key": "slow"}, {"group": "plain", "key": "bad"}])
    with trigger(raising("P0001"), BAD_IS_DONE), worker_thread():
        eventually(lambda: statuses() == {"slow": "running", "bad": "failed"})
        release.set()
        eventually(lambda: status("slow") == "done")
    assert (calls, cancelled) == ([1, 1], ["slow"])
    assert deliveries()["async"] == ("done", 1)


def test_a_table_that_is_not_there_for_a_moment_is_no_events_fault(own_registry, caplog):
    """As while the outbox is migrated, or restored."""

    def retry(event):
        if event.attempt == 1:
            if not caplog.text:
                with connect() as other:
                    other.execute("alter table spark_outbox_delivery rename to away")
            raise OSError

    handler("", name="h", backoff=0.01)(retry)
    with worker_thread():
        emit("g", "key")
        eventually(lambda: "Database default failed" in caplog.text)
        with connect() as other:
            other.execute("alter table away rename to spark_outbox_delivery")
        eventually(lambda: status("key") == "done")
    assert deliveries() == {"h": ("done", 2)}


@pytest.mark.parametrize("how", ["drain", "once"])
@pytest.mark.parametrize("table", ["spark_outbox_delivery", None])
def test_what_postgresql_refuses_to_a_worker_that_is_to_end_ends_it(
    own_registry, monkeypatch, how, table
):
    """It was refused again and again: a deployment waited for ever."""
    own_registry.add_handler(note, group="")
    emit("g", "key")
    sessions = []

    def claim(*arguments, using, **options):
        return fetch_value("select 1 / 0", using=using)

    def ready(_):
        sessions.append(connection.connection)
        assert len(sessions) == 1
        if table is None:
            monkeypatch.setattr(claiming, "begin_with_ready", claim)
        else:
            other.execute(f"alter table {table} rename to away")

    with connect() as other:
        try:
            with pytest.raises(DataError if table is None else ProgrammingError):
                Worker(on_ready=ready).run(**{how: True})
        finally:
            if table is not None:
                other.execute(f"alter table away rename to {table}")


# One row that nobody can change, in whatever state it is met


ALWAYS = "new.key = 'bad'"


@pytest.mark.parametrize("state", ["unhandled", "running"])
@pytest.mark.parametrize("body", [raising("P0001"), NOT_APPLIED])
def test_a_row_that_is_to_be_put_back_and_cannot_be_stops_no_worker(own_registry, state, body):
    own_registry.add_handler(note, group="")
    emit("g", "bad")
    OutboxEvent.objects.update(status=state)
    with trigger(body, ALWAYS), worker_thread(batch_size=1):
        emit_many({"group": "g", "key": f"{n}"} for n in range(5))
        eventually(lambda: OutboxEvent.objects.filter(status="done").count() == 5)
    assert status("bad") == state


@pytest.mark.parametrize("state", ["stray", "left by a worker"])
def test_what_cannot_be_put_back_keeps_no_others_and_is_logged_once(own_registry, caplog, state):
    detached = own_registry.add_handler(note, group="^detached$", name="h", atomic=False)
    own_registry.add_handler(note, group="^g$")
    for key in ("1", "bad", "2"):
        emit("detached", key)
    OutboxEvent.objects.update(status="running")
    if state != "stray":
        for event in OutboxEvent.objects.all():
            Delivery.objects.create(event=event, handler=detached.name, status="running", session=1)
    looks, take_over = [], takeover.take_over

    def look(**options):
        looks.append(options)
        return take_over(**options)

    with pytest.MonkeyPatch.context() as patch, trigger(raising("P0001"), ALWAYS):
        patch.setattr(detached_calls, "TAKE_OVER_INTERVAL", 0.0)
        patch.setattr(takeover, "take_over", look)
        with worker_thread(poll_interval=0.01):
            eventually(lambda: [status("1"), status("2")] == ["done", "done"])
            seen = len(looks)
            for number in range(3):
                emit("g", f"after {number}")
                eventually(lambda number=number: status(f"after {number}") == "done")
            eventually(lambda: len(looks) > seen + 2)
    assert status("bad") == "running"
    assert caplog.text.count("can't be put back") == 1


@pytest.mark.parametrize("code", ["57014", "40001", "55P03"])
def test_a_refusal_that_may_pass_and_never_does_stops_no_worker(own_registry, code):
    own_registry.add_handler(note, group="")
    emit("g", "bad")
    emit("g", "good")
    with trigger(raising(code), ALWAYS), worker_thread():
        eventually(lambda: status("good") == "done")


@pytest.mark.parametrize("body", [raising("P0001"), NOT_APPLIED])
def test_an_attempt_that_cannot_be_counted_stops_no_worker(own_registry, body):
    own_registry.add_handler(terminate, group="^t$", name="t")
    own_registry.add_handler(note, group="^g$", name="g")
    emit("t", "bad")
    emit("g", "good")
    with trigger(body, ALWAYS), worker_thread():
        eventually(lambda: status("good") == "done")


def test_due_events_do_not_wait_for_one_that_is_passed_over(own_registry):
    own_registry.add_handler(note, group="")
    for key in ("bad", "good"):
        emit("g", key, delay=-1)
    with trigger(raising("P0001"), ALWAYS), worker_thread():
        eventually(lambda: status("good") == "done")


@pytest.mark.parametrize(("ordering_key", "groups"), [("o", None), (None, "^g$")])
def test_a_look_at_what_is_passed_over_comes_to_an_end(own_registry, ordering_key, groups):
    own_registry.add_handler(note, group="")
    emit("g", "bad", ordering_key=ordering_key)
    with trigger(raising("P0001"), ALWAYS):
        Worker(groups=groups).drain()
    assert status("bad") == "pending"


@pytest.mark.parametrize("body", [raising("P0001"), NOT_APPLIED])
def test_in_process_what_is_passed_over_is_not_called_again_at_each_commit(settings, own_registry, body):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    own_registry.add_handler(note, group="")
    called = []
    own_registry.add_handler(lambda event: called.append(event.key), group="", name="called")
    with trigger(body, ALWAYS):
        emit("g", "bad")
        attempts = called.count("bad")
        for n in range(3):
            emit("g", f"{n}")
        assert called.count("bad") == attempts
    assert handled() == ["0", "1", "2"]
