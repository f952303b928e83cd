"""Promise 18: looking costs nothing, at any size of the table. All tests of this module look at the same
many events, and none writes."""

import datetime as dt

import pytest

from spark_outbox.store import pruning, viewing
from tests.tools import connect

pytestmark = pytest.mark.django_db

CROWD = [
    """
    insert into spark_outbox_event (key, event_group, status, finished_at)
    select 'done ' || n, 'group ' || n % 20, 'done', now() - n * interval '1 ms'
    from generate_series(1, 200000) as n
    """,
    """
    insert into spark_outbox_event (key, event_group, status, finished_at)
    select 'failed ' || n, 'group ' || n % 3, 'failed', now() from generate_series(1, 90000) as n
    """,
    """
    insert into spark_outbox_event (key, event_group, available_at, ordering_key)
    select concat(kind, ' ', n), 'group 1', now() + delay, ordering_key
    from generate_series(1, 20000) as n, (values
        (1, null::interval, null), (2, null, 'o'), (3, interval '-1 hour', null),
        (4, '-1 hour', 'o'), (5, '1 hour', null), (6, '1 hour', 'o')
    ) as kinds (kind, delay, ordering_key)
    """,
    """
    insert into spark_outbox_delivery (event_id, handler, status, error, attempted_at)
    select id, 'handler ' || id % 3, 'failed', 'ValueError: order ' || id || ' is bad', now()
    from spark_outbox_event where status = 'failed'
    """,
    "insert into spark_outbox_pause (kind, name) values ('group', 'group 1'), ('handler', 'handler 1')",
    """
    insert into spark_outbox_delivery (event_id, handler, error, available_at, attempted_at)
    select event.id, 'handler 1', spark_outbox_pause_mark(pause.id), '9999-01-01',
        now() - interval '1 day'
    from spark_outbox_event as event, spark_outbox_pause as pause
    where event.status = 'pending' and event.key like '5 %' and pause.kind = 'group'
    """,
    """
    insert into spark_outbox_delivery (event_id, handler, error, available_at)
    select id, 'handler 2', 'spark_outbox: not called, its circuit is open', now() + interval '1 minute'
    from spark_outbox_event where status = 'pending' and key like '5 %'
    """,
]


@pytest.fixture(scope="module")
def crowded(django_db_setup, django_db_blocker):
    """Many events of each kind: 200,000 done, 90,000 failed and 20,000 of each kind that is pending."""
    with django_db_blocker.unblock(), connect() as session:
        for statement in (*CROWD, "vacuum analyze spark_outbox_event, spark_outbox_delivery"):
            session.execute(statement)
        yield
        session.execute("truncate spark_outbox_event, spark_outbox_pause cascade")


def rows_read(sql, params=None):
    """Return how many rows of our tables a query reads, and its own rows."""
    with connect(autocommit=False) as session:
        found = session.execute(sql, params).fetchall()
        read = session.execute(
            "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) from pg_stat_xact_user_tables "
            "where relname like 'spark_outbox%'"
        )
        return int(read.fetchone()[0]), found


def test_looking_costs_nothing(crowded):
    """No view reads more than a bounded number of rows."""
    read, found = rows_read("select kind, name, waiting from spark_outbox_pauses order by name")
    assert read < 2 * (10_000 + 50)
    assert found == [("group", "group 1", 10_000), ("handler", "handler 1", 0)]
    read, found = rows_read("select * from spark_outbox_status")
    assert read < 6 * 10_000 + 2 * 10_000 + 3 * 10_000 + 20 * 10_000 + 2 * 20_000 + 1000
    counts = {row[0]: row[1:] for row in found}
    assert counts["group 1"][:5] == (10_000, 10_000, 0, 0, 10_000)
    assert counts["group 1"][7:9] == (10_000, 10_000)  # wait for a circuit, and for a pause
    assert counts["group 1"][9] > dt.timedelta(hours=23)
    assert counts["group 19"][0] == 0
    assert counts["group 19"][6] == 10_000  # in the last hour
    assert all(row[-1] for row in found)  # there are more
    read, found = rows_read("select * from spark_outbox_failures")
    assert read < 4 * 10_000 + 100
    assert sorted(row[1:4] for row in found) == [
        *[("ValueError: order # is bad", 10_000, 0)] * 3,
        ("spark_outbox: not called, its circuit is open", 0, 10_000),
    ]
    read, _ = rows_read("select * from spark_outbox_health")
    assert read < 400_000


def test_what_metrics_and_the_catalogue_look_at_is_bounded(crowded):
    read, found = rows_read(viewing.OPEN_CIRCUITS)
    assert found == [("handler 2",)]
    assert read < 100
    read, found = rows_read(viewing.EXAMPLES, {"groups": ["group 1"], "each": 2})
    assert len(found) == 6  # done, failed and pending
    assert read < 4 * 1000 + 100
    read, found = rows_read(pruning.OLDEST.format(state="done"), {"most": 10})
    assert len(found) == 10
    assert read < 200


def test_an_explanation_reads_a_few_rows(crowded):
    for key in ("done 5", "failed 7", "1 5", "2 19999", "5 5", "6 5"):
        read, found = rows_read(f"select spark_explain('{key}')")
        assert found
        assert "no event" not in str(found)
        assert read < 200
