"""Porting from django-spark: its keys are taken over, and nothing is handled without them."""

import contextlib
import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.core.management import CommandError, call_command
from django.db import connection

from spark_outbox import checks, emit
from spark_outbox.models import OutboxEvent
from spark_outbox.operating import porting
from spark_outbox.operations import ImportDjangoSpark
from spark_outbox.store import porting as store
from spark_outbox.testing import drain
from spark_outbox.worker import in_process
from tests.tools import PATIENCE, WorkerProcess, connect, conninfo, eventually, manage, statuses

pytestmark = pytest.mark.django_db(transaction=True)

TABLE = """
create table spark_event (
    key varchar(300) primary key, "group" varchar(300) not null, created_at timestamptz not null,
    context text not null
)
"""


def add(*keys, group="challenge_created", created="2018-10-16"):
    with connect() as other:
        for key in keys:
            other.execute("insert into spark_event values (%s, %s, %s, '{}')", [key, group, created])


@pytest.fixture
def table():
    """The table that django-spark has left, with three keys."""
    with connect() as other:
        other.execute(TABLE)
    add("created_1", "created_2", "created_3")
    yield
    with connect() as other:
        other.execute("drop table spark_event")


def run(*arguments):
    """Return the lines that the command prints."""
    out, err = io.StringIO(), io.StringIO()
    call_command("spark_import_django_spark", *arguments, stdout=out, stderr=err)
    return [*out.getvalue().splitlines(), *err.getvalue().splitlines()]


IS_WAITING = """
select exists (
    select from pg_stat_activity
    where datname = current_database() and wait_event_type = 'Lock' and query ~ 'from spark_event'
)
"""


def found():
    return [
        message for message in checks.check_databases(["default"]) if message.id == "spark_outbox.E009"
    ]


# The import


def test_keys_of_django_spark_are_handled_for_good(table):
    lines = run()
    assert lines[0] == "3 keys: 3 are new and done, 0 were known."
    assert "once the last process with django-spark has stopped" in lines[1]
    assert set(statuses().values()) == {"done"}
    assert emit("challenge_created", "created_1") is None
    event = OutboxEvent.objects.get(key="created_1")
    assert (event.group, event.created_at.year) == ("challenge_created", 2018)
    assert event.digest is not None  # as if it were pruned: nobody can replay it without its payload


def test_it_can_be_run_again_and_takes_what_has_come_since(table):
    run()
    add("created_0", "created_4")
    assert run()[0] == "5 keys: 2 are new and done, 3 were known."


def test_it_goes_on_after_a_stop(table, monkeypatch):
    monkeypatch.setattr(porting, "CHUNK_SIZE", 2)
    take_over = store.take_over

    def stop(after, **options):
        if after is not None:
            raise KeyboardInterrupt
        return take_over(after, **options)

    monkeypatch.setattr(store, "take_over", stop)
    with pytest.raises(CommandError, match=r"Stopped. 2 keys are taken over; run it again to go on."):
        run()
    assert list(statuses()) == ["created_1", "created_2"]
    monkeypatch.setattr(store, "take_over", take_over)
    assert run()[0] == "3 keys: 1 are new and done, 2 were known."


def test_an_empty_or_too_long_group_is_mended_and_an_impossible_key_left_out(table):
    add("nameless", group="")
    add("long", group="g" * 300)
    add("", "k" * 256)
    assert run()[:3] == [
        "7 keys: 5 are new and done, 0 were known.",
        "2 had an empty or too long group: it is '(none)' now, or cut.",
        "2 are left out: emit() takes no key that is empty or so long either.",
    ]
    groups = dict(OutboxEvent.objects.values_list("key", "group"))
    assert groups["nameless"] == "(none)"
    assert groups["long"] == "g" * 255
    assert found() == []


def test_events_that_were_emitted_meanwhile_are_told_and_may_be_discarded(table, own_registry):
    own_registry.add_handler(lambda event: pytest.fail("twice"), group="", name="never")
    emit("challenge_created", "created_2")
    lines = run()
    assert lines[0] == "3 keys: 2 are new and done, 1 were known."
    assert lines[1].startswith("1 events with such keys wait for handlers here")
    assert "1 events that waited for handlers here are discarded." in run("--discard-emitted")
    event = OutboxEvent.objects.get(key="created_2")
    assert event.status == "discarded"
    assert event.last_error.endswith("django-spark has handled this key.")
    drain()


def test_an_event_that_a_worker_has_in_hand_is_left_to_it(table):
    emit("challenge_created", "created_2")
    with connect(autocommit=False) as worker:
        worker.execute("select from spark_outbox_event where key = 'created_2' for no key update")
        lines = run("--discard-emitted")
    assert any(line.startswith("1 events with such keys wait") for line in lines)


@contextlib.contextmanager
def importing(*arguments):
    """Run the import while an emitter's transaction holds one of its keys.

    Yield the emitter's connection, and the list that will have the lines that are printed.
    """
    lines = []

    def run_it():
        with contextlib.closing(connection):
            lines.extend(run(*arguments))

    with connect(autocommit=False) as emitter, connect() as other, ThreadPoolExecutor() as pool:
        emitter.execute("select spark_emit('challenge_created', 'created_2')")
        done = pool.submit(run_it)
        try:
            eventually(lambda: other.execute(IS_WAITING).fetchone()[0])
            yield emitter, lines
        finally:
            emitter.commit()
        done.result(PATIENCE)


def test_an_event_that_is_emitted_while_its_key_is_taken_over_is_told_and_discarded(table):
    with importing("--discard-emitted") as (_, lines):
        pass
    assert lines[:2] == [
        "3 keys: 2 are new and done, 1 were known.",
        "1 events that waited for handlers here are discarded.",
    ]
    assert statuses()["created_2"] == "discarded"


def test_an_emitter_that_the_import_waits_for_is_not_in_its_way(table):
    with importing() as (emitter, lines):
        emitter.execute("select spark_emit('challenge_created', 'created_1')")  # in another order
    assert lines[0] == "3 keys: 1 are new and done, 2 were known."
    assert lines[1].startswith("2 events with such keys wait for handlers here")


def test_a_dry_run_changes_nothing(table):
    emit("challenge_created", "created_2")
    assert run("--dry-run", "--discard-emitted")[-1] == "It was a dry run: nothing was changed."
    assert statuses() == {"created_2": "pending"}


def test_it_answers_in_json(table):
    told = json.loads("".join(run("--json")))
    assert told == {
        "read": 3,
        "new": 3,
        "mended": 0,
        "unfit": 0,
        "waiting": 0,
        "discarded": 0,
        "dry_run": False,
    }


def test_it_says_if_keys_will_be_forgotten(table, settings):
    settings.SPARK_OUTBOX = {"KEYS_RETENTION": 86_400}
    assert "are forgotten some day" in run()[-1]


def test_without_the_table_there_is_nothing_to_do():
    assert run()[0].startswith("Database 'default' has no table spark_event of django-spark.")
    with connect() as other:
        other.execute(
            'create table spark_event (key int, "group" text, created_at date)'
        )  # another app's
        try:
            assert "has no table" in run()[0]
            assert found() == []
        finally:
            other.execute("drop table spark_event")


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_it_runs_with_parameters_that_the_server_binds(table):
    assert run("--database", "other")[0].startswith("3 keys: 3 are new")
    assert store.unknown_key(seconds=1.0, using="other") is None


# The operation


def test_a_migration_takes_the_keys_over_and_is_no_error_beforehand(table):
    done = manage("migrate", "ported", url=conninfo(), EXTRA_APPS="tests.ported")
    assert done.returncode == 0, done.stderr
    assert set(statuses()) == {"created_1", "created_2", "created_3"}
    with connect() as other:
        other.execute("delete from django_migrations where app = 'ported'")


def test_the_operation_leaves_a_database_alone_that_had_no_django_spark(caplog):
    with caplog.at_level(logging.INFO):
        for run_it in (ImportDjangoSpark().database_forwards, ImportDjangoSpark().database_backwards):
            run_it("ported", connection.schema_editor(), None, None)
    assert statuses() == {}
    assert caplog.messages == []


class NoOutbox:
    def allow_migrate(self, db, app_label, **hints):
        return app_label != "spark_outbox"


def test_the_operation_leaves_a_database_alone_that_the_router_keeps_the_outbox_out_of(table, settings):
    settings.DATABASE_ROUTERS = [NoOutbox()]
    ImportDjangoSpark().database_forwards("ported", connection.schema_editor(), None, None)
    assert statuses() == {}


# Nothing is handled without


def test_the_check_finds_a_key_that_the_outbox_does_not_know(table, settings):
    (error,) = found()
    assert "such as 'created_3'" in error.msg
    assert "spark_import_django_spark" in error.hint
    run()
    assert found() == []
    settings.SPARK_OUTBOX = {"KEYS_RETENTION": 86_400}
    add("created_old")
    assert found() == []  # the outbox would have forgotten it


def test_the_check_finds_an_import_that_was_stopped_and_one_that_was_too_early(table):
    with connect() as other:
        other.execute(
            "insert into spark_event select 'k' || n, 'g', now(), repeat('x', 200) "
            "from generate_series(10000, 30000) as n"
        )
    next(porting.take_over(using="default"))
    assert "'k30000'" in found()[0].msg
    run()
    assert found() == []
    add("in the middle")
    assert "'in the middle'" in found()[0].msg


def test_the_check_looks_at_a_bounded_number_of_keys(table):
    with connect(autocommit=False) as session:
        session.execute(
            "insert into spark_event select 'k' || n, 'g', now(), '{}' "
            "from generate_series(1, 50000) as n"
        )
        session.execute(
            "insert into spark_outbox_event (key, event_group, status) "
            "select key, 'g', 'done' from spark_event"
        )
        session.execute("analyze spark_event, spark_outbox_event")
        (page,) = session.execute(store.LAST_PAGES.replace("%s", str(store.PAGES))).fetchone()
        read = "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) from pg_stat_xact_user_tables"
        before = session.execute(read).fetchone()[0]
        sql = store.UNKNOWN.format(newest=f"where ctid >= '({page},0)'::tid")
        params = {"most": store.LOOKED_AT, "longest": 255, "seconds": None}
        assert session.execute(sql, params).fetchone() is None
        assert session.execute(read).fetchone()[0] - before < 3 * (store.LOOKED_AT + store.PAGES * 200)


def test_a_worker_refuses_to_start_without_the_keys(table):
    emit("probe_note", "created_1")
    with WorkerProcess("--drain") as worker:
        assert worker.wait() == os.EX_CONFIG
        assert "such as 'created_3'" in worker.output
        assert "--ignore-django-spark" in worker.output
        assert "Traceback" not in worker.output
    assert statuses() == {"created_1": "pending"}
    with WorkerProcess("--drain", "--ignore-django-spark") as worker:
        assert worker.wait() == 0
    assert statuses() != {"created_1": "pending"}


def test_a_worker_starts_if_the_check_is_silenced(table, settings):
    settings.SILENCED_SYSTEM_CHECKS = ["spark_outbox.E009"]
    in_process.ported.check_keys(using="default")


def test_in_the_process_that_emits_nothing_is_handled_without_the_keys(table, settings, caplog):
    settings.SPARK_OUTBOX = {"DISPATCH": "on_commit"}
    in_process._with_keys.clear()
    emit("nobody", "new")
    assert statuses() == {"new": "pending"}
    assert "manage.py spark_import_django_spark" in caplog.text
    run()
    emit("nobody", "newer")
    assert statuses()["new"] == statuses()["newer"] == "unhandled"
