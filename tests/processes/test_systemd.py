"""What systemd is told, and when; and the unit in deploy/."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from spark_outbox import emit
from tests import postgres
from tests.tools import PATIENCE, WorkerProcess, eventually, status

pytestmark = pytest.mark.django_db(transaction=True)

FOLDER = postgres.ROOT / "deploy" / "systemd"
UNIT = FOLDER / "shop-worker@.service"
UNITS = sorted(path.name for path in FOLDER.glob("shop-*"))
NEWER = ("RestartSteps", "RestartMaxDelaySec")
"""Keys of systemd 254, which older ones say that they ignore."""


def analyze(*arguments):
    systemd_analyze = shutil.which("systemd-analyze")
    if systemd_analyze is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([systemd_analyze, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("unit", UNITS)
def test_the_units_are_valid(unit, tmp_path):
    text = (FOLDER / unit).read_text().replace("/srv/shop/venv/bin/python", sys.executable)
    for name in UNITS:
        shutil.copy(FOLDER / name, tmp_path)
    (tmp_path / unit).write_text(text)
    verified = analyze("verify", "--man=no", tmp_path / unit)
    complaints = [line for line in verified.stderr.splitlines() if "shop-" in line]
    complaints = [line for line in complaints if not any(f"'{key}'" in line for key in NEWER)]
    assert (verified.returncode, complaints) == (0, []), verified.stderr


@pytest.mark.parametrize("unit", ["shop-worker@.service", "shop-sources.service"])
def test_the_units_expose_little(unit):
    rated = analyze("security", "--offline=yes", FOLDER / unit)
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", rated.stdout)
    assert float(exposure) <= 1.5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give folders to others")
def test_folders_that_are_there_keep_their_mode_and_owners(tmp_path):
    systemd_tmpfiles = shutil.which("systemd-tmpfiles")
    if systemd_tmpfiles is None:
        pytest.skip("systemd-tmpfiles is not installed")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0::/:\nshop:x:4712:4712::/:\n")
    (tmp_path / "etc" / "group").write_text("root:x:0:\nshop:x:4712:\n")
    media = tmp_path / "srv" / "shop" / "media"
    media.mkdir(parents=True)
    for folder, mode in ((media.parent, 0o750), (media, 0o2770)):
        os.chown(folder, 4711, 4711)
        folder.chmod(mode)
    create = [systemd_tmpfiles, "--create", f"--root={tmp_path}", FOLDER / "tmpfiles.conf"]
    done = subprocess.run(create, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = {path: path.stat() for path in (media.parent, media)}
    assert [(each.st_uid, each.st_gid) for each in found.values()] == [(4711, 4711)] * 2
    assert [each.st_mode & 0o7777 for each in found.values()] == [0o750, 0o2770]
    shutil.rmtree(media)
    subprocess.run(create, check=True)
    assert (media.stat().st_uid, media.stat().st_mode & 0o7777) == (4712, 0o755)


def test_the_unit_says_what_the_worker_does():
    lines = UNIT.read_text().splitlines()
    for line in (
        "Type=notify",
        "Restart=always",
        "KillMode=mixed",
        "OOMPolicy=continue",
        "WatchdogSec=60",
    ):
        assert line in lines
    (codes,) = (line for line in lines if line.startswith("RestartPreventExitStatus="))
    assert str(os.EX_CONFIG) in codes.partition("=")[2].split()


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


NEVER_READY = """
def work(slot, watch, ready):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.pause()

"""


def test_ready_waits_for_each_process_however_often_another_connects(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISE, tmp_path], cwd=postgres.ROOT, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "log").read_text().splitlines() == ["the second is ready", "READY"]


def test_ready_is_sent_without_a_database_after_a_while(tmp_path):
    """A host that boots need not wait for a database that the worker waits for by itself."""
    script = SUPERVISE.replace("folder = Path", "supervisor.READY_PATIENCE = 0.1\nfolder = Path", 1)
    script = script.replace("import os", "from spark_outbox.processes import supervisor\nimport os", 1)
    script = re.sub(r"def work.*?def on_ready", NEVER_READY + "def on_ready", script, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=postgres.ROOT, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "log").read_text() == "READY\n"


def test_ready_is_sent_once_listen_stands_and_stopping_on_the_way_out():
    with WorkerProcess("--poll-interval", "3600") as worker:
        assert worker.message() == "READY=1"
        emit("probe", "key")  # from here on it is woken
        eventually(lambda: status() == "done")
        worker.signal(signal.SIGTERM)
        assert worker.message() == "STOPPING=1"
        assert worker.wait() == 0
