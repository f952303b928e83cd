"""The image of deploy/Dockerfile: built for a project, and run beside the tests' PostgreSQL."""

import contextlib
import gc
import json
import os
import shutil
import subprocess
import threading
import warnings
from dataclasses import replace

import docker
import pytest

from spark_outbox import emit
from spark_outbox.management.kits import KITS
from spark_outbox.models import OutboxEvent
from tests import shop
from tests.postgres import IMAGE
from tests.tools import PATIENCE, connect, conninfo, eventually, status

pytestmark = [pytest.mark.docker, pytest.mark.django_db(transaction=True)]

BASE = os.environ.get("SPARK_OUTBOX_TEST_BASE", "python:3.13-slim-bookworm")
"""A Debian with Python and venv. If it is named, the tests fail rather than skip."""

WHEELS = os.environ.get("SPARK_OUTBOX_TEST_WHEELS")
"""A folder with wheels of Django and psycopg for its Python; without, pip downloads them."""

PROJECT = replace(shop.SHOP, name="sparkoutboxtest")

FILES = {
    "requirements.txt": "spark_outbox\npsycopg[binary]\ngunicorn\n",
    **shop.FILES,
    "shop/urls.py": "urlpatterns = []\n",
    "shop/wsgi.py": "from django.core.wsgi import get_wsgi_application\n"
    "application = get_wsgi_application()\n",
    "shop/settings.py": """
import os
from psycopg.conninfo import conninfo_to_dict

url = conninfo_to_dict(os.environ["DATABASE_URL"])
SECRET_KEY = "not a secret"
ROOT_URLCONF = "shop.urls"
INSTALLED_APPS = ["spark_outbox", "shop"]
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url["dbname"],
        "USER": url["user"],
        "PASSWORD": url.get("password", ""),
        "HOST": url["host"],
        "PORT": url.get("port", ""),
    }
}
""",
    "shop/handlers.py": """
from django.db import connection
from spark_outbox import handler


@handler("^docker$")
def wait_for_the_lock(event):
    with connection.cursor() as cursor:
        cursor.execute("select pg_advisory_xact_lock(4711)")
""",
}


def required(why_not):
    """Skip, unless somebody has named a base image and so expects these tests to run."""
    if "SPARK_OUTBOX_TEST_BASE" not in os.environ:
        pytest.skip(why_not)
    pytest.fail(why_not)


@pytest.fixture(scope="module")
def engine():
    client = None
    with warnings.catch_warnings(action="ignore"):  # if none answers, the client leaves a socket open
        with contextlib.suppress(docker.errors.DockerException):
            client = docker.from_env(timeout=300)
        gc.collect()
    if client is None:
        required("no Docker engine answers")
    with contextlib.closing(client):
        yield client


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    """The folder of a small project whose image is built, on a base that has our wheel."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("project")
    try:
        engine.images.list(BASE) or engine.images.pull(BASE)
    except docker.errors.DockerException as error:
        required(f"Docker answers, but has no image {BASE}: {error}")
    if WHEELS:
        shutil.copytree(WHEELS, base / "wheels")
    shop.build_wheel(base / "wheels")
    index = "ENV PIP_NO_INDEX=1\n" if WHEELS else ""
    (base / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY wheels /wheels\nENV PIP_FIND_LINKS=/wheels\n{index}"
    )
    kits = {**KITS["docker"].texts(PROJECT), **KITS["compose"].texts(PROJECT)}
    shop.write(folder, {**FILES, **kits, ".env": "POSTGRES_PASSWORD=secret\n"})
    tags = [f"{PROJECT.name}-base", f"{PROJECT.name}-build", PROJECT.name]
    engine.images.build(path=str(base), tag=tags[0], rm=True)
    for tag, target in zip(tags[1:], ("build", None), strict=True):  # a stage with no tag would stay
        engine.images.build(
            path=str(folder), tag=tag, target=target, buildargs={"BASE": tags[0]}, rm=True
        )
    yield folder
    for tag in reversed(tags):
        engine.images.remove(tag, force=True)


@pytest.fixture
def container(engine, folder):
    """A worker in a container as narrow as those of deploy/compose.yaml and deploy/kubernetes.yaml."""
    url = conninfo()
    if "host=/" in url:
        pytest.skip("the tests' PostgreSQL listens on a socket alone, which no container sees")
    second = 10**9
    running = engine.containers.run(
        PROJECT.name,
        detach=True,
        network_mode="host",
        environment={"DATABASE_URL": url},
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        healthcheck={"interval": second},
    )
    try:
        yield running
    finally:
        print(running.logs().decode())
        running.remove(force=True)


def output(container, *command):
    code, text = container.exec_run(list(command))
    assert code == 0, text
    return text.decode()


def test_the_worker_in_a_container_handles_events_and_stops_when_its_handler_has_finished(
    engine, container
):
    emit("docker", "first")
    eventually(lambda: status("first") == "done")

    def health():
        container.reload()
        return container.attrs["State"]["Health"]["Status"]

    eventually(lambda: health() == "healthy")
    assert output(container, "id", "-u") == "10001\n"
    assert "spark_worker" in output(container, "cat", "/proc/1/cmdline")
    assert ".env" not in output(container, "ls", "-A", "/app").split()

    with connect() as holder:
        holder.execute("select pg_advisory_lock(4711)")
        emit("docker", "second")
        waits = "select 1 from pg_locks where locktype = 'advisory' and objid = 4711 and not granted"
        eventually(lambda: holder.execute(waits).fetchone())
        signals = engine.events(decode=True, filters={"container": container.id, "event": "kill"})
        stop = threading.Thread(target=container.stop, kwargs={"timeout": 40})
        stop.start()
        assert next(signals)["Actor"]["Attributes"]["signal"] == "15"
        assert status("second") == "pending"
    stop.join(PATIENCE)
    assert container.wait(timeout=PATIENCE)["StatusCode"] == 0
    assert OutboxEvent.objects.get(key="second").status == "done"


@pytest.fixture
def compose(folder):
    """A function that runs `docker-compose` on the project, with the tests' PostgreSQL image."""
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed")
    (folder / "override.yaml").write_text(
        f"services: {{db: {{image: '{IMAGE}', command: postgres}}, web: {{ports: !reset []}}}}"
    )
    command = ["docker-compose", "--file=compose.yaml", "--file=override.yaml"]

    def run(*arguments):
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=5 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        yield run
    finally:
        print(run("logs"))
        run("down", "--volumes", "--timeout=0")


def test_compose_brings_up_everything_in_its_order_and_the_worker_stops_clean(compose):
    compose("up", "--no-build", "--detach", "--wait")
    python = ("exec", "-T", "web", "python", "manage.py")
    compose(*python, "shell", "-c", "from spark_outbox import emit; emit('docker', 'key')")
    eventually(lambda: json.loads(compose(*python, "spark_events", "key", "--json"))["status"] == "done")
    compose("stop", "worker")
    (worker,) = map(json.loads, compose("ps", "--all", "--format=json", "worker").splitlines())
    assert (worker["State"], worker["ExitCode"]) == ("exited", 0)
