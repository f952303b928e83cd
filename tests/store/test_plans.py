"""The plans of the statements that a worker lives on: read off EXPLAIN, not off a clock."""

import json

import pytest
from django.db import connection, transaction

from spark_outbox import emit
from spark_outbox.store import (
    checking,
    claiming,
    ordering,
    pausing,
    reading,
    repairing,
    resting,
    scanning,
    settling,
)
from spark_outbox.worker.loop import Worker
from tests.tools import connect

pytestmark = pytest.mark.django_db

FILL = """
insert into spark_outbox_event (key, event_group, status, finished_at, available_at, ordering_key)
select gen_random_uuid(), 'g', %(status)s, case when %(status)s = 'done' then now() end,
    now() + %(delay)s * interval '1 second', case when %(keys)s > 0 then 'key ' || number %% %(keys)s end
from generate_series(1, %(count)s) as number
"""

FROM_THE_FIRST = {"id": reading.LOWEST_ID, "time": "-infinity"}


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


def read_whole(nodes):
    return {node["Relation Name"] for node in nodes if node["Node Type"] == "Seq Scan"}


@pytest.mark.parametrize("floor", [0, 115_000])
def test_the_claim_reads_the_ready_index_in_its_order(full_table, floor):
    nodes, pages = explain(claiming.CLAIM_READY, {"floor": floor, "limit": 500})
    assert indexes(nodes) == ["spark_outbox_event_ready"]
    assert kinds(nodes) == {"Limit", "LockRows", "Index Scan"}  # and so without a sort
    assert nodes[0]["Actual Rows"] == 100
    assert pages < 500  # a page or two for each of the 100 rows, which it also locks


def test_the_claim_of_due_rows_does_not_read_those_that_are_delayed(full_table):
    nodes, pages = explain(claiming.CLAIM_DUE, {"limit": 100, **FROM_THE_FIRST})
    assert indexes(nodes) == ["spark_outbox_event_due"]
    assert "Sort" not in kinds(nodes)
    assert nodes[0]["Actual Rows"] == 0
    assert pages < 10


def test_the_heads_of_ordering_keys_are_found_by_one_descent_for_each(full_table):
    sql = ordering.HEADS.format(unfinished=ordering.UNFINISHED["block"], mine="true")
    nodes, pages = explain(sql, {"keys": [f"key {n}" for n in range(50)]})
    assert set(indexes(nodes)) == {"spark_outbox_event_order"}
    assert "Seq Scan" not in kinds(nodes)
    assert nodes[0]["Actual Rows"] == 50
    assert pages < 500  # a few for each key, and not for each of its 100 events


def test_a_run_of_ordered_events_is_read_no_further_than_asked(full_table):
    sql = ordering.RUNS.format(unfinished=ordering.UNFINISHED["block"], mine="true")
    nodes, pages = explain(sql, {"keys": [f"key {n}" for n in range(50)], "limit": 2})
    assert set(indexes(nodes)) == {"spark_outbox_event_order"}
    assert nodes[0]["Actual Rows"] == 100
    assert pages < 500


def test_the_head_of_a_key_with_many_events_is_not_looked_for_among_all_that_are_done(look):
    let_wait(status="done")
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_event (key, event_group, ordering_key) "
            "select number, 'g', 'hot' from generate_series(1, 10000) as number"
        )
    analyze()
    worker = Worker()
    for _ in range(20):
        handled, rows = look(worker)
        assert handled >= 16
        assert rows < 2 * scanning.PIECE + 10 * handled


@pytest.mark.parametrize(
    ("ordered", "groups", "names"),
    [
        (True, None, {"spark_outbox_event_ordered", "spark_outbox_event_ordered_due"}),
        (True, "^g$", {"spark_outbox_event_ordered", "spark_outbox_event_ordered_due"}),
        (False, "^g$", {"spark_outbox_event_ready", "spark_outbox_event_due"}),
    ],
)
def test_a_piece_is_read_off_its_index_in_its_order(full_table, ordered, groups, names):
    sql = scanning.piece_sql(ordered=ordered, groups=groups)
    nodes, pages = explain(sql, {"piece": 100, "due_id": 0, "groups": groups, **FROM_THE_FIRST})
    assert set(indexes(nodes)) == names
    assert "Seq Scan" not in kinds(nodes)
    assert pages < 200  # of 5,000 ordered events, or 100 ready ones: no more than the piece


def test_settling_finds_its_rows_by_their_ids(full_table):
    with connection.cursor() as cursor:
        cursor.execute("select id from spark_outbox_event order by id desc limit 100")
        ids = [event_id for (event_id,) in cursor.fetchall()]
    array = "{" + ",".join(map(str, ids)) + "}"
    nodes, _ = explain(settling.FINISH, {"ids": array, "status": "done"})
    assert set(indexes(nodes)) == {"spark_outbox_event_pkey"}
    assert "Seq Scan" not in kinds(nodes)


def test_groups_that_nobody_handles_are_read_off_their_index_one_by_one(full_table):
    nodes, pages = explain(repairing.UNHANDLED_GROUPS.format(groups=""), {"groups": None})
    assert set(indexes(nodes)) == {"spark_outbox_event_aside"}
    assert pages < 20  # and not for each of the 20,000 events


@pytest.mark.parametrize("groups", [None, "^g$", "^other$"])
def test_a_worker_that_looks_before_it_sleeps_reads_little(full_table, groups):
    nodes, pages = explain(resting.outlook_sql(groups=groups), {"groups": groups})
    assert "spark_outbox_event" not in read_whole(nodes)
    assert pages < (50 if groups is None else 50 + scanning.PIECE)  # of 10,000 delayed events


def test_it_reads_little_also_while_a_third_of_the_table_is_pending(full_table):
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(FILL, {"status": "pending", "count": 60_000, "delay": None, "keys": 0})
            cursor.execute("analyze spark_outbox_event")
        nodes, pages = explain(resting.outlook_sql(groups=None), {})
        transaction.set_rollback(True)
    with connect() as other:
        other.execute("vacuum spark_outbox_event")  # others count pages, too
    assert "spark_outbox_event" not in read_whole(nodes)  # the table of deliveries is empty here
    assert pages < 50


# The cost of a whole look, in rows that it reads, however many events wait


@pytest.fixture
def look(own_registry):
    """What runs a worker's look, and returns how many events it handled and how many rows it read."""
    own_registry.add_handler(lambda event: None, group="", name="h")
    with connection.cursor() as cursor:
        cursor.execute("truncate spark_outbox_event cascade")  # and back when the test ends

    def rows_read():
        with connection.cursor() as cursor:
            cursor.execute(
                "select sum(seq_tup_read + idx_tup_fetch) from pg_stat_xact_user_tables "
                "where relname = 'spark_outbox_event'"
            )
            return int(cursor.fetchone()[0] or 0)

    def measure(worker, **options):
        before = rows_read()
        handled = worker.handle_batch(**options)
        return handled, rows_read() - before

    return measure


WAITING = """
insert into spark_outbox_event (key, event_group, status, available_at, ordering_key)
select %(group)s || gen_random_uuid(), %(group)s, %(status)s, now() + %(delay)s * interval '1 second',
    case when %(ordered)s then %(status)s || number end
from generate_series(1, 10000) as number
"""


def let_wait(group="g", *, status="pending", delay=None, ordered=False):
    with connection.cursor() as cursor:
        params = {"group": group, "status": status, "delay": delay, "ordered": ordered}
        cursor.execute(WAITING, params)


def analyze():
    with connection.cursor() as cursor:
        cursor.execute("analyze spark_outbox_event")


def test_ordering_keys_that_have_nothing_to_do_cost_a_look_nothing(look):
    let_wait(status="pending", delay=3600, ordered=True)
    let_wait(status="failed", ordered=True)
    let_wait(status="running", ordered=True)
    analyze()
    worker = Worker()
    assert look(worker, sweep=True) <= (0, 10)
    emit("g", "key", ordering_key="o")
    handled, rows = look(worker)
    assert handled == 1
    assert rows < 20


def test_events_behind_blocked_heads_cost_each_look_no_more_than_a_piece(look):
    let_wait(status="failed", ordered=True)
    let_wait(status="failed", ordered=True)
    with connection.cursor() as cursor:  # half of them: ten thousand that wait behind ten thousand
        cursor.execute(
            "update spark_outbox_event set status = 'pending' "
            "where id in (select max(id) from spark_outbox_event group by ordering_key)"
        )
    analyze()
    worker = Worker()
    while worker.handle_batch() or worker._claims.goes_on:
        pass
    most = 2 * scanning.PIECE + 2 * ordering.KEYS_AT_ONCE
    for number in range(3):
        emit("g", f"{number}", ordering_key="o")
        handled, rows = look(worker)
        assert handled == 1  # though none of the others was looked at again
        assert rows < most
    emit("other", "unordered")
    assert look(worker) < (1, most)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("delay", [None, -1, 3600])
def test_events_of_other_groups_cost_each_look_no_more_than_a_piece(look, ordered, delay):
    let_wait("theirs", delay=delay, ordered=ordered)
    analyze()
    worker = Worker(groups="^ours$")
    while worker.handle_batch() or worker._claims.goes_on:
        pass
    emit("theirs", ordering_key="o" if ordered else None)
    handled, rows = look(worker)
    assert handled == 0
    assert rows < 2 * scanning.PIECE
    emit("ours", ordering_key="p" if ordered else None)
    handled, rows = look(worker)
    assert handled == 1
    assert rows < 2 * scanning.PIECE


PUT_ASIDE = """
insert into spark_outbox_pause (kind, name) select 'group', 'g' || n from generate_series(1, 5) as n;
insert into spark_outbox_delivery (event_id, handler, error, available_at)
select event.id, 'handler ' || event.id % 3, spark_outbox_pause_mark(pause.id), '9999-01-01'
from spark_outbox_event as event, spark_outbox_pause as pause
where event.status = 'unhandled' and pause.name = 'g' || event.id % 5 + 1;
insert into spark_outbox_delivery (event_id, handler, status, error)
select id, 'failing', 'failed', 'Error: ' || translate(key, '0123456789abcdef-', 'ghijklmnopqrstuv')
from spark_outbox_event where status = 'done' limit 20000;
analyze spark_outbox_delivery
"""


def test_what_has_waited_is_found_past_what_waits_and_what_fails(full_table):
    """20,000 deliveries that wait for five pauses, and as many that fail, each in another way."""
    with connection.cursor() as cursor:
        cursor.execute(PUT_ASIDE)
        nodes, pages = explain(pausing.ENDED, None)
        assert nodes[0]["Actual Rows"] == 0
        assert set(indexes(nodes)) == {"spark_outbox_delivery_failing"}
        assert pages < 200
        cursor.execute(
            "delete from spark_outbox_pause where name = 'g2' returning spark_outbox_pause_mark(id)"
        )
        ((mark,),) = cursor.fetchall()
        assert sorted(pausing.ended(using="default")) == [(f"handler {n}", mark) for n in range(3)]
        cursor.execute("update spark_outbox_event set status = 'pending' where status = 'unhandled'")
        params = {"handler": "handler 0", "mark": mark, "limit": 100}
        nodes, pages = explain(pausing.PUT_BACK, params)
        assert "spark_outbox_delivery_failing" in indexes(nodes)
        assert pages < 100 * 60  # what it costs to write a hundred deliveries and events
        counts = [pausing.put_back("handler 0", mark, limit=1000, using="default") for _ in range(3)]
        assert counts in ([1000, 333, 0], [1000, 334, 0])
        assert sorted(pausing.ended(using="default")) == [(f"handler {n}", mark) for n in (1, 2)]


UNSEEN = """
insert into spark_outbox_event (key, event_group, attempts, available_at)
select 'unseen ' || n, 'g', 1, '9999-01-01' from generate_series(1, 20000) as n;
insert into spark_outbox_delivery (event_id, handler, error, available_at)
select id, 'mail', (select spark_outbox_pause_mark(id) from spark_pause('handler', 'mail')), '9999-01-01'
from spark_outbox_event where key like 'unseen %%'
"""


def test_what_has_waited_is_put_back_cheaply_though_no_statistics_know_of_it(full_table):
    """Autovacuum comes after a minute at the earliest."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(UNSEEN, {})
            cursor.execute("select spark_outbox_pause_mark(id) from spark_outbox_pause")
            ((mark,),) = cursor.fetchall()
            _, pages = explain("select spark_resume('handler', 'mail')", [])
            assert pages < 1000 * 200  # of 20,000; for each event anew it would be millions
            cursor.execute("delete from spark_outbox_pause")
        params = {"handler": "mail", "mark": mark, "limit": 1000}
        nodes, pages = explain(pausing.PUT_BACK, params)
        assert indexes(nodes).count("spark_outbox_delivery_event_handler") == 1
        assert indexes(nodes).count("spark_outbox_delivery_failing") == 1
        assert "Seq Scan" not in kinds(nodes)
        assert pages < 1000 * 200
        assert pausing.put_back(**params, using="default") == 1000
        transaction.set_rollback(True)
    with connect() as other:
        other.execute("vacuum spark_outbox_event")  # others count pages, too


@pytest.mark.parametrize("count", [1, 100])
def test_whether_keys_are_there_is_read_off_their_index(full_table, count):
    with connection.cursor() as cursor:
        cursor.execute(
            "select array_agg(key) from (select key from spark_outbox_event limit %s) as chosen", [count]
        )
        ((keys,),) = cursor.fetchall()
    for _ in range(8):  # so often that the plan is kept, which then knows no number of keys
        _, pages = explain("select spark_outbox_check_keys('spark_outbox_event', %s)", [keys])
    assert pages < 10 + 5 * count


def test_whether_the_sequence_is_behind_is_read_off_the_last_id(full_table):
    for _ in range(2):  # the first time it also reads the catalogue
        _, pages = explain(checking.IDS_ARE_BEHIND, [])
    assert pages < 20
