"""The page of one event."""

import json
import re
from datetime import timedelta

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from spark_outbox import emit, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.admin.pages import DELIVERIES, EVENTS, get, words
from tests.tools import HOUR, make_challenge

pytestmark = pytest.mark.django_db


def page(client, key="key", path="change/"):
    return get(client, f"{OutboxEvent.objects.get(key=key).id}/{path}")


def test_an_event_is_shown_whole(admin, own_registry):
    @handler("^order$", name="shop.mail", backoff=HOUR)
    def fail(event):
        raise ValueError("no such user")

    emit("order", "key", number=5, ordering_key="anna", headers={"trace": "abc"})
    Worker().drain()
    text = words(page(admin))
    assert "It is pending" in text  # spark_explain's sentences
    assert '{ "number": 5 }' in text
    assert '{ "trace": "abc" }' in text
    assert "ordering key anna" in text
    assert re.search(r"emitted .* shop.mail attempt 1: Pending, took [\d.,]+ ms, on worker \S+", text)
    assert "shop.mail next attempt" in text
    assert "Traceback (most recent call last)" in text


def test_an_event_that_is_done_at_once_has_a_timeline(admin, own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    emit("g", "key")
    Worker().drain()
    text = words(page(admin))
    assert re.search(r"emitted [-\d]+ [:\d]+ Done", text)
    assert "No delivery is stored" in text
    assert text.count("Headers") == 0


def test_the_timeline_is_in_order(admin, own_registry):
    now = timezone.now()
    event = emit("g", "key")
    OutboxEvent.objects.update(
        status="failed",
        created_at=now - timedelta(hours=3),
        available_at=now - timedelta(hours=2),
        finished_at=now,
    )
    Delivery.objects.create(
        event_id=event.id,
        handler="b",
        status="failed",
        attempts=3,
        attempted_at=now - timedelta(minutes=1),
        duration=timedelta(seconds=2),
        worker="w1",
    )
    Delivery.objects.create(
        event_id=event.id,
        handler="a",
        status="done",
        attempts=1,
        attempted_at=now - timedelta(minutes=2),
    )
    found = re.findall(r"<strong>(.*?)</strong>(.*?)</li>", page(admin))
    assert [(what, more.strip()) for what, more in found] == [
        ("emitted", ""),
        ("due", ""),
        ("a", "attempt 1: Done"),
        ("b", "attempt 3: Failed, took 2.00 s, on worker w1"),
        ("Failed", ""),
    ]


def test_an_event_that_was_discarded_before_it_was_due_is_not_due(admin, own_registry):
    emit("g", "key", delay=HOUR)
    said = r"</span> <strong>(.*?)</strong>"
    assert re.findall(said, page(admin)) == ["emitted", "due"]
    OutboxEvent.objects.update(status="discarded", finished_at=timezone.now())
    assert re.findall(said, page(admin)) == ["emitted", "Discarded"]


def test_model_instances_are_links_for_those_who_may_see_them(admin, member, own_registry):
    from django.contrib.auth.models import Group

    group = Group.objects.create(name="readers")
    challenge = make_challenge()
    OutboxEvent.objects.all().delete()
    emit("g", "key", group_of=[group], challenge=challenge)
    html = page(admin)
    assert f'<a href="/admin/auth/group/{group.pk}/change/">' in html
    assert "challenges.challenge" in html  # it is not in the admin, and no link
    assert html.count('<a href="/admin/challenges') == 0
    client = Client()
    client.force_login(member("view_outboxevent"))
    assert "/admin/auth/group/" not in page(client)
    assert "auth.group" in page(client)
    assert page(client)  # and the challenge need not be there
    Group.objects.all().delete()
    assert f"/admin/auth/group/{group.pk}/change/" in page(admin)


def test_a_large_payload_is_cut_and_there_is_all_of_it(admin, own_registry):
    numbers = list(range(20_000))
    event = emit("g", "a/ä", numbers=numbers)
    html = page(admin, "a/ä")
    assert "This is only the beginning." in html
    assert len(html) < 60_000
    answer = admin.get(f"{EVENTS}{event.id}/payload.json")
    assert json.loads(answer.text) == {"numbers": numbers}
    assert answer["Content-Type"] == "text/plain; charset=utf-8"
    assert answer["X-Content-Type-Options"] == "nosniff"
    assert "a%2F%C3%A4.payload.json" in answer["Content-Disposition"]
    assert json.loads(get(admin, f"{event.id}/headers.json")) == {}
    assert admin.get(f"{EVENTS}{event.id}/status.json").status_code == 404


def test_what_is_redacted_is_not_shown(admin, own_registry, settings):
    settings.SPARK_OUTBOX = {"REDACT": ["card"]}
    event = emit("g", "key", card="4711", order={"card": "4711", "number": 5})
    for text in (page(admin), get(admin, f"{event.id}/payload.json")):
        assert "4711" not in text
        assert "[redacted]" in text


def test_what_people_write_is_text(admin, own_registry):
    evil = "<script>alert(1)</script>&\"'"
    event = emit(evil, evil, value=evil, **{evil: {"$": ["model", evil, evil, evil]}})
    Delivery.objects.create(
        event_id=event.id, handler=evil, status="failed", error=evil, traceback=evil, worker=evil
    )
    pages = [
        get(admin),
        get(admin, q=evil, group=evil, handler=evil),
        page(admin, evil),
        get(admin, root=DELIVERIES),
        get(admin, f"{Delivery.objects.get().id}/change/", root=DELIVERIES),
        get(admin, f"discard/?ids={event.id}"),
    ]
    for html in pages:
        assert "<script>alert" not in html
        assert "&lt;script&gt;alert" in html


def test_odd_rows_have_pages(admin, own_registry):
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_event (id, key, event_group, payload, available_at, created_at) "
            "values (-5, 'odd', 'g', '[1e400, 1]', 'infinity', '-infinity'), "
            "(-6, 'deep', 'g', (repeat('[', 2000) || repeat(']', 2000))::jsonb, null, now())"
        )
    text = words(get(admin, "-5/change/"))
    assert "infinity" in text
    assert text.index("emitted") < text.index("due")
    assert "1e400" in text or "1000000" in text
    assert "deep" in get(admin, "-6/change/")
    assert "odd" in get(admin)
    for nothing in ("0", "x", "9" * 30):
        assert admin.get(f"{EVENTS}{nothing}/change/").status_code == 404


def test_a_page_is_for_those_who_may_view_events(member, own_registry):
    event = emit("g", "key")
    client = Client()
    client.force_login(member("view_delivery", "retry_outboxevent"))
    for path in ("change/", "payload.json", "history/"):
        assert client.get(f"{EVENTS}{event.id}/{path}").status_code == 403
    client.logout()
    assert client.get(f"{EVENTS}{event.id}/payload.json").status_code == 302


def test_an_event_that_takes_too_long_is_no_error(admin, own_registry, monkeypatch):
    event = emit("g", "key")
    monkeypatch.setattr("spark_outbox.operating.patience.MILLISECONDS", 50)
    monkeypatch.setattr("spark_outbox.store.viewing.DELIVERIES", "select pg_sleep(600)")
    for path in ("change/", "payload.json"):
        assert "did not answer in time" in get(admin, f"{event.id}/{path}")


def test_no_page_has_inline_scripts_or_styles(admin, own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    event = emit("g", "key")
    paths = ("", f"{event.id}/change/", *(f"{name}/?ids={event.id}" for name in ("retry", "discard")))
    for html in (*(get(admin, path) for path in paths), get(admin, root=DELIVERIES)):
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|javascript:", html)
        assert not re.search(r'(?:src|href)="(?:https?:)?//', html)
