"""When a handler that failed is called again, and when no more: policies, Retry and Discard."""

import time
from datetime import timedelta

import pytest
from django.utils import timezone

from spark_outbox import Discard, Retry, emit, handler
from spark_outbox.errors import RegistrationError
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.backoff import delay
from spark_outbox.registry.policy import Policy
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import deliveries, eventually, make_ready, note, status, statuses, worker_thread
from tests.worker.failing import raising

pytestmark = pytest.mark.django_db(transaction=True)


# Attempts


def test_a_retry_runs_only_the_handlers_that_still_owe(own_registry):
    calls, attempts = [], []
    own_registry.add_handler(lambda event: calls.append("fine"), group="", name="fine")

    def flaky(event):
        calls.append("flaky")
        attempts.append(event.attempt)
        if event.attempt < 3:
            raise RuntimeError("not yet")

    own_registry.add_handler(flaky, group="", name="flaky")
    emit("g", "key")
    Worker().drain()
    assert {d.handler: (d.status, d.attempts) for d in Delivery.objects.all()} == {
        "fine": ("done", 1),
        "flaky": ("pending", 1),
    }
    for _ in range(2):
        assert statuses() == {"key": "pending"}
        make_ready()
        Worker().drain()
    assert calls == ["fine", "flaky", "flaky", "flaky"]
    assert attempts == [1, 2, 3]
    assert statuses() == {"key": "done"}
    assert {d.handler: (d.status, d.attempts) for d in Delivery.objects.all()} == {
        "fine": ("done", 1),
        "flaky": ("done", 3),
    }


def test_out_of_attempts_the_delivery_and_its_event_have_failed(own_registry, caplog):
    @handler("", name="h", max_attempts=3)
    def h(event):
        raise RuntimeError(f"attempt {event.attempt}")

    emit("g", "key")
    for attempt in (1, 2, 3):
        assert statuses() == {"key": "pending"}
        make_ready()
        Worker().drain()
        assert deliveries()["h"][1] == attempt
    assert statuses() == {"key": "failed"}
    assert deliveries() == {"h": ("failed", 3)}
    event = OutboxEvent.objects.get()
    assert "attempt 3" in event.last_error
    assert event.finished_at
    assert "Handler h on event" in caplog.text
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING", "ERROR"]


def test_each_handler_has_its_own_policy_and_the_event_waits_for_all(own_registry):
    @handler("", name="gives up", max_attempts=1)
    def gives_up(event):
        raise RuntimeError

    @handler("", name="recovers", backoff=[5, 60])
    def recovers(event):
        if event.attempt < 3:
            raise RuntimeError

    emit("g", "key")
    Worker().drain()
    assert deliveries() == {"gives up": ("failed", 1), "recovers": ("pending", 1)}
    event, delivery = OutboxEvent.objects.get(), Delivery.objects.get(handler="recovers")
    assert event.available_at == delivery.available_at
    assert abs(delivery.available_at - delivery.attempted_at - timedelta(seconds=5)) < timedelta(
        seconds=1
    )
    make_ready()
    Worker().drain()
    delivery.refresh_from_db()
    assert abs(delivery.available_at - delivery.attempted_at - timedelta(minutes=1)) < timedelta(
        seconds=1
    )
    make_ready()
    Worker().drain()
    assert deliveries() == {"gives up": ("failed", 1), "recovers": ("done", 3)}
    assert statuses() == {"key": "failed"}


def test_a_delivery_that_is_not_due_yet_is_left_alone_when_another_of_its_event_is(own_registry):
    calls = []

    @handler("", name="soon", backoff=[0.01])
    def soon(event):
        calls.append("soon")
        if event.attempt < 3:
            raise RuntimeError

    @handler("", name="late", backoff=[3600])
    def late(event):
        calls.append("late")
        raise RuntimeError

    emit("g", "key")
    with worker_thread():
        eventually(lambda: deliveries().get("soon") == ("done", 3))
    assert calls.count("late") == 1
    event = OutboxEvent.objects.get()
    assert event.available_at > timezone.now() + timedelta(minutes=50)


def test_a_delivery_that_falls_due_while_another_of_its_event_fails_is_not_put_off(own_registry):
    calls = []

    @handler("", name="slow", backoff=[0.01, 3600])
    def slow(event):
        calls.append("slow")
        if event.attempt == 2:
            time.sleep(0.3)  # meanwhile the other's time comes
        raise RuntimeError

    @handler("", name="quick", backoff=[0.2])
    def quick(event):
        calls.append("quick")
        if event.attempt == 1:
            raise RuntimeError

    emit("g", "key")
    with worker_thread():
        eventually(lambda: deliveries().get("quick") == ("done", 2))
    assert calls == ["slow", "quick", "slow", "quick"]


# Exceptions that decide


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyError("x"), "discarded"),
        (ConnectionResetError("x"), "pending"),
        (ValueError("x"), "failed"),
        (Discard("not for us"), "discarded"),
        (Retry("busy"), "pending"),
    ],
)
def test_retry_for_and_discard_for_sort_the_exceptions(own_registry, error, status):
    handler("", name="h", retry_for=(OSError,), discard_for=(LookupError,))(raising(error))
    emit("g", "key")
    Worker().drain()
    assert deliveries() == {"h": (status, 1)}
    assert statuses() == {"key": status}
    assert not Handled.objects.exists()  # rolled back, whatever became of it


def test_an_event_that_one_handler_discards_and_another_handles_is_done_without_an_error(own_registry):
    @handler("", name="discards")
    def discard(event):
        raise Discard("no")

    handler("", name="handles")(note)
    emit("g", "key")
    Worker().drain()
    assert (status(), OutboxEvent.objects.get().last_error) == ("done", "")
    assert deliveries() == {"discards": ("discarded", 1), "handles": ("done", 1)}


def test_an_event_that_one_handler_discards_and_another_handles_is_done(own_registry):
    own_registry.add_handler(raising(Discard("no")), group="", name="discards")
    own_registry.add_handler(note, group="", name="handles")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}
    assert deliveries() == {"discards": ("discarded", 1), "handles": ("done", 1)}
    assert Delivery.objects.get(handler="discards").error == "spark_outbox.errors.Discard: no"


@pytest.mark.parametrize(
    "after",
    [lambda: timedelta(hours=2), lambda: 7200, lambda: timezone.now() + timedelta(hours=2)],
    ids=["delta", "s", "time"],
)
def test_a_handler_may_say_itself_when_to_be_called_again(own_registry, after):
    own_registry.add_handler(raising(Retry("later", after=after())), group="", name="h")
    emit("g", "key")
    Worker().drain()
    event = OutboxEvent.objects.get()
    assert abs(event.available_at - timezone.now() - timedelta(hours=2)) < timedelta(minutes=5)
    assert event.status == "pending"


def test_retry_refuses_what_is_no_time():
    for nonsense in ("soon", timezone.now().replace(tzinfo=None)):
        with pytest.raises(TypeError, match="after"):
            Retry(after=nonsense)


# Defaults, delays, and what makes no sense


def test_project_defaults_come_from_the_settings(own_registry, settings):
    settings.SPARK_OUTBOX = {"MAX_ATTEMPTS": 2, "BACKOFF": 100, "MAX_BACKOFF": 1000}
    own_registry.add_handler(raising(RuntimeError()), group="", name="h")
    emit("g", "key")
    Worker().drain()
    delivery = Delivery.objects.get()
    waits = delivery.available_at - delivery.attempted_at
    assert timedelta(seconds=49) < waits < timedelta(seconds=101)
    make_ready()
    Worker().drain()
    assert statuses() == {"key": "failed"}


def test_delays_double_with_jitter_or_are_what_they_are_told_to_be():
    assert [delay(n, jitter=0) for n in (1, 2, 3, 12, 13, 99)] == [1, 2, 4, 2048, 3600, 3600]
    assert delay(3, jitter=1) == 2
    assert 2 <= delay(3) <= 4
    assert delay(3, timedelta(minutes=1), longest=100, jitter=0) == 100
    assert [delay(n, [1, timedelta(seconds=5)]) for n in (1, 2, 3)] == [1, 5, 5]
    assert delay(4, lambda attempt: timedelta(minutes=attempt)) == 240
    assert delay(4, lambda attempt: -1) == 0


@pytest.mark.parametrize("answer", [lambda: 1 / 0, lambda: "soon", lambda: None])
def test_a_backoff_that_makes_no_sense_costs_no_more_than_a_delay(own_registry, caplog, answer):
    handler("", name="h", backoff=lambda attempt: answer())(raising(OSError("x")))
    emit("g", "key")
    emit("g", "other")
    Worker().drain()
    assert statuses() == {"key": "pending", "other": "pending"}
    assert deliveries() == {"h": ("pending", 1)}
    assert "The backoff of h failed" in caplog.text


@pytest.mark.parametrize(
    "policy",
    [
        {"max_attempts": 0},
        {"max_attempts": "3"},
        {"backoff": -1},
        {"backoff": []},
        {"backoff": ["1"]},
        {"backoff": "1"},
        {"timeout": 0},
        {"timeout": "1"},
        {"retry_for": ValueError},
        {"discard_for": ("ValueError",)},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(policy):
    with pytest.raises(RegistrationError, match=next(iter(policy))):
        Policy(**policy)
