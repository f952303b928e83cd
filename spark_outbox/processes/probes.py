"""Answers probes: a file whose time is renewed, and HTTP on a port. Neither asks the database.

The HTTP server is a process of its own, so that no client keeps the supervisor waiting. It reads what
the supervisor writes into the memory that they share, and notices if that stops.
"""

import contextlib
import logging
import mmap
import os
import signal
import socket
import struct
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from spark_outbox.errors import SettingsError
from spark_outbox.processes.fork import Pipes, be_process, name_process, signals_blocked
from spark_outbox.processes.place import exit_code, send

logger = logging.getLogger(__name__)

STALE = 15.0
"""Seconds without a sign of life after which the service counts as dead. There is one each second."""

_STATE = struct.Struct("d?H")
_TEXT = mmap.PAGESIZE - _STATE.size


class Board:
    """The last sign of life, whether the service is ready, and a line about it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.write(is_ready=False, text="starting")

    def write(self, *, is_ready: bool, text: str) -> None:
        line = text.encode()[:_TEXT]
        self._memory[_STATE.size : _STATE.size + len(line)] = line
        _STATE.pack_into(self._memory, 0, time.monotonic(), is_ready, len(line))

    def read(self) -> tuple[bool, bool, str]:
        """Return whether the service is alive, whether it is ready, and the line."""
        at, is_ready, length = _STATE.unpack_from(self._memory, 0)
        text = self._memory[_STATE.size : _STATE.size + length].decode(errors="replace")
        is_alive = time.monotonic() - at < STALE
        return is_alive, is_alive and is_ready, text


class Probes:
    """The liveness file, and the server on `address`. Raises SettingsError if either can't be had."""

    def __init__(
        self, *, liveness_file: Path | None = None, address: tuple[str, int] | None = None
    ) -> None:
        self._file = liveness_file
        self.pid = 0
        """Of the server; 0 if there is none."""
        self._is_touched = False
        self._board: Board | None = None
        if address is not None:
            self._board = Board()
            self._socket = _listen(address)
        self._touch(at_start=True)

    def renew(self, *, is_ready: bool, text: str) -> None:
        """Give a sign of life."""
        self._touch()
        if self._board is not None:
            self._board.write(is_ready=is_ready, text=text)

    def look_after(self, pipes: Pipes) -> None:
        """Start the server if it does not run. In the main thread only."""
        if self._board is None or (self.pid and exit_code(self.pid) is None):
            return
        with signals_blocked(), contextlib.suppress(OSError):  # there can be no process: the next look
            self.pid = 0
            self.pid = os.fork()
            if not self.pid:
                be_process(partial(self._serve, self._board, pipes))

    def leave(self) -> None:
        """In another new process: the port belongs to the server."""
        if self._board is not None:
            self._socket.close()

    def stop(self) -> None:
        """End the server."""
        if self.pid:
            send(self.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = 0

    def _serve(self, board: Board, pipes: Pipes) -> int:
        pipes.leave_parent()
        pipes.follow_parent()
        name_process("spark_probes")
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        server = ThreadingHTTPServer(("", 0), partial(Answer, board), bind_and_activate=False)
        server.socket.close()
        server.socket = self._socket
        server.serve_forever()
        return 0

    def _touch(self, *, at_start: bool = False) -> None:
        if self._file is None:
            return
        try:
            self._file.touch()
        except OSError as error:
            if at_start:
                raise SettingsError(f"--liveness-file {self._file}: {error.strerror}.") from None
            if self._is_touched:
                details: dict[str, object] = {"error": error.strerror}
                logger.warning("The liveness file can't be renewed: %(error)s.", details, extra=details)
            self._is_touched = False
        else:
            self._is_touched = True


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    timeout = 5.0

    def __init__(self, board: Board, *arguments: object) -> None:
        self._board = board
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        is_alive, is_ready, text = self._board.read()
        answers = {"/live": is_alive, "/ready": is_ready}
        path = self.path.partition("?")[0]
        if path not in answers:
            self.send_error(404, "There are /live and /ready")
            return
        body = f"{text if is_alive else 'The supervisor gives no sign of life.'}\n".encode()
        self.send_response(200 if answers[path] else 503)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815, http.server's name

    def log_message(self, *_: object) -> None:
        """Probes come every few seconds."""


def _listen(address: tuple[str, int]) -> socket.socket:
    host, port = address
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=16
        )
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise SettingsError(f"--health-port {host}:{port}: {reason}.") from None
