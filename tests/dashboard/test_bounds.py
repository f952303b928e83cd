"""Promise 18 on two million events: what the dashboard reads, in rows and pages, is bounded."""

import pytest
from django.db import connection, transaction

from spark_outbox.operating.glance import glance
from spark_outbox.store import flowing, triaging
from spark_outbox.store.triaging import Kind, Place
from tests.dashboard import plans

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("many_events")]

KIND = Kind("handler 1", "Error: y")


@pytest.mark.parametrize(
    ("sql", "most"),
    [
        (flowing.ARRIVED, 25_000),  # 85 searches of about 22 steps, and up to 84,000 rows
        (flowing.DONE, 25_000),
        (flowing.WAITS, 25_000),
        (flowing.DURATIONS, 10_000),
        (triaging.FAILURES, 70_000),  # 6 kinds: 5,000 deliveries of each
    ],
    ids=["arrived", "done", "waits", "durations", "failures"],
)
def test_what_pages_show_is_read_off_indexes_up_to_a_bound(sql, most):
    pages, scans = plans.explained(triaging.IN_ORDER, sql, {}, but="_session")
    assert pages < most
    assert "Seq Scan" not in scans
    assert "Bitmap Heap Scan" not in scans


@pytest.mark.parametrize(
    ("sql", "most"),
    [
        (triaging.EXAMPLES, 200),
        (triaging.TRACEBACK, 20),
        (triaging.COUNT, 10_000),
        (triaging.NEXT, 2_500),
    ],
    ids=["examples", "traceback", "count", "next"],
)
def test_a_kind_of_failure_is_read_off_its_place_in_the_index(sql, most):
    pages, scans = plans.explained(
        triaging.IN_ORDER, sql, {**KIND._asdict(), **Place()._asdict()}, but="_session"
    )
    assert pages < most
    assert "Seq Scan" not in scans


def test_a_later_step_of_a_repair_reads_no_more_than_the_first():
    place, seen = Place(), []
    with transaction.atomic():
        for _ in range(3):
            pages, _scans = plans.explained(
                triaging.IN_ORDER, triaging.NEXT, {**KIND._asdict(), **place._asdict()}, but="_session"
            )
            seen.append(pages)
            place = triaging.step(KIND, place, None, using="default").place
        transaction.set_rollback(True)
    assert seen[2] < 3 * seen[0]


def test_the_figures_are_about_right():
    found = glance(using="default")
    hours = found.flows.hours
    assert all(flow.is_estimate for flow in hours[1:])
    assert all(30_000 < flow.arrived < 42_000 for flow in hours[12:])  # ten a second
    assert all(30_000 < flow.done < 42_000 for flow in hours)
    assert all(550 <= flow.done <= 650 and not flow.is_estimate for flow in found.flows.minutes[10:])
    (handler,) = [row for row in found.handlers if row["name"] == "handler 1"]
    assert handler["failed"] == 15_000
    assert 0.004 < handler["p50"] < 0.006


@pytest.mark.parametrize(
    "page",
    [
        "",
        "fragment/",
        "triage/",
        "triage/kind/?handler=handler+1&fingerprint=Error:+y",
        "triage/retry/?handler=handler+1&fingerprint=Error:+y",
        "explain/?key=many+5",
    ],
)
def test_pages_read_a_bounded_number_of_rows(admin, page):
    def rows_read():
        with connection.cursor() as cursor:
            cursor.execute(
                "select sum(seq_tup_read + idx_tup_fetch) from pg_stat_xact_user_tables "
                "where relname like 'spark_outbox_%'"
            )
            return int(cursor.fetchone()[0])

    before = rows_read()
    assert admin.get(f"/admin/spark_outbox/dashboard/{page}").status_code == 200
    assert rows_read() - before < 100_000  # of two million, beyond which the outbox may grow
