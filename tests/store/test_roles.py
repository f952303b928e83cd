"""Each role of deploy/roles.sql may do what it is for. The tests connect as each."""

import os
import re
import signal
from functools import partial

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, transaction
from psycopg.errors import UniqueViolation

from spark_outbox import aemit, emit, emit_many
from spark_outbox.errors import DuplicateKey, IdCollision
from spark_outbox.models import OutboxEvent
from spark_outbox.store import checking
from tests.challenges.models import Handled
from tests.store.logins import ROLES, ROLES_SQL
from tests.test_readme import blocks
from tests.tools import (
    WorkerProcess,
    connect,
    eventually,
    make_challenge,
    manage,
    status,
    wait_until_asleep,
    wait_until_ended,
)

pytestmark = pytest.mark.django_db(transaction=True)


def test_the_emitter_emits_in_every_way(logins):
    with logins.django("emitter"):
        with transaction.atomic():
            assert emit("g", "key", secret=1).id
            assert emit("g", "key") is None
        assert emit("g", "key", on_duplicate="check", secret=1) is None
        for duplicate in (
            partial(emit, "g", "key", on_duplicate="raise"),
            partial(emit, "g", "key", on_duplicate="check", secret=2),
            partial(emit, "other", "key", on_duplicate="check", secret=1),
        ):
            with transaction.atomic(), pytest.raises(DuplicateKey):
                duplicate()
        emit("g", "with all", ordering_key="o", delay=60, headers={"trace": 1})
        events = [{"group": "g", "key": f"{number}"} for number in range(10)]
        assert [emit_many(events) for _ in range(2)] == [10, 0]
        async_to_sync(aemit)("g", "async")
        make_challenge()  # its source emits
    assert OutboxEvent.objects.filter(status="pending").count() == 14


def test_the_emitter_is_told_of_an_id_that_is_taken(logins):
    taken = emit("g", "key").id
    with connection.cursor() as cursor:
        cursor.execute("select setval('spark_outbox_event_id_seq', %s, false)", [taken])
    try:
        with logins.django("emitter"), pytest.raises(IdCollision, match="setval"):
            emit("g", "new")
        with connection.cursor() as cursor:
            cursor.execute("select setval('spark_outbox_event_id_seq', %s, false)", [taken])
        done = manage("check", "--database", "default", url=logins.url("nobody"))
        assert "is behind the table" in done.stderr
        with logins.connect("emitter") as mine, pytest.raises(UniqueViolation, match="has its id"):
            mine.execute("select spark_emit('g', 'new')")
    finally:
        with connection.cursor() as cursor:
            cursor.execute(checking.PUT_IDS_RIGHT)


def test_an_emit_by_the_emitter_wakes_a_sleeping_worker(logins):
    with WorkerProcess("--poll-interval", "3600", url=logins.url("worker")) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        with logins.django("emitter"):
            emit("probe", "key")
        eventually(lambda: status() == "done")


def test_everybody_may_do_with_the_readme_s_sql_what_their_role_is_for(logins):
    emit("order_paid", "order_paid_1")
    for sql in blocks("sql"):
        kind = "emitter" if "insert" in sql else "operator"
        with logins.connect(kind) as mine:
            for statement in filter(str.strip, sql.split(";\n")):
                mine.execute(statement)
    assert status("import_1") == "pending"
    assert status("order_paid_1") == "discarded"


def test_the_worker_s_role_closes_circuits(logins):
    emit("g", "key", delay=3600)
    delivery = {"handler": "h", "error": "spark_outbox: not called, its circuit is open"}
    OutboxEvent.objects.get().deliveries.create(**delivery)
    with logins.connect("worker") as mine:
        assert mine.execute("select spark_outbox_close_circuit('h')").fetchone() == (1,)
    assert OutboxEvent.objects.get().available_at is None


@pytest.mark.parametrize("kind", [*ROLES, "nobody"])
def test_the_checks_need_no_right_and_find_nothing(logins, kind):
    check = partial(manage, "check", "--database", "default", "--fail-level", "WARNING")
    done = check(url=logins.url(kind))
    assert done.returncode == 0, done.stderr
    assert ("no issues" in done.stdout) == (kind not in {"emitter", "nobody"})
    emit("probe", "key")
    done = check(url=logins.url(kind))
    assert done.returncode == 0, done.stderr
    hidden = {"worker": None, "viewer": "payloads", "operator": "payloads"}
    hidden = hidden.get(kind, "events, payloads, deliveries")
    assert re.findall(r"role may not read (.*) in database", done.stderr) == ([hidden] if hidden else [])
    assert "spark_outbox.I003" in done.stderr or not hidden


def test_a_sweep_needs_the_emitter_s_rights_and_those_to_read_the_instances(logins):
    make_challenge()
    OutboxEvent.objects.all().delete()
    done = manage("process_spark_sources", url=logins.url("emitter"))
    assert done.returncode == 0, done.stderr
    assert "challenges.Challenge: 1 instances, 1 events, 1 new" in done.stdout


def test_replays_and_rehearsals_need_the_worker_s_rights(logins):
    emit("probe", "key")
    worker = logins.url("worker")
    drain = partial(manage, "spark_worker", "--drain", url=worker)
    replay = partial(manage, "spark_replay", "--handler", "tests.probe.handlers.probe", url=worker)
    assert drain().returncode == 0
    assert "1 rows written to challenges_handled" in replay("--rehearse").stdout
    assert replay("--yes").stdout == "1 events are given to tests.probe.handlers.probe.\n"
    assert drain().returncode == 0
    assert (status(), Handled.objects.count()) == ("done", 2)
    refused = replay(url=logins.url("viewer"))
    assert refused.returncode == 1
    assert "permission denied" in refused.stderr


def test_the_worker_takes_over_what_another_had_detached_and_puts_back_what_nobody_handled(
    logins, flags
):
    worker = logins.url("worker")
    emit("probe", "unhandled")
    OutboxEvent.objects.update(status="unhandled")
    emit("probe_detached", "key", **flags.payload)
    emit("probe", "1", ordering_key="o")
    emit("probe", "2", ordering_key="o", delay=0.1)
    emit("nothing", "unknown")
    with WorkerProcess(url=worker) as first, WorkerProcess(url=worker) as second:
        first.wait_until_ready()
        second.wait_until_ready()
        pid = flags.wait()
        holder, other = (first, second) if first.owns(pid) else (second, first)
        holder.kill()
        flags.go.touch()
        wait_until_ended()
        other.signal(signal.SIGTERM)
        assert other.wait() == 0
        assert "denied" not in first.output + second.output
    assert set(OutboxEvent.objects.values_list("key", "status")) == {
        *((key, "done") for key in ("unhandled", "key", "1", "2")),
        ("unknown", "unhandled"),
    }


def test_a_role_that_may_not_read_django_spark_s_table_does_not_take_it_for_none(logins):
    add = "insert into spark_event values ('created_1', 'g', now())"
    with connect() as owner:
        owner.execute(
            'create table spark_event (key varchar(100), "group" varchar(50), created_at date)'
        )
        try:
            owner.execute(add)
            done = manage("spark_import_django_spark", url=logins.url("worker"))
            assert (done.returncode, "may not read" in done.stderr) == (os.EX_CONFIG, True)
            owner.execute(ROLES_SQL)
            done = manage("check", "--database", "default", url=logins.url("worker"))
            assert "spark_outbox.E009" in done.stderr
            with WorkerProcess(url=logins.url("worker")) as worker:
                assert worker.wait() == os.EX_CONFIG
        finally:
            owner.execute("drop table spark_event")


def test_a_worker_whose_role_may_not_says_what_it_lacks(logins):
    emit("probe", "key")
    with WorkerProcess("-v", "2", url=logins.url("viewer")) as worker:
        eventually(lambda: "permission denied for table spark_outbox_session" in worker.output)
    assert status() == "pending"
