"""The lists of events and deliveries: pages, filters, search, and what they never do."""

import re

import pytest
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from spark_outbox import emit, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.worker.loop import Worker
from tests.admin.pages import DELIVERIES, EVENTS, get, link, listed, words
from tests.tools import HOUR

pytestmark = pytest.mark.django_db


@pytest.fixture
def shop(own_registry):
    """Events in each state."""

    def handle(event):
        if "error" in event:
            raise ValueError(event["error"])

    handler("^(order|mail)$", name="shop.mail", max_attempts=1)(handle)
    handler("^again$", name="shop.again", backoff=HOUR)(handle)
    emit("order", "order_1")
    emit("order", "order_10", error="No such user 17")
    emit("mail", "mail_1", error="refused")
    emit("again", "again_1", error="not yet")
    emit("strange", "strange_1")
    Worker().drain()
    emit("order", "order_2")
    OutboxEvent.objects.filter(key="order_2").update(status="discarded")
    emit("order", "order_3", delay=HOUR)


def found(client, q="", root=EVENTS, **query):
    return listed(get(client, root=root, **({"q": q} if q else {}), **query))


def test_the_list_has_the_latest_first(admin, shop):
    html = get(admin)
    assert listed(html) == [
        "order_3",
        "order_2",
        "strange_1",
        "again_1",
        "mail_1",
        "order_10",
        "order_1",
    ]
    states = ["Pending", "Discarded", "Unhandled", "Pending", "Failed", "Failed", "Done"]
    assert listed(html, "state") == states
    assert "ValueError: refused" in words(html)
    assert "These are all." in words(html)
    assert "admin/css/changelists.css" in html


def test_an_empty_list_is_a_page(admin, own_registry):
    assert listed(get(admin)) == []
    assert listed(get(admin, root=DELIVERIES)) == []
    assert "0 found." in words(get(admin, q="error:x"))


def test_pages_go_on_from_an_id(admin, own_registry, monkeypatch):
    monkeypatch.setattr("spark_outbox.admin.base.LookingAdmin.list_per_page", 3)
    for number in range(8):
        emit("g", f"key {number}")
    html = get(admin)
    pages = [listed(html)]
    assert link(html, "Newer") is None
    while older := link(html, "Older"):
        html = get(admin, older)
        pages.append(listed(html))
    assert pages == [
        ["key 7", "key 6", "key 5"],
        ["key 4", "key 3", "key 2"],
        ["key 1", "key 0"],
    ]
    html = get(admin, link(html, "Newer"))
    assert listed(html) == ["key 4", "key 3", "key 2"]
    html = get(admin, link(html, "Newer"))
    assert listed(html) == ["key 7", "key 6", "key 5"]
    assert link(html, "Newer") is None


def test_found_events_have_pages_as_well(admin, shop, monkeypatch):
    monkeypatch.setattr("spark_outbox.admin.base.LookingAdmin.list_per_page", 1)
    html = get(admin, q="group:order")
    assert listed(html) == ["order_3"]
    assert "4 found." in words(html)
    html = get(admin, link(html, "Older"))
    assert listed(html) == ["order_2"]
    assert listed(get(admin, link(html, "Newer"))) == ["order_3"]
    assert "before" not in link(html, "Done")  # a filter begins with the first page


@pytest.mark.parametrize(
    ("q", "keys"),
    [
        ("order_1", ["order_1"]),
        ("order_1*", ["order_10", "order_1"]),
        ("order", ["order_3", "order_2", "order_10", "order_1"]),
        ("key:order_3", ["order_3"]),
        ("nothing", []),
        ("group:order", ["order_3", "order_2", "order_10", "order_1"]),
        ("group:ord", []),
        ("handler:shop.mail", ["mail_1", "order_10"]),
        ("handler:shop.again", ["again_1"]),
        ("error:no such user 17", ["order_10"]),
        ("error:refused group:mail", ["mail_1"]),
        ("error:refused group:order", []),
        ("order handler:shop.mail", ["order_10"]),
        ("order_ error:user", ["order_10"]),
        ("a\x00b", []),
        ("group:", ["order_3", "order_2", "strange_1", "again_1", "mail_1", "order_10", "order_1"]),
    ],
)
def test_search(admin, shop, q, keys):
    assert found(admin, q) == keys


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ({"state": "pending"}, ["order_3", "again_1"]),
        ({"state": "failed"}, ["mail_1", "order_10"]),
        ({"state": "unhandled"}, ["strange_1"]),
        ({"state": "done"}, ["order_1"]),
        ({"state": "discarded"}, ["order_2"]),
        ({"state": "running"}, []),
        ({"state": "failed", "group": "mail"}, ["mail_1"]),
        ({"state": "failed", "q": "handler:shop.mail"}, ["mail_1", "order_10"]),
        ({"group": "again"}, ["again_1"]),
        ({"handler": "shop.again"}, ["again_1"]),
        ({"state": "pending", "group": "order"}, ["order_3"]),
        ({"state": "nonsense", "q": "mail_1"}, ["mail_1"]),
        ({"before": "x", "after": "9" * 30, "q": "mail_1"}, ["mail_1"]),
    ],
)
def test_filters(admin, shop, query, keys):
    assert found(admin, **query) == keys


def test_filters_are_the_states_the_groups_and_the_registered_handlers(admin, shop):
    html = get(admin)
    offered = re.findall(r'<a href="\?(state|group|handler)=([^"&]*)"', html)
    assert [value for name, value in offered if name == "group"] == [
        "again",
        "mail",
        "order",
        "strange",
    ]
    assert [value for name, value in offered if name == "handler"] == ["shop.again", "shop.mail"]
    states = ["pending", "done", "failed", "unhandled", "running", "discarded"]
    assert [value for name, value in offered if name == "state"] == states
    assert "group=long+gone" in get(admin, group="long gone")


def test_what_fails_without_a_delivery_is_found_by_its_error(admin, own_registry):
    emit("g", "bad")
    OutboxEvent.objects.update(status="failed", last_error="Traceback:\n  …\nNotSettled: a trigger")
    html = get(admin, q="error:notsettled")
    assert (listed(html), listed(html, "error")) == (["bad"], ["NotSettled: a trigger"])


@pytest.mark.parametrize("root", [EVENTS, DELIVERIES])
@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ({}, ["b 1", "a 2", "a 1"]),
        ({"handler": "h"}, ["a 2", "a 1"]),
        ({"q": "a 1"}, ["a 1"]),
        ({"q": "a"}, ["a 2", "a 1"]),
        ({"q": "c 1"}, []),
        ({"q": "error:no 2"}, ["b 1"]),
        ({"state": "failed", "group": "order"}, ["b 1", "a 2", "a 1"]),
        ({"state": "pending"}, []),
    ],
)
def test_events_and_deliveries_are_found_by_the_kind_of_error(admin, fail, root, query, keys):
    fail("a", handler="h", error="Error: no 1", number=2)
    fail("b", handler="i", error="Error: no 2")
    fail("c", handler="h", error="Error: no")
    fail("d", handler="h", error="Error: no 1")
    Delivery.objects.filter(event__key="d 1").update(status="done")  # its error is a former one
    assert found(admin, root=root, fingerprint="Error: no #", **query) == keys


def test_a_sample_that_is_not_all_says_so(admin, own_registry, monkeypatch, fail):
    monkeypatch.setattr("spark_outbox.store.listing.LOOKED_AT", 100)
    fail(number=120)
    text = words(get(admin, state="failed"))
    assert "100 found. Only 100 were looked at, and there may be others: narrow the search." in text
    assert "Only" not in words(get(admin, q="key 7"))
    assert found(admin, "key 7") == ["key 7"]
    assert "Only 100 were looked at" in words(get(admin, q="key*"))
    assert "Only" not in words(get(admin, q="key 12*"))


@pytest.mark.parametrize(("collation", "says_more"), [("C", False), ("en-x-icu", True)])
def test_in_the_order_of_a_language_a_full_piece_is_not_all(
    admin, monkeypatch, fail, collation, says_more
):
    """There `aa` comes after `A`, and before `Ab`."""
    with connection.cursor() as cursor:
        cursor.execute("select from pg_collation where collname = %s", [collation])
        if cursor.fetchone() is None:
            pytest.skip("the server has no collations of languages")
        cursor.execute(
            f'create temp view spark_outbox_events as select id, key collate "{collation}" as key, '
            "event_group, status, attempts, available_at, ordering_key, created_at, finished_at, "
            "last_error, digest is not null as is_pruned from spark_outbox_event"
        )
    monkeypatch.setattr("spark_outbox.store.listing.LOOKED_AT", 20)
    fail("Ab")
    fail("aa", number=12)
    fail("b", number=15)
    for root in (EVENTS, DELIVERIES):
        text = words(get(admin, root=root, q="A"))
        assert ("0 found. Only" in text) == says_more
        assert ("1 found." in text) != says_more


def test_pruned_events_are_found_by_their_keys(admin, own_registry):
    emit("g", "pruned")
    OutboxEvent.objects.update(status="done", digest=5, finished_at="2026-01-01T00:00Z", payload={})
    assert listed(get(admin, q="pruned"), "state") == ["Done, pruned"]
    assert found(admin, state="done") == []


def test_deliveries_have_a_list(admin, shop):
    html = get(admin, root=DELIVERIES)
    assert listed(html, "of") == ["shop.again", "shop.mail", "shop.mail"]
    assert listed(html) == ["again_1", "mail_1", "order_10"]
    assert "ValueError: No such user 17" in words(html)


@pytest.mark.parametrize(
    ("q", "query", "keys"),
    [
        ("order_10", {}, ["order_10"]),
        ("order", {}, ["order_10"]),
        ("handler:shop.mail", {}, ["mail_1", "order_10"]),
        ("error:NOT YET", {}, ["again_1"]),
        ("group:mail", {}, ["mail_1"]),
        ("", {"state": "failed"}, ["mail_1", "order_10"]),
        ("", {"state": "pending"}, ["again_1"]),
        ("", {"state": "running"}, []),
        ("", {"handler": "shop.again"}, ["again_1"]),
        ("nothing", {}, []),
    ],
)
def test_deliveries_are_searched_and_filtered(admin, shop, q, query, keys):
    assert found(admin, q, root=DELIVERIES, **query) == keys


def test_a_delivery_has_a_page(admin, shop):
    delivery = Delivery.objects.get(event__key="order_10")
    text = get(admin, f"{delivery.id}/change/", root=DELIVERIES)
    assert "ValueError: No such user 17" in words(text)
    assert f'href="{EVENTS}{delivery.event_id}/change/"' in text
    assert "Traceback (most recent call last)" in text
    assert get(admin, f"{delivery.id}/history/", root=DELIVERIES)
    for nothing in ("0", "x", "9" * 30):
        assert admin.get(f"{DELIVERIES}{nothing}/change/").status_code == 404


def test_a_delivery_has_a_page_in_an_admin_without_events(admin, shop, settings):
    delivery = Delivery.objects.get(event__key="order_10")
    settings.ROOT_URLCONF = "tests.admin.deliveries_alone"
    text = get(admin, f"{delivery.id}/change/", root=DELIVERIES)
    assert "ValueError: No such user 17" in words(text)
    assert "outboxevent" not in text


def test_autocomplete_finds_nothing_and_looks_for_nothing(admin, shop):
    asked = {"app_label": "spark_outbox", "model_name": "delivery", "field_name": "event", "term": "o"}
    with CaptureQueriesContext(connection) as queries:
        answer = admin.get("/admin/autocomplete/", asked)
    assert answer.json()["results"] == []
    assert not [query for query in queries if 'from "spark_outbox_event"' in query["sql"].lower()]


def test_ids_of_any_length_have_a_page_and_turn_pages(admin, own_registry):
    first = 5 * 10**18
    for number in range(60):
        OutboxEvent.objects.create(id=first + number, key=f"key_{number}", group="g")
    older = link(get(admin), "Older")
    assert listed(get(admin, older)) == [f"key_{n}" for n in reversed(range(10))]
    assert "key_0" in get(admin, f"{first}/change/")


def test_a_list_that_takes_too_long_is_no_error(admin, own_registry, monkeypatch):
    monkeypatch.setattr("spark_outbox.operating.patience.MILLISECONDS", 50)
    monkeypatch.setattr("spark_outbox.store.sampling.EVENTS", "select pg_sleep(600), 1")
    monkeypatch.setattr("spark_outbox.store.listing.GROUPS", "select pg_sleep(600)")
    assert "Narrow the filter, or try again later." in get(admin)


def test_lists_are_for_those_who_may_view_them(member):
    client = Client()
    for root, permission in ((EVENTS, "view_outboxevent"), (DELIVERIES, "view_delivery")):
        client.force_login(member(name=f"no {permission}"))
        assert client.get(root).status_code == 403
        client.force_login(member(permission, name=permission))
        assert client.get(root).status_code == 200


def test_nothing_can_be_added_edited_or_deleted(admin, own_registry):
    event = emit("g", "key")
    page = get(admin, f"{event.id}/change/")
    for html in (get(admin), page):
        assert f"{EVENTS}add/" not in html
        assert f"{EVENTS}{event.id}/delete/" not in html
    assert "submit" not in page.partition('id="content"')[2]
    for path in ("add/", f"{event.id}/delete/"):
        assert admin.get(f"{EVENTS}{path}").status_code == 403
        assert admin.post(f"{EVENTS}{path}").status_code == 403


def test_lists_never_count_nor_look_for_distinct_values(admin, shop, django_assert_max_num_queries):
    with django_assert_max_num_queries(40) as seen:
        get(admin, group="order")
        get(admin, root=DELIVERIES)
    ours = [query["sql"].lower() for query in seen.captured_queries if "spark_outbox_" in query["sql"]]
    assert len(ours) >= 4
    for sql in ours:
        assert not re.search(r'count\(\*\)[^)]*from "?spark_outbox', sql)
        assert "select distinct event_group" not in sql
