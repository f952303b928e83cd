"""Mails are written in the admin, and seen with an event of the past before they are saved."""

import html
import re
from datetime import UTC, datetime

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from spark_outbox import emit
from spark_outbox.contrib.mails import templating
from spark_outbox.contrib.mails.models import Mail
from spark_outbox.models import OutboxEvent
from spark_outbox.operating import patience
from spark_outbox.testing import drain
from tests.admin.pages import get, words
from tests.challenges.models import Challenge, Donation
from tests.tools import make_challenge

pytestmark = pytest.mark.django_db
ROOT = "/admin/spark_outbox_mails/mail/"
BUTTON = 'formaction="'


def form(**values):
    usual = {
        "event_group": "paid",
        "is_active": "on",
        "from_email": "",
        "subject": "Thanks",
        "body": "T",
    }
    return {**usual, "html": "", **values}


def preview(client, place="", *, status=200, key="", **values):
    answer = client.post(f"{ROOT}{place}preview/", {**form(**values), "preview_key": key})
    assert answer.status_code == status
    return answer.text


def frame(page):
    (document,) = re.findall(r'<iframe sandbox srcdoc="([^"]*)"', page)
    return html.unescape(document)


# Writing


def test_a_mail_is_written(admin):
    assert admin.post(f"{ROOT}add/", form()).status_code == 302
    mail = Mail.objects.get()
    assert (mail.event_group, mail.subject, mail.is_active) == ("paid", "Thanks", True)
    assert "paid" in words(get(admin, root=ROOT, q="pai"))
    assert f'formaction="{ROOT}{mail.pk}/preview/"' in get(admin, f"{mail.pk}/change/", root=ROOT)


@pytest.mark.parametrize("name", ["subject", "body", "html"])
@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ a b }}", "Could not parse the remainder"),
        ("{{ order._state }}", "may not begin with underscores"),
        ("{% if %}", "Unexpected end of expression"),
        ("{{ a|nothing }}", "Invalid filter"),
        ("{% load i18n %}", "Invalid block tag"),
        ("{% include 'admin/base.html' %}", "Invalid block tag"),
        ("{% extends 'admin/base.html' %}", "Invalid block tag"),
        ("{% debug %}", "Invalid block tag"),
        ("{% url 'admin:index' %}", "Invalid block tag"),
        ("{% csrf_token %}", "Invalid block tag"),
        ("{% lorem 999999999 %}", "Invalid block tag"),
    ],
)
def test_a_template_with_an_error_is_an_error_of_its_field(admin, name, source, problem):
    answer = admin.post(f"{ROOT}add/", form(**{name: source}))
    assert problem in answer.context["adminform"].form.errors[name][0]
    assert not Mail.objects.exists()
    assert problem in words(preview(admin, **{name: source}))


def test_tags_that_are_nested_too_deeply_are_an_error_of_their_field(admin):
    source = "{% if a %}" * 5000 + "{% endif %}" * 5000
    assert "nested too deeply" in words(admin.post(f"{ROOT}add/", form(body=source)).text)
    assert not Mail.objects.exists()


@pytest.mark.parametrize("sender", ["shop", "a@example.com, b@example.com", "a@example.com\nBcc: b@c.d"])
def test_a_sender_is_an_address(admin, sender):
    assert "This is no address" in words(admin.post(f"{ROOT}add/", form(from_email=sender)).text)
    assert admin.post(f"{ROOT}add/", form(from_email="Shop <shop@example.com>")).status_code == 302


# The preview


def test_what_is_in_the_form_is_seen_with_the_latest_event_or_another(admin, mail):
    saved = mail(body="saved")
    emit("paid", "first", challenge=make_challenge("Run & <fun>"), name="Anna")
    emit("paid", "second", challenge=make_challenge("Walk"), name="")
    emit("posted", "third", name="Cleo")
    values = {
        "subject": "{{ challenge }}",
        "body": "{{ name }} {{ missing }} {{ challenge.user.username|default:'you' }} {{ recipient }}",
        "html": "<p>{{ challenge }}",
    }
    page = preview(admin, f"{saved.pk}/", **values)
    assert ">second</a>" in page
    assert "subject Walk" in words(page)
    assert "These variables are empty: missing, name" in words(page)
    assert "you anna@example.com" in page
    page = preview(admin, f"{saved.pk}/", key=" first ", **values)
    assert "subject Run & <fun>" in html.unescape(words(page))
    assert "These variables are empty: missing" in words(page)
    assert frame(page).endswith("<p>Run &amp; &lt;fun&gt;")
    saved.refresh_from_db()
    assert saved.body == "saved"
    preview(admin, event_group="posted", body="{{ name }}")
    assert Mail.objects.count() == 1


def test_a_loop_and_a_condition_are_watched_as_well(admin):
    emit("paid", people=[{"name": "Anna"}, {"name": None}])
    body = "{% for each in people %}{% if each %}{{ each.name }}{% endif %}{% endfor %}{{ name|upper }}"
    page = words(preview(admin, body=body))
    assert "These variables are empty: each.name, name|upper" in page
    assert "AnnaNone" in page


def test_what_the_html_asks_for_is_neither_run_nor_loaded(admin):
    emit("paid", name='"><script>alert(1)</script>')
    evil = '<img src="http://x/"><script>alert(2)</script>{{ name|safe }}'
    page = preview(admin, subject="{{ name }}", body="{{ name }}", html=evil)
    assert "<script>alert" not in page
    document = frame(page)
    assert document.startswith(
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
    )
    assert "<script>alert(2)</script>" in document


def test_there_is_no_frame_without_html(admin):
    emit("paid")
    assert "<iframe" not in preview(admin)


@pytest.mark.parametrize("redact", [["token"], "tests.contrib.mails.test_admin.without_token"])
def test_the_preview_shows_nothing_that_is_redacted(admin, settings, redact):
    settings.SPARK_OUTBOX = {"REDACT": redact}
    emit("paid", token="t0p", nested={"token": "t0p"}, name="Anna")
    page = preview(admin, body="{{ name }}: {{ token }} {{ nested.token }} {{ nested }}")
    assert "Anna: " in page
    assert "t0p" not in page


def without_token(document):
    return {"name": document["name"]} if document else {}


def test_values_of_an_event_are_redacted_in_the_events_of_its_mails(admin, settings, mail, own_registry):
    from spark_outbox.contrib import mails

    settings.SPARK_OUTBOX = {"REDACT": ["token"]}
    mail(body="{{ token }}")
    mails.recipients("^paid$", name="to")(lambda event: "anna@example.com")
    emit("paid", token="t0p")
    drain()
    event = OutboxEvent.objects.get(group=mails.GROUP)
    page = get(admin, f"{event.pk}/change/")
    assert "anna@example.com" in page
    assert "t0p" not in page


@pytest.mark.parametrize(
    ("payload", "values"),
    [
        ("{}", {"key": "other"}),
        ("{}", {"key": "nothing"}),
        ("{}", {"key": "\0"}),
        ("{}", {"key": "k" * 10_000}),
        ("{}", {"event_group": "nobody"}),
        ("[]", {}),
        ('"text"', {}),
        ('{"a": {"$": ["model", "shop.gone", 1, "default"]}}', {"body": "{{ a }}"}),
        ('{"a": {"$": ["model", "challenges.challenge", 1, "default"]}}', {"body": "{{ a }}"}),
        ('{"a": {"$": ["date", "never"]}}', {"body": "{{ a }}"}),
        ('{"a":' + "[" * 3000 + "]" * 3000 + "}", {}),
        ('{"a": 1}', {"body": "{{ a|date:a }}{% widthratio a a a %}{% for b in a %}{% endfor %}"}),
    ],
)
def test_an_event_that_can_not_be_shown_is_a_sentence(admin, payload, values):
    emit("others", "other")
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_event (key, event_group, payload) values ('key', 'paid', %s)",
            [payload],
        )
    assert 'class="errornote"' in preview(admin, **values)


def test_a_pruned_event_is_not_shown(admin):
    emit("paid", "key")
    OutboxEvent.objects.update(status="done", digest=1)
    assert "no such event" in words(preview(admin, key="key"))
    assert "no such event" in words(preview(admin))


def test_the_database_is_as_it_was_before(admin, monkeypatch):
    def donate(self):
        return Donation.objects.create(challenge=self, amount=1)

    monkeypatch.setattr(Challenge, "donate", donate, raising=False)
    emit("paid", challenge=make_challenge())
    assert "1 for" in preview(admin, body="{{ challenge.donate }} {{ challenge.delete }}")
    assert Challenge.objects.count() == 1
    assert Donation.objects.count() == 0


def test_a_preview_is_in_the_language_and_time_zone_in_which_the_mail_is_sent(admin):
    emit("paid", at=datetime(2026, 3, 1, 23, 30, tzinfo=UTC))
    with timezone.override("Asia/Tokyo"):
        page = admin.post(
            f"{ROOT}preview/", form(body="{{ at }}"), headers={"Accept-Language": "de"}
        ).text
    assert "March 1, 2026, 11:30 p.m." in page
    assert "Vorschau" in page


def test_a_query_of_a_template_ends_in_time(admin, monkeypatch):
    def wait(self):
        with connection.cursor() as cursor:
            cursor.execute("select pg_sleep(30)")

    monkeypatch.setattr(patience, "MILLISECONDS", 10)
    monkeypatch.setattr(Challenge, "wait", wait, raising=False)
    emit("paid", challenge=make_challenge())
    assert "statement timeout" in preview(admin, body="{{ challenge.wait }}")


LOOPS = "{% for a in s %}{% for b in s %}{% for c in s %}", "{% endfor %}" * 3


@pytest.mark.parametrize(
    "body",
    [
        "{{ s|center:9999999999 }}",
        "{{ s|ljust:wide }}",
        "{{ s|rjust:'1_000_000_000' }}",
        "{{ n|stringformat:'.999999999f' }}",
        "{{ n|floatformat:'999999999g' }}",
        "{{ s" + "|addslashes" * 40 + " }}",
        "{{ s|make_list" + "|pprint|make_list" * 20 + " }}",
        "{% with s=s|add:s %}" * 40 + "{{ s|length }}" + "{% endwith %}" * 40,
        "{{ long|make_list|join:long }}",
        "x".join(LOOPS),
        "{{ s }}".join(LOOPS),
    ],
)
def test_a_template_that_makes_too_much_is_a_sentence(admin, monkeypatch, body):
    monkeypatch.setattr(templating, "LONGEST", 100_000)
    emit("paid", s="\\'" * 100, n=1, long="x" * 10_000, wide=10**12)
    assert "TooMuch" in preview(admin, body=body)


@pytest.mark.parametrize("inside", ["", "{% if a == b %}{% endif %}"])
def test_a_template_that_takes_too_long_is_a_sentence(admin, monkeypatch, inside):
    monkeypatch.setattr(templating, "SECONDS", 0)
    emit("paid", s="s" * 10_000)
    assert "TooMuch" in preview(admin, body=inside.join(LOOPS))


def test_widths_of_a_usual_size_are_filled(admin):
    emit("paid", n=1.5)
    body = "{{ n|center:7 }}{{ n|floatformat:2 }}{{ n|floatformat:'2gu' }}{{ n|stringformat:'.1f' }}"
    assert "  1.5  1.501.501.5" in preview(admin, body=body)


def test_few_queries_are_needed(admin):
    for number in range(30):
        emit("paid", f"paid_{number}", challenge=make_challenge())
    with CaptureQueriesContext(connection) as queries:
        preview(admin, body="{{ challenge }}")
    assert len(queries) < 20


# Who may


def test_who_may_not_see_events_has_no_preview(client, member, mail):
    saved = mail()
    emit("paid", name="secret")
    client.force_login(member("change_mail", "view_mail", "add_mail"))
    for place in (f"{saved.pk}/change/", "add/"):
        assert BUTTON not in get(client, place, root=ROOT)
    for place in ("", f"{saved.pk}/"):
        preview(client, place, status=403)


def test_who_may_not_write_mails_has_no_preview(client, member, mail):
    saved = mail()
    client.force_login(member("view_mail", "view_outboxevent"))
    assert BUTTON not in get(client, f"{saved.pk}/change/", root=ROOT)
    for place in ("", f"{saved.pk}/"):
        preview(client, place, status=403)


def test_who_may_change_mails_and_see_events_has_a_preview(client, member, mail):
    saved = mail()
    emit("paid", name="Anna")
    client.force_login(member("change_mail", "view_outboxevent"))
    assert BUTTON in get(client, f"{saved.pk}/change/", root=ROOT)
    assert "Anna" in preview(client, f"{saved.pk}/", body="{{ name }}")


def test_another_site_can_not_ask_for_a_preview(member):
    client = Client(enforce_csrf_checks=True)
    client.force_login(member("add_mail", "view_outboxevent"))
    preview(client, status=403)


def test_the_preview_is_asked_for_by_the_form_alone(admin, client, mail):
    assert admin.get(f"{ROOT}preview/").status_code == 405
    preview(admin, "99999/", status=404)
    preview(admin, "x/", status=404)
    client.logout()
    preview(client, status=302)
