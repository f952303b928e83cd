"""Handlers that come and go with releases: who calls them, and what becomes of what is owed to them."""

import time
from datetime import timedelta

import pytest
from django.utils import timezone

from spark_outbox import Retry, emit
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.handlers import Registry
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.unhandled import PUT_BACK_INTERVAL
from tests.challenges.models import Handled
from tests.tools import (
    HOUR,
    Clock,
    deliveries,
    eventually,
    make_ready,
    note,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)
from tests.worker.failing import raising

pytestmark = pytest.mark.django_db(transaction=True)

MINUTE = timedelta(minutes=1)


def test_what_an_event_owes_to_a_handler_that_is_gone_is_discarded_after_an_hour(own_registry, caplog):
    def fail(event):
        raise RuntimeError

    own_registry.add_handler(fail, group="", name="old")
    emit("g", "key")
    Worker().drain()
    own_registry.clear()
    own_registry.add_handler(lambda event: None, group="", name="new")
    for minutes, of_event, old in ((-1, "pending", "pending"), (59, "pending", "pending")):
        Delivery.objects.filter(handler="old").update(available_at=timezone.now() - minutes * MINUTE)
        make_ready()
        assert Worker().drain() == 1  # and it is not due again at once
        assert statuses() == {"key": of_event}
        assert dict(Delivery.objects.values_list("handler", "status")) == {"old": old, "new": "done"}
        due_in = OutboxEvent.objects.get().available_at - timezone.now()
        assert timedelta(0) < due_in < 6 * MINUTE
    Delivery.objects.filter(handler="old").update(available_at=timezone.now() - 61 * MINUTE)
    make_ready()
    assert Worker().drain() == 1
    assert statuses() == {"key": "done"}
    assert dict(Delivery.objects.values_list("handler", "status")) == {"old": "discarded", "new": "done"}
    assert "No worker has handler old" in caplog.text


def test_in_a_rolling_deployment_an_old_worker_leaves_to_new_ones_what_only_they_can_do(own_registry):
    calls = []

    def new_in_this_release(event):
        calls.append(event.attempt)
        if event.attempt < 3:
            raise Retry(after=0.01)

    releases = {"old": Registry(), "new": Registry()}
    for registry in releases.values():
        registry.add_handler(note, group="", name="both have it")
    releases["new"].add_handler(new_in_this_release, group="", name="new")
    emit("g", "key")
    Worker(registry=releases["new"]).drain()
    for release in ("old", "new", "old", "old", "new", "old"):
        time.sleep(0.02)
        make_ready()
        Worker(registry=releases[release]).drain()
    assert calls == [1, 2, 3]
    assert statuses() == {"key": "done"}
    assert dict(Delivery.objects.values_list("handler", "status")) == {
        "both have it": "done",
        "new": "done",
    }
    assert Handled.objects.count() == 1


def test_a_worker_that_has_left_something_to_others_lets_them_look_first(own_registry, monkeypatch):
    monkeypatch.setattr("spark_outbox.worker.rest.DEFERENCE", HOUR)
    new = Registry()
    for registry in (own_registry, new):
        registry.add_handler(lambda _: None, group="", name="old")
    new.add_handler(note, group="", name="new")
    emit("g", "key")
    event = OutboxEvent.objects.get()
    Delivery.objects.create(event=event, handler="new", attempts=1, available_at=timezone.now())
    OutboxEvent.objects.update(attempts=1, available_at=timezone.now())

    def looks():
        event.refresh_from_db()
        return event.attempts - 1

    with worker_thread(registry=own_registry):
        eventually(lambda: looks() == 1 and event.available_at < timezone.now())
        with worker_thread(registry=new):
            wait_until_done(1)
        assert looks() == 2


def test_a_handler_registered_later_is_owed_by_an_event_that_waits(own_registry):
    own_registry.add_handler(raising(RuntimeError()), group="", name="fails")
    emit("g", "key")
    Worker().drain()
    own_registry.add_handler(note, group="", name="new")
    make_ready()
    Worker().drain()
    assert deliveries() == {"fails": ("pending", 2), "new": ("done", 1)}


# Unhandled


def test_a_worker_that_starts_puts_back_the_unhandled_events_that_it_can_handle(own_registry):
    for group in ("new", "newer", "unknown"):
        emit(group, group)
    Worker().drain()
    assert set(statuses().values()) == {"unhandled"}
    own_registry.add_handler(note, group="^new", name="h")
    with worker_thread(groups="^newe?r?$"):
        eventually(lambda: Handled.objects.count() == 2)
    assert statuses() == {"new": "done", "newer": "done", "unknown": "unhandled"}


def test_a_worker_at_rest_puts_back_what_another_has_just_had_no_handler_for(own_registry):
    """In a rolling deployment the new release may start before the old one ends."""
    clock, tomorrow = Clock(), timezone.now() + timedelta(days=1)
    own_registry.add_handler(note, group="^key$|^later$", name="h")
    with worker_thread(poll_interval=0.05, clock=clock):
        wait_until_asleep()
        for key in ("key", "later", "other"):
            OutboxEvent.objects.create(group=key, key=key, status="unhandled", attempts=1)
        Delivery.objects.create(
            event=OutboxEvent.objects.get(key="later"), handler="h", attempts=1, available_at=tomorrow
        )
        clock.now = PUT_BACK_INTERVAL
        eventually(lambda: status("key") == "done")
    assert statuses() == {"key": "done", "later": "pending", "other": "unhandled"}
    assert OutboxEvent.objects.get(key="later").available_at == tomorrow
