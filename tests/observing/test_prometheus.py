"""Metrics for Prometheus: of real worker processes, and of the web side."""

import errno
import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection

from spark_outbox import BatchFailed, conf, emit, emit_many, handler
from spark_outbox.errors import SettingsError
from spark_outbox.management.metrics import VARIABLE, Metrics
from spark_outbox.models import OutboxEvent
from spark_outbox.observing import hooks, prometheus, views
from spark_outbox.observing.database import INTERVAL, Database
from spark_outbox.observing.files import Bounded, Distribution, InFiles, Numbers, Total
from spark_outbox.operating import look
from spark_outbox.testing import drain
from spark_outbox.worker.loop import Worker
from tests.observing.scraping import every_name, folder_of, parsed, scrape, value
from tests.test_readme import OPERATING, section
from tests.tools import (
    HOUR,
    PATIENCE,
    Clock,
    WorkerProcess,
    eventually,
    free_port,
    get,
    make_due,
    manage,
    wait_until_done,
    work,
)

pytestmark = pytest.mark.django_db(transaction=True)

HANDLED = {"outcome": "handled", "handler": "tests.probe.handlers.probe"}


# Of workers


def test_one_scrape_has_all_processes_and_no_total_falls():
    """Not by a process that is killed, nor by a reload."""
    port, processes, emitted = free_port(), 2, 0

    def handle(more):
        nonlocal emitted
        emit_many({"group": "probe", "key": f"{emitted + n}"} for n in range(more))
        emitted += more
        wait_until_done(emitted)
        eventually(lambda: value(scrape(port), "spark_outbox_deliveries_total", **HANDLED) == emitted)

    with WorkerProcess("--processes", str(processes), "--metrics-port", str(port)) as worker:
        worker.wait_until_ready()
        handle(20)
        names = {name_of(pid): pid for pid in worker.children()}
        assert set(names) == {
            "spark_metrics",
            *(f"spark_worker:{n + 1}" for n in range(processes)),
        }
        folder = folder_of(names["spark_worker:1"])
        os.kill(names["spark_worker:1"], signal.SIGKILL)
        eventually(lambda: name_of(names["spark_worker:1"]) is None)
        eventually(lambda: len(worker.children()) == processes + 1)
        handle(20)
        files = set(folder.iterdir())
        assert len(files) == 2 * processes + 1  # counters, histograms; and the groups
        for _ in range(2):
            reload(worker, processes)
            handle(20)
        assert len(set(folder.iterdir())) == 4 * processes + 1
        samples = scrape(port)
        assert value(samples, "spark_outbox_wait_seconds_count") == emitted
        assert value(samples, "spark_outbox_handler_duration_seconds_count") == emitted
        assert value(samples, "spark_outbox_batch_events_sum") == emitted
        assert value(samples, "spark_outbox_wakes_total") > 0
        assert value(samples, "spark_outbox_database_up") == 1
        assert value(samples, "spark_outbox_workers") > 0
        assert get(port, "/else")[0] == 404
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert not folder.exists()


def reload(worker, processes):
    former = set(worker.children())
    worker.signal(signal.SIGHUP)
    worker.wait_until_it_says("RELOADING=1")
    worker.wait_until_ready()
    eventually(lambda: len(worker.children()) == processes + 1 and not former & {*worker.children()})


def name_of(pid):
    """Return the name of a process; None if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it goes between open and read
        return None


def test_the_server_ends_with_a_supervisor_that_is_killed_and_leaves_nothing():
    port = free_port()
    with WorkerProcess("--metrics-port", str(port)) as worker:
        worker.wait_until_ready()
        eventually(lambda: get(port, "/metrics"))
        (child,) = [pid for pid in worker.children() if name_of(pid) == "spark_worker:1"]
        folder = folder_of(child)
        worker.process.kill()
        eventually(lambda: get(port, "/metrics") is None and not folder.exists())


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "prometheus_client.py").write_text(
        "raise ModuleNotFoundError('no', name='prometheus_client')"
    )
    done = manage(
        "spark_worker",
        "--drain",
        "--metrics-port",
        str(free_port()),
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
    )
    assert done.returncode == os.EX_CONFIG
    assert 'pip install "spark_outbox[prometheus]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_every_metric_is_documented_and_every_documented_one_is_there():
    rows = re.findall(r"^\| `(spark_outbox_\w+)", section(OPERATING, "Metrics"), re.MULTILINE)
    there = {re.sub("_(bucket|sum|count|created)$", "", name) for name in every_name()}
    assert sorted(rows) == sorted(there)


# Groups


def test_groups_above_a_number_share_a_time_series(tmp_path):
    for file in (None, tmp_path / "groups"):
        first, second = (Bounded(3, file) for _ in range(2))
        assert [first(name) for name in "abcdab"] == ["a", "b", "c", "other", "a", "b"]
        assert second("d") == ("other" if file else "d")
    assert Bounded(3, tmp_path / "groups")("a") == "a"


def test_a_line_that_a_full_disk_has_cut_off_is_no_name(tmp_path):
    file = tmp_path / "groups"
    file.write_text('"a"\n"cut o')
    groups = Bounded(3, file)
    assert [groups(name) for name in "bacd"] == ["b", "a", "c", "other"]
    assert Bounded(3, file)("c") == "c"


def test_no_scrape_has_more_groups_than_that():
    emit_many({"group": f"group\n{n}", "key": f"{n}"} for n in range(60))
    samples = parsed(prometheus.scrape(Database("default")).decode())
    for name in ("spark_outbox_events", "spark_outbox_group_lag_seconds"):
        groups = {dict(labels)["group"] for other, labels in samples if other == name}
        assert len(groups) == prometheus.MOST_GROUPS + 1
    assert value(samples, "spark_outbox_events", state="ready") == 60
    assert value(samples, "spark_outbox_events", state="ready", group="other") == 10


# What happens to events


@pytest.fixture
def counted(tmp_path):
    """What this process handles, from now on."""
    totals, distributions = (Numbers(tmp_path / f"{kind}_0.db") for kind in ("counter", "histogram"))
    prometheus.Handled(totals, distributions, Bounded(3))
    yield lambda: parsed(prometheus.scrape(InFiles(tmp_path)).decode())
    prometheus.stop()
    for each in (totals, distributions):
        each.close()


def test_attempts_are_counted_by_what_they_came_to(own_registry, counted):
    @handler("", name="h", max_attempts=2, discard_for=(KeyError,), backoff=HOUR)
    def handle(event):
        if "error" in event:
            raise {"KeyError": KeyError, "ValueError": ValueError}[event["error"]]

    emit("g", "good")
    emit("g", "discarded", error="KeyError")
    emit("g", "bad", error="ValueError")
    Worker().drain()
    make_due()
    Worker().drain()
    samples = counted()
    for outcome in ("handled", "discarded", "retried", "failed"):
        labels = {"handler": "h", "group": "g", "outcome": outcome}
        assert value(samples, "spark_outbox_deliveries_total", **labels) == 1, outcome
    assert value(samples, "spark_outbox_wait_seconds_count", handler="h") == 3  # first attempts
    assert value(samples, "spark_outbox_handler_duration_seconds_count", handler="h") == 4


KINDS = {"list": {"batch": 10}, "detached": {"atomic": False}}


@pytest.mark.parametrize("kind", ["plain", "list", "async", "detached", "inline"])
def test_each_kind_of_call_counts_once(own_registry, counted, kind):
    def handle(given):
        events = given if isinstance(given, list) else [given]
        if failed := {event: ValueError() for event in events if event.group == "bad"}:
            raise BatchFailed(failed) if events is given else ValueError

    async def handle_later(event):
        handle(event)

    function = handle_later if kind in {"async", "inline"} else handle
    handler("", name="h", max_attempts=1, **KINDS.get(kind, {}))(function)
    emit("good", "1")
    emit("bad", "2")
    drain(raise_exceptions=False) if kind == "inline" else work()
    samples = counted()
    name = "spark_outbox_deliveries_total"
    assert value(samples, name, group="good", outcome="handled") == 1
    assert value(samples, name, group="bad", outcome="failed") == 1
    assert value(samples, name) == 2
    assert value(samples, "spark_outbox_wait_seconds_count", handler="h") == 2
    assert value(samples, "spark_outbox_wait_seconds_sum") < HOUR
    calls = 1 if kind == "list" else 2
    assert value(samples, "spark_outbox_handler_duration_seconds_count", handler="h") == calls


def test_a_payload_that_cannot_be_read_has_failed_without_a_call(own_registry, counted):
    handler("", name="h")(lambda event: None)
    OutboxEvent.objects.create(group="g", key="key", payload={"a": {"$": ["?"]}})
    work()
    assert value(counted(), "spark_outbox_deliveries_total", outcome="failed") == 1
    assert value(counted(), "spark_outbox_handler_duration_seconds_count") == 0


def test_calls_beside_one_that_ends_the_transaction_count_once(own_registry, counted, unhurried):
    @handler("", name="h", max_attempts=1)
    def handle(event):
        if event.group == "bad":
            connection.close()

    emit("good", "1")
    emit("bad", "2")
    work()
    samples = counted()
    for outcome in ("handled", "failed"):
        assert value(samples, "spark_outbox_deliveries_total", outcome=outcome) == 1
    assert value(samples, "spark_outbox_wait_seconds_count") == 2


def test_values_are_counted_in_their_buckets(tmp_path):
    for _ in range(2):  # the next process of a place goes on with its file
        numbers = Numbers(tmp_path / "histogram_0.db")
        Distribution(numbers, "d", "Text.", (1, 5), "kind").add([0.5, 1, 3, 9], "x")
        numbers.close()
    samples = parsed(prometheus.scrape(InFiles(tmp_path)).decode())
    buckets = {
        le: value(samples, "spark_outbox_d_bucket", kind="x", le=le) for le in ("1.0", "5.0", "+Inf")
    }
    assert buckets == {"1.0": 4, "5.0": 6, "+Inf": 8}
    assert value(samples, "spark_outbox_d_sum") == 27
    assert value(samples, "spark_outbox_d_count") == 8


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(descriptor, offset, size):
        if size > os.fstat(descriptor).st_size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "posix_fallocate", refuse)


def test_a_full_disk_costs_a_number_and_no_process(tmp_path, full_disk):
    file = tmp_path / "counter_0.db"
    numbers = Numbers(file)
    assert file.stat().st_blocks * 512 >= file.stat().st_size > 0  # it has no holes
    total = Total(numbers, "x", "Text.", "kind")
    total.add(1, "a")
    full_disk()
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            total.add(1, "long" * 20_000)
    total.add(1, "a")
    samples = parsed(prometheus.scrape(InFiles(tmp_path)).decode())
    assert value(samples, "spark_outbox_x_total", kind="a") == 2
    numbers.close()


def test_a_worker_on_a_full_disk_counts_nothing(own_registry, full_disk, caplog):
    full_disk()
    metrics = Metrics(("127.0.0.1", free_port()), using="default")
    try:
        metrics.count(1)
        assert "This process counts nothing for metrics" in caplog.text
        assert not hooks.calls_settled.receivers
        assert list(InFiles(metrics._folder).collect()) == []
    finally:
        metrics.server.leave()
        metrics.remove()
        os.environ.pop(VARIABLE)


def test_an_event_that_was_due_before_it_was_emitted_waits_from_then(own_registry, counted):
    handler("", name="h")(lambda event: None)
    emit("g", "key")
    with connection.cursor() as cursor:
        cursor.execute("update spark_outbox_event set available_at = '-infinity'")
    Worker().drain()
    assert value(counted(), "spark_outbox_wait_seconds_count") == 1
    assert value(counted(), "spark_outbox_wait_seconds_sum") < HOUR


def test_a_delay_on_purpose_is_no_wait(own_registry, counted):
    handler("", name="h")(lambda event: None)
    emit("g", "key", delay=HOUR)
    with connection.cursor() as cursor:  # the hour is over
        cursor.execute(
            "update spark_outbox_event set created_at = created_at - interval '1 hour', "
            "available_at = available_at - interval '1 hour'"
        )
    Worker().drain()
    samples = counted()
    assert value(samples, "spark_outbox_wait_seconds_count") == 1
    assert value(samples, "spark_outbox_wait_seconds_sum") < HOUR / 2


def test_a_batch_that_is_rolled_back_counts_once(own_registry, counted):
    handler("", name="h")(lambda event: None)
    with connection.cursor() as cursor:  # PostgreSQL refuses to settle one of them
        cursor.execute(
            "alter table spark_outbox_event "
            "add constraint refused check (key <> 'bad' or status <> 'done')"
        )
    try:
        for key in ("good", "bad"):
            emit("g", key)
        Worker().drain()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("alter table spark_outbox_event drop constraint refused")
    assert value(counted(), "spark_outbox_deliveries_total", outcome="handled") == 1


# The database


def test_the_database_is_read_once_in_an_interval(monkeypatch):
    clock, reads, figures = Clock(), [], look.figures
    monkeypatch.setattr(look, "figures", lambda **given: reads.append(1) or figures(**given))
    database = Database("default", clock=clock)
    for now, number in ((0, 1), (INTERVAL - 1, 1), (INTERVAL, 2)):
        clock.now = now
        database.collect()
        assert len(reads) == number


def test_a_scrape_does_not_wait_for_a_database_that_hangs(monkeypatch):
    """Nor does it read a second time meanwhile."""
    clock, answers = Clock(), threading.Event()
    database = Database("default", clock=clock)
    up = "spark_outbox_database_up"

    def scraped():
        return parsed(prometheus.scrape(database).decode())

    before = scraped()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take():
            client, _ = server.accept()
            with client:
                answers.wait(PATIENCE)  # the test's own; what hangs says nothing

        accepts = threading.Thread(target=take)
        accepts.start()
        with monkeypatch.context() as patch:
            port = str(server.getsockname()[1])
            patch.setitem(connection.settings_dict, "HOST", "127.0.0.1")
            patch.setitem(connection.settings_dict, "PORT", port)
            patch.setattr("spark_outbox.observing.database.PATIENCE", 0.1)
            for now, is_up in ((0, 1), (INTERVAL, 1), (2 * INTERVAL - 1, 1), (2 * INTERVAL, 0)):
                clock.now = now
                assert value(scraped(), up) == is_up
            answers.set()
            accepts.join()
            eventually(lambda: not database._thread.is_alive())
    assert value(before, up) == 1
    assert value(scraped(), up) == 0  # the connection was refused
    clock.now += INTERVAL
    assert value(scraped(), up) == 1


def test_a_database_that_can_not_be_read_is_down_and_nothing_else_is_told(caplog):
    with connection.cursor() as cursor:
        cursor.execute("alter view spark_outbox_status rename to away")
        try:
            text = prometheus.scrape(Database("default")).decode()
        finally:
            cursor.execute("alter view away rename to spark_outbox_status")
    assert list(parsed(text).items()) == [(("spark_outbox_database_up", frozenset()), 0.0)]
    assert "can't be read for metrics" in caplog.text


def test_retention_is_behind_by_the_oldest_event(own_registry, settings):
    settings.SPARK_OUTBOX = {"RETENTION": {"done": 60}}
    emit("g", "key")
    OutboxEvent.objects.update(status="done")
    with connection.cursor() as cursor:
        cursor.execute("update spark_outbox_event set finished_at = now() - interval '1 hour'")
    samples = parsed(prometheus.scrape(Database("default")).decode())
    assert HOUR - 60 <= value(samples, "spark_outbox_retention_overdue_seconds") < HOUR


# The view


@pytest.fixture
def page(settings):
    settings.ROOT_URLCONF = "tests.observing.urls"
    views._databases.clear()
    yield
    views._databases.clear()


@pytest.mark.usefixtures("page")
def test_the_view_asks_who_it_is(client, settings):
    def status(**headers):
        return client.get("/metrics/", headers=headers).status_code

    assert status() == 404
    assert status(authorization="Bearer ") == 403
    settings.SPARK_OUTBOX = {"METRICS_TOKEN": "secret"}
    assert status() == 404
    assert status(authorization="Bearer wrong") == 403
    assert status(authorization="Basic secret") == 403
    assert status(authorization="Bearer sécret") == 403
    assert status(authorization="Bearer secret") == 200
    settings.SPARK_OUTBOX = {}
    user = User.objects.create_user("anna", is_staff=True)
    client.force_login(user)
    assert status() == 403
    user.user_permissions.add(Permission.objects.get(codename="view_outboxevent"))
    assert status() == 200
    User.objects.update(is_staff=False)
    assert status() == 403
    assert client.post("/metrics/").status_code == 405


@pytest.mark.usefixtures("page")
def test_the_view_takes_a_token_where_all_else_takes_a_login(client, settings):
    settings.SPARK_OUTBOX = {"METRICS_TOKEN": "secret"}
    required = "django.contrib.auth.middleware.LoginRequiredMiddleware"
    settings.MIDDLEWARE = [*settings.MIDDLEWARE, required]
    assert client.get("/metrics/", headers={"authorization": "Bearer secret"}).status_code == 200
    assert client.get("/metrics/").status_code == 404


@pytest.mark.usefixtures("page")
def test_the_view_has_what_this_process_emits_and_the_state_of_the_outbox(client, settings):
    settings.SPARK_OUTBOX = {"METRICS_TOKEN": "secret"}

    def seen():
        answer = client.get("/metrics/", headers={"authorization": "Bearer secret"})
        assert answer["Content-Type"] == prometheus.CONTENT_TYPE
        return parsed(answer.content.decode())

    emitted = value(seen(), "spark_outbox_events_emitted_total")
    views._databases.clear()
    emit("g", "key")
    emit("g", "key")  # a duplicate
    samples = seen()
    assert value(samples, "spark_outbox_events_emitted_total") == emitted + 1
    assert value(samples, "spark_outbox_events", state="ready", group="g") == 1
    assert value(samples, "spark_outbox_health", check="workers") == 2


ANOTHER = """
from spark_outbox.observing import hooks, views
hooks.event_emitted.send(None, group="theirs", key="k", using="default")
"""


@pytest.mark.usefixtures("page")
def test_the_view_shows_what_processes_share(client, settings, tmp_path, monkeypatch):
    settings.SPARK_OUTBOX = {"METRICS_TOKEN": "secret"}
    monkeypatch.setenv(prometheus.FOLDER, str(tmp_path))
    done = manage("shell", "--command", ANOTHER, **{prometheus.FOLDER: str(tmp_path)})
    assert done.returncode == 0, done.stderr
    text = client.get("/metrics/", headers={"authorization": "Bearer secret"}).content.decode()
    assert value(parsed(text), "spark_outbox_events_emitted_total", group="theirs") == 1


A_WORKER = """
from pathlib import Path
from spark_outbox.observing import hooks, prometheus
if {views_first}:
    from spark_outbox.observing import views
prometheus.count_in(Path("{folder}"), "1a")
from spark_outbox.observing import views
hooks.event_emitted.send(None, group="theirs", key="k", using="default")
"""


@pytest.mark.parametrize("views_first", [True, False])
def test_what_a_worker_emits_is_not_in_what_it_shares_with_the_web(tmp_path, views_first):
    own, shared = tmp_path / "own", tmp_path / "shared"
    for folder in (own, shared):
        folder.mkdir()
    code = A_WORKER.format(folder=own, views_first=views_first)
    done = manage("shell", "--command", code, **{prometheus.FOLDER: str(shared)})
    assert done.returncode == 0, done.stderr
    for folder, number in ((own, 1), (shared, 0)):
        samples = parsed(prometheus.scrape(InFiles(folder)).decode())
        assert value(samples, "spark_outbox_events_emitted_total") == number


def test_the_token_is_not_shown(settings):
    settings.SPARK_OUTBOX = {"METRICS_TOKEN": "secret"}
    assert "secret" not in repr(conf.current())
    settings.SPARK_OUTBOX = {"METRICS_TOKEN": b"secret"}
    with pytest.raises(SettingsError) as error:
        conf.current()
    assert "secret" not in str(error.value)
