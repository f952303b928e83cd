"""A real pgbouncer between clients and a server."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PGconn, Ping

from tests.chaos.server import free_port
from tests.tools import eventually

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

CONFIG = """
[databases]
* = {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
max_client_conn = 1000
default_pool_size = {pool_size}
server_login_retry = 1
ignore_startup_parameters = extra_float_digits, options
"""


class PgBouncer:
    """A pooler in front of `server` (a conninfo), with `pool_size` connections to it; for a `with`.

    It pools by transaction, or by session.

    Clients need no password. Skip the test where PROGRAM is None.
    """

    def __init__(
        self, server: str, *, pool_size: int = 10, mode: str = "transaction", log: Path | None = None
    ) -> None:
        self._server = {name: str(value) for name, value in conninfo_to_dict(server).items()}
        self._database = self._server.pop("dbname", "postgres")
        self._folder = tempfile.TemporaryDirectory(prefix="pgbouncer")
        self.log = log or Path(self._folder.name, "log")
        self._config = Path(self._folder.name, "ini")
        self.port = free_port()
        known = {"host", "port", "user", "password"} & self._server.keys()
        server = " ".join(f"{name}='{self._server[name]}'" for name in known)
        self._config.write_text(
            CONFIG.format(server=server, port=self.port, pool_size=pool_size, mode=mode)
        )
        Path(self._folder.name).chmod(0o755)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def url(self) -> str:
        """The conninfo of the server's database through the pooler."""
        port = str(self.port)
        return make_conninfo(host="127.0.0.1", port=port, dbname=self._database, user="anybody")

    def start(self) -> None:
        assert PROGRAM is not None
        with self.log.open("a") as log:
            self._process = subprocess.Popen([PROGRAM, self._config], stderr=log, user=self._user())
        eventually(lambda: PGconn.ping(self.url.encode()) == Ping.OK)

    def kill(self) -> None:
        """kill -9: its connections to clients and to the server end at once."""
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """SIGSTOP it until the end of the block: connections stay open, and nothing answers."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _user(self) -> int | str | None:
        """Return its user. It refuses root, so this is the owner of the server's socket folder."""
        if os.geteuid() != 0:
            return None
        host = self._server.get("host", "")
        owner = Path(host).stat().st_uid if host.startswith("/") else 0
        return owner or "nobody"
