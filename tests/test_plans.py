"""The plans of the statements that a worker lives on: read off EXPLAIN, not off a clock."""

import json

import pytest
from django.db import connection, transaction

from spark_outbox import store

pytestmark = pytest.mark.django_db

FILL = """
insert into spark_outbox_event (key, event_group, status, finished_at, available_at, ordering_key)
select gen_random_uuid(), 'g', %(status)s, case when %(status)s = 'done' then now() end,
    now() + %(delay)s * interval '1 second', case when %(keys)s > 0 then 'key ' || number %% %(keys)s end
from generate_series(1, %(count)s) as number
"""


@pytest.fixture(scope="module")
def full_table(django_db_setup, django_db_blocker):
    """From old to new: 100,000 done, 10,000 delayed, 5,000 ordered, 100 ready, 20,000 unhandled rows."""
    with django_db_blocker.unblock(), connection.cursor() as cursor:
        for status, count, delay, keys in (
            ("done", 100_000, None, 0),
            ("pending", 10_000, 3600, 0),
            ("pending", 5_000, None, 50),
            ("pending", 100, None, 0),
            ("unhandled", 20_000, None, 0),
        ):
            cursor.execute(FILL, {"status": status, "count": count, "delay": delay, "keys": keys})
        cursor.execute("vacuum analyze spark_outbox_event")
        yield
        cursor.execute("truncate spark_outbox_event cascade")


def explain(sql, params):
    """Return the plan's nodes, outermost first, as they ran, and the pages they touched."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"explain (analyze, buffers, format json) {sql}", params)
        (row,) = cursor.fetchall()
        transaction.set_rollback(True)
    plan = (row[0] if isinstance(row[0], list) else json.loads(row[0]))[0]["Plan"]

    def nodes(node):
        yield node
        for inner in node.get("Plans", []):
            yield from nodes(inner)

    return list(nodes(plan)), plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def indexes(nodes):
    return [node["Index Name"] for node in nodes if "Index Name" in node]


def kinds(nodes):
    return {node["Node Type"] for node in nodes}


@pytest.mark.parametrize("floor", [0, 115_000])
def test_the_claim_reads_the_ready_index_in_its_order(full_table, floor):
    nodes, pages = explain(
        store.CLAIM_READY.format(groups=""), {"floor": floor, "limit": 500, "groups": None}
    )
    assert indexes(nodes) == ["spark_outbox_event_ready"]
    assert kinds(nodes) == {"Limit", "LockRows", "Index Scan"}  # and so without a sort
    assert nodes[0]["Actual Rows"] == 100
    assert pages < 500  # a page or two for each of the 100 rows, which it also locks


def test_the_claim_of_due_rows_does_not_read_those_that_are_delayed(full_table):
    nodes, pages = explain(store.CLAIM_DUE.format(groups=""), {"limit": 100, "groups": None})
    assert indexes(nodes) == ["spark_outbox_event_due"]
    assert "Sort" not in kinds(nodes)
    assert nodes[0]["Actual Rows"] == 0
    assert pages < 10


def test_the_heads_of_ordering_keys_are_found_by_jumping_from_key_to_key(full_table):
    sql = store.HEADS.format(unfinished=store.UNFINISHED["block"], groups="")
    nodes, pages = explain(sql, {"after": "", "keys": store.KEYS_AT_ONCE, "groups": None})
    assert set(indexes(nodes)) == {"spark_outbox_event_order"}
    assert "Seq Scan" not in kinds(nodes)
    assert nodes[0]["Actual Rows"] == 50
    assert pages < 500  # a few for each key, and not for each of its 100 events


def test_settling_finds_its_rows_by_their_ids(full_table):
    with connection.cursor() as cursor:
        cursor.execute("select id from spark_outbox_event order by id desc limit 100")
        ids = [event_id for (event_id,) in cursor.fetchall()]
    array = "{" + ",".join(map(str, ids)) + "}"
    nodes, _ = explain(store.FINISH, {"ids": array, "status": "done"})
    assert set(indexes(nodes)) == {"spark_outbox_event_pkey"}
    assert "Seq Scan" not in kinds(nodes)


def test_groups_that_nobody_handles_are_read_off_their_index_one_by_one(full_table):
    nodes, pages = explain(store.UNHANDLED_GROUPS.format(groups=""), {"groups": None})
    assert set(indexes(nodes)) == {"spark_outbox_event_aside"}
    assert pages < 20  # and not for each of the 20,000 events


def test_a_worker_that_looks_before_it_sleeps_reads_little(full_table):
    nodes, pages = explain(store.OUTLOOK.format(groups=""), {"groups": None})
    assert "Seq Scan" not in {
        node["Node Type"] for node in nodes if node.get("Relation Name") == "spark_outbox_event"
    }
    assert pages < 50
