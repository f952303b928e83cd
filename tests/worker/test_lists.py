"""Batch handlers: they get lists of events, and one bad event takes no others with it."""

import pytest
from django.db import connection, transaction

from spark_outbox import BatchFailed, Discard, emit, emit_many, handler
from spark_outbox.errors import InstanceGone, RegistrationError
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Challenge, Handled
from tests.tools import deliveries, handled, make_challenge, make_ready, note, statuses

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_batch_handler_gets_lists(own_registry):
    lists = []

    @handler("", name="h", batch=100)
    def take(events):
        lists.append([event.key for event in events])
        for event in events:
            note(event)

    keys = [f"{n:03}" for n in range(250)]
    emit_many({"group": "g", "key": key} for key in keys)
    assert Worker().drain() == 250
    assert sorted(handled()) == keys
    assert [key for each in lists for key in each] == keys
    assert max(map(len, lists)) == 100
    assert len(lists) < 10
    assert not Delivery.objects.exists()


def test_events_of_a_list_that_failed_are_tried_again_alone_so_that_one_takes_no_others_with_it(
    own_registry,
):
    lists = []

    @handler("", name="h", batch=10, max_attempts=2)
    def take(events):
        lists.append(len(events))
        for event in events:
            note(event)
            if event.key == "3":
                raise ValueError(event.key)

    emit_many({"group": "g", "key": f"{n}"} for n in range(10))
    Worker().drain()
    assert handled() == []
    assert {(d.status, d.attempts) for d in Delivery.objects.all()} == {("pending", 1)}
    make_ready()
    Worker().drain()
    assert lists == [10] + 10 * [1]
    assert statuses() == {f"{n}": "failed" if n == 3 else "done" for n in range(10)}
    assert len(handled()) == 9


def test_batch_failed_fails_some(own_registry):
    own_registry.add_handler(note, group="", name="plain")

    @handler("", name="h", batch=10, backoff=3600)
    def take(events):
        errors = {}
        for event in events:
            try:
                with transaction.atomic():
                    Handled.objects.create(key=event.key, handler="h")
                    if event["n"] == 1:
                        raise ValueError(event.key)
                    if event["n"] == 2:
                        raise Discard("enough")
            except (ValueError, Discard) as error:
                errors[event] = error
        if errors:
            raise BatchFailed(errors)

    emit_many({"group": "g", "key": f"{n}", "n": n} for n in range(4))
    Worker().drain()
    assert statuses() == {"0": "done", "1": "pending", "2": "done", "3": "done"}
    assert sorted(Handled.objects.filter(handler="h").values_list("key", flat=True)) == ["0", "3"]
    of = {(d.event.key, d.handler): (d.status, d.attempts) for d in Delivery.objects.all()}
    assert of == {
        ("1", "plain"): ("done", 1),
        ("1", "h"): ("pending", 1),
        ("2", "plain"): ("done", 1),
        ("2", "h"): ("discarded", 1),
    }
    assert "ValueError: 1" in OutboxEvent.objects.get(key="1").last_error
    make_ready()
    Worker().drain()  # alone, and the plain one is not called again
    assert Delivery.objects.get(event__key="1", handler="h").attempts == 2
    assert Handled.objects.filter(handler="note").count() == 4


@pytest.mark.parametrize(
    "options", [{}, {"retry_for": (OSError,)}, {"discard_for": (InstanceGone, ValueError)}]
)
@pytest.mark.parametrize("bad", ["gone", "ValueError"])
def test_what_is_final_for_one_event_of_a_list_is_not_for_the_others(own_registry, options, bad):
    """Nobody knows whose it was: so each is tried again alone, and then it is known."""
    calls = []

    @handler("", name="h", batch=10, backoff=0.01, max_attempts=2, **options)
    def take(events):
        calls.append([event.key for event in events])
        for event in events:
            if event.key == "bad" and bad == "ValueError":
                raise ValueError
            event.get("challenge")

    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    for key in ("1", "bad", "2"):
        emit("g", key, **({"challenge": challenge} if key == "bad" else {}))
    Challenge.objects.all().delete()
    Worker().handle_batch()
    assert calls == [["1", "bad", "2"]]
    assert set(statuses().values()) == {"pending"}
    if options or bad == "gone":
        assert "each is tried again by itself" in OutboxEvent.objects.get(key="1").last_error
    make_ready()
    Worker().drain()
    assert calls[1:] == [["1"], ["bad"], ["2"]]
    ended = "discarded" if "discard_for" in options else "failed"
    assert statuses() == {"1": "done", "bad": ended, "2": "done"}


def test_a_list_that_fails_is_one_failure_to_its_circuit(own_registry):
    """Else one bad event in a list of ten or more would keep all the others waiting."""
    calls = []

    @handler("", name="h", batch=50)
    def take(events):
        calls.append(len(events))
        if any(event.key == "bad" for event in events):
            raise ValueError

    emit_many({"group": "g", "key": key} for key in ["bad", *map(str, range(59))])
    worker = Worker()
    worker.drain()
    assert sum(calls) == 60
    assert sorted(set(statuses().values())) == ["done", "pending"]
    make_ready()
    worker.drain()
    assert {key for key, status in statuses().items() if status == "pending"} == {"bad"}


def test_batch_failed_must_name_events_of_its_list(own_registry):
    @handler("^list", name="list", batch=10, backoff=3600)
    def take(events):
        note(events[0])
        raise BatchFailed({"nothing": ValueError()})

    @handler("^plain", name="plain", backoff=3600)
    def plain(event):
        note(event)
        raise BatchFailed({event: ValueError()})

    emit("list", "1")
    emit("plain", "2")
    Worker().drain()
    assert handled() == []
    assert deliveries() == {"list": ("pending", 1), "plain": ("pending", 1)}
    assert all(
        "BatchFailed is for" in error for error in Delivery.objects.values_list("error", flat=True)
    )
    with pytest.raises(TypeError):
        BatchFailed({})


def test_a_list_holds_one_event_of_an_ordering_key(own_registry):
    lists = []

    @handler("", name="h", batch=10)
    def take(events):
        lists.append([event.key for event in events])

    for n in range(3):
        for key in "ab":
            emit("g", f"{key}{n}", ordering_key=key)
    Worker().drain()
    assert lists == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]


def test_a_list_that_ends_the_transaction_fails_alone(own_registry):
    own_registry.add_handler(note, group="", name="plain")

    @handler("^bad", name="h", batch=2, backoff=3600)
    def take(events):
        connection.cursor().execute("rollback")

    emit_many({"group": group, "key": group} for group in ("bad 1", "bad 2", "good"))
    Worker().drain()
    assert statuses() == {"bad 1": "pending", "bad 2": "pending", "good": "done"}
    assert Delivery.objects.filter(handler="h", status="pending", attempts=1).count() == 2
    assert sorted(handled()) == ["bad 1", "bad 2", "good"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is the most events"),
        ({"batch": "many"}, "batch is the most events"),
        ({"batch": 10, "atomic": False}, "shares the worker's transaction"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(own_registry, options, message):
    with pytest.raises(RegistrationError, match=message):
        handler("", **options)(note)


def test_a_batch_handler_is_not_async(own_registry):
    async def take(events): ...

    with pytest.raises(RegistrationError, match="shares the worker's transaction"):
        handler("", batch=10)(take)
