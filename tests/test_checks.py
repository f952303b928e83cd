"""System checks of a database, and of what is before it. What is stored: operating/test_fitting.py."""

import contextlib
import os
import re
import subprocess
import tomllib

import pytest
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import connection, connections
from django.db.backends.postgresql import base
from psycopg.conninfo import make_conninfo

from spark_outbox import checks, emit
from spark_outbox.migrations._postgresql import SQL
from spark_outbox.store import definitions
from tests import postgres
from tests.chaos import pgbouncer
from tests.chaos.pgbouncer import PgBouncer
from tests.tools import connect, conninfo

pytestmark = pytest.mark.django_db(transaction=True)


def found(*databases):
    """Return what the checks of these databases find, by id."""
    messages = checks.check_databases(databases=databases or ["default"])
    by_id = {message.id.partition(".")[2]: message for message in messages}
    assert len(by_id) == len(messages)
    return by_id


@contextlib.contextmanager
def leading(url, alias="default"):
    """Have a connection of Django's lead to another server or database."""
    it = connections[alias]
    before = it.settings_dict
    it.close()
    it.settings_dict = {**before, **postgres.django_database(url)}
    try:
        yield
    finally:
        it.close()
        it.settings_dict = before


def execute(sql):
    with connection.cursor() as cursor:
        cursor.execute(sql)


@pytest.fixture(params=["public", "shop"])
def schema(request):
    """Lead to a database of its own, in which the outbox is in a schema of this name."""
    name = f"{connection.settings_dict['NAME']}_checked"
    with connect() as server:
        server.execute(f"drop database if exists {name} with (force)")
        server.execute(f"create database {name} template template0")
        url = make_conninfo(conninfo(), dbname=name)
        with leading(make_conninfo(url, options=f"-csearch_path={request.param}")):
            execute(f"create schema if not exists {request.param}")
            assert found() == {}
            call_command("migrate", "spark_outbox", verbosity=0)
            assert found() == {}
            execute(f"alter database {name} set search_path = {request.param}")
            yield request.param
        server.execute(f"drop database {name} with (force)")


# What the migrations have defined


def follow(hint):
    """Run the command of a hint."""
    command = re.search(r"^    (sed .*)$", hint, re.MULTILINE)[1]
    assert "psql" not in command
    assert "dbshell" not in command
    url = make_conninfo(conninfo(), dbname=connection.settings_dict["NAME"])
    environment = {**os.environ, "DATABASE_URL": url}
    environment["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    options = {"cwd": postgres.ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], check=False, **options)
    assert done.returncode == 0, done.stderr


EDIT = """
create or replace function spark_emit(
    event_group text, key text, payload jsonb default '{}', headers jsonb default '{}'
) returns bigint language sql as 'select 1::bigint'
"""

DAMAGES = {
    "drop function spark_emit": ("E006", "the function spark_emit is absent"),
    EDIT: ("W007", "the function spark_emit differs"),
    "drop view spark_outbox_health": ("W007", "the view spark_outbox_health is absent"),
    "drop view spark_outbox_snapshots cascade": (
        "W007",
        "the view spark_outbox_snapshots is absent, the view",
    ),
    "drop trigger spark_outbox_pruned on spark_outbox_event": (
        "E006",
        "trigger spark_outbox_pruned is absent",
    ),
    "alter table spark_outbox_event disable trigger user": (
        "E006",
        "trigger spark_outbox_pruned is absent",
    ),
}


def test_what_is_absent_or_outdated_is_named_and_the_hint_mends_it(schema):
    for damage, (kind, named) in DAMAGES.items():
        execute(damage)
        problems = found()
        assert list(problems) == [kind]
        assert named in problems[kind].msg
        assert ("--skip-checks" in problems[kind].hint) == (kind == "E006")
        follow(problems[kind].hint)
        call_command("migrate", "spark_outbox", verbosity=0)
        assert found() == {}


def test_a_function_that_was_edited_does_not_stop_migrate(schema):
    execute(EDIT)
    call_command("migrate", "auth", verbosity=0, skip_checks=False)
    execute("drop function spark_emit")
    with pytest.raises(SystemCheckError, match=r"spark_outbox\.E006"):
        call_command("migrate", "auth", verbosity=0, skip_checks=False)
    call_command("migrate", "auth", verbosity=0, skip_checks=True)


def test_a_view_with_other_columns_is_outdated(schema):
    execute("alter view spark_outbox_workers rename column host to machine")
    assert "the view spark_outbox_workers differs" in found()["W007"].msg
    execute("drop view spark_outbox_workers cascade")  # PostgreSQL replaces no column
    follow(found()["W007"].hint)
    assert found() == {}


def test_all_is_found_that_the_files_define(schema):
    execute("drop trigger spark_outbox_pruned on spark_outbox_event")
    with connection.cursor() as cursor:
        cursor.execute(
            "select format('drop function if exists %s cascade', oid::regprocedure) from pg_proc "
            "where proname like 'spark%' union all "
            "select format('drop view if exists %s cascade', relname) from pg_class "
            "where relkind = 'v' and relname like 'spark%'"
        )
        for (drop,) in cursor.fetchall():
            cursor.execute(drop)
    text = "\n".join(path.read_text() for path in SQL.iterdir() if "reverse" not in path.name)
    names = re.findall(r"^create (?:or replace )?(?:function|view|trigger) (\w+)", text, re.MULTILINE)
    differences = definitions.differences(using="default")
    assert all(difference.is_absent for difference in differences)
    absent = [difference.definition.name for difference in differences]
    assert sorted({*absent, "spark_outbox_wake", "spark_outbox_wake_again"}) == sorted(set(names))
    assert re.search(r", and \d+ more\.$", found()["E006"].msg)
    follow(found()["E006"].hint)
    call_command("migrate", "spark_outbox", verbosity=0)
    assert found() == {}


def test_the_last_definition_counts(tmp_path):
    first, second = tmp_path / "0001.sql", tmp_path / "0002.sql"
    first.write_text(
        """
        -- create function no_such() returns void as $$; $$
        create function f(a text) returns text language sql as $body$ select 'create view x;' $body$;
        create view gone as select ';' as a; create view kept as select 1 as b;
        """
    )
    second.write_text(
        """
        drop view if exists gone;
        create or replace function f(a text) returns text language sql as $$ select 2; $$;
        """
    )
    defined = {}
    definitions._define(first, defined)
    assert defined["function", "f"].text == " select 'create view x;' "
    definitions._define(second, defined)
    assert {each.name: (each.text, each.path) for each in defined.values()} == {
        "kept": ("select 1 as b", first),
        "f": (" select 2; ", second),
    }


def test_migrations_that_have_not_run_keep_migrate_from_nothing(schema):
    execute("delete from django_migrations where app = 'spark_outbox'")
    execute("drop function spark_emit")
    problems = found()
    assert list(problems) == ["W002"]
    assert "lacks migrations of spark_outbox: 0001_initial" in problems["W002"].msg
    call_command("migrate", "spark_outbox", fake=True, verbosity=0, skip_checks=False)
    assert list(found()) == ["E006"]


def test_code_that_is_older_than_the_database_compares_nothing(schema):
    execute("insert into django_migrations (app, name, applied) values ('spark_outbox', '0999', now())")
    execute(EDIT)
    assert found() == {}


def test_a_project_whose_tests_run_without_migrations_has_nothing_to_compare(schema, settings):
    execute("drop view spark_outbox_status cascade")
    settings.MIGRATION_MODULES = {"spark_outbox": None}
    assert found() == {}


def test_a_server_that_only_reads_can_be_checked(schema):
    emit("no such group", "key")
    execute("set default_transaction_read_only = on")
    assert list(found()) == ["W004"]


# Versions


def test_an_old_psycopg_is_found(monkeypatch):
    assert checks.check_psycopg() == []
    for version in ((3, 2, 9), (2, 9, 10)):
        monkeypatch.setattr(base, "psycopg_version", lambda version=version: version)
        (error,) = checks.check_psycopg()
        assert error.id == "spark_outbox.E005"


def test_the_versions_needed_are_those_that_are_declared():
    project = tomllib.loads((postgres.ROOT / "pyproject.toml").read_text())["project"]
    assert f"psycopg>={'.'.join(map(str, checks.PSYCOPG))}" in project["dependencies"]
    # Django itself refuses to connect to an older server.
    assert connection.features.minimum_database_version >= (14,)


# Poolers


@pytest.fixture
def pooler(request):
    if pgbouncer.PROGRAM is None:
        pytest.skip("pgbouncer is not installed")
    with PgBouncer(conninfo(), **request.param) as pooler, leading(pooler.url):
        yield pooler


by_transaction = pytest.mark.parametrize(
    "pooler", [{"pool_size": 1}, {"pool_size": 5}], indirect=True, ids=["one", "five"]
)


@by_transaction
def test_a_pooler_before_a_connection_that_must_be_direct_is_found(pooler):
    problems = found()
    assert list(problems) == ["W003"]
    assert "'default' is behind a transaction pooler" in problems["W003"].msg


@by_transaction
def test_a_worker_that_only_polls_may_be_behind_a_pooler(pooler, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    assert found() == {}


@by_transaction
@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_the_connection_that_listens_must_be_direct_and_no_other(pooler, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}
    assert found("default", "other") == {}
    with leading(pooler.url, "other"):
        problems = found("default", "other")
        assert list(problems) == ["W003"]
        assert "'other'" in problems["W003"].msg


@pytest.mark.parametrize("pooler", [{"mode": "session"}], indirect=True, ids=[""])
def test_a_pooler_of_whole_sessions_is_none_to_mind(pooler):
    assert found() == {}


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_connection_for_listen_that_leads_to_another_outbox_is_found(schema, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}
    problems = found("default", "other")
    assert list(problems) == ["E008"]
    assert found("default") == {}  # only what is named is connected to
