"""No search_path makes the outbox run what is not its own, and any schema may hold it."""

import psycopg
import pytest
from django.db import connection
from psycopg.conninfo import make_conninfo

from spark_outbox import emit
from spark_outbox.models import OutboxEvent
from spark_outbox.store import waking
from tests.store.logins import PROJECT, ROLES_SQL
from tests.tools import (
    WorkerProcess,
    connect,
    conninfo,
    eventually,
    manage,
    notifications,
    wait_until_asleep,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def traps(logins):
    """A schema with functions and operators of the names that the outbox uses, which raise."""
    with connection.cursor() as cursor:
        cursor.execute("create schema traps")
        cursor.execute("grant usage on schema traps to public")
        for name, arguments, returns in (
            ("pg_notify", "text, text", "void"),
            ("pg_try_advisory_lock", "integer, integer", "boolean"),
            ("pg_advisory_unlock", "integer, integer", "boolean"),
            ("pg_try_advisory_xact_lock_shared", "integer, integer", "boolean"),
            ("pg_stat_get_xact_tuples_inserted", "oid", "bigint"),
            ("current_setting", "text", "text"),
            ("gen_random_uuid", "", "uuid"),
            ("equals", "text, text", "boolean"),
            ("equals", "jsonb, jsonb", "boolean"),
            ("greater", "bigint, integer", "boolean"),
            ("accepts", "text", "boolean"),
        ):
            cursor.execute(
                f"create function traps.{name}({arguments}) returns {returns} language plpgsql "
                "as 'begin raise exception $$trapped$$; end'"
            )
        for operator, function, left, right in (
            ("=", "equals", "text", "text"),
            ("=", "equals", "jsonb", "jsonb"),
            (">", "greater", "bigint", "integer"),
        ):
            cursor.execute(
                f"create operator traps.{operator} "
                f"(function = traps.{function}, leftarg = {left}, rightarg = {right})"
            )
        cursor.execute(
            "create domain traps.text as pg_catalog.text check (traps.accepts(value)); "
            "create table traps.spark_outbox_event (like public.spark_outbox_event including all)"
        )
    yield "traps"
    with connection.cursor() as cursor:
        cursor.execute("drop schema traps cascade")


@pytest.mark.parametrize("mode", ["gated", "always"])
@pytest.mark.parametrize("sleeping", [False, True])
def test_no_search_path_makes_the_outbox_run_what_is_not_its_own(
    logins, traps, wake_mode, mode, sleeping
):
    wake_mode(mode)
    emit("g", "key", secret=1)
    with (
        connect() as listener,
        logins.connect("emitter", options="-csearch_path=traps,pg_catalog,public") as victim,
    ):
        for trap in ("select pg_notify('a', 'b')", "select 'a'::pg_catalog.text = 'b'::text"):
            with pytest.raises(psycopg.Error, match="trapped"):
                victim.execute(trap)
        listener.execute("listen spark_outbox")
        if sleeping:
            listener.execute(waking.TAKE_S)
        victim.execute("insert into public.spark_outbox_event (key, event_group) values ('1', 'g')")
        for key in ("2", None):
            assert victim.execute("select public.spark_emit('g', %s)", [key]).fetchone()[0]
        outbox = "'public.spark_outbox_event'::pg_catalog.regclass"
        same = f"select public.spark_outbox_is_same({outbox}, 'key', 'g', '{{\"secret\": 1}}')"
        assert victim.execute(same).fetchone() == (True,)
        assert notifications(listener) == (3 if sleeping or mode == "always" else 0)
        assert victim.execute("select public.spark_emit('g', 'key')").fetchone() == (None,)
        many = "'{3, key}', '{g, g}', e'{}\\n{}', e'{}\\n{}', '{o, o}', '{}', '{}', null, false"
        many = f"select public.spark_outbox_emit_many({outbox}, {many})"
        assert victim.execute(many).fetchone() == ([1],)
        assert victim.execute("select public.spark_outbox_ids_are_behind()").fetchone() == (False,)
    assert OutboxEvent.objects.count() == 5


def test_nor_does_what_somebody_has_put_into_its_own_schema(logins):
    """Up to PostgreSQL 14 everybody may create in public."""
    with connection.cursor() as cursor:
        cursor.execute(
            "create function public.accepts(text) returns boolean language plpgsql "
            "as 'begin raise exception $$trapped$$; end'; "
            "create domain public.text as pg_catalog.text check (public.accepts(value))"
        )
    try:
        with logins.connect("emitter") as victim:
            assert victim.execute("select spark_emit('g', null)").fetchone()[0]
    finally:
        with connection.cursor() as cursor:
            cursor.execute("drop domain public.text; drop function public.accepts")


def test_the_outbox_may_be_in_any_schema(logins):
    """And be written to from a session whose search_path leads to another outbox."""
    here = make_conninfo(conninfo(), options="-csearch_path=shop")
    worker = logins.url("worker", options="-csearch_path=shop")
    with connect() as admin:
        admin.execute("create schema shop")
        try:
            done = manage("migrate", url=here)
            assert done.returncode == 0, done.stderr
            admin.execute("set search_path = shop")
            admin.execute(ROLES_SQL)
            admin.execute(PROJECT.format(logins.names["worker"]))
            with (
                WorkerProcess("--poll-interval", "3600", url=worker) as process,
                logins.connect("emitter") as elsewhere,
            ):
                process.wait_until_ready()
                wait_until_asleep()
                elsewhere.execute("select shop.spark_emit('probe', 'key')")
                done = "select true from spark_outbox_event where status = 'done'"
                eventually(lambda: admin.execute(done).fetchone())
            assert admin.execute("select count(*) from challenges_handled").fetchone() == (1,)
        finally:
            admin.execute("drop schema shop cascade")
    assert not OutboxEvent.objects.exists()
