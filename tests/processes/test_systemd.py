"""What systemd is told, and when; and the unit in deploy/."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from spark_outbox import emit
from tests import postgres
from tests.tools import PATIENCE, WorkerProcess, eventually, status

pytestmark = pytest.mark.django_db(transaction=True)

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
from spark_outbox.processes.fork import SIGNALS
from spark_outbox.processes.supervisor import Supervisor

folder = Path(sys.argv[1])

def say(line):
    with (folder / "log").open("a") as log:
        log.write(line + "\\n")

def await_file(name):
    while not (folder / name).exists():
        time.sleep(0.001)

def work(slot, watch, ready):
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
