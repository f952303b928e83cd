"""Workers that are to stop: signals, Ctrl-C, terminals that go away, handlers that take their time."""

import os
import pty
import signal

import pytest

from spark_outbox import emit
from spark_outbox.models import OutboxEvent
from tests.challenges.models import Handled
from tests.tools import WorkerProcess, eventually, start_a_handler, status, wait_until_asleep
from tests.trouble import TROUBLE

pytestmark = pytest.mark.django_db(transaction=True)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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


def test_a_sleeping_worker_stops_at_once():
    with WorkerProcess("--poll-interval", "3600") as worker:
        worker.wait_until_ready()
        wait_until_asleep()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


def test_a_handler_that_does_not_stop_in_time_is_killed(flags):
    with WorkerProcess("--shutdown-timeout", "0.2") as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "did not stop in time" in worker.output
    assert (status(), OutboxEvent.objects.get().attempts) == ("pending", 0)


# Terminals


@pytest.fixture
def terminal():
    ends = pty.openpty()
    yield ends[1]
    for end in ends:
        os.close(end)


def test_a_terminal_that_goes_away_may_say_so_twice(flags, terminal):
    with WorkerProcess(stdin=terminal) as worker:
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
        worker.wait_until_it_says("STOPPING=1")
        flags.go.touch()
        assert worker.wait() == 0
        waits = f"Waiting for tests.probe.handlers.probe on event {OutboxEvent.objects.get().id};"
        assert f"{waits} press Ctrl-C again to stop at once (nothing is lost)." in worker.output


def test_ctrl_c_in_a_terminal_stops_all_and_lets_them_finish(flags):
    with WorkerProcess("--processes", "2") as worker:
        worker.wait_until_ready()
        start_a_handler(flags)
        os.killpg(worker.process.pid, signal.SIGINT)  # as a terminal does
        worker.wait_until_it_says("STOPPING=1")
        flags.go.touch()
        assert worker.wait() == 0
    assert status() == "done"


# The end of a process


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
        assert " does not end in time, and is killed." in worker.output
    assert status() == "done"
