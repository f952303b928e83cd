"""What a handler does around Django's cursors stands or falls with it, and hurts no other handler."""

import contextlib

import psycopg
import pytest
from django.db import connection
from psycopg import sql

from spark_outbox import emit
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.policy import Policy
from spark_outbox.worker.loop import Worker
from tests.challenges.models import Handled
from tests.tools import (
    HOUR,
    eventually,
    handled,
    note,
    status,
    statuses,
    wait_until_asleep,
    worker_thread,
)
from tests.worker.neighbours import KEYS, OTHERS_DONE, others
from tests.worker.sql import ROW, run

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("own_session")]

INSERT = "insert into challenges_handled (key, handler, note) values (%s, 'raw', '')"
COPY = "copy challenges_handled (key, handler, note) from stdin"


# Writes


def executemany(raw):
    with raw.cursor() as cursor:
        cursor.executemany(INSERT, [["raw"], ["raw"]])


def executemany_returning(raw):
    with raw.cursor() as cursor:
        cursor.executemany(INSERT + " returning id", [["raw"], ["raw"]], returning=True)


def named_cursor(raw):
    with raw.cursor(name="named") as cursor:
        cursor.execute("select spark_emit('raw', 'raw')").fetchall()


def client_cursor(raw):
    psycopg.ClientCursor(raw).execute(ROW)


def raw_cursor(raw):
    psycopg.RawCursor(raw).execute(ROW)


def execute(raw):
    raw.execute(ROW)


def composed(raw):
    raw.execute(sql.SQL(ROW))


def transaction_block(raw):
    with raw.transaction():
        raw.execute(ROW)


def pipeline(raw):
    with raw.pipeline():
        raw.execute(ROW)
        raw.execute(INSERT, ["raw"])


def pipeline_with_transaction(raw):
    with raw.pipeline(), raw.transaction():
        raw.execute(ROW)


def copy(raw):
    with connection.cursor().copy(COPY) as copying:
        copying.write_row(("raw", "raw", ""))


def copy_out_first(raw):
    with raw.cursor().copy("copy challenges_handled to stdout") as copying:
        list(copying)
    raw.execute(ROW)


def stream(raw):
    list(raw.cursor().stream(ROW + " returning id"))


def as_bytes(raw):
    with connection.cursor() as cursor:
        cursor.execute(ROW.encode())


def as_composed(raw):
    with connection.cursor() as cursor:
        cursor.execute(sql.SQL(ROW))


def do_block(raw):
    raw.execute("do $$ begin perform spark_emit('raw', 'raw'); end $$")


WAYS = [
    executemany,
    executemany_returning,
    named_cursor,
    client_cursor,
    raw_cursor,
    execute,
    composed,
    transaction_block,
    pipeline,
    pipeline_with_transaction,
    copy,
    copy_out_first,
    stream,
    as_bytes,
    as_composed,
    do_block,
]


def handle_with(registry, way, *, fails=False, **options):
    """Register a handler that does `way` to the event `bad`, and notes all others."""

    def handle(event):
        if event.key != "bad":
            note(event)
            return
        way(connection.connection)
        if fails:
            raise RuntimeError("roll back, please")

    registry.add_handler(
        handle,
        group="^g$",
        name="h",
        policy=Policy(backoff=3600, **options.pop("policy", {})),
        **options,
    )
    for key in KEYS:
        emit("g", key)


def rows_of_raw():
    return Handled.objects.filter(key="raw").count() + OutboxEvent.objects.filter(key="raw").count()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", [True, False])
def test_whatever_cursor_a_handler_uses_its_writes_stand_or_fall_with_it(own_registry, way, fails):
    handle_with(own_registry, way, fails=fails)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == ("pending" if fails else "done")
    assert (rows_of_raw() == 0) is fails
    assert [key for key in handled() if key != "raw"] == list(OTHERS_DONE)


# The end of the transaction


def commit(raw):
    raw.commit()


def roll_back(raw):
    raw.rollback()


def write_and_commit(raw):
    raw.execute(ROW)
    raw.commit()


def write_and_roll_back(raw):
    raw.execute(ROW)
    raw.rollback()


def commit_and_write(raw):
    with contextlib.suppress(Exception):
        raw.commit()
    raw.execute(ROW)


def commit_as_sql(raw):
    run("commit")


def comment_and_commit(raw):
    run("/* no ' more */ -- '\n COMMIT AND CHAIN")


def roll_back_as_bytes(raw):
    raw.execute(b"rollback")


def end_in_between(raw):
    raw.execute(f"{ROW}; end; begin; {ROW}")


def commit_in_between(raw):
    run(f"{ROW}; commit; begin; {ROW}")


def commit_in_a_pipeline(raw):
    with raw.pipeline():
        raw.execute(ROW)
        raw.commit()


def prepare_transaction(raw):
    run("prepare transaction 'x'")


def nested_comment(raw):
    raw.execute("/* /* */ */ commit")  # it is not understood, but its effect is seen
    raw.execute(ROW)


ENDINGS = [
    commit,
    roll_back,
    write_and_commit,
    write_and_roll_back,
    commit_and_write,
    commit_as_sql,
    comment_and_commit,
    roll_back_as_bytes,
    end_in_between,
    commit_in_between,
    commit_in_a_pipeline,
    prepare_transaction,
]


@pytest.mark.parametrize("end", ENDINGS)
@pytest.mark.parametrize("swallows", [False, True])
def test_a_handler_cannot_end_the_transaction_that_it_shares(own_registry, end, swallows):
    calls = []

    def handle(event):
        calls.append(event.key)
        if event.key != "bad":
            note(event)
            return
        with contextlib.suppress(Exception) if swallows else contextlib.nullcontext():
            end(connection.connection)

    own_registry.add_handler(handle, group="^g$", name="h", policy=Policy(backoff=3600))
    for key in KEYS:
        emit("g", key)
    Worker(commit_interval=HOUR).drain()
    assert calls == KEYS  # each was called once: nothing of theirs had to be handled again
    assert statuses() == {**OTHERS_DONE, "bad": "pending"}
    assert handled() == list(OTHERS_DONE)
    assert "BrokenTransaction: The handler must not commit or roll back" in Delivery.objects.get().error


def test_a_commit_that_nobody_could_foresee_is_the_failure_of_the_handler_that_sent_it(own_registry):
    handle_with(own_registry, nested_comment)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == "pending"
    assert "committed or rolled back the worker's transaction" in Delivery.objects.get().error
    assert rows_of_raw() == 0


def libpq_commit(raw):
    raw.pgconn.exec_(b"commit")


def libpq_error(raw):
    raw.pgconn.exec_(b"select 1 / 0")


@pytest.mark.parametrize("way", [libpq_commit, libpq_error])
@pytest.mark.parametrize("fails", [True, False])
def test_a_transaction_that_a_handler_ends_by_libpq_itself_is_its_own_failure(own_registry, way, fails):
    handle_with(own_registry, way, fails=fails)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == "pending"
    assert "BrokenTransaction" in Delivery.objects.get().error
    assert set(handled()) == set(OTHERS_DONE)


def error_of_a_named_cursor(raw):
    with contextlib.suppress(psycopg.Error), raw.cursor(name="named") as cursor:
        cursor.execute("select * from there_is_no_such_table")


@pytest.mark.parametrize("fails", [True, False])
def test_an_error_that_a_handler_swallows_around_django_is_found_out(own_registry, fails):
    handle_with(own_registry, error_of_a_named_cursor, fails=fails)
    Worker(commit_interval=HOUR).drain()
    assert others() == OTHERS_DONE
    assert status("bad") == "pending"
    assert handled() == list(OTHERS_DONE)


# A connection that is left busy


KEPT = []


def leave_a_stream_open(raw):
    rows = raw.cursor().stream("select generate_series(1, 1000)")
    next(rows)
    KEPT.append(rows)


def leave_a_copy_open(raw):
    copying = raw.cursor().copy(COPY)
    copying.__enter__()
    KEPT.append(copying)


def leave_a_pipeline_open(raw):
    pipeline = raw.pipeline()
    pipeline.__enter__()
    KEPT.append(pipeline)


@pytest.mark.parametrize("leave", [leave_a_stream_open, leave_a_copy_open, leave_a_pipeline_open])
@pytest.mark.parametrize("fails", [True, False])
def test_a_handler_that_leaves_the_connection_busy_blocks_nobody(own_registry, leave, fails):
    handle_with(own_registry, leave, fails=fails)
    with worker_thread(commit_interval=HOUR):
        eventually(lambda: others() == OTHERS_DONE)
        eventually(lambda: Delivery.objects.filter(attempts=1).exists())
        wait_until_asleep()
    with contextlib.suppress(psycopg.Error):
        KEPT.pop().close() if leave is leave_a_stream_open else KEPT.pop().__exit__(None, None, None)
    assert status("bad") == "pending"
    assert "stream() or a pipeline()" in Delivery.objects.get().error
    assert sorted(handled()) == sorted(OTHERS_DONE)
