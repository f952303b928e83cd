"""Retry, discard, replay and rehearse: who may, what is asked, and what is done."""

from asyncio import CancelledError

import pytest
from django.contrib.admin import site
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client, RequestFactory

from spark_outbox import emit, handler
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.operating import repair
from spark_outbox.worker.loop import Worker
from tests.admin.pages import EVENTS, field, get, words
from tests.challenges.models import Handled
from tests.tools import connect, note, status, statuses

pytestmark = pytest.mark.django_db

NAMES = ("retry", "discard", "replay", "rehearse")


def ids(*keys):
    found = OutboxEvent.objects.filter(key__in=keys) if keys else OutboxEvent.objects.all()
    return ",".join(map(str, found.order_by("id").values_list("id", flat=True)))


def post(client, name, *keys, **fields):
    answer = client.post(f"{EVENTS}{name}/", {"ids": ids(*keys), **fields}, follow=True)
    assert answer.status_code == 200
    return words(answer.text)


def chosen(client, name, *keys, query="", **fields):
    """Select events in the list, and an action."""
    data = {"action": name, "index": "0", "_selected_action": ids(*keys).split(","), **fields}
    answer = client.post(f"{EVENTS}{query}", data)
    assert answer.status_code == 200
    return answer.text


@pytest.fixture
def past(own_registry):
    """Events that are done, with a handler that writes and one that fails; and one that has failed."""

    @handler("^order$", name="shop.mail")
    def fail(event):
        Handled.objects.create(key=event.key, handler="mail")
        raise ValueError("no such user")

    own_registry.add_handler(note, group="^order$", name="shop.note")
    for key in ("order_1", "order_2"):
        emit("order", key)
    emit("other", "other_1")
    OutboxEvent.objects.update(status="done", finished_at="2026-01-01T00:00Z")


# Who may


@pytest.mark.parametrize("name", NAMES)
def test_each_action_has_a_permission_of_its_own(name, member, fail):
    fail()
    others = [f"{other}_outboxevent" for other in NAMES if other != name]
    client = Client()
    client.force_login(member("view_outboxevent", *others, name="others"))
    for answer in (
        client.get(f"{EVENTS}{name}/", {"ids": ids()}),
        client.post(f"{EVENTS}{name}/", {"ids": ids(), "why": "x", "handler": "shop.mail"}),
        client.post(EVENTS, {"action": name, "index": "0", "_selected_action": ids()}),
    ):
        assert answer.status_code == 403
    assert f'value="{name}"' not in get(client)
    assert f'href="{EVENTS}{name}/' not in get(client, f"{ids()}/change/")
    assert status("key 1") == "failed"
    assert not LogEntry.objects.exists()

    client.force_login(member("view_outboxevent", f"{name}_outboxevent", name="this"))
    assert get(client, f"{name}/", ids=ids())
    assert f'value="{name}"' in get(client)
    client.force_login(member(f"{name}_outboxevent", name="blind"))
    assert client.get(f"{EVENTS}{name}/", {"ids": ids()}).status_code == 403
    assert client.post(f"{EVENTS}{name}/", {"ids": ids(), "why": "x"}).status_code == 403


def test_those_who_may_only_look_are_offered_nothing(member, fail):
    fail()
    client = Client()
    client.force_login(member("view_outboxevent"))
    assert "action-select" not in get(client)
    assert 'name="action"' not in get(client)
    page = get(client, f"{ids()}/change/")
    assert not any(f"{EVENTS}{name}/" in page for name in NAMES)


def refuses(client):
    assert 'name="action"' not in get(client)
    page = get(client, f"{ids()}/change/")
    assert not any(f"{EVENTS}{name}/" in page for name in NAMES)
    for name in NAMES:
        for answer in (
            client.get(f"{EVENTS}{name}/", {"ids": ids()}),
            client.post(f"{EVENTS}{name}/", {"ids": ids(), "why": "x"}),
            client.post(EVENTS, {"action": name, "index": "0", "_selected_action": ids()}),
        ):
            assert answer.status_code == 403
            assert "can only be read here" in answer.text
    return True


def test_a_session_that_may_only_read_offers_nothing(admin, fail):
    fail()
    with connection.cursor() as cursor:
        cursor.execute("set local transaction_read_only = on")
    assert refuses(admin)


def test_a_replica_offers_nothing(admin, fail):
    fail()
    with connection.cursor() as cursor:  # no replica runs here: its function says so, all the same
        cursor.execute("create schema replica")
        cursor.execute(
            "create function replica.pg_is_in_recovery() returns boolean language sql as 'select true'"
        )
        cursor.execute("set local search_path = replica, pg_catalog, public")
    assert refuses(admin)


# What is asked


def test_a_preview_counts_and_changes_nothing(admin, fail):
    fail(number=3)
    emit("g", "running")
    OutboxEvent.objects.filter(key="running").update(status="running")
    html = chosen(admin, "retry")
    text = words(html)
    assert "3 events get all their attempts again." in text
    assert "key 1 order" in text
    assert "1 other is left out: Running: 1" in text
    assert field(html, "ids") == ids("key 1", "key 2", "key 3")
    assert set(statuses().values()) == {"failed", "running"}


def test_all_that_were_found_can_be_chosen(admin, fail):
    fail(number=120)
    fail("other", error="KeyError: no", number=2)
    query = "?q=error%3AValueError"
    html = chosen(admin, "retry", "key 1", query=query, select_across="1")
    assert "120 events get all their attempts again." in words(html)
    assert "and 100 more" in words(html)
    assert field(html, "back") == "q=error%3AValueError"
    text = words(
        admin.post(
            f"{EVENTS}retry/", {"ids": field(html, "ids"), "back": field(html, "back")}, follow=True
        ).text
    )
    assert "120 events are retried." in text
    assert [key for key, state in statuses().items() if state == "failed"] == ["other 1", "other 2"]


def test_a_list_of_all_can_not_be_chosen_as_a_whole(admin, fail):
    fail(number=3)
    answer = admin.post(EVENTS, {"action": "retry", "index": "0", "select_across": "1"}, follow=True)
    assert "Select events first." in words(answer.text)


@pytest.mark.parametrize("data", [{}, {"action": ""}, {"action": "delete_selected"}])
def test_what_is_no_action_does_nothing(admin, fail, data):
    fail()
    answer = admin.post(EVENTS, {"index": "0", "_selected_action": ids(), **data}, follow=True)
    assert answer.status_code == 200
    assert status("key 1") == "failed"


def test_nothing_fitting_is_said(admin, past):
    assert "There is no event to which this can be done." in words(get(admin, "retry/", ids=ids()))
    assert "There is no event to which this can be done." in post(admin, "retry")
    assert "There is no event to which this can be done." in words(get(admin, "retry/", ids="x,,-"))


def test_an_event_offers_what_fits_it(admin, past, fail):
    fail()

    def offered(key):
        page = get(admin, f"{ids(key)}/change/")
        return [name for name in NAMES if f'href="{EVENTS}{name}/?ids={ids(key)}"' in page]

    assert offered("order_1") == ["replay", "rehearse"]
    assert offered("key 1") == ["retry", "discard", "rehearse"]
    OutboxEvent.objects.filter(key="order_1").update(digest=1)
    assert offered("order_1") == []


# What is done


def log():
    return [
        (entry.object_repr, entry.change_message, entry.user.username)
        for entry in LogEntry.objects.order_by("id")
    ]


def test_events_are_retried_in_chunks(admin, fail, monkeypatch):
    monkeypatch.setattr(repair, "CHUNK_SIZE", 2)
    fail(number=5)
    assert "5 events are retried." in post(admin, "retry")
    assert set(statuses().values()) == {"pending"}
    assert set(Delivery.objects.values_list("status", "attempts")) == {("pending", 0)}
    assert log() == [(f"key {number}", "Retried.", "boss") for number in range(1, 6)]
    assert "Retried." in get(admin, f"{ids('key 1')}/history/")


def test_a_chunk_that_takes_too_long_leaves_those_before_it(admin, fail, monkeypatch):
    monkeypatch.setattr(repair, "CHUNK_SIZE", 2)
    fail(number=3)
    lock = "select key from spark_outbox_reopen(spark_outbox_lock(%s::bigint[], '{failed}'))"
    slow = (
        f"{lock}, pg_sleep(case when exists (select from spark_outbox_event where status = 'pending') "
    )
    monkeypatch.setattr("spark_outbox.store.repairing.RETRY_IDS", f"{slow} then 600 else 0 end)")
    monkeypatch.setattr("spark_outbox.operating.patience.MILLISECONDS", 1000)
    text = post(admin, "retry")
    assert "did not answer in time: the others are left alone" in text
    assert "2 events are retried. 1 was left out." in text
    assert statuses() == {"key 1": "pending", "key 2": "pending", "key 3": "failed"}
    assert len(log()) == 2


def test_events_are_discarded_with_a_reason(admin, fail):
    fail(number=2)
    assert "Say why." in post(admin, "discard", why=" ")
    assert set(statuses().values()) == {"failed"}
    assert "2 events are discarded." in post(admin, "discard", why="the club has closed")
    assert set(statuses().values()) == {"discarded"}
    assert "boss: the club has closed" in OutboxEvent.objects.first().last_error
    assert log()[0] == ("key 1", "Discarded: the club has closed", "boss")


def test_a_single_event_is_shown_afterwards(admin, fail):
    fail()
    answer = admin.post(f"{EVENTS}retry/", {"ids": ids()})
    assert answer["Location"] == f"{EVENTS}{ids()}/change/"


@pytest.mark.django_db(transaction=True)
def test_what_a_worker_holds_is_left_out(admin, fail):
    fail(number=2)
    with connect(autocommit=False) as other:
        other.execute("select from spark_outbox_event where key = 'key 1' for update")
        text = post(admin, "retry")
    assert "The event 'key 1' is left out: a worker has it in hand." in text
    assert "1 event is retried. 1 was left out." in text
    assert statuses() == {"key 1": "failed", "key 2": "pending"}


def test_events_are_replayed_to_one_handler(admin, past):
    html = get(admin, "replay/", ids=ids())
    assert "3 events are given to a handler once more." in words(html)
    assert "shop.note" in html
    assert "Choose a handler." in post(admin, "replay")
    assert "Choose a handler." in post(admin, "replay", handler="shop.unknown")
    assert "2 events are replayed. 1 was left out." in post(admin, "replay", handler="shop.note")
    assert statuses() == {"order_1": "pending", "order_2": "pending", "other_1": "done"}
    Worker().drain()
    assert set(Handled.objects.values_list("key", "handler")) == {
        ("order_1", "note"),
        ("order_2", "note"),
    }
    assert log()[0] == ("order_1", "Replayed to shop.note.", "boss")


def test_only_handlers_that_match_are_offered(admin, past):
    html = words(get(admin, "replay/", ids=ids("other_1")))
    assert "No handler of this process's code matches any of them." in html
    assert "There is no event to which" in post(admin, "replay", "other_1", handler="shop.note")
    assert status("other_1") == "done"


def test_a_rehearsal_writes_nothing(admin, past):
    before = list(OutboxEvent.objects.order_by("id").values())
    text = post(admin, "rehearse", handler="shop.note")
    assert "shop.note was called with 2 events. It did not fail. All of it was rolled back." in text
    assert "1 was left out." in text
    assert "challenges_handled 2" in text
    assert 'INSERT INTO "challenges_handled"' in text
    assert "2 queries" in text
    assert not Handled.objects.exists()
    assert not Delivery.objects.exists()
    assert list(OutboxEvent.objects.order_by("id").values()) == before
    assert log()[0] == ("order_1", "Rehearsed with shop.note.", "boss")


def test_a_rehearsal_shows_tracebacks(admin, past):
    OutboxEvent.objects.filter(key="order_1").update(status="failed")
    text = post(admin, "rehearse", "order_1", handler="shop.mail")
    assert "It failed on 1." in text
    assert "ValueError: no such user" in text
    assert "Traceback (most recent call last)" in text
    assert status("order_1") == "failed"
    assert not Handled.objects.exists()


@pytest.mark.parametrize("error", [SystemExit, CancelledError, GeneratorExit])
def test_whatever_a_handler_raises_is_reported(admin, past, own_registry, error):
    def leave(event):
        Handled.objects.create(key=event.key, handler="leave")
        raise error("enough")

    own_registry.add_handler(leave, group="^order$", name="shop.leave")
    text = post(admin, "rehearse", handler="shop.leave")
    assert "It failed on 2." in text
    assert "enough" in text
    assert not Handled.objects.exists()
    assert [entry[:2] for entry in log()] == [
        ("order_1", "Rehearsed with shop.leave."),
        ("order_2", "Rehearsed with shop.leave."),
    ]


def test_a_rehearsal_is_logged_even_if_it_ends_the_request(admin, past, own_registry):
    def interrupt(event):
        raise KeyboardInterrupt

    own_registry.add_handler(interrupt, group="^order$", name="shop.interrupt")
    with pytest.raises(KeyboardInterrupt):
        post(admin, "rehearse", "order_1", handler="shop.interrupt")
    assert log() == [("order_1", "Rehearsed with shop.interrupt.", "boss")]


def test_a_rehearsal_takes_a_few_events(admin, past, monkeypatch):
    monkeypatch.setattr("spark_outbox.admin.acting.REHEARSED", 1)
    assert "with the first 1 events" in words(get(admin, "rehearse/", ids=ids()))
    assert "was called with 1 event." in post(admin, "rehearse", handler="shop.note")


@pytest.mark.django_db(transaction=True)
def test_a_role_that_only_looks_sees_no_payload_and_is_offered_nothing(logins, fail, own_registry):
    fail()
    request = RequestFactory().get("/", {"q": "key"})
    request.user = User(username="boss", is_superuser=True, is_staff=True, is_active=True)
    pages = site.get_model_admin(OutboxEvent)
    event_id = ids()
    with logins.django("viewer"):
        listed = words(pages.changelist_view(request).render().text)
        shown = words(pages.change_view(request, event_id).render().text)
        refused = pages.act_view(request, "retry")
    assert "key 1" in listed
    assert "Action" not in listed
    assert "The payload can't be shown" in shown
    assert "ValueError: no" in shown
    assert not any(f"{name.capitalize()}…" in shown for name in NAMES)
    assert refused.status_code == 403


@pytest.mark.django_db(transaction=True)
def test_an_operator_s_role_can_do_all_but_rehearse(logins, admin, past, fail):
    fail(number=2)
    OutboxEvent.objects.filter(key="key 1").update(status="unhandled")
    with logins.django("operator"):
        shown = get(admin)
        event = get(admin, f"{ids('order_1')}/change/")
        assert "1 event is retried." in post(admin, "retry", "key 1")
        assert "1 event is discarded." in post(admin, "discard", "key 2", why="so")
        assert "2 events are replayed." in post(admin, "replay", handler="shop.note")
        refused = admin.post(f"{EVENTS}rehearse/", {"ids": ids("order_1"), "handler": "shop.note"})
    assert [name for name in NAMES if f'value="{name}"' in shown] == ["retry", "discard", "replay"]
    assert "replay/" in event
    assert "rehearse/" not in event
    assert refused.status_code == 403
    assert "may not read payloads" in refused.text
    assert statuses() == {
        "order_1": "pending",
        "order_2": "pending",
        "other_1": "done",
        "key 1": "pending",
        "key 2": "discarded",
    }
    assert len(log()) == 4


def test_a_slow_query_of_a_rehearsal_is_its_failure(admin, own_registry, monkeypatch):
    @handler("^order$", name="shop.slow")
    def slow(event):
        with connection.cursor() as cursor:
            cursor.execute("select pg_sleep(600)")

    emit("order", "order_1")
    monkeypatch.setattr("spark_outbox.operating.patience.MILLISECONDS", 50)
    text = post(admin, "rehearse", handler="shop.slow")
    assert "It failed on 1." in text
    assert "canceling statement due to statement timeout" in text


@pytest.mark.django_db(transaction=True)
def test_a_rehearsal_is_rolled_back_for_good(admin, past):
    text = post(admin, "rehearse", handler="shop.note")
    assert "It did not fail." in text
    assert not Handled.objects.exists()
    assert len(log()) == 2
