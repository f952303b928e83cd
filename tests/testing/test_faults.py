"""Faults that a test injects into its project's handlers."""

from datetime import timedelta
from functools import wraps

import pytest
from django.core import mail

from spark_outbox import api, emit, handler
from spark_outbox.registry.handlers import registry
from spark_outbox.testing import Outbox
from tests.challenges.models import Handled
from tests.tools import deliveries, handled, note, statuses


@pytest.fixture
def calls(own_registry):
    """What the handler `write` was called with."""
    seen = []

    @handler("^write$", name="write", backoff=1)
    def write(event):
        note(event)
        seen.append((event.key, event.attempt))

    return seen


def test_a_handler_fails_on_the_attempts_that_a_test_names(outbox, calls):
    outbox.fail("write", on_attempt=[1, 2], with_=OSError("down"))
    emit("write", "key")
    for _ in range(3):
        assert outbox.drain() == 1
        outbox.advance(timedelta(seconds=4))
    assert calls == [("key", 3)]
    (event,) = outbox.emitted()
    assert (event.status, handled()) == ("done", ["key"])
    assert "OSError: down" in event.last_error


def test_a_failure_after_the_work_leaves_calls_to_others_behind(outbox, calls):
    outbox.fail("write", with_=OSError, after=True)
    emit("write", "key")
    outbox.drain()
    assert (calls, handled()) == ([("key", 1)], [])
    outbox.advance(timedelta(seconds=4))
    outbox.drain()
    assert (calls, handled()) == ([("key", 1), ("key", 2)], ["key"])


def test_errors_of_the_handlers_own_are_still_raised(outbox, own_registry):
    @handler("")
    def fail(event):
        raise ValueError("a bug")

    outbox.fail(fail, on_attempt=2)
    emit("g", "key")
    with pytest.raises(ValueError, match="a bug"):
        outbox.drain()


def test_an_event_can_come_twice(outbox, own_registry):
    @handler("", name="h")
    def mail_and_note(event):
        mail.outbox.append(mail.EmailMessage(event.key, to=["a@example.com"]))  # as if it were sent
        note(event)
        event["list"].append(1)
        assert event["list"] == [1]

    outbox.duplicate()
    emit("g", "key", list=[])
    assert outbox.drain() == 1
    assert len(mail.outbox) == 2
    assert handled() == ["key"]


def test_writes_that_are_at_least_once_come_twice_too(outbox, own_registry):
    @handler("", batch=5)
    def many(events):
        Handled.objects.create(key="many", handler="many")

    @handler("")
    async def wait(event):
        await Handled.objects.acreate(key="wait", handler="wait")

    outbox.duplicate(wait)
    outbox.duplicate(many)
    emit("g")
    outbox.drain()
    assert sorted(handled()) == ["many", "wait", "wait"]


def test_events_can_come_in_another_order(outbox, calls):
    outbox.reorder()
    for number in range(4):
        emit("write", str(number))
    for number in range(2):
        emit("write", f"ordered {number}", ordering_key="o")
    assert outbox.drain() == 6
    keys = [key for key, _ in calls]
    assert [key for key in keys if len(key) == 1] == ["3", "2", "1", "0"]
    assert [key for key in keys if len(key) > 1] == ["ordered 0", "ordered 1"]


def test_a_handler_that_takes_too_long_is_interrupted_after_its_work(outbox, own_registry):
    @handler("^g$", name="h", timeout=30)
    def work(event):
        note(event)

    outbox.slow(work, 3600)
    emit("g", "key")
    outbox.drain()
    assert (handled(), statuses(), deliveries()) == ([], {"key": "pending"}, {"h": ("pending", 1)})


def test_a_handler_that_takes_its_time_does_its_work(outbox, calls):
    outbox.slow("write", 0.001)
    emit("write", "key")
    outbox.drain()
    assert handled() == ["key"]


def test_a_handler_is_found_whatever_it_is_wrapped_in(outbox, own_registry):
    def wrap(function):
        return wraps(function)(lambda event: function(event))

    @wrap
    @handler("^g$", name="h")
    @wrap
    def write(event):
        note(event)

    for function in (write, write.__wrapped__, write.__wrapped__.__wrapped__):
        outbox.fail(function, with_=OSError)
    emit("g", "key")
    outbox.drain()
    assert (handled(), deliveries()) == ([], {"h": ("pending", 1)})


@pytest.mark.django_db
def test_faults_end_with_the_test(calls):
    with Outbox() as outbox:
        outbox.fail("write", with_=OSError)
        outbox.duplicate("write")
    emit("write", "key")
    outbox.drain()
    assert calls == [("key", 1)]


def test_faults_that_nothing_ends_are_refused(calls):
    with pytest.raises(RuntimeError, match="Nothing would end this fault"):
        Outbox().fail("write")


@pytest.mark.django_db
def test_faults_end_if_handlers_have_been_arranged_anew(calls):
    with Outbox() as outbox:
        outbox.fail("write", with_=OSError)
        api.HANDLERS.insert(0, ("^other", note))
    emit("write", "key")
    with Outbox() as outbox:
        outbox.drain()
    assert calls == [("key", 1)]
    assert [each.number for each in registry.handlers] == [0, 1]


def test_faults_are_for_handlers_that_are_registered(outbox):
    with pytest.raises(ValueError, match="is no registered handler"):
        outbox.fail(note)
