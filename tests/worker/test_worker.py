"""The worker in this process: whom it calls for which event, what it commits, and on which database."""

import threading

import pytest

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.store import checking
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.statements import Statements
from tests.tools import (
    connect,
    eventually,
    note,
    statuses,
    wait_until_asleep,
    wait_until_done,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


# The happy path


def test_events_are_handled_in_order_and_marked_done(own_registry):
    own_registry.add_handler(note, group="^g")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(100))
    assert Worker().drain() == 100
    assert list(Handled.objects.order_by("id").values_list("key", flat=True)) == [
        f"{n:03}" for n in range(100)
    ]
    event = OutboxEvent.objects.first()
    assert (event.status, event.attempts, event.last_error) == ("done", 1, "")
    assert event.finished_at >= event.created_at


def test_handlers_are_called_in_registration_order_if_their_regex_is_found_in_the_group(own_registry):
    calls = []
    for name, pattern in [("z", "paid"), ("a", "^order"), ("m", "^paid"), ("b", "order_(paid|sent)$")]:
        own_registry.add_handler(
            lambda event, name=name: calls.append((event.group, name)), group=pattern, name=name
        )
    emit("order_paid")
    emit("prepaid_order")
    Worker().drain()
    assert calls == [
        ("order_paid", "z"),
        ("order_paid", "a"),
        ("order_paid", "b"),
        ("prepaid_order", "z"),
    ]


def test_an_event_that_nobody_handles_is_unhandled_and_not_done(own_registry, caplog):
    emit("g", "key")
    assert Worker().drain() == 1
    assert statuses() == {"key": "unhandled"}
    assert "No handler matched 1 events" in caplog.text


def test_the_happy_path_is_one_insert_one_update_and_no_savepoint(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="nothing")
    worker = Worker()
    worker.handle_batch()  # it looks what is paused, and what waits for a pause that has ended
    with Statements() as statements:
        emit_many({"group": "g", "key": f"{n}"} for n in range(10))
        worker.handle_batch()
    assert statements.count("insert|spark_outbox_emit_many") == 1
    assert statements.count("update spark") == 1
    assert statements.count("savepoint|delivery") == 0
    assert not Delivery.objects.exists()


def test_a_handlers_writes_and_its_done_mark_are_committed_together(own_registry):
    seen = []

    def handle(event):
        note(event)
        with connect() as other:
            seen.append(other.execute("select count(*) from challenges_handled").fetchone())

    own_registry.add_handler(handle, group="")
    emit("g", "key")
    Worker().drain()
    assert seen == [(0,)]
    assert Handled.objects.count() == 1


def test_two_workers_handle_each_of_2000_events_once(own_registry):
    handled = []
    own_registry.add_handler(
        lambda event: (note(event), handled.append(threading.current_thread())), group="", name="h"
    )
    with worker_thread(batch_size=20), worker_thread(batch_size=20):
        wait_until_asleep(2)
        emit_many(({"group": "g", "key": f"{n}"} for n in range(2000)), chunk_size=100)
        wait_until_done(2000)
    keys = list(Handled.objects.values_list("key", flat=True))
    assert sorted(keys, key=int) == [f"{n}" for n in range(2000)]
    assert len(handled) == 2000
    assert len(set(handled)) == 2  # both took part


# The database


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_worker_can_listen_on_another_connection_than_it_works_on(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}
    own_registry.add_handler(note, group="")
    with worker_thread():
        for number in range(3):
            wait_until_asleep()
            emit("g", f"{number}")
            eventually(lambda number=number: Handled.objects.count() == number + 1)
    assert set(statuses().values()) == {"done"}


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_worker_works_on_the_database_it_is_told(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread(using="other"):
        wait_until_asleep()
        emit("g", "key", using="other", delay=0.01, headers={"a": 1}, x=[1])
        emit_many([{"group": "g", "key": "key 2"}, {"group": "g", "x": "y"}], using="other")
        eventually(lambda: Handled.objects.count() == 3)
        wait_until_asleep()
    own_registry.add_handler(lambda event: 1 / 0, group="", name="fail")
    emit("g", "fails", using="other")
    assert Worker(using="other", groups="^g").drain() == 1
    assert statuses()["fails"] == "pending"


def test_a_worker_without_an_outbox_says_how_to_get_one(own_registry, monkeypatch):
    from spark_outbox.errors import NotMigrated

    monkeypatch.setattr(checking, "HAS_OUTBOX", "select false")
    with pytest.raises(NotMigrated, match=r"manage\.py migrate spark_outbox"):
        Worker().run(drain=True)
