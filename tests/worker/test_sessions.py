"""The sessions of a worker: what handlers can't close, who takes over, and databases that don't fit."""

import asyncio
import threading

import psycopg
import pytest
from django.db import OperationalError, close_old_connections, connection, connections, transaction
from psycopg.conninfo import make_conninfo

from spark_outbox import checks, conf, emit, handler
from spark_outbox.errors import HandlerTimeout, SettingsError, WorkerDied
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.registry.handlers import Registry
from spark_outbox.store import repairing, sessions, waking
from spark_outbox.store.connection import fetch, fetch_value
from spark_outbox.worker import booking, bounds, takeover
from spark_outbox.worker.claims import Claims
from spark_outbox.worker.loop import Worker
from spark_outbox.worker.private import NAME, PrivateConnection
from tests.tools import (
    HOUR,
    PATIENCE,
    Flags,
    WorkerProcess,
    connect,
    conninfo,
    deliveries,
    eventually,
    handled,
    make_challenge,
    make_ready,
    manage,
    note,
    start_a_handler,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
    wait_until_ended,
    worker_thread,
)

pytestmark = pytest.mark.django_db(transaction=True)

LOCKS = f"select pid from pg_stat_activity where application_name = '{NAME}'"


def private_sessions():
    with connect() as other:
        return {pid for (pid,) in other.execute(LOCKS)}


def elsewhere(function):
    """Run a function in another thread, on connections of its own; return what it returns."""
    found = []

    def run():
        try:
            found.append(function())
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    return found[0]


def look():
    """Be another worker that looks for what those that are gone have left; return what still runs."""
    takeover.take_over(using="default")
    return [key for key, status in statuses().items() if status == "running"]


# The lock of a session


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


# Taking over


def leave_running(*, attempts=0, since="statement_timestamp()", session=1):
    """Have a worker begin a delivery, and be gone."""
    event = emit("g", "key")
    OutboxEvent.objects.update(status="running", attempts=1)
    with connection.cursor() as cursor:
        cursor.execute(
            "insert into spark_outbox_delivery "
            "(event_id, handler, status, session, attempts, attempted_at) "
            f"values (%s, 'h', 'running', %s, %s, {since})",
            [event.id, session, attempts],
        )
    return event


def test_a_take_over_counts_as_an_attempt(own_registry):
    calls = []

    @handler("", name="h", atomic=False, max_attempts=2)
    def run(event):
        calls.append(event.attempt)

    leave_running()
    takeover.take_over(using="default")
    assert deliveries() == {"h": ("pending", 1)}
    assert "WorkerDied" in Delivery.objects.get().error
    Worker().run(drain=True)
    assert (calls, status()) == ([2], "done")


@pytest.mark.parametrize("is_async", [False, True])
def test_out_of_attempts_it_has_failed_and_is_not_called_again(own_registry, is_async):
    calls = []

    def run(event):
        calls.append(event.attempt)

    async def run_async(event):
        run(event)

    function = run_async if is_async else run
    own_registry.add_handler(function, group="", name="h", atomic=is_async)
    leave_running(attempts=19)
    Worker().run(drain=True)
    assert calls == []
    assert deliveries() == {"h": ("failed", 20)}
    assert status() == "failed"
    assert "WorkerDied" in OutboxEvent.objects.get().last_error
    Delivery.objects.update(status="pending", attempts=0)
    OutboxEvent.objects.update(status="pending", available_at=None)
    Worker().run(drain=True)
    assert (calls, status()) == ([1], "done")


def test_a_worker_that_lacks_the_handler_only_counts(own_registry):
    leave_running(attempts=19)
    other = Registry()
    other.add_handler(note, group="", name="of the old release")
    Worker(registry=other).run(drain=True)
    assert deliveries() == {"h": ("pending", 20), "of the old release": ("done", 1)}
    assert (status(), handled()) == ("pending", ["key"])
    own_registry.add_handler(lambda event: 1 / 0, group="", name="h", atomic=False)
    make_ready()
    Worker().run(drain=True)
    assert deliveries() == {"h": ("failed", 20), "of the old release": ("done", 1)}
    assert status() == "failed"


@pytest.mark.parametrize(
    "left",
    [
        {"since": "pg_postmaster_start_time() - interval '1 second'"},  # the server was restarted
        {"session": None},  # SQL has put it there
    ],
)
def test_what_ended_through_no_fault_of_its_handler_is_not_counted(own_registry, left):
    leave_running(**left)
    takeover.take_over(using="default")
    assert deliveries() == {"h": ("pending", 0)}


def crash(event, error, registry):
    """Book what the supervisor has seen: the worker of session 1 died of this event's handler."""
    booking.book([(event.id, 0)], error, registry, session=1, using="default")


def test_a_crash_that_was_taken_over_already_is_not_counted_twice(own_registry):
    own_registry.add_handler(note, group="", name="h", atomic=False)
    event = leave_running()
    takeover.take_over(using="default")
    crash(event, WorkerDied("It died of signal SIGSEGV."), own_registry)
    assert deliveries() == {"h": ("pending", 1)}


@pytest.mark.parametrize(("max_attempts", "judged"), [(1, False), (1, True), (2, False)])
def test_the_cause_of_a_crash_is_known_also_if_it_was_taken_over_first(
    own_registry, max_attempts, judged
):
    """Whoever takes over knows only that the worker is gone; the supervisor knows why."""
    calls = []
    handler("", name="h", atomic=False, max_attempts=max_attempts, backoff=HOUR)(calls.append)
    event = leave_running()
    takeover.take_over(using="default")
    if judged:
        Worker().run(drain=True)
        assert deliveries() == {"h": ("failed", 1)}
    crash(event, HandlerTimeout("It ran longer than its timeout."), own_registry)
    failed = "failed" if max_attempts == 1 else "pending"
    assert deliveries() == {"h": (failed, 1)}
    assert Delivery.objects.get().error.startswith("spark_outbox.errors.HandlerTimeout: It ran longer")
    assert "HandlerTimeout" in Delivery.objects.get().traceback
    found = OutboxEvent.objects.get()
    assert "HandlerTimeout" in found.last_error
    assert found.status == failed
    assert (found.finished_at is None) == (failed == "pending")
    Worker().run(drain=True)
    assert calls == []  # it waits for its backoff, or has failed


def test_a_worker_that_was_stopped_has_burned_no_attempt_also_if_it_was_taken_over_first(own_registry):
    own_registry.add_handler(note, group="", name="h", atomic=False)
    event = leave_running()
    takeover.take_over(using="default")
    crash(event, None, own_registry)
    assert deliveries() == {"h": ("pending", 0)}
    assert status() == "pending"
    Worker().run(drain=True)
    assert (status(), handled()) == ("done", ["key"])


@pytest.mark.parametrize("outcome", ["fails", "runs", "dies"])
def test_a_crash_that_is_booked_after_the_next_attempt_changes_nothing_of_that(own_registry, outcome):
    """Which another worker has begun in the meantime: the first was counted as it was taken over."""

    @handler("", name="h", atomic=False, max_attempts=5, backoff=HOUR)
    def run(event):
        if outcome == "fails":
            raise OSError("another reason")

    event = leave_running()
    takeover.take_over(using="default")
    if outcome == "fails":
        Worker().run(drain=True)
    else:
        OutboxEvent.objects.update(status="running")
        Delivery.objects.update(status="running", session=2)
    with connect() as other:
        other.execute("select pg_advisory_lock(7531003, 2)")
        if outcome == "runs":
            crash(event, HandlerTimeout(), own_registry)
            assert deliveries() == {"h": ("running", 1)}
    if outcome == "dies":
        eventually(lambda: not look())  # the server may see a moment later that the connection is gone
    crash(event, HandlerTimeout(), own_registry)
    assert "HandlerTimeout" not in Delivery.objects.get().error
    assert Delivery.objects.get().attempts == (1 if outcome == "runs" else 2)


def test_a_crash_is_not_counted_by_a_take_over_as_well(own_registry):
    own_registry.add_handler(note, group="", name="h", atomic=False)
    event = leave_running()
    crash(event, WorkerDied("It died of signal SIGSEGV."), own_registry)
    takeover.take_over(using="default")
    assert deliveries() == {"h": ("pending", 1)}
    assert "SIGSEGV" in Delivery.objects.get().error
    assert OutboxEvent.objects.get().attempts == 1


def test_a_second_signal_in_a_detached_handler_burns_no_attempt(flags: Flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags, "probe_detached")
        for number in (15, 15):
            worker.process.send_signal(number)
            eventually(lambda: worker.has_message() or worker.process.poll() is not None)
        assert worker.wait() == -15
    assert deliveries() == {"detached": ("pending", 0), "sibling": ("done", 1)}


# Running events of which nothing runs


def test_an_event_that_sql_has_made_running_is_handled(own_registry):
    own_registry.add_handler(note, group="")
    OutboxEvent.objects.create(key="key", group="g", status="running")
    with worker_thread():
        wait_until_done(1)
    assert handled() == ["key"]


def test_an_event_whose_delivery_a_person_gives_up_as_it_runs_ends(own_registry):
    @handler("", name="h", atomic=False)
    def run(event):
        Delivery.objects.update(status="discarded")

    with worker_thread():
        emit("g", "key")
        eventually(lambda: status() == "discarded")
    assert deliveries() == {"h": ("discarded", 0)}


def test_a_running_event_that_nobody_else_works_on_is_looked_for_by_an_index(django_db_blocker):
    with connection.cursor() as cursor:
        cursor.execute("set enable_seqscan = off")
        cursor.execute(f"explain {repairing.REOPEN_STRAYS}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
        cursor.execute("reset enable_seqscan")
    assert "spark_outbox_event_aside" in plan


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


# Databases that don't fit


@pytest.fixture
def leads(monkeypatch):
    """What makes the alias `other` lead elsewhere."""
    other = connections["other"]

    def lead(**changed):
        other.close()
        for name, value in changed.items():
            monkeypatch.setitem(other.settings_dict, name, value)

    yield lead
    other.close()


both = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@both
@pytest.mark.parametrize("listen", ["other", {"default": "other"}])
def test_a_worker_refuses_to_listen_in_another_database(own_registry, settings, leads, listen):
    leads(NAME="postgres")
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": listen}
    own_registry.add_handler(note, group="", atomic=False)
    emit("g", "key")
    with pytest.raises(SettingsError, match="'other' for 'default', which has another outbox"):
        Worker().run()
    with pytest.raises(SettingsError, match="another outbox"):
        Worker().drain()
    assert (status(), handled()) == ("pending", [])


@both
def test_the_same_database_by_another_search_path_has_another_outbox(leads):
    leads(OPTIONS={"options": "-c search_path=pg_catalog"})
    with pytest.raises(SettingsError, match="another outbox"):
        bounds.check_direct("default", "other")


@both
def test_each_database_has_a_direct_connection_of_its_own(own_registry, settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": {"default": None, "other": "default"}}
    own_registry.add_handler(note, group="", name="h", atomic=False)
    with worker_thread(using="other"):
        wait_until_asleep()
        emit("g", "key", using="other")
        wait_until_done(1)
    assert handled() == ["key"]
    assert [conf.current().direct(alias) for alias in ("default", "third")] == [None, "third"]


@both
def test_a_direct_connection_that_leads_elsewhere_since_a_failover_is_waited_for(
    own_registry, settings, leads
):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": "other"}
    own_registry.add_handler(note, group="")
    name = connections["other"].settings_dict["NAME"]
    with worker_thread() as worker, connect() as server:
        leads(NAME="postgres")
        server.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
            "where application_name = 'spark_worker'"
        )
        emit("g", "key")
        eventually(lambda: worker._session._failures >= 2)
        leads(NAME=name)
        wait_until_done(1)


def test_aliases_that_do_not_exist_are_found_by_check(settings):
    settings.SPARK_OUTBOX = {"LISTEN_DATABASE": {"default": "direct", "shop": None}}
    found = checks.check_settings()
    assert [error.id for error in found] == ["spark_outbox.E002"] * 2
    assert ["direct" in found[0].msg, "shop" in found[1].msg]


def test_a_database_without_autocommit_is_refused(own_registry, monkeypatch):
    make_challenge()
    monkeypatch.setitem(connection.settings_dict, "AUTOCOMMIT", False)
    for work in (Worker().run, Worker().drain):
        with pytest.raises(SettingsError, match="has AUTOCOMMIT off"):
            work()
    (error,) = checks.check_autocommit()
    assert error.id == "spark_outbox.E004"


def test_a_callback_that_turns_autocommit_off_stops_nobody(own_registry):
    @handler("", name="h")
    def run(event):
        note(event)
        transaction.on_commit(lambda: transaction.set_autocommit(False))

    with worker_thread():
        for number in range(3):
            emit("g", f"{number}")
            wait_until_done(number + 1)
    assert set(statuses().values()) == {"done"}


def test_a_worker_that_reaches_the_database_and_can_claim_nothing_tries_less_and_less_often(
    own_registry, monkeypatch, caplog
):
    def fail(*_, **__):
        raise OperationalError("out of shared memory")

    def pauses():
        return [record.seconds for record in caplog.records if "trying again" in record.message]

    monkeypatch.setattr(Claims, "next", fail)
    with worker_thread():
        eventually(lambda: len(pauses()) >= 4)
    assert pauses()[3] > 2 * pauses()[0]


def test_an_outbox_that_is_being_restored_is_waited_for(own_registry):
    own_registry.add_handler(note, group="")
    with worker_thread() as worker, connect() as server:
        server.execute("alter view spark_outbox_status rename to away")
        try:
            server.execute(
                "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
                "where application_name = 'spark_worker'"
            )
            eventually(lambda: worker._session._failures >= 2)
        finally:
            server.execute("alter view away rename to spark_outbox_status")
        emit("g", "key")
        wait_until_done(1)
    assert handled() == ["key"]
