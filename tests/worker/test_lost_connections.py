"""Outages, and events that bring one about each time: who is charged for it, and who is not."""

import contextlib
import threading

import pytest
from django.db import connection

from spark_outbox import emit, emit_many, handler
from spark_outbox.models import Delivery
from spark_outbox.store import claiming
from spark_outbox.worker.isolation import Isolation
from spark_outbox.worker.loop import Worker
from tests.tools import (
    PATIENCE,
    connect,
    deliveries,
    eventually,
    handled,
    note,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)
from tests.worker.sessions import terminate, terminate_from_outside

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.parametrize("how", ["drain", "once"])
def test_an_outage_does_not_end_a_worker_that_is_to_end_later(own_registry, how):
    own_registry.add_handler(note, group="")
    emit("g", "key")
    sessions = []

    def ready(_):
        sessions.append(connection.connection.info.backend_pid)
        if len(sessions) == 1:
            terminate_from_outside(None)

    Worker(on_ready=ready).run(**{how: True})
    assert (status(), len(sessions)) == ("done", 2)


def test_a_server_that_goes_away_again_and_again_charges_no_event_that_was_not_there(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread():
        for number in range(4):
            emit("g", f"{number}")
            eventually(lambda number=number: status(f"{number}") == "done")
            wait_until_asleep()
            with connect() as other:
                other.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where starts_with(application_name, 'spark_worker ')"
                )
    assert not Delivery.objects.exists()


# An outage that one event brings about


@pytest.mark.parametrize(("lose", "times"), [(terminate, 3), (terminate_from_outside, 4)])
def test_an_event_that_costs_the_connection_each_time_is_charged_for_it(own_registry, lose, times):
    calls = []

    def handle(event):
        calls.append((event.key, event.attempt))
        if event.key == "bad":
            lose(event)

    handler("", name="h", max_attempts=2, backoff=0.01)(handle)
    emit_many({"group": "g", "key": key} for key in ("a", "bad", "c"))
    with worker_thread():
        eventually(lambda: statuses() == {"a": "done", "bad": "failed", "c": "done"})
        emit("g", "later")
        eventually(lambda: status("later") == "done")
    # Three times to be sure, and then at once. The first time it was in a batch with others, and if it
    # noticed nothing, another was suspected.
    assert [call for call in calls if call[0] == "bad"] == [("bad", 1)] * times + [("bad", 2)]
    assert [call[0] for call in calls].count("a") <= 2
    assert [call[0] for call in calls].count("c") <= times - 2
    assert deliveries()["h"] == ("failed", 2)
    assert "ConnectionLost" in Delivery.objects.get().error


def test_only_the_handler_that_was_running_is_charged(own_registry):
    handler("", name="first", max_attempts=1)(note)
    handler("", name="second", max_attempts=1)(terminate)
    handler("", name="third", max_attempts=1)(note)
    emit("g", "bad")
    with worker_thread():
        eventually(lambda: deliveries().get("second") == ("failed", 1))
        eventually(lambda: status("bad") == "failed")
    assert len(handled()) == 2  # the first's and the third's, once each


@contextlib.contextmanager
def lost_in_commit():
    """Have a deferred trigger end the session that commits the settling of an event."""
    with connect() as other:
        other.execute(
            "create function no() returns trigger language plpgsql as "
            "$$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$; "
            "create constraint trigger no after update on spark_outbox_event "
            "deferrable initially deferred for each row when "
            "(old.attempts = 0 and new.status in ('done', 'running') and new.key = 'bad') "
            "execute function no()"
        )
        try:
            yield
        finally:
            other.execute("drop function no cascade")


def test_a_connection_that_is_lost_in_commit_is_charged_to_the_handlers_that_were_called(own_registry):
    """Nobody knows which of them it was; but those that were not called it was not."""
    called = []
    handler("", name="first", max_attempts=1)(lambda event: called.append("first"))
    handler("", name="second", max_attempts=1)(lambda event: called.append("second"))
    handler("", name="detached", max_attempts=1, atomic=False)(lambda event: called.append("detached"))
    emit("g", "bad")
    with lost_in_commit(), worker_thread():
        eventually(lambda: status("bad") == "failed")
    assert deliveries() == {"first": ("failed", 1), "second": ("failed", 1), "detached": ("done", 1)}
    assert called == ["first", "second"] * 3 + ["detached"]


def test_an_event_that_loses_the_connection_in_commit_before_any_call_stops_no_worker(own_registry):
    handler("", name="detached", max_attempts=1, atomic=False)(note)
    emit("g", "bad")
    emit("g", "good")
    with lost_in_commit(), worker_thread():
        eventually(lambda: statuses() == {"bad": "failed", "good": "done"})
    assert "ConnectionLost" in Delivery.objects.get(event__key="bad").error


def test_a_connection_that_is_lost_before_any_call_is_charged_to_nobody(own_registry, monkeypatch):
    begin, lost = Isolation.__enter__, []

    def lose(isolation, *arguments, **options):
        if len(lost) < 4:
            lost.append(connection.connection.info.backend_pid)
            terminate(None)
        return begin(isolation, *arguments, **options)

    monkeypatch.setattr(Isolation, "__enter__", lose)
    handler("", name="h", max_attempts=1)(note)
    emit("g", "key")
    with worker_thread():
        eventually(lambda: status() == "done")
    assert len(lost) == 4
    assert not Delivery.objects.exists()


def test_an_attempt_is_counted_also_if_the_closed_connection_lingers(own_registry, monkeypatch):
    """The server may take a moment to see that it is gone, and the event's row is locked until then."""
    seen, claim_one = threading.Event(), claiming.claim_one

    def claim(*arguments, **options):
        claimed = claim_one(*arguments, **options)
        seen.set()
        return claimed

    def fail(event):
        connection.close()
        lingering.execute("select from spark_outbox_event for update")
        raise OSError

    monkeypatch.setattr(claiming, "claim_one", claim)
    handler("", name="h", max_attempts=1)(fail)
    with connect(autocommit=False) as lingering, worker_thread():
        emit("g", "key")
        assert seen.wait(PATIENCE)
        assert status() == "pending"
        lingering.rollback()
        eventually(lambda: status() == "failed")
    assert deliveries() == {"h": ("failed", 1)}
