"""The units of deploy/systemd under a real systemd, set up as the README says."""

import json
import re
import shlex
import shutil
from functools import partial

import pytest

from spark_outbox.management.kits import KITS
from tests import shop
from tests.postgres import ROOT
from tests.test_docker import BASE, WHEELS, engine, required  # noqa: F401, a fixture
from tests.tools import eventually

pytestmark = pytest.mark.docker

TAG = "sparkoutboxmachine"

DOCKERFILE = f"""
FROM {BASE}
COPY wheels /wheels
COPY project /srv/shop
RUN python3 -m venv --system-site-packages /srv/shop/venv
RUN /srv/shop/venv/bin/pip install --no-cache-dir --find-links /wheels \
    {"--no-index" if WHEELS else ""} spark_outbox 'psycopg[binary]'
COPY units /root
ENV container=docker
STOPSIGNAL SIGRTMIN+3
ENTRYPOINT ["/lib/systemd/systemd"]
"""

FILES = {
    **shop.FILES,
    "shop/settings.py": """
SECRET_KEY = "not a secret"
INSTALLED_APPS = ["spark_outbox", "shop"]
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "shop", "USER": "shop"}}
""",
    "shop/handlers.py": """
import time
from spark_outbox import handler


@handler("^plain")
def plain(event):
    pass


@handler("^detached$", atomic=False)
def detached(event):
    pass


@handler("^failing$", max_attempts=1)
def failing(event):
    raise ValueError("no")


@handler("^slow$")
def slow(event):
    time.sleep(event["seconds"])
""",
}


class Machine:
    """The container, as root on the machine sees it."""

    def __init__(self, container):
        self.container = container

    def run(self, command, *, check=True):
        """Run a shell command; return its output."""
        code, (output, complaints) = self.container.exec_run(
            ["sh", "-c", command], workdir="/root", demux=True
        )
        assert code == 0 or not check, f"{command}: {(complaints or b'').decode()}"
        return (output or b"").decode().strip()

    def manage(self, command):
        shop = "runuser -u shop -- env DJANGO_SETTINGS_MODULE=shop.settings ./venv/bin/python manage.py"
        return self.run(f"cd /srv/shop && {shop} {command}")

    def emit(self, group, key, **payload):
        payload = json.dumps(payload)
        self.sql(f"select spark_emit('{group}', '{key}', '{payload}'::jsonb)")

    def sql(self, statement):
        return self.run(f"runuser -u shop -- psql -d shop -Atc {shlex.quote(statement)}")

    def status(self, key):
        return self.sql(f"select status from spark_outbox_event where key = '{key}'")

    def show(self, what, unit="shop-worker@main"):
        return self.run(f"systemctl show --value --property {what} {unit}")

    def await_status(self, part):
        eventually(lambda: part in self.show("StatusText"))

    def children(self):
        return self.run(f"cat /proc/{self.show('MainPID')}/task/*/children").split()

    def is_done(self, key):
        return self.status(key) == "done"

    def write(self, path, text, *, append=False):
        self.run(f"printf %s {shlex.quote(text)} {'>>' if append else '>'} {path}")

    def option(self, line):
        """Set something of the worker's unit."""
        folder = "/etc/systemd/system/shop-worker@.service.d"
        self.run(f"mkdir -p {folder}")
        self.write(f"{folder}/test.conf", f"[Service]\n{line}\n")
        self.run("systemctl daemon-reload")


def readme_steps():
    """Return the commands that the README gives to root."""
    text = (ROOT / "deploy" / "README.md").read_text()
    block = re.search(r"### systemd\n.*?```console\n(.*?)```", text, re.DOTALL)[1]
    lines = [re.sub(r" {2,}\(.*\)$", "", line[2:]) for line in block.splitlines()]
    return [
        line for line in lines if not re.match("editor|journalctl .*-f|systemctl (status|reload)", line)
    ]


@pytest.fixture(scope="module")
def machine(engine, tmp_path_factory):  # noqa: F811
    context = tmp_path_factory.mktemp("machine")
    if not engine.images.list(BASE):
        required(f"there is no image {BASE}")
    shop.build_wheel(context / "wheels")
    if WHEELS:
        shutil.copytree(WHEELS, context / "wheels", dirs_exist_ok=True)
    shop.write(context / "project", FILES)
    for kit in ("systemd", "timers"):
        shop.write(context / "units", KITS[kit].texts(shop.SHOP))
    (context / "Dockerfile").write_text(DOCKERFILE)
    engine.images.build(path=str(context), tag=TAG, rm=True)
    container = engine.containers.run(
        TAG,
        detach=True,
        cap_add=["SYS_ADMIN"],
        security_opt=["seccomp=unconfined"],
        tmpfs={"/run": "", "/run/lock": ""},
        volumes={"/sys/fs/cgroup": {"bind": "/sys/fs/cgroup", "mode": "rw"}},
    )
    machine = Machine(container)
    try:
        eventually(
            lambda: machine.run("systemctl is-system-running", check=False) in {"running", "degraded"}
        )
        for step in readme_steps():
            if "enable --now" in step:
                machine.manage("migrate")
            machine.run(step)
        yield machine
    finally:
        print(machine.run("journalctl --no-pager -n 300 -u 'shop-*'", check=False))
        container.remove(force=True)
        engine.images.remove(TAG, force=True)


def test_set_up_as_the_readme_says_it_runs_and_says_how_it_goes(machine):
    units = "shop-worker@main shop-sources.timer"
    assert machine.run(f"systemctl is-active {units}") == "active\nactive"
    machine.await_status("events/s, 0 ready, 0 failed")
    for group in ("plain", "detached"):
        machine.emit(group, group)
        eventually(partial(machine.is_done, group))
    machine.run("systemctl start shop-sources")
    assert machine.show("Result", "shop-sources") == "success"
    rights = machine.run(f"grep CapEff /proc/{machine.show('MainPID')}/status")
    assert rights.split() == ["CapEff:", "0000000000000000"]


def test_a_second_worker_of_the_project_is_another_instance(machine):
    machine.write("/etc/shop/worker-export.env", "SPARK_WORKER_OPTIONS=--processes=2\n")
    machine.run("systemctl start shop-worker@export")
    main = machine.show("MainPID", "shop-worker@export")
    assert "--processes=2" in machine.run(f"cat /proc/{main}/cmdline").split("\0")
    machine.run("systemctl stop shop-worker@export")
    assert machine.show("Result", "shop-worker@export") == "success"


def test_the_journal_has_priorities_and_fields(machine):
    machine.emit("failing", "failing")
    eventually(lambda: machine.status("failing") == "failed")
    machine.run("journalctl --sync")
    errors = machine.run("journalctl -o json --no-pager -u shop-worker@main -p err").splitlines()
    (line,) = map(json.loads, errors)
    assert "failed for good" in line["MESSAGE"]
    assert line["SYSLOG_IDENTIFIER"] == "spark-worker"
    assert line["SPARK_OUTBOX_HANDLER"] == "shop.handlers.failing"
    machine.await_status("0 ready, 1 failed")


def test_a_process_and_a_supervisor_that_are_stopped_are_replaced(machine):
    machine.option("WatchdogSec=5")
    machine.write("/etc/shop/worker.env", "SPARK_WORKER_OPTIONS=--poll-interval=1\n", append=True)
    machine.run("systemctl restart shop-worker@main")
    machine.await_status("0 ready")
    main, (child,) = machine.show("MainPID"), machine.children()
    machine.run(f"kill -STOP {child}")
    eventually(lambda: machine.children() not in ([], [child]))
    assert machine.show("MainPID") == main
    machine.run(f"kill -STOP {main}")
    eventually(lambda: machine.show("MainPID") not in {main, "0"})
    assert machine.show("NRestarts") == "1"
    machine.emit("plain", "after")
    eventually(partial(machine.is_done, "after"))


def test_a_reload_loads_new_code_and_keeps_the_service(machine):
    machine.await_status("0 ready")
    main, (child,) = machine.show("MainPID"), machine.children()
    new = '\n\n@handler("^new$")\ndef new(event):\n    pass\n'
    machine.write("/srv/shop/shop/handlers.py", new, append=True)
    machine.run("systemctl reload shop-worker@main")
    eventually(lambda: machine.children() not in ([], [child]) and child not in machine.children())
    machine.emit("new", "new")
    eventually(partial(machine.is_done, "new"))
    assert machine.show("MainPID") == main
    assert machine.run("systemctl is-active shop-worker@main") == "active"


def test_a_stop_takes_the_time_that_the_worker_asks_for(machine):
    machine.option("TimeoutStopSec=2")
    machine.run("systemctl restart shop-worker@main")
    machine.await_status("0 ready")
    machine.emit("slow", "slow", seconds=6)
    machine.await_status("1 of 1 processes at work")
    machine.run("systemctl stop shop-worker@main")
    assert machine.status("slow") == "done"
    assert machine.show("Result") == "success"


def test_a_worker_that_is_up_before_its_database_says_so(machine):
    machine.run("systemctl stop shop-worker@main postgresql@15-main")
    machine.run("systemctl start --no-block shop-worker@main")
    machine.await_status("waiting for the database")
    machine.run("systemctl start postgresql@15-main")
    machine.await_status("0 ready")
    assert machine.run("systemctl is-active shop-worker@main") == "active"


def test_what_no_restart_mends_is_not_restarted(machine):
    machine.run("systemctl stop shop-worker@main")
    machine.manage("migrate spark_outbox zero")
    try:
        machine.run("systemctl start shop-worker@main", check=False)
        eventually(lambda: machine.show("ActiveState") == "failed")
        assert (machine.show("ExecMainStatus"), machine.show("NRestarts")) == ("78", "0")
    finally:
        machine.manage("migrate")
