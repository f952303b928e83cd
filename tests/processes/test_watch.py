"""Several processes of one supervisor: one of those that are idle watches, the others rest."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from django.db import connection

from spark_outbox import emit
from spark_outbox.processes.slot import Slot
from spark_outbox.processes.watch import REST, WORK, SharedWatch
from tests import postgres
from tests.challenges.models import Handled
from tests.tools import (
    PATIENCE,
    Flags,
    WorkerProcess,
    eventually,
    status,
    wait_until_asleep,
    wait_until_done,
)

pytestmark = pytest.mark.django_db(transaction=True)

ONLY_WOKEN = ("--poll-interval", "3600")


def queries():
    """Return when each worker's connection was used last."""
    with connection.cursor() as cursor:
        cursor.execute(
            "select pid, query_start from pg_stat_activity "
            "where starts_with(application_name, 'spark_worker ') and datname = current_database()"
        )
        return dict(cursor.fetchall())


def asked():
    """Return the connections that are used as notifications come that are in vain."""
    before = queries().items()
    for _ in range(5):
        with connection.cursor() as cursor:
            cursor.execute("notify spark_outbox")
        time.sleep(0.02)
    return {pid for pid, _ in queries().items() - before}


def test_one_process_watches_and_the_others_ask_the_database_nothing():
    with WorkerProcess("--processes", "4", *ONLY_WOKEN) as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        assert len(queries()) == 4
        eventually(lambda: len(asked()) == 1)  # those that have just started may have to say so yet


def test_processes_that_rest_poll_in_case_nobody_gives_them_the_watch():
    """Here the one that has it does not move."""
    with WorkerProcess("--processes", "2", "--poll-interval", "0.5") as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        emit("probe", "first")
        eventually(lambda: status("first") == "done")
        wait_until_asleep()
        os.kill(int(Handled.objects.get().note), signal.SIGSTOP)
        for number in range(3):
            emit("probe", f"{number}")
            eventually(lambda number=number: status(f"{number}") == "done")


def test_events_are_handled_while_others_take_their_time(tmp_path):
    """Also the one that comes after the watch was passed on twice."""
    with WorkerProcess("--processes", "3", *ONLY_WOKEN) as worker:
        worker.wait_until_ready()
        held = []
        for number in range(2):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            flags = Flags(folder)
            emit("probe", f"slow {number}", **flags.payload)
            held.append((flags, flags.wait()))
        for number in range(3):
            emit("probe", f"{number}")
            wait_until_done(number + 1)
        for flags, _ in held:
            flags.go.touch()
        wait_until_done(5)
        assert len({pid for _, pid in held}) == 2


def test_the_watch_of_a_process_that_dies_passes_to_another():
    with WorkerProcess("--processes", "2", *ONLY_WOKEN) as worker:
        worker.wait_until_ready()
        for number in range(4):
            wait_until_asleep()
            emit("probe", f"{number}")
            eventually(lambda number=number: status(f"{number}") == "done")
            wait_until_asleep()
            os.kill(int(Handled.objects.get(key=f"{number}").note), signal.SIGKILL)
        emit("probe", "last")
        eventually(lambda: status("last") == "done")
        assert worker.process.poll() is None


def test_no_event_is_missed_however_often_the_watch_is_passed_on():
    """The pauses are about as long as the holder may be at work before another gets the watch."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    pauses = random.Random(seed)
    rounds = 300
    with WorkerProcess("--processes", "3", *ONLY_WOKEN) as worker:
        worker.wait_until_ready()
        for number in range(rounds):
            emit("probe", f"{number}")
            time.sleep(pauses.choice([0, 0.002, 0.01, 0.02]) * pauses.random())
            if pauses.random() < 0.3:
                wait_until_done(number + 1)
        wait_until_done(rounds)
    assert Handled.objects.count() == rounds


def test_a_child_says_that_it_is_idle_before_it_asks_whether_the_watch_is_its_own():
    """The supervisor takes the watch away first, and then asks: so one sees what the other did."""
    slot, told = Slot(0), []
    read, write = os.pipe()
    watch = SharedWatch(slot, read, told.append)
    watch.rest()
    assert slot.is_idle()
    assert told == [REST]
    slot.give_watch(True)
    assert watch.is_ours
    watch.work()
    watch.work()
    assert not slot.is_idle()
    assert told == [REST, WORK]
    watch.rest()
    assert told == [REST, WORK]  # nobody has to do anything
    slot.give_watch(False)
    watch.work()
    assert told == [REST, WORK]
    watch.answer()  # a wake-up that another wait has read already
    for end in (read, write):
        os.close(end)


SUPERVISE = """
import os, signal, sys, time
from pathlib import Path
from spark_outbox.processes import supervisor
from spark_outbox.processes.fork import SIGNALS
from spark_outbox.processes.supervisor import Supervisor

supervisor.HANGS = 0.1
got = Path(sys.argv[1], "got")

def work(slot, watch, ready):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    slot.rest()
    if slot.number == 0:
        watch.rest()
        while not watch.is_ours:
            time.sleep(0.001)
        slot.put_down()  # it asks the database, which does not answer
        got.with_suffix(".first").touch()
        signal.pause()
    while not got.with_suffix(".first").exists():
        time.sleep(0.001)
    watch.rest()
    while not watch.is_ours:
        time.sleep(0.001)
    got.touch()
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()

service = Supervisor(
    work, processes=2, shutdown_timeout=30, answer_timeout=8, finite=False,
    on_ready=print, on_crash=print,
)
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: service.stop())
sys.exit(service.run())
"""


def test_the_watch_of_a_process_that_gets_no_answer_passes_to_another(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISE, tmp_path], cwd=postgres.ROOT, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "got").exists()
