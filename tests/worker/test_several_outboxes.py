"""Several outboxes in one database: the search path says which is meant, and they never mix."""

import contextlib

import pytest
from django.db import ProgrammingError, connection, transaction
from psycopg.conninfo import make_conninfo

from spark_outbox import emit, emit_many
from spark_outbox.errors import DuplicateKey
from spark_outbox.worker.loop import Worker
from tests.tools import (
    connect,
    conninfo,
    eventually,
    handled,
    manage,
    note,
    status,
    statuses,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def tenant():
    """Another outbox, of the same make, in a schema of its own."""
    with connect() as other:
        other.execute("create schema tenant")
        for table in ("spark_outbox_event", "spark_outbox_delivery"):
            other.execute(f"create table tenant.{table} (like public.{table} including all)")
        yield other
        other.execute("drop schema tenant cascade")


@pytest.mark.parametrize("local", ["local", ""])
def test_a_worker_keeps_to_its_outbox_whatever_the_search_path(own_registry, tenant, local):
    """Another schema's rows were settled: the effects were committed each time, the event never done."""

    def handle(event):
        note(event)
        with connection.cursor() as cursor:
            cursor.execute(f"set {local} search_path = tenant, public")

    own_registry.add_handler(handle, group="^g$", name="h")
    own_registry.add_handler(note, group="^other$", name="note")
    emit("g", "key")
    with worker_thread():
        eventually(lambda: status() == "done")
        emit("other", "later")
        eventually(lambda: status("later") == "done")
    assert handled() == ["key", "later"]


def test_a_handler_emits_where_its_search_path_says(own_registry, tenant):
    def handle(event):
        with connection.cursor() as cursor:
            cursor.execute("set local search_path = tenant, public")
        emit("other", "follow-up")

    own_registry.add_handler(handle, group="^g$", name="h")
    emit("g", "key")
    Worker().drain()
    assert statuses() == {"key": "done"}
    found = tenant.execute("select key from tenant.spark_outbox_event").fetchall()
    assert found == [("follow-up",)]


@contextlib.contextmanager
def search_path(schemas):
    """Have a transaction of the caller's look for tables and functions in these schemas."""
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"set local search_path = {schemas}")
        yield


def emit_one(key):
    emit("g", key)


def emit_if_new(key):
    emit("g", key, on_duplicate="check")


def emit_in_bulk(key):
    emit_many([{"group": "g", "key": key}])


@pytest.fixture
def whole_tenant():
    """Another outbox, with all that the migrations make, in a schema of its own."""
    with connect() as other:
        other.execute("create schema tenant")
        try:
            done = manage("migrate", url=make_conninfo(conninfo(), options="-csearch_path=tenant"))
            assert done.returncode == 0, done.stderr
            yield other
        finally:
            other.execute("drop schema tenant cascade")


def test_events_and_duplicates_are_those_of_the_outbox_that_the_search_path_finds(whole_tenant):
    for schemas, key in (("tenant", "1"), ("public", "1"), ("tenant", "2"), ("public", "3")):
        with search_path(schemas):
            emit_in_bulk(key)
            emit_in_bulk(key)
            assert emit("g", key, on_duplicate="check") is None
            with pytest.raises(DuplicateKey):
                emit("g", key, price=1, on_duplicate="check")
    assert list(statuses()) == ["1", "3"]
    found = whole_tenant.execute("select key from tenant.spark_outbox_event order by id").fetchall()
    assert found == [("1",), ("2",)]


def test_nothing_is_emitted_into_another_outbox(tenant):
    """The tables of one schema, and the functions of another: these took what emit_many() emitted."""
    emit("g", "here")
    for key in ("here", "new"):
        with pytest.raises(ProgrammingError, match="another outbox"), search_path("tenant, public"):
            emit_in_bulk(key)
    assert list(statuses()) == ["here"]
    assert tenant.execute("select key from tenant.spark_outbox_event").fetchall() == []


@pytest.mark.parametrize("emit_again", [emit_one, emit_if_new])
def test_nor_is_another_outbox_asked_for_a_key(tenant, emit_again):
    emit("g", "both")
    with search_path("tenant, public"):
        emit("g", "both")
        emit("g", "tenant's")
    for key in ("both", "tenant's"):
        with pytest.raises(ProgrammingError, match="another outbox"), search_path("tenant, public"):
            emit_again(key)


@pytest.mark.parametrize("emit_again", [emit_one, emit_if_new, emit_in_bulk])
def test_a_function_whose_table_is_gone_is_that_of_another_outbox(whole_tenant, emit_again):
    whole_tenant.execute("drop table tenant.spark_outbox_event cascade")
    emit("g", "key")
    with pytest.raises(ProgrammingError, match="another outbox"), search_path("tenant, public"):
        emit_again("key")
    assert list(statuses()) == ["key"]
