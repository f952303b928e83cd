"""Promise 18 on two million events: what the admin reads, in rows and pages, is bounded."""

import pytest
from django.db import connection

from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.store import listing
from spark_outbox.store.listing import Range, Wanted
from tests.admin.pages import DELIVERIES, EVENTS
from tests.dashboard import plans

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("many_events")]

SIZE = 50


WANTED = {
    "all": (Wanted(), 400),
    "key": (Wanted(key="many 1000000"), 100),
    "prefix": (Wanted(prefix="many 1"), 40_000),
    "rare prefix": (Wanted(prefix="failure 77"), 40_000),
    "done": (Wanted(state="done"), 40_000),
    "pending": (Wanted(state="pending"), 40_000),
    "failed": (Wanted(state="failed"), 40_000),
    "running": (Wanted(state="running"), 40_000),
    "discarded": (Wanted(state="discarded"), 40_000),
    "group": (Wanted(group="group 3"), 40_000),
    "group and state": (Wanted(group="broken", state="failed"), 40_000),
    "handler": (Wanted(handler="handler 1"), 70_000),
    "error": (Wanted(error="Error: y"), 70_000),
    "no error": (Wanted(error="nowhere"), 70_000),
    "kind": (Wanted(handler="handler 1", fingerprint="Error: y", state="failed"), 70_000),
    "kind of any handler": (Wanted(fingerprint="Error: y"), 70_000),
    "no kind": (Wanted(fingerprint=""), 200),
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("kind", ["events", "deliveries"])
def test_lists_are_read_off_indexes_up_to_a_bound(kind, name):
    wanted, most = WANTED[name]
    sql = getattr(listing, f"{kind}_sql")(wanted, Range()).sql
    pages, scans = plans.explained(listing.IN_ORDER, sql, listing.params(wanted, Range(), SIZE))
    assert pages < most
    assert "Seq Scan" not in scans
    assert "Bitmap Heap Scan" not in scans


@pytest.mark.parametrize("where", [Range(before=1_000_000), Range(after=1_000_000), Range(before=60)])
def test_a_page_in_the_middle_costs_as_much_as_the_first(where):
    sql = listing.events_sql(Wanted(), where).sql
    pages, scans = plans.explained(listing.IN_ORDER, sql, listing.params(Wanted(), where, SIZE))
    assert pages < 200
    assert scans == {"Index Scan"}


def test_groups_are_read_from_one_to_the_next():
    pages, scans = plans.explained(listing.IN_ORDER, listing.GROUPS, {})
    assert pages < 2000
    assert "Seq Scan" not in scans


def rows_read():
    with connection.cursor() as cursor:
        cursor.execute(
            "select sum(seq_tup_read + idx_tup_fetch) from pg_stat_xact_user_tables "
            "where relname like 'spark_outbox_%'"
        )
        return int(cursor.fetchone()[0])


@pytest.mark.parametrize("root", [EVENTS, DELIVERIES])
@pytest.mark.parametrize(
    "query",
    [
        "",
        "?before=1000000",
        "?q=many+5",
        "?q=many*",
        "?q=handler:handler+1",
        "?q=error:y",
        "?q=group:group+1",
        "?state=done",
        "?state=failed&group=broken",
        "?handler=handler+1&state=failed",
    ],
)
def test_pages_read_a_bounded_number_of_rows(admin, root, query):
    before = rows_read()
    assert admin.get(f"{root}{query}").status_code == 200
    assert rows_read() - before < 100_000  # of two million, which the outbox may grow beyond


def test_what_is_done_to_events_reads_no_others(admin):
    event = OutboxEvent.objects.get(key="failure 5")
    delivery = Delivery.objects.get(event=event)
    before = rows_read()
    for path in ("change/", "payload.json", "history/"):
        assert admin.get(f"{EVENTS}{event.id}/{path}").status_code == 200
    assert admin.get(f"{DELIVERIES}{delivery.id}/change/").status_code == 200
    assert admin.get(f"{EVENTS}retry/?ids={event.id}").status_code == 200
    assert admin.post(f"{EVENTS}retry/", {"ids": event.id}).status_code == 302
    assert rows_read() - before < 50_000


def test_the_list_says_about_how_many_there_are(admin):
    text = admin.get(EVENTS).text
    about = int(text.partition("About ")[2].partition(" in all")[0].replace(",", ""))
    assert 1_900_000 < about < 2_200_000
