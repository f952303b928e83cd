"""Workers and emitters behind a network that fails, and behind a pooler that shares its sessions."""

import contextlib
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from django.db import connection
from psycopg.conninfo import conninfo_to_dict

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from spark_outbox.store import limiting
from spark_outbox.worker import bounds
from tests.challenges.models import Handled
from tests.chaos import pgbouncer
from tests.chaos.pgbouncer import PgBouncer
from tests.chaos.proxy import Proxy
from tests.tools import (
    WorkerProcess,
    connect,
    conninfo,
    eventually,
    make_challenge,
    manage,
    start_a_handler,
    status,
    wait_until_asleep,
    wait_until_done,
)

pytestmark = pytest.mark.django_db(transaction=True)

ONLY_WOKEN = ("--poll-interval", "3600")


@pytest.fixture
def proxy():
    """The network between the workers and the test database."""
    with Proxy(conninfo()) as proxy:
        yield proxy


def emit_some(count):
    emit_many({"group": "probe", "key": f"{number}"} for number in range(count))


def assert_each_was_handled_once(count):
    """Its effects in the database, that is: there is one row for each event."""
    keys = list(Handled.objects.values_list("key", flat=True))
    assert len(keys) == len(set(keys)) == count


def assert_it_is_woken(worker):
    """It LISTENs: as it hardly ever polls, it finds no event otherwise."""
    wait_until_asleep()
    emit("probe", "woken")
    eventually(lambda: status("woken") == "done")
    assert worker.process.poll() is None
    assert "died" not in worker.output


# The bounds of a worker's connections


def sockets(group="sockets", *, url, **environment):
    """Return what a worker process has set on its sockets, by alias."""
    emit(group, "sockets")
    with WorkerProcess("--drain", url=url, **environment) as worker:
        assert worker.wait() == 0, worker.output
    found = json.loads(Handled.objects.get().note)
    return {alias: sides["client"] for alias, sides in found.items()}


def as_numbers(bounds):
    return {name: int(value) for name, value in bounds.items() if name != "connect_timeout"}


def test_a_worker_bounds_all_of_its_connections(proxy):
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.chaos.network_settings",
        "DIRECT_URL": proxy.url,
        "SPARK_OUTBOX": '{"LISTEN_DATABASE": "direct"}',
    }
    expected = as_numbers(bounds.BOUNDS)
    assert sockets(url=proxy.url, **environment) == {"default": expected, "direct": expected}


@pytest.mark.parametrize("group", ["sockets", "detached_sockets"])
def test_bounds_of_the_project_s_own_come_first(proxy, group):
    url = f"{proxy.url} keepalives_idle=77 tcp_user_timeout=99000"
    expected = as_numbers(bounds.BOUNDS | {"keepalives_idle": 77, "tcp_user_timeout": 99_000})
    assert sockets(group, url=url) == {"default": expected}


def test_a_detached_handler_may_pause_in_what_it_reads_or_writes(proxy):
    """`tcp_user_timeout` ends a connection whose other side does not read, though it is alive."""
    expected = as_numbers(bounds.BOUNDS | {"tcp_user_timeout": 0})
    assert sockets("detached_sockets", url=proxy.url) == {"default": expected}


def test_the_bounds_are_back_after_it(proxy, monkeypatch):
    options = conninfo_to_dict(proxy.url)
    monkeypatch.setitem(connection.settings_dict, "HOST", options["host"])
    monkeypatch.setitem(connection.settings_dict, "PORT", options["port"])
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {})
    connection.close()
    bounds.set_bounds("default")
    bounds.set_up("default", direct="default", idle_in_transaction=None)

    def limit():
        with socket.socket(fileno=os.dup(connection.connection.fileno())) as end:
            return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)

    assert limit() == 15_000
    with bounds.patience("default", direct=True):
        assert limit() == 0
    assert limit() == 15_000
    connection.close()


def test_a_service_has_its_bounds_in_its_own_file(proxy, tmp_path):
    server = psycopg.conninfo.conninfo_to_dict(proxy.url)
    text = "".join(f"{name}={value}\n" for name, value in server.items())
    (tmp_path / "services").write_text(f"[outbox]\n{text}keepalives_idle=77\n")
    url = f"service=outbox dbname={server['dbname']}"
    found = sockets(url=url, PGSERVICEFILE=str(tmp_path / "services"))
    assert found["default"]["keepalives_idle"] == 77
    assert found["default"]["tcp_user_timeout"] == 0


def test_what_the_environment_says_comes_first(monkeypatch):
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "33")
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", {"keepalives": 0})
    bounds.set_bounds("default", None)
    expected = {**bounds.BOUNDS, "keepalives": 0}
    del expected["connect_timeout"]
    assert connection.settings_dict["OPTIONS"] == expected


def test_the_password_is_no_parameter_of_a_statement():
    """Those end up in logs and traces."""
    given = []

    def watch(execute, sql, params, many, context):
        given.append(params)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(watch):
        bounds.set_up("default", direct="default", idle_in_transaction=None)
    connection.close()
    assert [set(params) for params in given if params] == [set(bounds.BOUNDS)]


# A network that fails


def test_a_connection_that_is_reset_in_the_middle_of_a_handler_costs_nothing(proxy, flags):
    with WorkerProcess(*ONLY_WOKEN, url=proxy.url) as worker:
        worker.wait_until_ready()
        pid = start_a_handler(flags)
        proxy.reset()
        flags.go.touch()
        worker.wait_until_ready()
        eventually(lambda: status() == "done")
        assert_it_is_woken(worker)
    assert {handled.note for handled in Handled.objects.all()} == {str(pid)}
    assert_each_was_handled_once(2)
    assert set(OutboxEvent.objects.values_list("attempts", flat=True)) == {1}


def test_a_stalled_network_is_waited_for(proxy, flags):
    with WorkerProcess(*ONLY_WOKEN, url=proxy.url) as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        proxy.stall()
        flags.go.touch()
        emit("probe", "next")
        eventually(lambda: proxy.held)  # the handler has returned, and its outcome is on its way
        assert status() == "pending"
        proxy.resume()
        wait_until_done(2)
        assert_it_is_woken(worker)
        assert "trying again" not in worker.output
    assert_each_was_handled_once(3)
    assert proxy.accepted == 2  # its own and the private one: none was made anew


def test_a_worker_outlives_a_network_that_swallows_all(proxy, flags):
    with WorkerProcess(*ONLY_WOKEN, url=proxy.url) as worker:
        worker.wait_until_ready()
        pid = start_a_handler(flags)
        proxy.black_hole()
        flags.go.touch()
        eventually(lambda: proxy.swallowed)  # the handler has returned, and its outcome is on its way
        assert status() == "pending"
        proxy.heal()
        worker.wait_until_ready()
        eventually(lambda: status() == "done")
        assert_it_is_woken(worker)
    assert {handled.note for handled in Handled.objects.all()} == {str(pid)}
    assert_each_was_handled_once(2)


def test_a_worker_that_sleeps_in_such_a_network_is_woken_after_it(proxy):
    with WorkerProcess(*ONLY_WOKEN, url=proxy.url) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        proxy.black_hole()
        emit("probe", "lost")  # and so is its notification
        eventually(lambda: proxy.swallowed)
        assert status("lost") == "pending"
        proxy.heal()
        worker.wait_until_ready()
        eventually(lambda: status("lost") == "done")
        assert_it_is_woken(worker)
    assert_each_was_handled_once(2)


def test_connecting_is_given_up_and_tried_again(proxy):
    proxy.black_hole()
    with WorkerProcess(*ONLY_WOKEN, url=f"{proxy.url} connect_timeout=2") as worker:
        eventually(lambda: "timeout expired" in worker.output)
        proxy.heal()
        worker.wait_until_ready()
        assert_it_is_woken(worker)


def test_connections_that_are_refused_are_tried_again(proxy):
    with WorkerProcess(*ONLY_WOKEN, url=proxy.url) as worker:
        worker.wait_until_ready()
        proxy.refuse()
        proxy.reset()
        eventually(lambda: worker.output.count("trying again") >= 3)
        proxy.heal()
        worker.wait_until_ready()
        assert_it_is_woken(worker)


def test_a_slow_network_changes_nothing_but_the_time(proxy):
    proxy.slow(0.005)
    emit_some(100)
    with WorkerProcess("--drain", url=proxy.url) as worker:
        assert worker.wait() == 0
    assert_each_was_handled_once(100)


def test_resets_again_and_again_lose_nothing_and_repeat_nothing(proxy):
    total = 2000
    with WorkerProcess("--commit-interval", "0.005", "--processes", "2", url=proxy.url) as worker:
        worker.wait_until_ready()
        with ThreadPoolExecutor(1) as emitter:
            emitting = emitter.submit(emit_through, proxy.url, list(range(total)))
            for _ in range(10):
                before = Handled.objects.count()
                eventually(lambda before=before: Handled.objects.count() > before or before == total)
                proxy.reset()
            emitting.result()
        wait_until_done(total)
        assert worker.process.poll() is None
        assert "died" not in worker.output
    assert_each_was_handled_once(total)


def emit_through(url, numbers):
    """Emit in SQL; and again, with the same key, if nobody can tell whether it went through."""
    while numbers:
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(url, autocommit=True) as emitter,
        ):
            while numbers:
                emitter.execute("select spark_emit('probe', %s)", [str(numbers[-1])])
                numbers.pop()


def test_a_worker_that_nobody_answers_can_still_be_stopped(proxy, flags):
    with WorkerProcess("--shutdown-timeout", "0.5", url=proxy.url) as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        proxy.black_hole()
        flags.go.touch()
        eventually(lambda: proxy.swallowed)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    proxy.heal()
    assert status() == "pending"
    with WorkerProcess("--drain") as worker:
        assert worker.wait() == 0
    assert_each_was_handled_once(1)


def test_a_worker_whose_connection_only_seems_to_stand_is_started_anew(proxy):
    with WorkerProcess("--poll-interval", "0.1", "--answer-timeout", "2", url=proxy.url) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        proxy.lose()
        emit("probe", "key")
        worker.wait_until_ready()
        eventually(lambda: status("key") == "done")
        assert "has had no answer" in worker.output
    assert_each_was_handled_once(1)


def test_a_crash_that_cannot_be_counted_does_not_keep_the_supervisor_from_its_work(flags):
    with WorkerProcess(*ONLY_WOKEN, "--answer-timeout", "2") as worker:
        worker.wait_until_ready()
        pid = start_a_handler(flags)
        with connect(autocommit=False) as other:
            other.execute("lock table spark_outbox_delivery")
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: "could not be counted: The database does not" in worker.output)
            assert flags.wait() != pid
        flags.go.touch()
        eventually(lambda: status() == "done")
    assert_each_was_handled_once(1)


def test_what_handlers_wait_for_may_take_longer_than_the_worker_s_own_statements():
    emit("probe", "in a statement", sql="select pg_sleep(3)")
    emit("probe", "after the commit", later=3)
    with WorkerProcess(*ONLY_WOKEN, "--answer-timeout", "2") as worker:
        worker.wait_until_ready()
        wait_until_done(2)
        wait_until_asleep()
        emit("probe", "after a sleep", delay=3)
        wait_until_done(3)
        assert "has had no answer" not in worker.output
    assert_each_was_handled_once(3)


# A pooler

DIRECT, POLLING, NEVER = {"LISTEN_DATABASE": "direct"}, {"LISTEN_DATABASE": None}, {"WAKE": "never"}

DONATE = """
from django.db import transaction
from tests.challenges.models import Challenge, Donation
for number in range(150):
    with transaction.atomic():
        Donation.objects.create(challenge=Challenge.objects.get(), amount=number)
"""

LEFT_BEHIND = """
select name || ' is ' || setting from pg_settings where source = 'session' and name not in (
    -- what pgbouncer keeps apart for each of its clients
    'application_name', 'client_encoding', 'DateStyle', 'TimeZone', 'standard_conforming_strings'
)
union all select locktype || ' lock of class ' || classid from pg_locks
where pid = pg_backend_pid() and locktype = 'advisory'
union all select 'listens to ' || pg_listening_channels()
union all select 'has prepared ' || statement from pg_prepared_statements
"""


@pytest.fixture
def pooler():
    if pgbouncer.PROGRAM is None:
        pytest.skip("pgbouncer is not installed")
    with PgBouncer(conninfo(), pool_size=3) as pooler:
        yield pooler


def pooled(pooler, options, *arguments, direct=None):
    """Start a worker behind the pooler, with SPARK_OUTBOX."""
    return WorkerProcess(
        *arguments,
        url=pooler.url,
        DJANGO_SETTINGS_MODULE="tests.chaos.network_settings",
        DIRECT_URL=direct or conninfo(),
        SPARK_OUTBOX=json.dumps(options),
        EXTRA_APPS="tests.probe" if options == DIRECT else "",  # it has detached handlers
    )


def donate(pooler, *, processes):
    """Emit 150 events in each of some processes behind the pooler, and one more; return how many."""
    make_challenge()
    with ThreadPoolExecutor(processes) as emitters:
        runs = emitters.map(lambda url: manage("shell", "-c", DONATE, url=url), [pooler.url] * processes)
        assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * processes
    return 1 + 150 * processes


def left_behind(pooler):
    """Return what is in force in the pooler's sessions, which all of its clients share."""
    with contextlib.ExitStack() as stack:
        found = set()
        for _ in range(3):  # each has a transaction open: so all of the pool is looked at
            client = stack.enter_context(psycopg.connect(pooler.url, prepare_threshold=None))
            found.add((client.execute("select pg_backend_pid()").fetchone()[0], "alive"))
            found.update(client.execute(LEFT_BEHIND).fetchall())
        assert len([pid for pid, *rest in found if rest == ["alive"]]) == 3
        return [what for what, *rest in found if not rest]


@pytest.mark.parametrize("options", [DIRECT, POLLING], ids=["listening", "polling"])
def test_emitters_and_workers_share_a_pooler(pooler, options):
    often = () if options == DIRECT else ("--poll-interval", "0.05")
    with pooled(pooler, options, *often) as one, pooled(pooler, options, *often) as two:
        one.wait_until_ready()
        two.wait_until_ready()
        emitted = donate(pooler, processes=3)
        wait_until_done(emitted)
        assert left_behind(pooler) == []
        for worker in (one, two):
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert "trying again" not in worker.output
    assert_each_was_handled_once(emitted)
    assert left_behind(pooler) == []


def test_behind_a_pooler_a_worker_is_woken_by_its_direct_connection(pooler):
    with pooled(pooler, DIRECT, *ONLY_WOKEN) as worker:
        worker.wait_until_ready()
        assert_it_is_woken(worker)


def test_behind_a_pooler_a_worker_needs_no_trigger(pooler, wake_mode):
    wake_mode("never")
    with pooled(pooler, POLLING | NEVER, "--poll-interval", "0.05") as worker:
        worker.wait_until_ready()
        emitted = donate(pooler, processes=1)
        wait_until_done(emitted)
    assert_each_was_handled_once(emitted)


def test_workers_outlive_their_pooler(pooler, flags):
    with pooled(pooler, DIRECT, *ONLY_WOKEN) as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        pooler.kill()
        flags.go.touch()
        eventually(lambda: worker.output.count("trying again") >= 2)
        pooler.start()
        worker.wait_until_ready()
        eventually(lambda: status() == "done")
        assert_it_is_woken(worker)
    assert_each_was_handled_once(2)


def test_a_direct_connection_that_is_lost_is_made_anew(pooler, proxy):
    with pooled(pooler, DIRECT, *ONLY_WOKEN, direct=proxy.url) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        proxy.reset()
        worker.wait_until_ready()
        assert_it_is_woken(worker)


def test_behind_a_pooler_a_detached_handler_leaves_nothing_behind_and_is_taken_over(pooler, flags):
    with pooled(pooler, DIRECT, *ONLY_WOKEN) as one, pooled(pooler, DIRECT, *ONLY_WOKEN) as two:
        one.wait_until_ready()
        two.wait_until_ready()
        pid = start_a_handler(flags, "probe_detached")
        eventually(lambda: status() == "running")
        assert left_behind(pooler) == []
        holder, other = (one, two) if one.owns(pid) else (two, one)
        holder.kill()
        assert other.owns(flags.wait())
        flags.go.touch()
        eventually(lambda: status() == "done")
    assert left_behind(pooler) == []
    assert Handled.objects.filter(handler="after").count() == 1
    assert set(Delivery.objects.values_list("status", flat=True)) == {"done"}


def test_behind_a_pooler_silence_in_a_transaction_is_limited_for_that_transaction(pooler):
    limits = "show idle_in_transaction_session_timeout", "show client_connection_check_interval"
    with psycopg.connect(pooler.url, prepare_threshold=None) as client:
        client.execute(limiting.silence_limit(1.5))
        assert [client.execute(each).fetchone()[0] for each in limits] == ["1500ms", "1s"]
        client.commit()
        assert [client.execute(each).fetchone()[0] for each in limits] == ["0", "0"]
