"""Real workers, in processes of their own: what their options do, and how several share the work."""

import signal

import psycopg
import pytest
from django.db import connection

from spark_outbox import emit, emit_many
from tests.challenges.models import Handled
from tests.tools import (
    WorkerProcess,
    conninfo,
    eventually,
    manage,
    status,
    statuses,
    wait_until_asleep,
    wait_until_done,
)

pytestmark = pytest.mark.django_db(transaction=True)


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


# Side by side


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


def test_several_processes_work_side_by_side():
    with WorkerProcess("--processes", "3") as worker:
        worker.wait_until_ready()
        wait_until_asleep()  # one watches, the others rest
        assert "3 processes" in worker.output
        emit_many(({"group": "probe", "key": f"{n}"} for n in range(1500)), chunk_size=50)
        wait_until_done(1500)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert Handled.objects.count() == 1500
    assert Handled.objects.values("note").distinct().count() > 1


def test_with_a_pool_processes_share_no_connection_and_have_one_each():
    pool = {"DJANGO_SETTINGS_MODULE": "tests.pooled"}
    with WorkerProcess("--processes", "3", **pool) as worker:
        worker.wait_until_ready()
        for n in range(2):
            emit("probe_crash", f"crash {n}")
        eventually(lambda: set(statuses().values()) == {"failed"})
        emit_many({"group": "probe", "key": f"{n}"} for n in range(300))
        wait_until_done(300)
        wait_until_asleep()
        with connection.cursor() as cursor:
            cursor.execute(
                "select count(*) from pg_stat_activity where "
                "starts_with(application_name, 'spark_worker ') and "
                "datname = current_database()"
            )
            assert cursor.fetchone() == (3,)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert Handled.objects.values("key").distinct().count() == Handled.objects.count() == 300


# Restarts


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
