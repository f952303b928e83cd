"""spark_bench: small, but for real. What it finds is not asserted, since machines differ."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings
from django.db import connection

from spark_outbox import emit
from spark_outbox.bench.figures import Bench, Figure, Goal, percentile
from spark_outbox.bench.scratch import LOCK, SUFFIX, Scratch, scratch
from spark_outbox.errors import SparkOutboxError
from spark_outbox.management.commands import spark_bench  # imports all measurements in their order
from spark_outbox.models import OutboxEvent
from tests.tools import PATIENCE, connect, conninfo, eventually, manage

pytestmark = pytest.mark.django_db(transaction=True)


def scratch_databases():
    with connection.cursor() as cursor:
        cursor.execute("select datname from pg_database where datname like %s", [f"%{SUFFIX}"])
        return [name for (name,) in cursor.fetchall()]


def test_it_prints_a_list_of_figures_and_leaves_nothing_behind():
    emit("g", "mine")
    wanted = ["drain_noop", "emit_one", "takeover"]
    done = manage("spark_bench", "--quick", "--json", *(f"--only={name}" for name in wanted))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [figure["name"] for figure in figures] == wanted
    for figure in figures:
        assert list(figure) == ["name", "value", "unit", "baseline", "goal", "ratio", "met"]
        assert figure["value"] > 0
        assert (figure["ratio"] is None) == (figure["baseline"] is None)
        assert figure["met"] in (True, False)
    assert OutboxEvent.objects.get().status == "pending"  # nobody's own events are touched
    assert scratch_databases() == []


def test_crowds_and_neighbours_are_measured():
    wanted = ["emit_crowd", "notify_share", "groups", "retries"]
    done = manage("spark_bench", "--quick", "--json", *(f"--only={name}" for name in wanted))
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)}
    assert list(figures) == [
        "emit_crowd",
        "emit_crowd_polled",
        "notify_share",
        "notify_share_paced",
        "groups",
        "groups_latency",
        "retries",
        "retries_share",
    ]
    for name in ("notify_share", "notify_share_paced", "retries_share"):
        assert 0 <= figures.pop(name)["value"] <= 1
    assert all(figure["ratio"] > 0 for figure in figures.values())
    assert scratch_databases() == []


def test_each_service_has_its_cost_and_latency_at_each_rate(monkeypatch):
    monkeypatch.setattr(spark_bench.resting, "PROC", Path("/"))
    bench = Bench(Scratch("default"), "default", quick=True, say=lambda text: None)
    cost, p50, p99 = 3.0, 5.0, 7.0
    monkeypatch.setattr(bench, "medians", lambda *runs: [cost, p50, p99] * len(runs))
    figures = {figure.name: figure.value for figure in spark_bench.resting.rates(bench)}
    services, rates = ("one", "eight", "hosts"), (1, 20, 200)
    assert figures == {
        f"{name}_{service}_{rate}": value
        for service in services
        for rate in rates
        for name, value in {"cost": cost * rate, "latency": p50}.items()
    }


def test_it_prints_a_table():
    done = manage("spark_bench", "--quick", "--only", "emit_many")
    header, *lines, hint = done.stdout.splitlines()
    assert header.split() == ["name", "value", "unit", "baseline", "ratio", "goal", "met"]
    assert [line.split()[0] for line in lines] == ["emit_many", "emit_many_plain"]
    assert "rough" in hint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_cleans_up(number):
    process = subprocess.Popen(
        [sys.executable, settings.BASE_DIR / "manage.py", "spark_bench", "--only", "drain_noop"],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings", "DATABASE_URL": conninfo()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(scratch_databases)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "Interrupted; the scratch databases have been dropped." in errors
    assert scratch_databases() == []


def test_what_a_killed_one_left_behind_is_dropped_by_the_next():
    left = Scratch("default", "_big")
    with connection.cursor() as cursor:
        cursor.execute(f'create database "{left.alias}"')
    assert manage("spark_bench", "--quick", "--only", "emit_one").returncode == 0
    assert scratch_databases() == []


def test_two_at_once_are_refused():
    with connect() as other:
        other.execute("select pg_advisory_lock(%s)", [LOCK])
        done = manage("spark_bench", "--quick", "--only", "emit_one")
        assert done.returncode == 1
        assert "Another spark_bench is running" in done.stderr


def test_without_the_right_to_create_databases_it_says_what_to_do(monkeypatch):
    with connection.cursor() as cursor:
        cursor.execute("drop role if exists nobody_special")
        cursor.execute("create role nobody_special")
        cursor.execute("set role nobody_special")
    try:
        with pytest.raises(SparkOutboxError, match="ALTER ROLE"), scratch():
            pass
    finally:
        with connection.cursor() as cursor:
            cursor.execute("reset role")
            cursor.execute("drop role nobody_special")


def test_what_it_does_not_know_is_refused():
    assert "invalid choice" in manage("spark_bench", "--only", "nonsense").stderr
    assert "DATABASES has no 'nope'" in manage("spark_bench", "--database", "nope").stderr


def test_runs_take_turns_and_their_median_counts():
    calls = []

    def run(name, *values):
        left = list(values)

        def call():
            calls.append(name)
            return left.pop(0)

        return call

    bench = Bench(Scratch("default"), "default", quick=False, say=lambda text: None)
    assert bench.medians(run("a", 5, 1, 3, 2, 4), run("b", 10, 10, 10, 0, 99)) == [3, 10]
    assert calls == ["a", "b"] * 5


def test_figures_know_whether_they_meet_their_goal():
    assert Figure("f", 80, "events/s", 100, Goal(">=", 0.75)).met is True
    assert Figure("f", 70, "events/s", 100, Goal(">=", 0.75)).met is False
    assert Figure("f", 0.9, "s", goal=Goal("<", 1)).met is True
    assert Figure("f", 0.9, "s").met is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(100)], 0.99) == 99.0
