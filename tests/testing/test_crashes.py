"""The crash prover finds handlers that do not survive the death of their process."""

import asyncio
import random
from types import SimpleNamespace

import pytest
from django.core import mail
from django.db import IntegrityError, transaction

from spark_outbox import Event, emit, handler
from tests.challenges.models import Challenge, Donation, Handled
from tests.tools import handled, make_challenge, note

END = "at its end, before its event is marked as done"


def test_writes_of_a_plain_handler_survive_every_crash(outbox, own_registry):
    challenge = make_challenge("Run")

    @handler("^g$")
    def write(event):
        donation = Donation.objects.create(challenge=event["challenge"], amount=event.attempt // 9)
        with transaction.atomic():
            note(event)
        Challenge.objects.filter(pk=event["challenge"].pk).update(title=f"with {donation.pk}")
        emit("next", f"next_{donation.pk}", donation=donation)

    before = Donation.objects.create(challenge=challenge, amount=1).pk
    event = emit("g", "key", challenge=challenge)
    boundaries = outbox.crash_everywhere(write, event)
    assert boundaries[0].startswith("before SELECT")
    assert [each.split()[0] for each in boundaries[1::2]] == ["after"] * (len(boundaries) // 2)
    assert any(each.startswith("after SAVEPOINT") for each in boundaries)
    assert any("challenges_handled" in each for each in boundaries)
    assert boundaries[-2:] == [END, "after the commit"]
    challenge.refresh_from_db()
    assert (challenge.title, handled(), Donation.objects.count()) == ("Run", [], 1)
    outbox.assert_not_emitted("next")
    assert Donation.objects.create(challenge=challenge, amount=1).pk == before + 1


def test_a_mail_is_sent_again_unless_that_does_no_harm(outbox):
    def send(event):
        mail.outbox.append(mail.EmailMessage(event.key, to=["a@example.com"]))  # as if it were sent
        note(event)

    event = Event("g", "key")
    with pytest.raises(AssertionError) as caught:
        outbox.crash_everywhere(send, event)
    first, second, third, *_ = str(caught.value).splitlines()
    assert first.endswith(
        "send comes to another end if it is cut off at 3 of 4 boundaries, and called again:"
    )
    assert second == "  1. before " + second.partition("before ")[2]
    assert third.startswith("    one call more: mail ('key', '', ")
    assert mail.outbox == []
    assert outbox.crash_everywhere(send, event, repeats=True)


def test_a_mail_that_differs_in_its_html_is_another_one(outbox):
    def send(event):
        message = mail.EmailMultiAlternatives(event.key, to=["a@example.com"])
        message.attach_alternative(f"<p>{event.attempt}", "text/html")
        mail.outbox.append(message)

    with pytest.raises(AssertionError, match=r"one call more: mail .*<p>2"):
        outbox.crash_everywhere(send, Event("g", "key"), repeats=True)


def test_calls_are_what_the_test_records(outbox):
    requests = []

    def post(event):
        note(event)
        requests.append(SimpleNamespace(url="/", attempt=event.attempt))

    event = {"group": "g", "key": "key"}
    with pytest.raises(AssertionError, match=rf"3\. {END}:\n    one call more: .*attempt=2") as caught:
        outbox.crash_everywhere(post, event, calls=[requests], repeats=True)
    assert "at 1 of 4 boundaries" not in str(caught.value)
    assert requests == []


def test_what_runs_after_the_commit_can_be_lost(outbox):
    sent = []

    def send_late(event):
        note(event)
        transaction.on_commit(lambda: sent.append(event.key))

    with pytest.raises(AssertionError, match=r"4\. after the commit:\n    one call less: 'key'"):
        outbox.crash_everywhere(send_late, Event("g", "key"), calls=[sent])


def test_a_robust_callback_may_fail(outbox):
    def fail_late(event):
        note(event)
        transaction.on_commit(lambda: 1 / 0, robust=True)

    assert outbox.crash_everywhere(fail_late, Event("g", "key"))


def test_a_handler_that_never_does_the_same_can_not_be_proven(outbox):
    def guess(event):
        Handled.objects.create(key=str(random.random()), handler="guess")

    with pytest.raises(AssertionError, match=r"even if nothing disturbs it:\n    one row more: .*guess"):
        outbox.crash_everywhere(guess, Event("g", "key"))
    assert outbox.crash_everywhere(guess, Event("g", "key"), ignore=["challenges.Handled.key"])


def test_a_handler_that_commits_by_itself_has_to_look_what_it_has_done(outbox, own_registry):
    @handler("^g$", name="naive", atomic=False)
    def naive(event):
        note(event)
        with transaction.atomic(durable=True):
            Handled.objects.create(key=event.key, handler="second")
            Handled.objects.create(key=event.key, handler="third")

    @handler("^g$", name="careful", atomic=False)
    def careful(event):
        Handled.objects.get_or_create(key=event.key, handler="first")
        with transaction.atomic(durable=True):
            if not Handled.objects.filter(key=event.key, handler="second").exists():
                Handled.objects.create(key=event.key, handler="second")
                Handled.objects.create(key=event.key, handler="third")

    with pytest.raises(AssertionError) as caught:
        outbox.crash_everywhere(naive, Event("g", "key"))
    report = str(caught.value)
    assert "  2. after INSERT" in report
    assert "\n  1. before INSERT" not in report
    assert "after COMMIT" in report
    assert "handler='second'" in report
    boundaries = outbox.crash_everywhere(careful, Event("g", "key"))
    assert {"before COMMIT", "after COMMIT", END} <= set(boundaries)
    assert handled() == []


def test_rows_have_the_same_keys_in_each_run(outbox, own_registry):
    @handler("^g$", atomic=False)
    def write(event):
        challenge, _ = Challenge.objects.get_or_create(
            title="new", defaults={"start_date": "2026-01-01", "end_date": "2026-01-01"}
        )
        Donation.objects.update_or_create(challenge=challenge, defaults={"amount": 2})
        emit("next", f"next_{challenge.pk}", challenge=challenge)

    boundaries = outbox.crash_everywhere(write, Event("g", "key"))
    assert boundaries.count("before COMMIT") > 1


def test_cursors_that_are_open_at_the_cut_are_in_nobodys_way(outbox, own_registry):
    make_challenge("one")

    @handler("^g$", atomic=False)
    def read(event):
        for _ in Challenge.objects.iterator(chunk_size=1):
            pass
        with transaction.atomic():
            for _ in Challenge.objects.select_for_update().iterator(chunk_size=1):
                pass

    assert outbox.crash_everywhere(read, Event("g", "key"))


def test_an_async_handler_commits_each_statement(outbox, own_registry):
    @handler("^g$")
    async def write(event):
        await Handled.objects.acreate(key=event.key, handler="one")
        await Handled.objects.acreate(key=event.key, handler="two")

    with pytest.raises(AssertionError, match=r"2\. after INSERT(.|\n)*one row more"):
        outbox.crash_everywhere(write, Event("g", "key"))


def test_tasks_of_a_group_are_cut_off_together(outbox, own_registry):
    @handler("^g$")
    async def write(event):
        async with asyncio.TaskGroup() as group:
            for number in range(2):
                group.create_task(Handled.objects.acreate(key=event.key, handler=str(number)))

    with pytest.raises(AssertionError, match="at 4 of 5 boundaries"):
        outbox.crash_everywhere(write, Event("g", "key"))


def test_an_error_of_the_second_call_is_reported(outbox, own_registry):
    @handler("^g$", atomic=False)
    def write(event):
        make_challenge("first", pk=7)
        note(event)

    with pytest.raises(AssertionError, match=r"2\. after INSERT.*\n    the second call raised Integ"):
        outbox.crash_everywhere(write, Event("g", "key"))


def test_errors_that_a_handler_catches_are_no_crash(outbox, own_registry):
    make_challenge("there", pk=7)

    @handler("^g$", atomic=False)
    def write(event):
        try:
            make_challenge("again", pk=7)
        except IntegrityError:
            Handled.objects.get_or_create(key=event.key, handler="late")

    assert outbox.crash_everywhere(write, Event("g", "key"))


@pytest.mark.parametrize("atomic", [True, False])
def test_events_that_the_handler_emits_are_left_to_a_worker(outbox, own_registry, settings, atomic):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}

    @handler("^g$", atomic=atomic)
    def pass_on(event):
        with transaction.atomic():
            emit("next", "next")

    own_registry.add_handler(note, group="^next$")
    boundaries = outbox.crash_everywhere(pass_on, Event("g", "key"))
    assert len(boundaries) < 10


def test_a_list_handler_gets_a_list(outbox, own_registry):
    @handler("^g$", batch=10)
    def take(events):
        for event in events:
            note(event)

    assert outbox.crash_everywhere(take, Event("g", "key"))


def test_a_report_can_be_read(outbox, own_registry):
    @handler("^g$", atomic=False)
    def write(event):
        Handled.objects.bulk_create(Handled(key=f"{n}", note="x" * 1000) for n in range(20))

    with pytest.raises(AssertionError, match=r"note='x+…\n    … and 10 others\n  \d") as caught:
        outbox.crash_everywhere(write, Event("g", "key"))
    assert len(str(caught.value)) < 12_000


def test_a_proof_ends(outbox):
    assert len(outbox.crash_everywhere(note, Event("g", "key"), most=4)) == 4
    with pytest.raises(AssertionError, match="has more than 3 boundaries"):
        outbox.crash_everywhere(note, Event("g", "key"), most=3)


@pytest.mark.django_db(transaction=True)
def test_proofs_are_taken_back_where_tests_commit_too(outbox, own_registry):
    @handler("^g$", atomic=False)
    def write(event):
        with transaction.atomic(durable=True):
            note(event)

    emit("g", "key")
    (event,) = outbox.emitted()
    with pytest.raises(AssertionError, match="after COMMIT"):
        outbox.crash_everywhere(write, event)
    assert handled() == []
    assert outbox.drain() == 1
    assert handled() == ["key"]
