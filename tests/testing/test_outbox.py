"""The fixture `outbox`, and the class behind it."""

import asyncio
from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connections
from django.test import TestCase
from django.utils import translation

from spark_outbox import Event, Retry, aemit, emit, handler
from spark_outbox.errors import UnstorableValue
from spark_outbox.models import OutboxEvent
from spark_outbox.store import pausing
from spark_outbox.testing import Outbox, strict
from tests.challenges.models import Challenge, Donation, Handled
from tests.tools import handled, make_challenge, note, worker_thread

# What was emitted


def test_emitted_events_have_their_status(outbox, own_registry):
    @handler("^g$", max_attempts=1)
    def fail(event):
        raise ValueError("no")

    emit("g", "bad", status="of the payload")
    emit("other", "nobody")
    assert [event.status for event in outbox.emitted()] == ["pending", "pending"]
    assert outbox.drain(raise_exceptions=False) == 2
    bad, nobody = outbox.emitted()
    assert (bad.status, bad["status"], nobody.status) == ("failed", "of the payload", "unhandled")
    assert "ValueError: no" in bad.last_error
    assert nobody.last_error == ""


def test_an_assertion_compares_the_values_that_it_names(outbox):
    challenge = make_challenge("Run")
    emit("order_paid", "paid_1", challenge=challenge, amount=3)
    event = outbox.assert_emitted("^order_paid$", "paid_1", challenge=challenge)
    assert (event.key, event["amount"]) == ("paid_1", 3)
    outbox.assert_emitted("order", amount=3)
    outbox.assert_not_emitted("order", amount=4)
    outbox.assert_not_emitted("order", color=None)
    outbox.assert_not_emitted("order", "paid_2")


def test_a_failed_assertion_lists_what_was_there(outbox):
    with pytest.raises(AssertionError, match=r"No event of group 'g' .* no events at all"):
        outbox.assert_emitted("g")
    challenge = make_challenge("Run")
    emit("order_paid", "paid_1", challenge=challenge, description="x" * 1000)
    with pytest.raises(AssertionError) as caught:
        outbox.assert_emitted("order", "paid_2", amount=3)
    first, *lines = str(caught.value).splitlines()
    assert first == (
        "No event of group 'order' with the key 'paid_2' with amount=3 was emitted. There are these:"
    )
    assert lines[1].startswith(
        "  order_paid 'paid_1' (pending) challenge=<Challenge: Run>, description='xxx"
    )
    assert len(lines[1]) < 300
    challenge.delete()
    with pytest.raises(AssertionError, match=r"after all(.|\n)*challenge=InstanceGone"):
        outbox.assert_not_emitted("order_paid")


def test_a_failed_assertion_lists_what_has_no_name(outbox, monkeypatch):
    emit("g", challenge=make_challenge("Run"))
    monkeypatch.setattr(Challenge, "__str__", lambda challenge: challenge.user.name)
    with pytest.raises(AssertionError, match=r"<Challenge, whose repr\(\) raises AttributeError"):
        outbox.assert_emitted("other")


# One handler by itself


def test_a_handler_gets_the_event_that_a_worker_would_hand_it(outbox, own_registry):
    challenge = make_challenge("Run")
    Donation.objects.create(challenge=challenge, amount=1)
    seen = []

    @handler(r"^order_paid$", name="by name")
    def look(event):
        seen.append(event)

    outbox.handle(look, attempt=3, headers={"trace": "abc"}, challenge=challenge, at=(1, 2))
    outbox.handle("by name", "order_paid", "key")
    first, second = seen
    assert (first.group, first.attempt, first.headers["trace"]) == ("order_paid", 3, "abc")
    assert first["challenge"] == challenge
    assert first["challenge"] is not challenge
    assert first["at"] == (1, 2)
    assert (second.key, second.attempt) == ("key", 1)
    assert outbox.emitted("order_paid") == []


def test_what_a_handler_writes_is_rolled_back_if_it_raises(outbox, own_registry):
    @handler("^order_")
    def write(event):
        note(event)
        raise Retry("later")

    with pytest.raises(Retry):
        outbox.handle(write)
    outbox.handle(note)  # which is not registered
    assert len(handled()) == 1


def test_handlers_of_other_kinds_are_called_by_themselves_too(outbox, own_registry):
    seen = []

    @handler("a")
    async def wait(event):
        seen.append(event["challenge"].title)

    @handler("b", batch=10)
    def many(events):
        seen.extend(event.key for event in events)

    outbox.handle(wait, challenge=make_challenge("Run"))
    outbox.handle(many, key="2")
    assert seen == ["Run", "2"]


def test_a_language_ends_with_its_handler(outbox):
    def speak(event):
        translation.activate("de")

    with translation.override("fr"):
        outbox.handle(speak)
        outbox.crash_everywhere(speak, Event("g", "key"))
        assert translation.get_language() == "fr"


def test_a_call_that_could_not_be_is_refused(outbox, own_registry):
    @handler(r"^challenge_(announced|ended)$")
    def tell(event):
        pass

    with pytest.raises(ValueError, match="say which, with group="):
        outbox.handle(tell)
    with pytest.raises(ValueError, match="not for 'challenge_won'"):
        outbox.handle(tell, "challenge_won")
    with pytest.raises(ValueError, match="no handler of the name 'other'"):
        outbox.handle("other")
    with pytest.raises(UnstorableValue):
        outbox.handle(tell, "challenge_ended", function=print)


# Time


def test_delays_and_backoffs_pass_when_a_test_says_so(outbox, own_registry):
    @handler("", backoff=3600)
    def try_twice(event):
        if event.attempt == 1:
            raise Retry
        note(event)

    emit("g", "delayed", delay=timedelta(days=1))
    assert outbox.drain() == 0
    outbox.advance(timedelta(hours=23))
    assert outbox.drain() == 0
    outbox.advance(timedelta(hours=1))
    assert (outbox.drain(), handled()) == (1, [])
    outbox.advance(timedelta(hours=1))
    assert (outbox.drain(), handled()) == (1, ["delayed"])


def test_time_does_not_end_a_pause(outbox, own_registry):
    own_registry.add_handler(note, group="", name="note")
    pausing.pause("handler", "note", "", using="default")
    emit("g", "key")
    outbox.drain()
    outbox.advance(timedelta(days=365_000))
    assert (outbox.drain(), outbox.emitted()[0].status) == (0, "pending")


# Live and async


@pytest.mark.django_db(transaction=True)
def test_a_test_waits_for_a_real_worker(outbox, own_registry):
    @handler("", max_attempts=1)
    def take(event):
        if event.key == "bad":
            raise ValueError("no")

    with worker_thread():
        emit("g", "good")
        assert outbox.wait_for("good").status == "done"
        emit("g", "bad")
        assert outbox.wait_for("bad", "failed").key == "bad"
        with pytest.raises(AssertionError, match=r"'bad' is failed, not done(.|\n)*ValueError: no"):
            outbox.wait_for("bad", timeout=3600)
    with pytest.raises(AssertionError, match="no event with the key 'other'"):
        outbox.wait_for("other", timeout=0)
    emit("g", "late")
    with pytest.raises(AssertionError, match="'late' is pending, not done"):
        outbox.wait_for("late", timeout=0)


def test_nobody_waits_for_an_event_that_no_worker_can_see(outbox):
    emit("g", "key")
    assert outbox.wait_for("key", "pending").key == "key"
    with pytest.raises(AssertionError, match=r"not committed\. Call drain"):
        outbox.wait_for("key")


def test_async_tests_drain_too(outbox, own_registry):
    @handler("")
    async def take(event):
        await Handled.objects.acreate(key=event.key, handler="take")

    emit("g", "key")
    assert async_to_sync(outbox.adrain)() == 1
    assert handled() == ["key"]


@pytest.mark.django_db(transaction=True)
def test_they_do_so_in_a_running_loop(outbox, own_registry):
    own_registry.add_handler(note, group="")

    async def run():
        await aemit("g", "key")
        assert await outbox.adrain() == 1
        await sync_to_async(connections.close_all)()

    asyncio.run(run())
    assert handled() == ["key"]


@pytest.mark.django_db
def test_they_do_not_drain_outside_of_the_tests_transaction(own_registry):
    async def run():
        with pytest.raises(AssertionError, match=r"with django_db\(transaction=True\)"):
            await outbox.adrain()
        await sync_to_async(connections.close_all)()

    with Outbox() as outbox:
        asyncio.run(run())


@pytest.mark.outbox(using="other")
@pytest.mark.django_db(databases=["default", "other"])
class TestOfAnotherDatabase:
    @pytest.mark.outbox(strict=True)
    def test_markers_add_up(self, outbox):
        assert outbox.using == "other"


# Strict mode


@pytest.mark.django_db
def test_a_test_that_fails_is_told_of_groups_without_handlers_too(own_registry):
    with pytest.raises(ZeroDivisionError) as caught, strict():
        emit("order_plcaed", "one")
        raise ZeroDivisionError
    (note,) = caught.value.__notes__
    assert note.startswith("No handler matches the group 'order_plcaed'")


@pytest.mark.django_db
def test_strict_mode_finds_groups_that_no_handler_matches(own_registry):
    with strict():
        own_registry.add_handler(note, group="^order_placed$")
        emit("order_placed")
    with pytest.raises(AssertionError) as caught, strict():
        emit("order_plcaed", "one")
        emit("order_plcaed", "two")
    assert str(caught.value) == (
        "No handler matches the group 'order_plcaed' of the event 'one'. Close are '^order_placed$'."
    )
    emit("other")  # nobody watches any more


# In a TestCase


class ShopTests(TestCase):
    @classmethod
    def setUpTestData(cls):
        cls.challenge = make_challenge("Run")

    def setUp(self):
        self.outbox = self.enterContext(Outbox())
        self.enterContext(strict())

    def test_events_of_the_class_are_there_in_each_test(self):
        self.outbox.assert_emitted("^challenge_created$", challenge=self.challenge)
        assert self.outbox.drain() == 1

    def test_another_test_has_them_too(self):
        assert [event.status for event in self.outbox.emitted()] == ["pending"]
        assert self.outbox.drain() == 1

    def test_callbacks_of_a_commit_handle_events(self):
        on_commit = self.settings(SPARK_OUTBOX={"DISPATCH": "on_commit"})
        with on_commit, self.captureOnCommitCallbacks(execute=True):
            Donation.objects.create(challenge=self.challenge, amount=1)
        event = self.outbox.assert_emitted("^donation_received$")
        assert event.status == "done"


class FixtureTests(TestCase):
    @pytest.fixture(autouse=True)
    def use(self, outbox):
        self.outbox = outbox

    def test_the_fixture_works_in_a_testcase(self):
        emit("donation_received", "key", challenge=make_challenge(), amount=1)
        assert self.outbox.drain() == 2
        assert {event.status for event in self.outbox.emitted()} == {"done"}
        assert OutboxEvent.objects.count() == 2


def test_an_event_is_no_row_of_another_test(outbox):
    assert outbox.emitted() == []
    assert isinstance(emit("g", "key"), Event)
