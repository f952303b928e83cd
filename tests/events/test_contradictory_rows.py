"""Rows at odds with each other, with the clock, or with a constraint: none is taken up for ever."""

from datetime import timedelta

import pytest
from django.utils import timezone

from spark_outbox import Retry, emit, emit_many, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.events.rows import insert, update
from tests.tools import (
    deliveries,
    eventually,
    make_ready,
    note,
    statuses,
    wait_until_asleep,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def test_an_event_that_is_available_in_infinity_is_put_off_until_somebody_says_otherwise(own_registry):
    own_registry.add_handler(note, group="")
    insert(available_at="infinity")
    with worker_thread():
        wait_until_asleep()
        emit("g", "good")
        eventually(lambda: statuses() == {"bad": "pending", "good": "done"})
        wait_until_asleep()
        update("update spark_outbox_event set available_at = null where key = 'bad'")
        update("notify spark_outbox")
        eventually(lambda: statuses()["bad"] == "done")


def test_a_payload_that_says_when_to_try_again_is_not_believed_everything(own_registry):
    @handler("", name="h")
    def postpone(event):
        raise Retry(after=timedelta(days=event["days"]))

    emit("g", "good", days=1)
    insert(payload='{"days": 999999999}')
    insert(key="worse", payload='{"days": -999999999}')
    insert(key="worst", payload='{"days": 1e300}')
    Worker().handle_batch()
    assert set(statuses().values()) == {"pending"}
    assert OutboxEvent.objects.get(key="bad").available_at.year > 2100


# Deliveries


def insert_delivery(event_id, handler="note", **columns):
    insert("spark_outbox_delivery", event_id=event_id, handler=handler, **columns)


@pytest.mark.parametrize("attempts", [-(2**31), -1, 2**31 - 1])
def test_attempts_without_measure_end_in_an_event_that_is_done_or_failed(own_registry, attempts):
    @handler("", name="note", backoff=0.01, max_attempts=3)
    def fail(event):
        note(event)
        if "raise" in event:
            raise RuntimeError

    emit("g", "good")
    for key, payload in (("fails", '{"raise": 1}'), ("does not", "{}")):
        event_id = insert(key=key, payload=payload, attempts=1 if attempts > 1 else attempts)
        insert_delivery(event_id, attempts=attempts)
    with worker_thread():
        eventually(lambda: statuses() == {"good": "done", "fails": "failed", "does not": "done"})
    assert Handled.objects.filter(key="fails").count() == 0  # its handler was rolled back
    assert Delivery.objects.get(event__key="fails").attempts == max(3, attempts)


@pytest.mark.parametrize("session", [None, 0, -(2**31), 12345])
@pytest.mark.parametrize("status", ["running", "pending"])
def test_what_is_running_in_the_session_of_nobody_is_taken_over(own_registry, status, session):
    own_registry.add_handler(note, group="", name="note")
    event_id = insert(status=status, attempts=-(2**31) if status == "running" else 1)
    insert_delivery(event_id, status="running", session=session)
    insert_delivery(event_id, "nobody", status="running", session=session)
    with worker_thread():
        eventually(lambda: deliveries().get("note", "")[0] == "done")
        wait_until_asleep()
    assert Handled.objects.count() == 1
    assert deliveries()["nobody"][0] == "pending"  # another release may have it
    assert OutboxEvent.objects.get().available_at > timezone.now()


def test_what_is_owed_to_a_handler_that_does_not_exist_does_not_make_an_event_due_all_the_time(
    own_registry,
):
    own_registry.add_handler(note, group="", name="note")
    event_id = insert(attempts=1, available_at="-infinity")
    insert_delivery(event_id, available_at="infinity")
    insert_delivery(event_id, "renamed", available_at="2026-01-01", attempts=-5)
    insert_delivery(event_id, "removed")
    worker = Worker()
    assert [worker.handle_batch(sweep=True) for _ in range(2)] == [1, 0]
    make_ready()
    assert [worker.handle_batch(sweep=True) for _ in range(2)] == [1, 0]
    assert statuses() == {"bad": "done"}


# Refused by the database

REFUSALS = {
    'violates check constraint "no"': (
        "alter table spark_outbox_event add constraint no check (key <> 'bad' or status <> 'done')",
        "alter table spark_outbox_event drop constraint no",
    ),
    "RaiseException: not this one": (
        """
        create function no() returns trigger language plpgsql as $$ begin
            raise exception 'not this one';
        end $$;
        create trigger no before update on spark_outbox_event for each row
        when (new.key = 'bad' and new.status = 'done') execute function no()
        """,
        "drop function no cascade",
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_an_event_that_cannot_be_settled_fails_instead_of_coming_back_for_ever(
    own_registry, caplog, reason
):
    """The last resort: whatever it may be that PostgreSQL does not take."""
    own_registry.add_handler(note, group="")
    emit_many({"group": "g", "key": key} for key in ("1", "bad", "2"))
    refuse, allow = REFUSALS[reason]
    update(refuse)
    try:
        with worker_thread():
            eventually(lambda: statuses() == {"1": "done", "bad": "failed", "2": "done"})
            emit("g", "3")
            eventually(lambda: statuses()["3"] == "done")
    finally:
        update(allow)
    assert reason in OutboxEvent.objects.get(key="bad").last_error
    assert sorted(Handled.objects.values_list("key", flat=True)) == ["1", "2", "3"]
    assert "can't be settled" in caplog.text
