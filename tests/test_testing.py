"""spark_outbox.testing in the tests of a project, and DISPATCH = "on_commit"."""

import pytest
from django.db import transaction
from django.test import TestCase

from spark_outbox import Discard, Event, Retry, emit, emit_many, handler
from spark_outbox.models import OutboxEvent
from spark_outbox.testing import capture_events, drain, emitted
from tests.challenges.models import Donation, Handled
from tests.tools import eventually, make_challenge


class ShopTests(TestCase):
    """What a user writes: plain TestCase, whose transaction is never committed."""

    def test_saving_a_challenge_announces_it(self):
        with capture_events() as events:
            challenge = make_challenge("Run")
            Donation.objects.create(challenge=challenge, amount="2.50")
        assert [event.group for event in events] == ["challenge_created", "donation_received"]
        assert emitted("^donation")[0]["challenge"] == challenge
        assert drain() == 2
        assert set(Handled.objects.values_list("note", flat=True)) == {"Run", "2.50 for Run"}
        assert drain() == 0


@pytest.mark.django_db
def test_drain_raises_what_a_handler_raised_after_the_others_were_handled(own_registry):
    def fail(event):
        if event.key == "bad":
            raise RuntimeError("no")

    own_registry.add_handler(fail, group="", name="fail")
    for key in ("one", "bad", "two"):
        emit("g", key)
    with pytest.raises(RuntimeError, match="no") as caught:
        drain()
    assert "raised by handler fail on <Event g 'bad'" in caught.value.__notes__[0]
    assert OutboxEvent.objects.filter(status="done").count() == 2
    emit("g", "three")
    assert drain() == 1  # the failed one waits for its time


@pytest.mark.django_db
def test_drain_raises_what_a_list_of_events_failed_for(own_registry):
    @handler("", batch=10, retry_for=(ConnectionError,))
    def take(events):
        raise ValueError("a bug")

    emit_many([Event("g"), Event("g")])
    with pytest.raises(ValueError, match="a bug"):
        drain()


@pytest.mark.django_db
def test_drain_does_not_take_retry_and_discard_for_errors(own_registry):
    def speak(event):
        raise Retry if event.key == "again" else Discard

    own_registry.add_handler(speak, group="")
    for key in ("again", "never"):
        emit("g", key)
    assert drain() == 2
    assert dict(OutboxEvent.objects.values_list("key", "status")) == {
        "again": "pending",
        "never": "discarded",
    }


@pytest.mark.django_db
def test_drain_handles_what_handlers_emit(own_registry):
    def count_down(event):
        if event["n"]:
            emit("g", f"{event['n'] - 1}", n=event["n"] - 1)

    own_registry.add_handler(count_down, group="g")
    emit("g", "3", n=3)
    assert drain() == 4


@pytest.mark.django_db
def test_capture_events_sees_only_what_is_new_and_not_rolled_back():
    emit("g", "before")
    with capture_events("g") as events:
        emit("g", "before")
        emit("g", "inside", n=1)
        emit("other", "other")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            emit("g", "undone")
            raise ZeroDivisionError
    assert [(event.key, event["n"]) for event in events] == [("inside", 1)]


@pytest.mark.django_db
def test_emitted_shows_delays_and_headers():
    emit("g", "key", headers={"trace": "abc"}, ordering_key="o")
    (event,) = emitted()
    assert isinstance(event, Event)
    assert (event.headers["trace"], event.ordering_key, event.id) == (
        "abc",
        "o",
        OutboxEvent.objects.get().id,
    )


# DISPATCH = "on_commit"


@pytest.fixture
def on_commit(settings):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}


@pytest.mark.django_db(transaction=True)
def test_events_are_handled_after_the_commit_and_not_before(on_commit, own_registry):
    calls = []
    own_registry.add_handler(lambda event: calls.append(event.key), group="", name="h")
    with transaction.atomic():
        emit("g", "1")
        emit("g", "2")
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            emit("g", "undone")
            raise ZeroDivisionError
        assert calls == []
    assert calls == ["1", "2"]
    emit("g", "3")
    assert calls == ["1", "2", "3"]
    with transaction.atomic():
        emit("g", "4")
        transaction.set_rollback(True)
    assert calls == ["1", "2", "3"]


@pytest.mark.django_db(transaction=True)
def test_a_chain_of_events_is_handled_without_recursion(on_commit, own_registry):
    def count_down(event):
        if event["n"]:
            emit("g", f"{event['n'] - 1}", n=event["n"] - 1)

    own_registry.add_handler(count_down, group="g")
    emit("g", "300", n=300)
    assert OutboxEvent.objects.filter(status="done").count() == 301


@pytest.mark.django_db(transaction=True)
def test_a_handler_that_fails_after_the_commit_does_not_hurt_the_caller(on_commit, own_registry):
    def fail(event):
        raise RuntimeError

    own_registry.add_handler(fail, group="")
    with transaction.atomic():
        emit("g", "1")
    event = OutboxEvent.objects.get()
    assert (event.status, event.attempts) == ("pending", 1)
    eventually(lambda: event.available_at)


def test_in_a_testcase_capture_on_commit_callbacks_runs_the_handlers(on_commit, own_registry, db):
    calls = []
    own_registry.add_handler(lambda event: calls.append(event.key), group="", name="h")
    with TestCase.captureOnCommitCallbacks(execute=True):
        emit("g", "1")
        emit("g", "2")
    assert calls == ["1", "2"]
