"""An HTTP server in a process of its own, so that no client keeps the supervisor waiting."""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from spark_outbox.errors import SettingsError, describe
from spark_outbox.processes.fork import Pipes, be_process, name_process, signals_blocked
from spark_outbox.processes.place import exit_code, send

logger = logging.getLogger(__name__)


DEADLINE = 8.0
"""Seconds that a connection may last, from when it is accepted until it is answered."""

MOST = 32
"""How many connections there may be at a time."""


class Page(NamedTuple):
    """What is answered."""

    body: bytes
    status: int = 200
    kind: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[], Page]]
"""By path, what is called for each request, in a thread of its own."""


class Server:
    """Answers GET on the address that an `option` gives. Raises SettingsError if it can't be had.

    `name` is that of the process. `on_end` is called there if the supervisor has ended without `stop`.
    """

    def __init__(
        self,
        name: str,
        option: str,
        address: tuple[str, int],
        pages: Pages,
        *,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._name = name
        self._pages = pages
        self._on_end = on_end
        self.pid = 0
        """Of the process; 0 if it does not run."""
        self._socket = _listen(option, address)

    def look_after(self, pipes: Pipes) -> None:
        """Start the server if it does not run. In the main thread only."""
        if self.pid and exit_code(self.pid) is None:
            return
        with signals_blocked(), contextlib.suppress(OSError):  # there can be no process: the next look
            self.pid = 0
            self.pid = os.fork()
            if not self.pid:
                be_process(partial(self._serve, pipes))

    def leave(self) -> None:
        """In another new process: the port belongs to the server."""
        self._socket.close()

    def stop(self) -> None:
        """End the server."""
        if self.pid:
            send(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0

    def _serve(self, pipes: Pipes) -> int:
        pipes.leave_parent()
        pipes.follow_parent(self._on_end)
        name_process(self._name)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        server = Bounded(("", 0), partial(Answer, self._pages), bind_and_activate=False)
        server.socket.close()
        server.socket = self._socket
        server.serve_forever()
        return 0


class Bounded(ThreadingHTTPServer):
    """Ends connections that last longer than DEADLINE, and refuses those beyond MOST."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._open: dict[socket.socket, float] = {}
        """When each connection was accepted, by the monotonic clock."""
        super().__init__(*arguments, **options)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._open) >= MOST:
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # there can be no thread
            del self._open[request]
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(request, None)

    def service_actions(self) -> None:
        """After each connection, and at least twice a second: what reads or writes too long fails."""
        before = time.monotonic() - DEADLINE
        for request, accepted in list(self._open.items()):
            if accepted < before:
                with contextlib.suppress(OSError):  # it has just been closed
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are none of ours."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handle_error(request, client_address)


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    timeout = 5.0
    """Seconds that a client may say nothing."""

    def __init__(self, pages: Pages, *arguments: object) -> None:
        self._pages = pages
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        page = self._pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(404, f"There is {' and '.join(self._pages)}")
            return
        try:
            body, status, kind = page()
        except Exception as error:  # noqa: BLE001, the client is told; the next request may fare better
            details: dict[str, object] = {"path": self.path, "error": describe(error)}
            logger.warning("%(path)s can't be answered (%(error)s).", details, extra=details)
            self.send_error(500)
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815, http.server's name

    def log_message(self, *_: object) -> None:
        """Probes and scrapes come every few seconds."""


def _listen(option: str, address: tuple[str, int]) -> socket.socket:
    host, port = address
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=16
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise SettingsError(f"{option} {host}:{port}: {reason}.") from None
