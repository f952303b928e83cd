"""The wheel in an empty environment, with the oldest versions that it supports and with the newest.

There a new project follows the README's tutorial, runs a worker, and opens the admin.
"""

import contextlib
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from django.conf import settings
from psycopg.conninfo import make_conninfo

from tests.postgres import ROOT, django_database
from tests.test_readme import follow_the_tutorial
from tests.tools import PATIENCE

pytestmark = pytest.mark.package

NEEDED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]

VERSIONS = {
    "lowest": ("3.11", [each.replace(">=", "==") for each in NEEDED]),
    "newest": ("3.13", NEEDED),
}
"""The Python, if it is there, and the requirements."""

LOOK = """
from django.contrib.auth.models import User
from django.contrib.staticfiles import finders
from django.test import Client
from django.utils import translation

from orders.models import Order
from spark_outbox.testing import Outbox

order = Order.objects.create(email="berta@example.com")
event = Outbox().wait_for(f"order_placed_{order.pk}", timeout=30)
client = Client(SERVER_NAME="localhost")
client.force_login(User.objects.create_superuser("anna"))
translation.activate("de")
events = client.get("/admin/spark_outbox/outboxevent/").text
assert "Ereignisse" in events and event.key in events
assert event.key in client.get(f"/admin/spark_outbox/outboxevent/{event.id}/change/").text
assert "Übersicht" in client.get("/admin/spark_outbox/dashboard/").text
assert finders.find("spark_outbox/dashboard.js")
"""


@dataclass
class Shop:
    """The tutorial's project."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str, **options) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["python", "manage.py", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def manage(self, *arguments: str, text: str = "") -> str:
        with self.start(*arguments, stdin=subprocess.PIPE) as process:
            output, _ = process.communicate(text, timeout=PATIENCE)
        assert process.returncode == 0, output
        return output


@contextlib.contextmanager
def own_database(name):
    """Create a database on the tests' server; return Django's settings for it."""
    with psycopg.connect(settings.SERVER.url, autocommit=True) as server:
        server.execute(f"create database {name}")
        try:
            yield django_database(make_conninfo(settings.SERVER.url, dbname=name))
        finally:
            server.execute(f"drop database {name} with (force)")


@pytest.mark.parametrize("versions", VERSIONS)
def test_a_new_project_follows_the_readme(versions, wheel, tmp_path):
    python, needed = VERSIONS[versions]
    venv = tmp_path / "venv"
    virtualenv = [sys.executable, "-m", "virtualenv", "--quiet", "--no-periodic-update"]
    subprocess.run([*virtualenv, "--python", python, "--python", sys.executable, venv], check=True)
    pip = [venv / "bin" / "pip", "--disable-pip-version-check", "--quiet", "install"]
    with_libpq = [each.replace("psycopg", "psycopg[binary]") for each in needed]
    done = subprocess.run([*pip, *with_libpq], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip can't install {with_libpq}: {done.stderr.strip().splitlines()[-1]}")
    subprocess.run([*pip, "--no-index", wheel], check=True)  # these versions are enough

    with own_database(f"spark_outbox_{versions}") as database:
        databases = f'DATABASES["default"] = {database!r}\n'
        environment = follow_the_tutorial(tmp_path, venv / "bin", databases)
        shop = Shop(tmp_path / "shop", environment)
        with shop.start("spark_worker") as worker:
            try:
                shop.manage("shell", text=LOOK)
                worker.send_signal(signal.SIGTERM)
                output, _ = worker.communicate(timeout=PATIENCE)
            finally:
                worker.kill()
        assert worker.returncode == 0, output
        assert "Dear berta@example.com: order_placed." in output
        shop.manage("check", "--database", "default", "--fail-level", "WARNING")
    shop.manage("spark_deploy", "docker", "--output", "image")
    assert "shop.settings" in (shop.folder / "image" / "Dockerfile").read_text()
