"""Processes that die: of kill -9, of a segfault, of a handler past its timeout, and who takes over."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest

from spark_outbox import emit, emit_many
from spark_outbox.models import Delivery, OutboxEvent
from tests.challenges.models import Handled
from tests.tools import (
    WorkerProcess,
    deliveries,
    eventually,
    start_a_handler,
    status,
    statuses,
    wait_until_done,
)
from tests.trouble import TROUBLE

pytestmark = pytest.mark.django_db(transaction=True)


# kill -9


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


def test_children_stop_when_their_supervisor_is_gone(flags):
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        pid = start_a_handler(flags)
        worker.signal(signal.SIGKILL)  # it alone
        worker.wait()
        flags.go.touch()
        eventually(lambda: status() == "done")  # the handler in hand is finished
        eventually(lambda: not Path(f"/proc/{pid}").exists())


# Handlers that end their process


def test_a_segfault_takes_down_one_child_and_its_event_is_retried_and_then_failed():
    emit("probe_crash", "bad")
    emit_many({"group": "probe", "key": f"{n}"} for n in range(20))
    with WorkerProcess("--processes", "2") as worker:
        worker.wait_until_ready()
        wait_until_done(20)
        eventually(lambda: status("bad") == "failed")
        # Twice, or more often if both had it in hand before the first could be counted.
        assert worker.output.count(" died of signal SIGSEGV.") >= 2
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


# Handlers past their timeout


def test_a_handler_past_its_timeout_is_interrupted_in_the_worker_process(flags):
    emit("probe_in_time", "key", **flags.payload)
    with WorkerProcess() as worker:
        worker.wait_until_ready()
        eventually(lambda: OutboxEvent.objects.get().attempts == 1)  # nobody says `go`
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert "HandlerTimeout" in OutboxEvent.objects.get().last_error
    assert [handled.handler for handled in Handled.objects.all()] == []


def test_code_that_heeds_no_timeout_is_killed_and_has_had_an_attempt():
    kinds = ["async", "detached", "list", "plain"]
    with WorkerProcess("--processes", "4", "--batch-size", "1", EXTRA_APPS=TROUBLE) as worker:
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


# Handlers that fork


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
