"""The dashboard's pages: who may see them, what they show, and what they do."""

import re
from html import unescape
from urllib.parse import urlencode

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test import Client
from django.utils import timezone

from spark_outbox import emit, handler
from spark_outbox.dashboard.access import alias
from spark_outbox.models import Delivery, OutboxEvent, Pause
from spark_outbox.operating.glance import glance
from spark_outbox.store import triaging
from spark_outbox.worker.loop import Worker
from tests.tools import HOUR, connect, statuses, wait_until_asleep, worker_thread

pytestmark = pytest.mark.django_db

ROOT = "/admin/spark_outbox/dashboard/"
PAGES = ["", "fragment/", "triage/", "triage/fragment/", "triage/kind/", "explain/"]
REPAIRS = ["triage/retry/", "triage/discard/"]


def get(client, page="", **query):
    """Return the text of a page."""
    answer = client.get(f"{ROOT}{page}", query)
    assert answer.status_code == 200
    return answer.text


def tiles(html):
    """Return the numbers at the top."""
    found = re.findall(r'<dd data-tile="(\w+)">(?:<a [^>]*>)?([^<]*)<', html)
    return {name: value for name, value in found if value != "0"}


def words(html):
    """Return the text without its tags."""
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def kind(handler="shop.mail", fingerprint="ValueError: no"):
    return {"handler": handler, "fingerprint": fingerprint}


# Who


@pytest.mark.parametrize("page", [*PAGES, *REPAIRS])
def test_nobody_sees_a_page_without_the_permission(member, page):
    client = Client()
    assert client.get(ROOT + page).status_code == 302  # to the login
    client.force_login(member("view_outboxevent", "retry_outboxevent", "discard_outboxevent"))
    assert client.get(ROOT + page).status_code == 403


@pytest.mark.parametrize("page", PAGES)
def test_who_may_view_the_dashboard_sees_all_pages_and_no_way_to_change_anything(member, fail, page):
    fail()
    client = Client()
    client.force_login(member("view_dashboard"))
    html = get(client, page, **kind())
    assert "triage/retry/" not in html
    assert "triage/discard/" not in html
    for repair in REPAIRS:
        assert client.post(ROOT + repair, kind() | {"why": "so"}).status_code == 403
    assert statuses() == {"key 1": "failed"}


def test_each_action_has_a_permission_of_its_own(member, fail):
    fail()
    client = Client()
    client.force_login(member("view_dashboard", "retry_outboxevent"))
    html = get(client, "triage/")
    assert "triage/retry/?" in html
    assert "triage/discard/" not in html
    assert client.post(ROOT + "triage/discard/", kind() | {"why": "so"}).status_code == 403
    assert client.post(ROOT + "triage/retry/", kind()).status_code == 200
    assert statuses() == {"key 1": "pending"}


def test_a_post_needs_a_token(member, fail):
    fail()
    client = Client(enforce_csrf_checks=True)
    client.force_login(member("view_dashboard", "retry_outboxevent"))
    assert client.post(ROOT + "triage/retry/", kind()).status_code == 403
    assert statuses() == {"key 1": "failed"}


def test_where_the_outbox_can_only_be_read_nothing_is_offered(admin, fail):
    fail()
    assert "triage/retry/?" in get(admin, "triage/")
    with connection.cursor() as cursor:
        cursor.execute("set transaction_read_only = on")
    assert "triage/retry/?" not in get(admin, "triage/")
    answer = admin.get(ROOT + "triage/retry/", kind())
    assert answer.status_code == 403
    assert "can only be read here" in answer.text


def test_the_admin_lists_the_dashboard(admin):
    assert f'href="{ROOT}"' in admin.get("/admin/").text


# At a glance


def test_an_empty_outbox_has_a_dashboard(admin, own_registry):
    html = get(admin)
    assert tiles(html) == {}
    assert "There are no events." in html
    assert "0 worker processes are there." in html
    assert "Start one: manage.py spark_worker." in html


@pytest.fixture
def some_events(own_registry):
    """One event of each kind."""

    def handle(event):
        if "error" in event:
            raise ValueError(event["error"])

    handler("^(order|mail)$", name="shop.mail", max_attempts=1)(handle)
    handler("^(again)$", name="shop.again", backoff=HOUR)(handle)
    emit("order", "fine")
    emit("order", "bad", error="no such user")
    emit("again", "again", error="not yet")
    emit("strange", "strange")
    Worker().drain()
    emit("order", "new")
    emit("mail", "later", delay=HOUR)
    Pause.objects.create(kind="group", name="mail", why="the server moves")


def test_the_dashboard_has_the_numbers(admin, some_events):
    html = get(admin)
    assert tiles(html) == {
        "ready": "1",
        "delayed": "1",
        "retrying": "1",
        "failed": "1",
        "unhandled": "1",
        "done_last_hour": "1",
        "late": "0 s",
    }
    text = words(html)
    assert "1 critical, 3 warnings: workers, failed, unhandled, pauses" in text
    assert "In the last hour 6 events were emitted and 1 done" in text
    assert 'data-summary="1 critical, 3 warnings: workers, failed, unhandled, pauses. 1 event' in html
    assert "Group mail : since" in text
    assert "the server moves" in text
    assert "How long simple successes took is not stored." in text
    assert "shop.again" in text
    order = row_of(html, 'scope="row">order<')
    assert order["done a minute"] == "0.0"
    assert order["p50"].endswith((" ms", " s"))
    assert not re.search(r"\d", row_of(html, 'scope="row">again<')["p50"])  # it is not done


def test_the_fragment_is_the_part_of_the_page_that_changes(admin, some_events):
    fragment = get(admin, "fragment/")
    assert "<html" not in fragment
    assert tiles(fragment) == tiles(get(admin))


def test_an_open_circuit_is_shown(admin, own_registry):
    event = emit("g", "key", delay=HOUR)
    error = "spark_outbox: not called, its circuit is open"
    Delivery.objects.create(event_id=event.id, handler="shop.mail", error=error)
    assert "open: 1 wait" in words(get(admin))
    assert "The circuit of shop.mail is open" in words(get(admin, "triage/"))
    assert "Nothing fails." in get(admin, "triage/")


@pytest.mark.django_db(transaction=True)
def test_the_dashboard_has_the_workers_and_what_keeps_snapshots(admin, own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    with connect(autocommit=False) as other, worker_thread(groups="^order"):
        wait_until_asleep()
        other.execute("select txid_current()")
        text = words(get(admin))
    assert re.search(r":\d+ on watch \d+ s . \^order", text)
    assert "select pg_terminate_backend(" in text


def test_the_environment_is_shown(admin, settings):
    settings.SPARK_OUTBOX = {}
    assert "spark-environment" not in get(admin)
    settings.SPARK_OUTBOX = {"ENVIRONMENT": "Production <eu>"}
    html = get(admin)
    assert '<p class="spark-environment is-production">' in html
    assert "<title>[Production &lt;eu&gt;] Dashboard" in html


def test_a_database_that_is_too_slow_is_no_error(admin, monkeypatch):
    monkeypatch.setattr("spark_outbox.operating.patience.MILLISECONDS", 50)
    monkeypatch.setattr("spark_outbox.store.viewing.STATUS", "select pg_sleep(600)")
    for page in ("", "fragment/"):
        assert "did not answer in time" in get(admin, page)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("role", ["viewer", "operator"])
def test_each_role_that_sees_events_has_a_dashboard(logins, admin, some_events, fail, role):
    fail()
    OutboxEvent.objects.filter(key="fine").update(finished_at=timezone.now())
    with logins.django(role):
        shown = [get(admin, page, **kind(), key="fine") for page in PAGES]
        done = glance(using="default").flows
    assert tiles(shown[0])["failed"] == "2"
    assert sum(flow.done for flow in done.minutes) == 1


# Triage


def row_of(html, fingerprint):
    """Return the cells of a kind of failure, by their labels."""
    (row,) = [row for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL) if fingerprint in row]
    return {label: words(cell) for label, cell in re.findall(r'data-label="(.*?)"[^>]*>(.*?)</td>', row)}


WINDOWS = ("1 h", "3 h", "24 h", "3 d", "7 d")


def test_failures_are_counted_by_window(admin, fail):
    for age in (0, 2, 10, 48, 100, 24 * 30):
        fail(f"old {age}", age=age * HOUR)
    fail("another", error="KeyError: 'anna'", number=3)
    html = get(admin, "triage/")
    found = row_of(html, "ValueError: no")
    assert {name: found[name] for name in (*WINDOWS, "failed", "first seen")} == {
        "1 h": "1",
        "3 h": "2",
        "24 h": "3",
        "3 d": "4",
        "7 d": "5",
        "failed": "6",
        "first seen": "30 d ago",
    }
    assert row_of(html, "KeyError: *")["failed"] == "3"
    assert "2 kinds of failures." in html


def test_more_than_are_counted_are_said_to_be_more(admin, fail):
    fail(number=triaging.COUNTED + 1)
    assert row_of(get(admin, "triage/"), "ValueError: no")["1 h"] == "5,000+"


@pytest.mark.django_db(transaction=True)
def test_what_was_first_seen_since_the_release_is_new(admin, fail, own_registry):
    fail("old", error="OldError: no", age=HOUR)
    fail("again", error="AgainError: no", age=HOUR)
    with worker_thread():
        wait_until_asleep()
        fail("new", error="NewError: no")
        again = Delivery.objects.filter(error="AgainError: no")
        again.update(attempts=2, attempted_at=timezone.now())  # tried again since, but not new
        html = get(admin, "triage/")
    assert "3 kinds of failures, 1 new." in html
    assert re.findall(r"\w+Error: no(?=</a> <strong)", html) == ["NewError: no"]
    assert " new." not in get(admin, "triage/")  # without workers nobody knows


def test_a_kind_of_failure_has_its_events_and_a_traceback(admin, fail):
    fail("old", age=60, traceback="the old one")
    fail("new", traceback="Traceback: the new one")
    html = get(admin, "triage/kind/", **kind())
    assert "Traceback: the new one" in html
    assert "the old one" not in html
    assert re.findall(r">(\w+ 1)</a></th>", html) == ["new 1", "old 1"]
    assert "2 events have failed for good" in html
    assert "Nothing fails so any more." in get(admin, "triage/kind/", **kind("other"))


def test_what_handlers_write_is_text(admin, fail):
    evil = "<script>alert(1)</script>&\"'"
    name = f"x{evil}"
    fail(name, handler=name, error=f"ValueError: {evil}", traceback=name)
    fingerprint = triaging_fingerprint(f"ValueError: {evil}")
    pages = [
        get(admin),
        get(admin, "triage/"),
        get(admin, "triage/kind/", handler=name, fingerprint=fingerprint),
        get(admin, "triage/discard/", handler=name, fingerprint=fingerprint),
        get(admin, "explain/", key=f"{name} 1"),
    ]
    for html in pages:
        assert "<script>alert" not in html
        assert "&lt;script&gt;alert" in html
    for page in ("triage/kind/", "explain/", "triage/retry/"):
        get(admin, page, handler="a\x00b", fingerprint="\x00", key="\x00a")


def triaging_fingerprint(error):
    with connection.cursor() as cursor:
        cursor.execute("select spark_outbox_fingerprint(%s)", [error])
        return cursor.fetchone()[0]


# Repair


def hidden(html):
    """Return the fields by which a repair goes on."""
    part = html[html.index("data-part") :]
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', part))


def repair(client, action, **fields):
    """Take all steps; return how many there were, and the last page."""
    steps, given = 0, kind() | fields
    while True:
        answer = client.post(f"{ROOT}triage/{action}/", given)
        assert answer.status_code == 200
        steps += 1
        if "data-finished" in answer.text:
            return steps, answer.text
        given = kind() | fields | hidden(answer.text)


def test_a_preview_counts_and_changes_nothing(admin, fail):
    fail(number=3)
    html = get(admin, "triage/retry/", **kind())
    assert "3 events get all their attempts again." in html
    assert "No event has failed so" in get(admin, "triage/retry/", **kind("other"))
    assert set(statuses().values()) == {"failed"}


def test_a_kind_is_retried_step_by_step(admin, fail, monkeypatch):
    monkeypatch.setattr(triaging, "NEXT", triaging.NEXT.replace("limit 1000", "limit 4"))
    monkeypatch.setattr(triaging, "PIECE", 4)
    fail(number=10)
    fail("other", error="KeyError: no")
    steps, html = repair(admin, "retry", total="10")
    assert steps == 3
    assert "10 events are retried." in html
    assert "That was all." in html
    assert OutboxEvent.objects.filter(status="pending").count() == 10
    assert statuses()["other 1"] == "failed"
    assert Delivery.objects.filter(status="pending", attempts=0).count() == 10
    entries = LogEntry.objects.order_by("id")
    assert [entry.change_message for entry in entries] == [
        "Retried 4 events.",
        "Retried 4 events.",
        "Retried 2 events.",
    ]
    assert {entry.object_repr for entry in entries} == {"shop.mail: ValueError: no"}
    assert {entry.user.username for entry in entries} == {"boss"}


def test_what_fails_again_meanwhile_is_not_retried_for_ever(admin, fail, monkeypatch):
    monkeypatch.setattr(triaging, "NEXT", triaging.NEXT.replace("limit 1000", "limit 2"))
    monkeypatch.setattr(triaging, "PIECE", 2)
    fail(number=4, age=60)
    answer = admin.post(f"{ROOT}triage/retry/", kind())
    with connection.cursor() as cursor:  # a worker came to them, and failed
        cursor.execute("update spark_outbox_event set status = 'failed' where status = 'pending'")
        cursor.execute(
            "update spark_outbox_delivery set status = 'failed', attempted_at = clock_timestamp() "
            "where status = 'pending'"
        )
    _, html = repair(admin, "retry", **hidden(answer.text))
    assert "4 events are retried." in html
    assert OutboxEvent.objects.filter(status="pending").count() == 2


def test_a_kind_is_discarded_with_a_reason(admin, fail):
    fail(number=2)
    assert admin.post(f"{ROOT}triage/discard/", kind() | {"why": " "}).status_code == 400
    assert set(statuses().values()) == {"failed"}
    _, html = repair(admin, "discard", why="the club has closed")
    assert "2 events are discarded." in html
    assert set(statuses().values()) == {"discarded"}
    assert "boss: the club has closed" in OutboxEvent.objects.first().last_error
    assert LogEntry.objects.get().change_message == "Discarded 2 events: the club has closed"


@pytest.mark.django_db(transaction=True)
def test_what_a_worker_holds_is_left_out(admin, fail):
    fail(number=2)
    with connect(autocommit=False) as other:
        other.execute("select from spark_outbox_event where key = 'key 1' for update")
        _, html = repair(admin, "retry")
    assert "1 event is retried." in html
    assert "1 was left out." in html
    assert "&#x27;key 1&#x27; is left out: a worker has it in hand." in html
    assert statuses() == {"key 1": "failed", "key 2": "pending"}


@pytest.mark.parametrize(
    "bad",
    [{"after": "x'; drop table"}, {"after": "9999-99-99 00:00:00+00"}, {"after_id": "x"}, {"until": ""}],
)
def test_a_place_that_is_none_is_refused(admin, fail, bad):
    fail()
    assert admin.post(f"{ROOT}triage/retry/", kind() | bad).status_code == 400


# Explain


def test_an_event_is_explained(admin, own_registry):
    emit("order", "order <1>")
    html = get(admin, "explain/", key="order <1>")
    assert "It is pending, in the group order" in html
    assert "No worker that can be seen is there." in html
    assert "There is no event with this key" in get(admin, "explain/", key="other")
    assert "spark-sentences" not in get(admin, "explain/")


# What pages are made of


def test_no_page_has_inline_scripts_or_styles(admin, fail):
    fail(traceback="Traceback")
    for page in [*PAGES, *REPAIRS]:
        html = get(admin, page, **kind(), key="key 1")
        assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=|javascript:", html)
        assert not re.search(r'(?:src|href)="(?:https?:)?//', html)


def test_links_to_events_are_for_those_who_may_see_them(member, fail):
    fail()
    client = Client()
    client.force_login(member("view_dashboard"))
    html = get(client, "triage/kind/", **kind())
    assert f'href="{ROOT}explain/?{urlencode({"key": "key 1"})}"' in html


def test_a_kind_leads_to_its_events_in_the_admin(admin, fail):
    pytest.importorskip("spark_outbox.admin.events", reason="the admin has no pages of events")
    fail(number=2)
    fail("other", error="KeyError: 1")
    html = get(admin, "triage/kind/", **kind())
    listed, event = (
        admin.get(unescape(re.search(rf'href="([^"]*)">{text}</a>', html)[1]))
        for text in ("All of them in the list of events", "key 1")
    )
    assert "key 1" in listed.text
    assert "key 2" in listed.text
    assert "other 1" not in listed.text
    assert "key 1" in event.text
    for link in re.findall(r'href="([^"]*outboxevent[^"]*)"', get(admin)):
        assert admin.get(unescape(link)).status_code == 200


@pytest.mark.parametrize(
    ("error", "fingerprint"),
    [
        ("RuntimeError: tool said error: 17", "RuntimeError: tool said error: #"),
        ("17", "#"),
        ("'17'", "*"),
        ("key:a handler:b state:c", "key:a handler:b state:c"),
        (" ошибка", " "),
        ("нет", ""),
    ],
)
def test_to_select_all_events_of_a_kind_takes_exactly_these(admin, fail, error, fingerprint):
    fail("of kind", error=error, number=2)
    others = ("ValueError: no", "error: 17", "RuntimeError: tool said error: 17 not", "17 '17'", "-")
    for number, other in enumerate(others):
        fail(f"other {number}", error=other)
    fail("handler", error=error, handler="shop.other")
    html = get(admin, "triage/kind/", **kind(fingerprint=fingerprint))
    url = unescape(re.search(r'href="([^"]*)">All of them in the list of events</a>', html)[1])
    listed = admin.get(url)
    assert "2 found." in listed.text
    chosen = listed.text.rpartition("kind of error")[2]
    without = re.search(r'href="([^"]*)"[^>]*>All</a>\s*</li>\s*<li class="selected', chosen)[1]
    assert "handler=shop.mail" in without
    assert "fingerprint" not in without
    asked = admin.post(url, {"action": "discard", "index": "0", "select_across": "1"}).text
    ids = re.search(r'name="ids" value="([^"]*)"', asked)[1]
    admin.post("/admin/spark_outbox/outboxevent/discard/", {"ids": ids, "why": "so"})
    discarded = {key for key, state in statuses().items() if state == "discarded"}
    assert discarded == {"of kind 1", "of kind 2"}


class EventsElsewhere:
    """A router that knows the outbox's tables by their names."""

    def db_for_write(self, model, **_):
        return "elsewhere" if model is OutboxEvent else None


def test_the_outbox_is_where_its_events_are(settings):
    settings.DATABASE_ROUTERS = [EventsElsewhere()]
    assert alias() == "elsewhere"
