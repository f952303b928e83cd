"""What a worker tells of itself while it runs: to systemd, to probes, and to its log."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psycopg
import pytest
from django.db import connection

from spark_outbox import emit
from spark_outbox.processes.place import Child, Place
from spark_outbox.processes.signs import LONG, Signs
from spark_outbox.processes.slot import Slot
from tests.tools import (
    WorkerProcess,
    eventually,
    free_port,
    get,
    manage,
    start_a_handler,
    status,
    wait_until_asleep,
    wait_until_done,
)
from tests.trouble import TROUBLE

pytestmark = pytest.mark.django_db(transaction=True)


# To systemd


def test_the_status_line_says_how_it_goes(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        assert worker.status_line("0 ready") == "STATUS=0 events/s, 0 ready, 0 failed"
        emit("probe", "bad", **{"raise": "no"})
        worker.status_line(" events/s, 0 ready, 0 failed")
        start_a_handler(flags)
        worker.status_line("1 of 1 processes at work")
        pattern = "tests.probe.handlers.probe on event "
        assert pattern in worker.status_line(pattern)
        flags.go.touch()


def test_the_watchdog_hears_of_each_second_in_which_all_is_well():
    with WorkerProcess(WATCHDOG_USEC="3000000") as worker:
        worker.wait_until_ready()
        eventually(lambda: worker.has_message() or worker.signs.count("WATCHDOG=1") >= 3)
        worker.signal(signal.SIGSTOP)
        eventually(lambda: not worker.has_message() and has_stopped(worker.process.pid))
        heard = len(worker.signs)
        time.sleep(2)
        worker.has_message()
        assert len(worker.signs) == heard


def test_stopping_takes_the_time_that_the_option_says():
    with WorkerProcess("--shutdown-timeout", "120") as worker:
        worker.wait_until_ready()
        worker.signal(signal.SIGTERM)
        assert worker.message() == "STOPPING=1"
        assert worker.last == "STOPPING=1\nEXTEND_TIMEOUT_USEC=135000000"
        assert worker.wait() == 0


def has_stopped(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_each_process_is_named_for_what_it_does():
    with WorkerProcess("--processes", "2", "--health-port", str(free_port())) as worker:
        worker.wait_until_ready()
        pids = [worker.process.pid, *worker.children()]
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids}
        assert names == {"spark_worker", "spark_worker:1", "spark_worker:2", "spark_probes"}


# Processes that hang


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_sleeping_process_that_is_stopped_is_replaced(processes):
    options = ("--poll-interval", "1", "--answer-timeout", "8", "--processes", processes)
    with WorkerProcess(*options) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        (stopped, *_) = worker.children()
        os.kill(
            stopped, signal.SIGSTOP
        )  # in its sleep; or as it waits for an answer, which is killed, too
        kills = re.compile(f"The worker process {stopped} .*, and is killed.")
        eventually(lambda: kills.search(worker.output))
        emit("probe", "key")
        eventually(lambda: status() == "done")
        assert stopped not in worker.children()


def test_a_supervisor_that_was_stopped_itself_judges_nobody():
    """As by Ctrl-Z and fg: all of them stand still, and go on."""
    with WorkerProcess("--poll-interval", "1") as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        children = worker.children()
        os.killpg(worker.process.pid, signal.SIGSTOP)
        time.sleep(12)  # more than the poll interval and two graces
        os.killpg(worker.process.pid, signal.SIGCONT)
        emit("probe", "key")
        eventually(lambda: status() == "done")
        assert worker.children() == children
        assert "is killed" not in worker.output


def place_with(slot):
    """Return a place whose child has this slot, and no process."""
    place = Place(0, child=Child(slot, pid=1))
    place.child.slot.be_ready()
    return place


@pytest.mark.parametrize(
    ("note", "called"),
    [
        (lambda slot: slot.take_in_hand((4711, 0)), "handler 0 on event 4711"),
        (lambda slot: slot.keep((4711, 0)), "handler 0 on event 4711"),  # an async call beside others
        (lambda slot: slot.rest(), "callbacks after a commit"),
    ],
)
def test_what_takes_long_is_logged_and_again_after_twice_the_time(caplog, note, called):
    now, slot = [0.0], Slot(0)
    place = place_with(slot)
    signs = Signs(name_of=lambda number: f"handler {number}", clock=lambda: now[0])
    note(slot)
    for _ in range(int(5 * LONG)):
        signs.look([place], pipes=None)
        now[0] += 1
    assert [record.getMessage() for record in caplog.records] == [
        f"The worker process 1 has been at {called} for {seconds} s." for seconds in (60, 120, 240)
    ]
    slot.put_down()
    slot.keep()
    signs.look([place], pipes=None)
    note(slot)
    now[0] += 1
    signs.look([place], pipes=None)
    assert len(caplog.records) == 3
    place.child.close()


def test_the_handler_in_hand_is_seen_by_all(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        start_a_handler(flags)

        def seen():
            with connection.cursor() as cursor:
                cursor.execute("select handler, event_key, in_hand_for from spark_outbox_workers")
                return cursor.fetchone()

        eventually(lambda: seen()[0])
        handler, key, in_hand_for = seen()
        assert (handler, key) == ("tests.probe.handlers.probe", "key")
        assert in_hand_for.total_seconds() > 0
        flags.go.touch()
        eventually(lambda: seen() == ("", None, None))
        assert status() == "done"


# To probes


def test_live_and_ready(own_server, tmp_path):
    url, stop, start = own_server
    port, alive = free_port(), tmp_path / "alive"
    with WorkerProcess("--health-port", str(port), "--liveness-file", str(alive), url=url) as worker:
        worker.wait_until_ready()
        eventually(lambda: get(port, "/ready")[0] == 200)
        assert get(port, "/live")[0] == 200
        assert "events/s" in get(port, "/live")[1]
        assert get(port, "/else")[0] == 404
        stop("fast")
        eventually(lambda: get(port, "/ready")[0] == 503)
        assert get(port, "/live")[0] == 200
        before = alive.stat().st_mtime_ns
        eventually(lambda: alive.stat().st_mtime_ns > before)
        start()
        eventually(lambda: get(port, "/ready")[0] == 200)
        worker.signal(signal.SIGSTOP)
        eventually(lambda: get(port, "/live")[0] == 503)
        worker.signal(signal.SIGCONT)
        eventually(lambda: get(port, "/live")[0] == 200)
        worker.process.kill()  # and all that belongs to it goes
        eventually(lambda: get(port, "/live") is None)


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = manage("spark_worker", "--drain", "--health-port", str(port))
    assert done.returncode == os.EX_CONFIG
    assert f"--health-port 127.0.0.1:{port}: Address already in use." in done.stderr
    done = manage("spark_worker", "--drain", "--liveness-file", "/nowhere/alive")
    assert done.returncode == os.EX_CONFIG
    assert "--liveness-file /nowhere/alive: No such file or directory." in done.stderr


# New code

HANDLERS = """
from spark_outbox import handler
from tests.challenges.models import Handled

@handler("^fresh$", name="fresh")
def fresh(event):
    Handled.objects.create(key=event.key, handler="{version}")
"""


@pytest.fixture
def fresh(tmp_path):
    app = tmp_path / "fresh"
    app.mkdir()
    (app / "__init__.py").touch()
    (app / "handlers.py").write_text(HANDLERS.format(version="old"))
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    return (
        app / "handlers.py",
        {"EXTRA_APPS": f"{TROUBLE} fresh", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )


def handled_by(key):
    with connection.cursor() as cursor:
        cursor.execute("select handler from challenges_handled where key = %s", [key])
        return cursor.fetchone()


@pytest.mark.parametrize("processes", ["1", "3"])
def test_a_hangup_loads_new_code_and_leaves_no_gap(fresh, flags, processes):
    handlers, environment = fresh
    with WorkerProcess("--processes", processes, **environment) as worker:
        worker.wait_until_ready()
        former = worker.children()
        emit("fresh", "before")
        eventually(lambda: handled_by("before") == ("old",))
        start_a_handler(flags)  # it takes its time
        handlers.write_text(HANDLERS.format(version="new"))
        worker.signal(signal.SIGHUP)
        worker.wait_until_it_says("RELOADING=1")
        eventually(lambda: set(worker.children()) - set(former))
        number = 0
        by = None
        while by != ("new",):  # the old code or the new one, at any time
            number += 1
            emit("fresh", f"during {number}")
            by = eventually(partial(handled_by, f"during {number}"))
        flags.go.touch()
        worker.wait_until_ready()
        eventually(lambda: len(worker.children()) == int(processes))
        assert not set(former) & set(worker.children())
        wait_until_done(number + 2)
        worker.signal(signal.SIGTERM)
        worker.wait_until_it_says("STOPPING=1")
        assert worker.wait() == 0


def test_code_that_can_not_be_loaded_changes_nothing(fresh):
    handlers, environment = fresh
    with WorkerProcess(**environment) as worker:
        worker.wait_until_ready()
        children = worker.children()
        handlers.write_text("import nothing_of_this_name")
        worker.signal(signal.SIGHUP)
        assert [worker.message() for _ in range(2)] == ["RELOADING=1", "READY=1"]
        assert "The new code can't be loaded (it ended with 1): the worker goes on" in worker.output
        assert "nothing_of_this_name" in worker.output
        emit("fresh", "key")
        eventually(lambda: handled_by("key") == ("old",))
        assert worker.children() == children


def test_a_worker_that_loads_new_code_can_be_stopped(fresh, flags):
    with WorkerProcess("--shutdown-timeout", "0.5", **fresh[1]) as worker:
        worker.wait_until_ready()
        former = worker.children()
        start_a_handler(flags)
        worker.signal(signal.SIGHUP)
        eventually(lambda: len(worker.children()) == 2 and former[0] in worker.children())
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert status() == "pending"  # the former one was killed in the end


def test_the_check_loads_what_a_worker_would(fresh):
    handlers, environment = fresh
    done = manage("spark_worker", "--check", **environment)
    assert done.returncode == 0
    assert "fresh for ^fresh$" in done.stdout
    handlers.write_text("import nothing_of_this_name")
    assert manage("spark_worker", "--check", **environment).returncode == 1


# To the journal

JOURNAL = """
import logging, os, socket, sys
found = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
from spark_outbox.management.journal import set_up_logging
set_up_logging(int(sys.argv[1]))
log = logging.getLogger("spark_outbox.worker")
log.error("two\\nlines"); log.warning("one"); log.info("more"); log.debug("all")
"""


@pytest.mark.parametrize(
    ("verbosity", "lines"),
    [
        ("1", ["<3>two", "<3>lines", "<4>one"]),
        ("2", ["<3>two", "<3>lines", "<4>one", "<6>more"]),
        ("3", ["<3>two", "<3>lines", "<4>one", "<6>more", "<7>all"]),
    ],
)
def test_each_line_to_the_journal_has_its_priority(verbosity, lines):
    said = subprocess.run(
        [sys.executable, "-c", JOURNAL, verbosity], capture_output=True, text=True, check=True
    )
    assert said.stderr.splitlines() == lines


# A reload that goes wrong


def test_a_check_that_hangs_is_given_up(fresh):
    handlers, environment = fresh
    environment |= {"CHECK_PATIENCE": "1", "DJANGO_SETTINGS_MODULE": "tests.hurried"}
    with WorkerProcess(**environment) as worker:
        worker.wait_until_ready()
        children = worker.children()
        good = handlers.read_text()
        handlers.write_text("import time\ntime.sleep(3600)")
        worker.signal(signal.SIGHUP)
        assert [worker.message() for _ in range(2)] == ["RELOADING=1", "READY=1"]
        assert "can't be loaded (it ended with -9)" in worker.output
        handlers.write_text(good)
        worker.signal(signal.SIGHUP)
        assert [worker.message() for _ in range(2)] == ["RELOADING=1", "READY=1"]
        eventually(lambda: worker.children() not in ([], children))


def test_new_code_without_its_tables_changes_nothing(fresh, own_server):
    url, _, _ = own_server
    with WorkerProcess(url=url, **fresh[1]) as worker:
        worker.wait_until_ready()
        children = worker.children()
        with psycopg.connect(url, autocommit=True) as admin:
            admin.execute("alter view spark_outbox_status rename to away")
            worker.signal(signal.SIGHUP)
            assert [worker.message() for _ in range(2)] == ["RELOADING=1", "READY=1"]
            assert "has no outbox. Run: manage.py migrate" in worker.output
            os.kill(children[0], signal.SIGSEGV)  # nor does the end of a process stop the service
            eventually(lambda: "exit code 78" in worker.output)
            admin.execute("alter view away rename to spark_outbox_status")
        worker.wait_until_ready()


def test_the_service_is_ready_after_a_reload_once_the_former_processes_are_gone(fresh):
    with WorkerProcess("--max-events", "1", "--processes", "2", **fresh[1]) as worker:
        worker.wait_until_ready()
        former = worker.children()
        worker.signal(signal.SIGHUP)
        for number in range(20):  # processes end and are ready all the time
            emit("fresh", f"during {number}")
        worker.wait_until_it_says("RELOADING=1")
        worker.wait_until_ready()
        assert not set(former) & set(worker.children())
        wait_until_done(20)
