"""spark_replay: past events for a handler, really and as a rehearsal."""

import io
from datetime import timedelta

import pytest
from django.core import mail
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.utils import timezone

from spark_outbox import emit, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.operating.replay import Selection, rehearse
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import (
    HOUR,
    eventually,
    make_challenge,
    note,
    statuses,
    wait_until_asleep,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


def run(*arguments):
    out = io.StringIO()
    error = None
    try:
        call_command("spark_replay", "--yes", *arguments, stdout=out)
    except CommandError as caught:
        error = str(caught)
    return out.getvalue(), error


@pytest.fixture
def past(own_registry):
    """Events that are done, and a handler that was registered too late for them."""
    calls = []
    own_registry.add_handler(note, group="", name="old")
    for key in ("order_1", "order_2", "other_1"):
        emit(key[:-2], key)
    emit("order", "pending", delay=HOUR)
    Worker().drain()
    OutboxEvent.objects.filter(key="order_1").update(created_at=timezone.now() - timedelta(days=9))
    own_registry.add_handler(lambda event: calls.append(event.key), group="^o", name="new")
    return calls


def test_a_new_handler_gets_past_events_and_no_other_handler_does(past):
    assert run("--handler", "new") == ("3 events are given to new.\n", None)
    assert set(statuses().values()) == {"pending"}
    Worker().drain()
    assert past == ["order_1", "order_2", "other_1"]
    assert Handled.objects.count() == 3  # by the old one, once
    assert set(statuses().values()) == {"done", "pending"}
    assert set(Delivery.objects.values_list("handler", "status")) == {("new", "done"), ("*", "done")}


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["--group", "^order$"], ["order_1", "order_2"]),
        (["--since", (timezone.now() - timedelta(days=2)).date().isoformat()], ["order_2", "other_1"]),
        (["--key", "order_1", "other_1"], ["order_1", "other_1"]),
        (["--group", "nothing"], []),
    ],
)
def test_events_can_be_chosen(past, options, keys):
    assert run("--handler", "new", *options)[0] == f"{len(keys)} events are given to new.\n"
    Worker().drain()
    assert past == keys


def test_a_handler_that_has_had_the_events_gets_them_again(past):
    for times in (1, 2):
        run("--handler", "new", "--key", "order_1")
        Worker().drain()
        assert past == ["order_1"] * times
    assert Delivery.objects.get(handler="new").attempts == 1


def test_sleeping_workers_are_woken(past):
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        run("--handler", "new")
        eventually(lambda: len(past) == 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--handler", "nope"], "There is no handler 'nope'. Handlers:\n  old\n  new"),
        (["--handler", "new", "--since", "yesterday"], "'yesterday' is no date or time"),
        (["--handler", "new", "--since", "2026-13-01"], "is no date or time"),
        (["--handler", "new", "--rehearse", "--limit", "0"], "1 or more"),
        (["--handler", "new", "--database", "nope"], "DATABASES has no 'nope'"),
    ],
)
def test_what_makes_no_sense_is_refused(past, arguments, message):
    assert message in run(*arguments)[1]


def test_a_rehearsal_tells_what_would_happen_and_changes_nothing(past, own_registry):
    def rehearsed(event):
        Handled.objects.create(key=event.key, handler="rehearsed")
        Handled.objects.filter(key=event.key, handler="rehearsed").update(note="x")
        transaction.on_commit(lambda: mail.mail_admins("never", "sent"))
        if event.key == "order_2":
            with connection.cursor() as cursor:
                cursor.execute("select 1 / 0")
        make_challenge()

    own_registry.add_handler(rehearsed, group="", name="rehearsed")
    before = dict(OutboxEvent.objects.values_list("key", "status"))
    out, error = run("--handler", "rehearsed", "--rehearse")
    assert "order_2:\nTraceback (most recent call last):" in out
    assert "DivisionByZero" in out
    assert "3 events, 1 failures\n" in out
    assert "3.0 queries per event\n" in out
    assert "6 rows written to challenges_handled\n" in out
    assert "2 rows written to challenges_challenge\n" in out
    assert error == "The handler failed on 1 events."
    assert not Handled.objects.filter(handler="rehearsed").exists()
    assert dict(OutboxEvent.objects.values_list("key", "status")) == before
    assert not Delivery.objects.exists()
    assert mail.outbox == []


def test_a_rehearsal_stops_at_its_limit(past):
    assert "2 events, 0 failures" in run("--handler", "new", "--rehearse", "--limit", "2")[0]
    assert past == ["order_1", "order_2"]


def test_a_rehearsal_goes_on_after_an_exit_and_ends_with_an_interrupt(past, own_registry):
    def leave(event):
        past.append(event.key)
        raise SystemExit(3) if event.key == "order_1" else KeyboardInterrupt

    own_registry.add_handler(leave, group="", name="leave")
    with pytest.raises(KeyboardInterrupt):
        run("--handler", "leave", "--rehearse")
    assert past == ["order_1", "order_2"]


@pytest.mark.parametrize(("atomic", "failures"), [(False, 0), (True, 2)])
def test_a_rehearsal_lets_a_handler_be_durable_if_it_may(past, own_registry, atomic, failures):
    """A detached one may, though the rehearsal itself is one transaction that is rolled back."""

    def export(event):
        with transaction.atomic(durable=True):
            Handled.objects.create(key=event.key, handler="export")

    own_registry.add_handler(export, group="^o", name="export", atomic=atomic)
    out, error = run("--handler", "export", "--rehearse", "--limit", "2")
    assert f"2 events, {failures} failures\n" in out
    assert (error is None) == (not failures)
    assert ("2 rows written to challenges_handled\n" in out) == (not failures)
    assert not Handled.objects.filter(handler="export").exists()
    with transaction.atomic(durable=True):  # what the rehearsal has allowed itself is over
        pass
    with (
        transaction.atomic(),
        pytest.raises(RuntimeError, match="durable"),
        transaction.atomic(durable=True),
    ):
        pass


def test_a_rehearsal_ends_with_the_handler_that_costs_it_its_connection(own_registry):
    for key in "123":
        emit("g", key)
    own_registry.add_handler(note, group="", name="old")
    Worker().drain()

    @handler("", name="new")
    def close(event):
        if event.key == "2":
            connection.close()

    selection = Selection(handler=own_registry.handlers[-1])
    done = rehearse(selection, using="default", limit=10)
    assert done.events == 2
    assert [key for key, _ in done.failures] == ["2"]
