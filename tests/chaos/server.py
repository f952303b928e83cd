"""A PostgreSQL of the test's own, which can be stopped, killed, and left without disk space."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from tests import postgres
from tests.tools import eventually

CONNECTIONS = 60

CONF = f"""
max_connections = {CONNECTIONS}
max_prepared_transactions = 10
log_min_messages = error
log_line_prefix = '%m [%p] %a '
autovacuum_naptime = 5s
checkpoint_timeout = 30s
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def binaries() -> Path:
    """Return the folder of the server's programs: SPARK_OUTBOX_CHAOS_POSTGRES, or the embedded one's."""
    if path := os.environ.get("SPARK_OUTBOX_CHAOS_POSTGRES"):
        return Path(path)
    return postgres.embedded_binaries()


DISK = 400 * 1024 * 1024
"""The size in bytes of the small disk for the outbox, if one can be mounted."""


class Server:
    """A server with its data in `folder`. PostgreSQL refuses root; it runs as `nobody` then.

    It listens on `address`, for its whole /24, and on a Unix socket. With `small_disk`, if the test may
    mount one, new tables are on a small disk of their own, which `full_disk` fills.
    """

    def __init__(self, folder: Path, address: str = "127.0.0.1", *, small_disk: bool = False) -> None:
        self.folder = folder
        self.address = address
        self.data = folder / "data"
        self.log = folder / "postgresql.log"
        self.port = free_port()
        self._bin = binaries()
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self.data.mkdir(mode=0o700)
        self.log.touch()
        self.own(self.data)
        self.own(self.log)
        self._run(
            "initdb", "-D", self.data, "-U", "postgres", "--auth=trust", "-E", "utf8", "--locale=C"
        )
        where = f"listen_addresses = '{address}'\nunix_socket_directories = '{self.data}'"
        with (self.data / "postgresql.conf").open("a") as file:
            file.write(f"{CONF}\nport = {self.port}\n{where}\n")
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write(f"host all all {address}/24 trust\n")
        self.start()
        self.disk = self._mount(folder / "disk") if small_disk else None
        if self.disk:
            self.query(f"create tablespace small location '{self.disk}'")
            self.query("alter database postgres set default_tablespace = 'small'")
            self.query("grant create on tablespace small to public")

    def own(self, path: Path) -> None:
        """Make the server's user the owner of a path."""
        if self._user is not None:
            os.chown(path, self._user, -1)

    def url(self, user: str = "chaos", **options: Any) -> str:
        """Return a conninfo of the server over TCP."""
        where = {"host": self.address, "port": self.port, "user": user, "dbname": "postgres"}
        return make_conninfo(**{**where, **options})

    @contextlib.contextmanager
    def superuser(self) -> Iterator[psycopg.Connection[Any]]:
        """Connect as a superuser, over the Unix socket: no fault affects this connection."""
        with psycopg.connect(self._own_url, autocommit=True) as connection:
            yield connection

    @property
    def _own_url(self) -> str:
        return self.url("postgres", host=str(self.data), application_name="chaos_rig")

    def query(self, sql: str, params: Any = None) -> list[Any]:
        with self.superuser() as connection:
            cursor = connection.execute(sql, params)
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-t", "120", "-D", self.data, "-l", self.log, "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-w", "-t", "120", "-D", self.data, "-m", mode, "stop")

    def kill(self) -> None:
        """kill -9 a backend, as the out-of-memory killer does; the server restarts all others."""
        sql = "select min(pid) from pg_stat_activity where usename = 'chaos'"
        pid = eventually(lambda: self.query(sql)[0][0])
        with contextlib.suppress(psycopg.OperationalError), self.superuser() as witness:
            os.kill(pid, signal.SIGKILL)
            witness.execute("select pg_sleep(60)")  # until the restart ends it, too
            raise AssertionError("The server did not restart.")
        eventually(lambda: psycopg.pq.PGconn.ping(self._own_url.encode()) == psycopg.pq.Ping.OK)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill the small disk until the end of the block."""
        assert self.disk is not None
        ballast = self.disk / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(65536))
            yield
        finally:
            ballast.unlink()

    def _mount(self, folder: Path) -> Path | None:
        folder.mkdir()
        options = f"size={DISK},mode=700,uid={self._user}"
        mount = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)]
        if self._user is None or subprocess.run(mount, check=False, capture_output=True).returncode:
            return None  # only root may
        return folder

    def errors(self) -> Counter[str]:
        """Count the errors in the server's log that the faults should have caused."""
        expected = (
            "deadlock detected",
            "No space left on device",
            "canceling statement due to statement timeout",
            "canceling statement due to lock timeout",
            "remaining connection slots are reserved",
            "terminating connection due to administrator command",
        )
        log = self.log.read_text(errors="replace")
        return Counter({error: log.count(error) for error in expected})

    def remove(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        if self.disk:
            subprocess.run(["umount", "--lazy", self.disk], check=False)
        shutil.rmtree(self.data, ignore_errors=True)

    def _run(self, program: str, *arguments: object) -> None:
        """Run one of PostgreSQL's programs, as the server's user."""
        done = subprocess.run(
            [self._bin / program, *map(str, arguments)],
            user=self._user,
            cwd=self.data,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, program, stderr=done.stderr)
