"""What a handler did goes when it fails: its rows, its callbacks, and nothing that others did."""

import pytest
from django.db import connection, transaction

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Donation, Handled
from tests.tools import eventually, make_challenge, note, statuses, worker_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.mark.usefixtures("unhurried")
def test_on_commit_callbacks_of_a_failing_handler_are_dropped_and_others_run_once(own_registry):
    ran = []

    def handle(event):
        transaction.on_commit(lambda: ran.append(event.key))
        with transaction.atomic():
            transaction.on_commit(lambda: ran.append(event.key + " nested"))
        assert not ran
        if event.key == "bad":
            raise RuntimeError

    own_registry.add_handler(handle, group="")
    for key in ("good", "bad", "fine"):
        emit("g", key)
    Worker().drain()
    assert ran == ["good", "good nested", "fine", "fine nested"]


def test_an_on_commit_callback_that_raises_costs_the_others_nothing(own_registry, caplog):
    ran = []

    def handle(event):
        transaction.on_commit(lambda: ran.append(event.key) or 1 / (event.key != "bad"))

    own_registry.add_handler(handle, group="")
    for key in ("bad", "good"):
        emit("g", key)
    assert Worker().drain() == 2
    assert ran == ["bad", "good"]
    assert set(statuses().values()) == {"done"}


@pytest.mark.parametrize("touch_first", [True, False])
def test_a_database_error_is_rolled_back_with_what_else_the_handler_did(own_registry, touch_first):
    def handle(event):
        if touch_first:
            note(event)
        if event.key == "bad":
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        note(event)

    own_registry.add_handler(handle, group="")
    for key in ("one", "bad", "two"):
        emit("g", key)
    Worker().drain()
    assert statuses() == {"one": "done", "bad": "pending", "two": "done"}
    assert not Handled.objects.filter(key="bad").exists()


@pytest.mark.parametrize("around", ["copy", "callproc", "stream", "raw"])
def test_what_goes_around_djangos_wrappers_is_rolled_back_too(own_registry, around):
    insert = "insert into challenges_handled (key, handler, note) values ('x', 'x', '') returning id"

    def handle(event):
        with connection.cursor() as cursor:
            if around == "copy":
                with cursor.copy("copy challenges_handled (key, handler, note) from stdin") as copy:
                    copy.write_row(("x", "x", ""))
            elif around == "callproc":
                cursor.callproc("spark_emit", ["g2", "x", "{}"])
            elif around == "stream":
                list(cursor.stream(insert))
            else:
                connection.connection.execute(insert)
        raise RuntimeError

    own_registry.add_handler(handle, group="^g$")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "pending"}
    assert not Handled.objects.exists()


def test_a_handler_that_swallows_a_database_error_fails_with_a_hint(own_registry):
    def handle(event):
        note(event)
        try:
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        except Exception:  # what the hint is about
            pass

    own_registry.add_handler(handle, group="")
    emit("g", "bad")
    emit("g", "fine", delay=-1)
    Worker().drain()
    assert "BrokenTransaction" in OutboxEvent.objects.get(key="bad").last_error
    assert "transaction.atomic()" in OutboxEvent.objects.get(key="bad").last_error
    assert not Handled.objects.exists()


def test_an_error_caught_outside_atomic_is_none(own_registry):
    def handle(event):
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        except Exception:
            note(event)

    own_registry.add_handler(handle, group="")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}
    assert Handled.objects.count() == 1


@pytest.mark.usefixtures("unhurried")
def test_a_constraint_that_fails_at_the_commit_fails_the_event_that_broke_it_alone(own_registry):
    """Django's foreign keys are deferred: at the commit, nobody can tell whose row it was."""
    challenge = make_challenge()
    runs = []

    def donate(event):
        runs.append(event.key)
        Donation.objects.create(challenge_id=challenge.pk if event.key != "5" else -1, amount=1)

    own_registry.add_handler(donate, group="")
    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    Worker().drain()
    assert {key for key, status in statuses().items() if status == "pending"} == {"5"}
    assert Donation.objects.count() == 9
    assert "IntegrityError" in OutboxEvent.objects.get(key="5").last_error
    # The batch that could not be committed was handled again, once.
    assert len(runs) == 20


def test_the_running_worker_gets_over_it_too(own_registry):
    def donate(event):
        if event.key == "bad":
            Donation.objects.create(challenge_id=-1, amount=1)
        note(event)

    own_registry.add_handler(donate, group="")
    emit_many({"group": "g", "key": key} for key in ("1", "bad", "2"))
    with worker_thread():
        eventually(lambda: sorted(statuses().values()) == ["done", "done", "pending"])
        emit("g", "3")
        eventually(lambda: statuses()["3"] == "done")
    assert sorted(Handled.objects.values_list("key", flat=True)) == ["1", "2", "3"]


def test_a_handler_may_write_rows_that_refer_to_its_event(own_registry):
    own_registry.add_handler(
        lambda event: Delivery.objects.create(event_id=event.id, handler="mine", status="done"),
        group="",
        name="h",
    )
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}
