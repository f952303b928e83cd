"""One event is one mail to each recipient, on a real database and through a real SMTP server."""

import re
from datetime import date, timedelta
from functools import partial

import pytest
from django.core import mail as django_mail
from django.core.mail import EmailMessage
from django.template import TemplateSyntaxError
from django.utils import translation

from spark_outbox import Event, emit
from spark_outbox.contrib import mails
from spark_outbox.contrib.mails.models import Mail
from spark_outbox.errors import RegistrationError
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.handlers import registry
from tests.challenges.models import Challenge
from tests.tools import make_challenge, work

THREE = ["anna@example.com", "bert@example.com", "Cleo <cleo@example.com>"]
BARE = ["anna@example.com", "bert@example.com", "cleo@example.com"]


pytestmark = pytest.mark.usefixtures("sender")


def to(*addresses, group="^paid$"):
    mails.recipients(group, name=f"to {group}")(lambda event: addresses)


def error(key):
    return Delivery.objects.get(event__key=key).error


def retry(outbox):
    outbox.advance(timedelta(hours=2))
    outbox.drain(raise_exceptions=False)


def test_mails_are_sent_under_a_name_that_stays():
    (found,) = registry.handlers_for("spark_mails")
    assert found.name == "spark_outbox.contrib.mails.send"
    assert not registry.handlers_for("spark_mails\n")


def test_a_mail_is_rendered_and_sent(outbox, mail, post):
    mail(
        subject="{{ challenge.title }} for {{ who|default:'you' }}",
        body="Dear {{ recipient }}, <{{ challenge.title }}> {{ group }} {{ key }}{{ missing }}.",
        html="<p>{{ challenge.title }}</p>",
        from_email="Club <club@club.example>",
    )
    to("anna@example.com")
    emit("paid", "paid_1", challenge=make_challenge("Run & <fun>"))
    assert outbox.drain() == 2
    ((recipient, got),) = post.mails
    assert recipient == got["To"] == "anna@example.com"
    assert got["From"] == "Club <club@club.example>"
    assert got["Subject"] == "Run & <fun> for you"
    body, html = (got.get_body([kind]).get_content().rstrip() for kind in ("plain", "html"))
    assert body == "Dear anna@example.com, <Run & <fun>> paid paid_1."
    assert html == "<p>Run &amp; &lt;fun&gt;</p>"
    assert re.fullmatch(r"<[0-9a-f]{32}@club\.example>", got["Message-ID"])


def test_the_values_arrive_as_they_are_when_the_mail_is_sent(outbox, mail, post):
    written = mail(body="{{ challenge.title }}")
    to("anna@example.com")
    post.refused["anna@example.com"] = "451 later"
    challenge = make_challenge("Run")
    emit("paid", challenge=challenge)
    outbox.drain(raise_exceptions=False)
    post.refused.clear()
    Challenge.objects.update(title="Walk")
    Mail.objects.filter(pk=written.pk).update(subject="New")
    retry(outbox)
    assert post.mails[0][1].get_content().strip() == "Walk"
    assert post.mails[0][1]["Subject"] == "New"


# Nobody is mailed twice


def test_a_retry_mails_only_the_recipient_that_was_refused(outbox, mail, post):
    mail()
    to(*THREE)
    post.refused["bert@example.com"] = "450 busy"
    emit("paid", "paid_1")
    outbox.drain(raise_exceptions=False)
    assert post.recipients == ["anna@example.com", "cleo@example.com"]
    retry(outbox)
    assert len(post.mails) == 2
    post.refused.clear()
    retry(outbox)
    assert post.recipients == ["anna@example.com", "cleo@example.com", "bert@example.com"]
    assert {got["To"] for _, got in post.mails} == set(THREE)
    assert len({got["Message-ID"] for _, got in post.mails}) == 3
    assert {event.status for event in outbox.emitted()} == {"done"}


@pytest.mark.django_db(transaction=True)
def test_a_worker_hands_out_and_sends(mail, post):
    mail()
    to(*THREE)
    emit("paid", "paid_1")
    work()
    assert sorted(post.recipients) == BARE


def test_an_address_that_comes_twice_gets_one_mail(outbox, mail, post):
    mail()
    to("anna@example.com", "", None, "anna@example.com")
    mails.recipients("^pa", name="others")(lambda event: "anna@example.com")
    emit("paid", "paid_1")
    outbox.drain()
    assert post.recipients == ["anna@example.com"]


def test_a_mailbox_that_is_written_in_several_ways_gets_one_mail(outbox, mail, post):
    mail()
    ways = ["Anna <anna@example.com>", "Anna@Example.com", " anna@example.com\u3000"]
    to(*ways, "anna@exämple.com", "anna@XN--exmple-cua.com")
    to("ANNA@example.com", group="^pa")
    emit("paid", "paid_1")
    outbox.drain()
    assert post.recipients == ["anna@example.com", "anna@xn--exmple-cua.com"]


@pytest.mark.parametrize("address", ["anna@example.com\u3000", "\xa0anna@example.com\n"])
def test_space_around_an_address_is_left_out(outbox, mail, post, address):
    mail()
    to(address)
    emit("paid")
    outbox.drain()
    assert post.mails[0][1]["To"] == "anna@example.com"


def test_one_function_may_be_for_two_patterns(outbox, mail, post):
    def mail_anna(event):
        return "anna@example.com"

    mail()
    mail("sent")
    mails.recipients("^sent$")(mails.recipients("^paid$")(mail_anna))
    emit("paid")
    emit("sent")
    outbox.drain()
    assert post.recipients == ["anna@example.com"] * 2


async def ask(event):
    return "anna@example.com"


async def ask_each(event):
    yield "anna@example.com"


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (ask, "no plain function"),
        (partial(ask), "no plain function"),
        (ask_each, "no plain function"),
        (None, "no plain function"),
        (partial(to), "no name of its own"),
    ],
)
def test_what_can_not_return_addresses_is_refused_when_it_is_registered(function, problem):
    with pytest.raises(RegistrationError, match=problem):
        mails.recipients("^paid$")(function)


def test_the_pattern_may_not_be_forgotten():
    with pytest.raises(RegistrationError, match="it needs the pattern"):
        mails.recipients(to)


@pytest.mark.parametrize("found", [b"anna@example.com", [("anna@example.com",)], ["b@example.com", 5]])
def test_recipients_that_are_no_text_are_a_failure_and_mail_nobody(outbox, mail, post, found):
    mail()
    mails.recipients("^paid$", name="bytes")(lambda event: found)
    emit("paid", "paid_1")
    outbox.drain(raise_exceptions=False)
    assert [event.status for event in outbox.emitted()] == ["pending"]
    assert "Recipients are text" in error("paid_1")


def test_a_function_that_raises_midway_mails_nobody(outbox, mail, post):
    def midway(event):
        yield "anna@example.com"
        raise LookupError

    mail()
    mails.recipients("^paid$")(midway)
    emit("paid")
    outbox.drain(raise_exceptions=False)
    assert [event.status for event in outbox.emitted()] == ["pending"]


@pytest.mark.django_db(transaction=True)
def test_mails_are_sent_in_process(mail, post, settings):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    mail(body="{{ day }}")
    to(*THREE)
    with translation.override("de"):
        emit("paid", day=date(2026, 3, 1))
    assert sorted(post.recipients) == BARE
    assert set(OutboxEvent.objects.values_list("status", flat=True)) == {"done"}
    assert post.mails[0][1].get_content().strip() == "March 1, 2026"


def test_to_hand_an_event_out_again_mails_nobody(outbox, mail, post):
    mail()
    to(*THREE)
    outbox.duplicate()
    emit("paid", "paid_1")
    outbox.handle("to ^paid$", key="paid_1")
    outbox.drain()
    assert {recipient: post.recipients.count(recipient) for recipient in BARE} == dict.fromkeys(BARE, 2)
    for recipient in BARE:  # which `duplicate` has let be sent twice
        assert len({got["Message-ID"] for each, got in post.mails if each == recipient}) == 1


def test_if_the_answer_is_lost_the_mail_comes_again_with_the_same_message_id(outbox, mail, post):
    mail()
    to("anna@example.com")
    post.dying.add("anna@example.com")
    emit("paid", "paid_1")
    outbox.drain(raise_exceptions=False)
    post.dying.clear()
    retry(outbox)
    retry(outbox)
    first, second = (got for _, got in post.mails)
    assert first["Message-ID"] == second["Message-ID"]


@pytest.mark.usefixtures("recorded")
def test_a_crash_anywhere_does_no_harm_but_to_repeat_an_equal_mail(outbox, mail):
    mail(body="{{ challenge.title }}")
    to(*THREE)
    event = Event("paid", "paid_1", challenge=make_challenge())
    assert outbox.crash_everywhere("to ^paid$", event)
    outbox.handle("to ^paid$", key="paid_1", challenge=event["challenge"])
    (first, *_) = outbox.emitted(f"^{mails.GROUP}$")
    boundaries = outbox.crash_everywhere("spark_outbox.contrib.mails.send", first, repeats=True)
    assert len(boundaries) >= 5
    assert django_mail.outbox == []


# What is not sent


@pytest.mark.parametrize("is_written", [True, False])
def test_with_recipients_but_no_active_mail_the_event_is_discarded(outbox, mail, post, is_written):
    if is_written:
        mail(is_active=False)
    to("anna@example.com")
    emit("paid", "paid_1")
    outbox.drain()
    (event,) = outbox.emitted()
    assert event.status == "discarded"
    assert "no active mail for the group 'paid'" in error("paid_1")


def test_a_mail_that_is_switched_off_before_the_retry_is_discarded(outbox, mail, post):
    mail()
    to("anna@example.com")
    post.refused["anna@example.com"] = "450 busy"
    emit("paid")
    outbox.drain(raise_exceptions=False)
    Mail.objects.update(is_active=False)
    retry(outbox)
    assert [event.status for event in outbox.emitted()] == ["done", "discarded"]


@pytest.mark.parametrize("recipients", [None, "", [], [None]])
def test_an_event_without_recipients_is_done_also_without_a_mail(outbox, post, recipients):
    mails.recipients("^paid$", name="none")(lambda event: recipients)
    emit("paid")
    assert outbox.drain() == 1
    assert outbox.emitted()[0].status == "done"


def test_a_recipient_that_is_refused_for_good_is_not_tried_again(outbox, mail, post):
    mail()
    to(*THREE)
    post.refused["bert@example.com"] = "550 no such user"
    emit("paid", "paid_1")
    outbox.drain()
    states = {event["spark_mail"]["to"]: event for event in outbox.emitted(mails.GROUP)}
    assert {to: event.status for to, event in states.items()} == {
        THREE[0]: "done",
        THREE[1]: "discarded",
        THREE[2]: "done",
    }
    assert "550 b'no such user'" in error(states[THREE[1]].key)


@pytest.mark.parametrize("answer", ["450 later", "550 never"])
@pytest.mark.parametrize("command", ["MAIL", "DATA", "."])
def test_what_is_refused_for_another_reason_is_tried_again(outbox, mail, post, command, answer):
    mail()
    to("anna@example.com")
    post.answers[command] = answer
    emit("paid")
    outbox.drain(raise_exceptions=False)
    assert [event.status for event in outbox.emitted()] == ["done", "pending"]
    post.answers.clear()
    retry(outbox)
    assert post.recipients == ["anna@example.com"]


@pytest.mark.parametrize(("sent", "status"), [(0, "pending"), (1, "done"), (None, "done")])
def test_a_backend_that_has_sent_nothing_is_asked_again(outbox, mail, monkeypatch, sent, status):
    monkeypatch.setattr(EmailMessage, "send", lambda *_, **__: sent)
    mail()
    to("anna@example.com")
    emit("paid")
    outbox.drain(raise_exceptions=False)
    assert outbox.emitted(mails.GROUP)[0].status == status


def test_a_pattern_for_all_groups_does_not_mail_about_mails(outbox, mail, post):
    mail(mails.GROUP)
    mail()
    to("anna@example.com", group="")
    emit("paid", "paid_1")
    outbox.drain()
    assert post.recipients == ["anna@example.com"]
    assert len(outbox.emitted()) == 2


# Hostile input


@pytest.mark.parametrize(
    "key",
    ["k" * 255, "ü" * 255, "<a@b> \r\n\tBcc: x", "\N{PILE OF POO}" * 200, "\u2028", "%s{{ key }}"],
)
def test_any_key_makes_a_message_id(outbox, mail, post, key):
    mail()
    to("anna@example.com")
    emit("paid", key)
    outbox.drain()
    ((_, got),) = post.mails
    assert re.fullmatch(r"<[0-9a-f]{32}@shop\.example>", got["Message-ID"])
    assert got["Message-ID"][1:33] in outbox.emitted(mails.GROUP)[0].key


def test_keys_that_begin_alike_are_told_apart(outbox, mail, post):
    mail()
    to("anna@example.com")
    emit("paid", "k" * 254 + "1")
    emit("paid", "k" * 254 + "2")
    outbox.drain()
    assert len({got["Message-ID"] for _, got in post.mails}) == 2


@pytest.mark.parametrize("evil", ["\n", "\r\n", "\r", "\x00", "\x0b", "\x85", "\u2028", "\x1f", "\x7f"])
def test_a_value_begins_no_header(outbox, mail, post, evil):
    mail(subject="Dear {{ name }}")
    to("anna@example.com")
    emit("paid", name=f"Anna{evil}Bcc: eve@example.com")
    outbox.drain()
    ((_, got),) = post.mails
    assert got["Subject"] == "Dear Anna Bcc: eve@example.com"
    assert got["Bcc"] is None


@pytest.mark.parametrize(
    "address",
    [
        "anna",
        "anna@",
        "@example.com",
        "anna@example.com\nBcc: eve@example.com",
        "anna@example.com, eve@example.com",
        "anna@example.com eve@example.com",
        "Anna\r\nBcc: <eve@example.com>",
        "all: anna@example.com;",
        "jörg@example.com",
        f"anna@{'x' * 300}",
        "(" * 5000,
        "anna@exa mple.com",
        "anna\x00@example.com",
        "\udc80@example.com",
        "x" * 5000,
    ],
)
def test_what_is_no_address_is_discarded_and_hinders_no_other(outbox, mail, post, address):
    mail()
    to(address, "bert@example.com")
    emit("paid", "paid_1")
    outbox.drain()
    assert post.recipients == ["bert@example.com"]
    assert sorted(event.status for event in outbox.emitted(mails.GROUP)) == ["discarded", "done"]


def test_values_may_have_any_names(outbox, mail, post):
    mail(body="{{ delay }} {{ headers }} {{ ordering_key }} {{ spark_mail.to }} {{ user }} {{ key }}")
    to("anna@example.com")
    spark_mail = {"to": ["eve@example.com"]}
    context = {"user": "Anna", "key": "own"}
    event = Event("paid", "paid_1", context=context, spark_mail=spark_mail)
    event._payload |= {"delay": "d", "headers": "h", "ordering_key": "o"}
    emit(event)
    outbox.drain()
    assert post.recipients == ["anna@example.com"]
    assert post.mails[0][1].get_content().strip() == "d h o anna@example.com Anna own"


def test_a_template_that_fails_is_tried_again_until_it_is_mended(outbox, mail, post):
    written = mail()
    Mail.objects.filter(pk=written.pk).update(body="{% load i18n %}")
    to("anna@example.com")
    emit("paid", amount=1)
    with pytest.raises(TemplateSyntaxError, match="load"):
        outbox.drain()
    assert outbox.emitted(mails.GROUP)[0].status == "pending"
    Mail.objects.filter(pk=written.pk).update(body="{{ amount|add:'1' }}")
    retry(outbox)
    assert post.mails[0][1].get_content().strip() == "2"
