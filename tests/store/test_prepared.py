"""The statements that are prepared in a worker's session, and what may happen to them there."""

import random
import re

import pytest
from django.db import connection, connections, transaction
from django.test.utils import CaptureQueriesContext
from psycopg import IsolationLevel
from psycopg.pq import TransactionStatus

from spark_outbox import emit
from spark_outbox.store import claiming, prepared, resting
from spark_outbox.store.connection import fixed_schema
from tests.statements import Statements
from tests.tools import HOUR, connect, eventually, wait_until_asleep, wait_until_done, worker_thread

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def session():
    """A session in which the claim is prepared."""
    connection.ensure_connection()
    claiming.prepare(using="default")
    yield connection.connection
    connection.close()


def can_begin():
    return prepared.can_begin(claiming.PREPARED_CLAIM, using="default")


def claim():
    with transaction.atomic():
        claim_ready = claiming.begin_with_ready if can_begin() else claiming.claim_ready
        rows = claim_ready(0, 10, using="default")
        assert connection.connection.pgconn.transaction_status == TransactionStatus.INTRANS
        transaction.set_rollback(True)
    return rows


def test_the_prepared_claim_returns_what_the_other_does(session):
    emit("g", "plain", number=5, text="é\u2028'\\\"")
    emit("g", "with headers", headers={"trace": "ab"})
    emit("g", "large", text=random.Random(1).randbytes(20_000).hex())
    emit("g", "ordered", ordering_key="key")
    with connect() as other:
        other.execute(
            "insert into spark_outbox_event (key, event_group, attempts, created_at) "
            "values ('odd', 'g', -5, 'infinity')"
        )
    assert can_begin()
    rows = claim()
    with CaptureQueriesContext(connection):
        assert not can_begin()
        others = claim()
    assert len(rows) == 4
    assert [row[:3] for row in rows] == [row[:3] for row in others]
    assert [row[5:] for row in rows] == [row[5:] for row in others]
    assert [row[3:5] for row in rows if row[1] != "large"] == [
        row[3:5] for row in others if row[1] != "large"
    ]


def test_a_transaction_is_begun_as_the_project_has_chosen(session):
    session.isolation_level = IsolationLevel.REPEATABLE_READ
    assert not can_begin()
    session.isolation_level = None
    assert can_begin()
    with transaction.atomic():
        connection.cursor().execute("select 1")
        assert not can_begin()  # it has begun
    assert can_begin()


def test_what_comes_first_is_no_part_of_the_transaction_if_it_has_ended_its_own(session):
    emit("g", "one")
    with transaction.atomic():
        first = "begin; set spark.first = 'yes'; commit"
        assert claiming.begin_with_ready(0, 10, first=first, using="default")
        transaction.set_rollback(True)
    assert session.execute("select current_setting('spark.first')").fetchone() == ("yes",)


def test_it_is_prepared_again_if_somebody_has_deallocated_it(session):
    emit("g", "one")
    session.execute("deallocate all")
    assert [row[1] for row in claim()] == ["one"]
    assert [row[1] for row in claim()] == ["one"]


def test_it_is_prepared_anew_for_another_schema(session):
    prepared.prepare("spark_outbox_number", "select 1", using="default")
    prepared.prepare("spark_outbox_number", "select 2", using="default")
    assert prepared.begin_with("spark_outbox_number", "", first="", using="default") == [(2,)]
    session.rollback()
    session.execute("deallocate all")
    prepared.prepare("spark_outbox_number", "select 3", using="default")
    assert prepared.begin_with("spark_outbox_number", "", first="", using="default") == [(3,)]
    session.rollback()


def test_a_pattern_of_groups_names_no_table(session):
    with fixed_schema(using="default"):
        resting.prepare(groups="^spark_outbox_event$", using="default")
    statements = session.execute("select statement from pg_prepared_statements").fetchall()
    assert any("'^spark_outbox_event$'" in text for (text,) in statements)


def test_a_refusal_of_the_claim_leaves_no_transaction_open(session):
    with pytest.raises(Exception, match="division by zero"), transaction.atomic():
        claiming.begin_with_ready(0, 10, first="select 1/0", using="default")
    assert session.pgconn.transaction_status == TransactionStatus.IDLE
    assert connection.get_autocommit()


def test_a_look_of_a_sleeping_worker_prepares_its_statement_again(session):
    resting.prepare(groups=None, using="default")
    resting.fall_asleep(listens=False, using="default")
    session.execute("deallocate all")
    emit("g", "one")
    assert resting.look(listens=True, using="default").ready


def test_claims_among_many_are_planned_for_the_table_as_it_is(own_registry):
    own_registry.add_handler(lambda event: None, group="", name="h")
    with worker_thread(poll_interval=HOUR):
        wait_until_asleep()
        with Statements() as statements, connect() as other:
            other.execute(
                "insert into spark_outbox_event (key, event_group) select number::text, 'g' "
                "from generate_series(1, 2000) as number; notify spark_outbox"
            )
            wait_until_done(2000)
    claim = f"execute {claiming.PREPARED_CLAIM}|and id >= %.floor.s"
    claims = [sql for sql in statements.sql if re.search(claim, sql)]
    assert "execute" in claims[0]
    assert "execute" not in claims[1]


def test_a_handler_that_deallocates_everything_costs_nobody_anything(own_registry, caplog):
    def handle(event):
        with connections["default"].cursor() as cursor:
            cursor.execute("deallocate all")

    own_registry.add_handler(handle, group="", name="h")
    with worker_thread(poll_interval=HOUR):
        for number in range(3):
            wait_until_asleep()
            emit("g", f"key {number}")
            eventually(lambda done=number + 1: wait_until_done(done) is None)
    assert not [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}]


def test_a_worker_that_falls_asleep_without_its_statements_holds_s_once(own_registry):
    own_registry.add_handler(
        lambda event: connection.cursor().execute("deallocate all"), group="", name="h"
    )
    with worker_thread(poll_interval=HOUR), connect() as other:
        wait_until_asleep()
        emit("g", "key")
        wait_until_done(1)
        wait_until_asleep()
        emit("g", "another")  # the worker lets S go: nobody would hold it if it is held once
        wait_until_done(2)
        wait_until_asleep()
        count = "select count(*) from pg_locks where locktype = 'advisory' and classid = 7531002"
        eventually(lambda: other.execute(count).fetchone() == (1,))  # at first it has none again
