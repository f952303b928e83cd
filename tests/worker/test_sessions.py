"""The sessions of a worker: the private one, which no handler can close, and the one that LISTENs."""

import asyncio
import threading

import psycopg
import pytest
from django.db import OperationalError, close_old_connections, connection, connections
from psycopg.conninfo import make_conninfo

from spark_outbox import emit, handler
from spark_outbox.store import sessions, waking
from spark_outbox.store.connection import fetch, fetch_value
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.private import PrivateConnection
from tests.tools import (
    WorkerProcess,
    connect,
    conninfo,
    deliveries,
    elsewhere,
    eventually,
    manage,
    note,
    status,
    wait_until_asleep,
    wait_until_done,
    wait_until_ended,
    worker_thread,
)
from tests.worker.sessions import look, private_sessions

pytestmark = pytest.mark.django_db(transaction=True)


# The private connection, and the lock of a session


@pytest.mark.parametrize(
    "close", [close_old_connections, connections.close_all, lambda: connection.close()]
)
def test_a_detached_handler_that_closes_its_connections_is_not_taken_over(own_registry, close):
    states = []

    @handler("", name="h", atomic=False, max_attempts=3)
    def run(event):
        close()
        states.append(elsewhere(look))
        note(event)
        close()

    with worker_thread():
        for number in range(3):
            emit("g", f"{number}")
            eventually(lambda number=number: len(states) == number + 1)
        wait_until_ended()
    assert states == [["0"], ["1"], ["2"]]


def test_a_detached_handler_outlasts_the_idle_session_timeout(own_registry, monkeypatch):
    options = connection.settings_dict["OPTIONS"]
    short = {**options, "options": "-c idle_session_timeout=300"}
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", short)
    states, alive = [], "select from pg_stat_activity where pid = %s"

    @handler("", name="h", atomic=False)
    def run(event):
        pid = connection.connection.info.backend_pid
        with connect() as other:
            eventually(lambda: not other.execute(alive, [pid]).fetchall())
        states.append(elsewhere(look))

    emit("g", "key")
    Worker().run(drain=True)
    connection.close()
    assert states == [["key"]]
    assert deliveries() == {"h": ("done", 1)}


def test_the_server_ends_a_private_connection_for_no_reason_but_that_its_client_is_gone(monkeypatch):
    short = "-c idle_session_timeout=10min -c statement_timeout=10min"
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {"options": short})
    private = PrivateConnection("default")
    try:
        for limit in ("idle_session_timeout", "statement_timeout"):
            assert private.run(fetch_value, f"show {limit}") == "0"
        assert len(private_sessions()) == 1
        connections.close_all()
        assert private.run(sessions.lock_session, 1)
    finally:
        private.close()
    eventually(lambda: not private_sessions())


def test_a_private_connection_belongs_to_no_pool(monkeypatch):
    """Whose next user would find its locks."""
    monkeypatch.setitem(
        connection.settings_dict, "OPTIONS", {**connection.settings_dict["OPTIONS"], "pool": True}
    )
    private = PrivateConnection("default")
    assert private.run(sessions.lock_session, 1)
    private.close()
    with connect() as other:
        eventually(lambda: other.execute("select pg_try_advisory_lock(7531003, 1)").fetchone()[0])


def test_a_worker_has_one_private_connection_whatever_it_does(own_registry):
    seen = []

    @handler("^detached$", name="h", atomic=False)
    def run(event):
        seen.append(private_sessions())

    own_registry.add_handler(note, group="^plain$")
    with worker_thread():
        (pid,) = private_sessions()
        emit("plain", "0")
        wait_until_done(1)
        for number in (1, 2):
            emit("detached", f"{number}")
            wait_until_done(number + 1)
        wait_until_asleep()
        assert private_sessions() == {pid}
    eventually(lambda: not private_sessions())
    assert seen == [{pid}, {pid}]


def test_a_worker_that_has_no_direct_connection_has_no_private_one(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": None}
    own_registry.add_handler(note, group="")
    with worker_thread(poll_interval=0.01):
        emit("g", "key")
        wait_until_done(1)
        assert not private_sessions()


def test_without_a_connection_to_spare_no_handler_is_called(own_registry, monkeypatch, caplog):
    """Rather than called for nothing, again and again, as its batch can't be committed."""
    connect_to, refusals = PrivateConnection._connect, iter(range(2))

    def refuse(private):
        if next(refusals, None) is None:
            return connect_to(private)
        raise OperationalError("sorry, too many clients already")

    monkeypatch.setattr(PrivateConnection, "_connect", refuse)
    calls = []
    own_registry.add_handler(lambda event: calls.append("plain"), group="", name="plain")
    own_registry.add_handler(lambda event: calls.append("detached"), group="", name="h", atomic=False)
    emit("g", "key")
    with worker_thread():
        wait_until_done(1)
    assert calls == ["plain", "detached"]
    assert caplog.text.count("sorry, too many clients already") == 2


def test_a_worker_that_is_ready_needs_no_more_connections(own_registry, monkeypatch):
    def refuse(private):
        raise OperationalError("sorry, too many clients already")

    calls = []
    own_registry.add_handler(lambda event: calls.append("plain"), group="", name="plain")
    own_registry.add_handler(lambda event: calls.append("detached"), group="", name="h", atomic=False)
    with worker_thread():
        monkeypatch.setattr(PrivateConnection, "_connect", refuse)
        emit("g", "key")
        wait_until_done(1)
    assert calls == ["plain", "detached"]


def test_a_private_connection_that_is_lost_is_made_anew_and_its_calls_stay_ours(own_registry):
    calls, release = [], threading.Event()

    @handler("", name="h", atomic=False)
    async def run(event):
        calls.append(event.attempt)
        while not release.is_set():
            await asyncio.sleep(0.005)

    with worker_thread(), connect() as other:
        emit("g", "key")
        eventually(lambda: calls and status() == "running")
        (pid,) = private_sessions()
        other.execute("select pg_terminate_backend(%s, 10000)", [pid])
        eventually(lambda: private_sessions() - {pid})
        (row,) = other.execute("select session from spark_outbox_delivery").fetchall()
        held = "select from pg_locks where locktype = 'advisory' and classid = 7531003 and objid = %s"
        eventually(lambda: other.execute(held, row).fetchall())
        assert look() == ["key"]
        release.set()
        wait_until_done(1)
    assert calls == [1]
    assert deliveries() == {"h": ("done", 1)}


# LISTEN


def test_nobody_listens_while_a_detached_handler_runs(own_registry):
    """Nobody would read: the server would keep what others notify, and in the end drop the session."""
    listening = []

    @handler("^detached$", name="h", atomic=False)
    def run(event):
        listening.append([*fetch("select pg_listening_channels()", using="default")])

    own_registry.add_handler(note, group="^plain$")
    with worker_thread():
        emit("detached", "1")
        wait_until_done(1)
        wait_until_asleep()
        emit("plain", "2")  # it is woken
        wait_until_done(2)
    assert listening == [[]]


RESTORE = f"""
create table restored (like spark_outbox_event including all);
drop table spark_outbox_event cascade;
alter table restored rename to spark_outbox_event;
{waking.SET_WAKE_MODE["gated"]}
"""


@pytest.fixture
def own_database():
    """A database of its own, with an outbox."""
    name = "spark_outbox_restored"
    url = make_conninfo(conninfo(), dbname=name)
    with connect() as server:
        server.execute(f"drop database if exists {name} with (force)")
        server.execute(f"create database {name}")
        migrated = manage("migrate", "--no-input", url=url)
        assert migrated.returncode == 0, migrated.stderr
        yield url
        server.execute(f"drop database {name} with (force)")


def test_a_worker_whose_table_is_restored_notices_and_is_woken_again(own_database):
    held = (
        "select from pg_locks where locktype = 'advisory' and classid = 7531002 "
        "and objid = 'spark_outbox_event'::regclass"
    )
    with (
        psycopg.connect(own_database, autocommit=True) as other,
        WorkerProcess("--poll-interval", "0.2", url=own_database) as worker,
    ):
        worker.wait_until_ready()
        eventually(lambda: other.execute(held).fetchall())
        other.execute(RESTORE)
        eventually(lambda: other.execute(held).fetchall())
