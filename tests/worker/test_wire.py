"""What the worker reads in the SQL that a handler sends, by whatever cursor, and what it does then."""

import contextlib

import psycopg
import pytest
from django.db import connection, transaction

from spark_outbox import emit, emit_many, handler
from spark_outbox.worker import wire
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.savepoints import MAX_SUBTRANSACTIONS
from tests.challenges.models import Challenge
from tests.tools import HOUR, make_challenge
from tests.worker.sql import ROW

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("own_session")]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("SELECT 1", wire.READS),
        ("  (select 1)", wire.READS),
        ("insert into t values (1)", wire.WRITES),
        ("with x as (delete from t) select 1", wire.WRITES),
        ("UPDATE t SET a = 'x; commit; y'", wire.WRITES),
        ('update t set "a; commit" = 1', wire.WRITES),
        (r"update t set a = E'\'; commit; --'", wire.WRITES),
        (r"update t set a = 'C:\'; commit", wire.WRITES | wire.ENDS),
        ("update t set a = $x$'; commit; $x$; -- ; commit", wire.WRITES),
        ("-- why\nselect 1", wire.READS),
        ("/* ; commit */ select 1;", wire.READS),
        ("create function f() begin atomic select 1; end", wire.WRITES),
        ("savepoint x", wire.WRITES | wire.SAVEPOINT),
        ('ROLLBACK TO SAVEPOINT "x"', wire.WRITES | wire.ANYTHING),
        ("rollback work to x", wire.WRITES | wire.ANYTHING),
        ("rollback", wire.ENDS),
        ("Rollback Work", wire.ENDS),
        ("select 1; commit", wire.ENDS),
        ("prepare transaction 'x'", wire.ENDS),
        ("prepare x as select 1", wire.WRITES),
        ("set local x = 1", wire.SETS),
        ("set constraints all immediate", wire.DEFERS),
        ("reset all", wire.SETS),
        ("SELECT set_config('a.b', 'c', false)", wire.SETS),
        ("select SET_CONFIG('a.b', 'c', false)", wire.SETS),
        ("do $$ begin commit; end $$", wire.SETS | wire.WRITES | wire.ANYTHING),
        ("", wire.READS),
    ],
)
def test_the_kind_of_a_statement(text, kind):
    assert wire.kind(text) == kind


def test_raw_writes_count_as_subtransactions(own_registry):
    own_registry.add_handler(lambda _: connection.connection.execute(ROW), group="", name="h")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(200))
    worker = Worker(commit_interval=HOUR)
    worker._claims.size.fitting = 200
    assert worker.handle_batch() == MAX_SUBTRANSACTIONS


def test_savepoints_of_psycopg_count_as_subtransactions(own_registry):
    def nest(event):
        for _ in range(MAX_SUBTRANSACTIONS):
            with connection.connection.transaction():
                connection.connection.execute(ROW)

    own_registry.add_handler(nest, group="")
    emit_many({"group": "g", "key": f"{n:03}"} for n in range(5))
    assert Worker(commit_interval=HOUR).handle_batch() == 1


RENAME = "update challenges_challenge set title = 'new'"


@pytest.mark.parametrize(
    "rename",
    [
        lambda raw: raw.execute(RENAME),
        lambda raw: raw.cursor().executemany(RENAME + " where id > %s", [[0], [1]]),
        lambda raw: psycopg.ClientCursor(raw).execute(RENAME.encode()),
        lambda raw: raw.execute(
            "do $do$ begin execute format($q$update %I set title = 'new'$q$, "
            "'challenges_' || 'challenge'); end $do$"
        ),
    ],
    ids=["execute", "executemany", "bytes", "do"],
)
def test_after_a_raw_write_instances_are_fetched_again(own_registry, rename):
    titles = []

    def look(event):
        titles.append(event["challenge"].title)

    own_registry.add_handler(look, group="^g$", name="before")
    own_registry.add_handler(lambda _: rename(connection.connection), group="^g$", name="rename")
    own_registry.add_handler(look, group="^g$", name="after")
    emit("g", "key", challenge=make_challenge("old"))
    Worker().drain()
    assert titles == ["old", "new"]


def test_after_a_rollback_to_a_savepoint_instances_are_fetched_again(own_registry):
    titles = []

    def look(event):
        titles.append(event["challenge"].title)

    @handler("^g$", name="change")
    def change(event):
        with contextlib.suppress(RuntimeError), transaction.atomic():
            Challenge.objects.update(title="new")
            look(event)
            raise RuntimeError

    own_registry.add_handler(look, group="^g$", name="look")
    emit("g", "key", challenge=make_challenge("old"))
    Worker().drain()
    assert titles == ["new", "old"]
