"""Answers probes: a file whose time is renewed, and HTTP on a port. Neither asks the database.

The HTTP server, see serving.py, reads what the supervisor writes into the memory that they share, and
notices if that stops.
"""

import logging
import mmap
import struct
import time
from pathlib import Path

from spark_outbox.errors import SettingsError
from spark_outbox.processes.serving import Page, Server

logger = logging.getLogger(__name__)

STALE = 15.0
"""Seconds without a sign of life after which the service counts as dead. There is one each second."""

SILENT = "The supervisor gives no sign of life."

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

    def live(self) -> Page:
        is_alive, _, text = self.read()
        return _page(is_alive, text if is_alive else SILENT)

    def ready(self) -> Page:
        is_alive, is_ready, text = self.read()
        return _page(is_ready, text if is_alive else SILENT)


def _page(is_well: bool, text: str) -> Page:
    return Page(f"{text}\n".encode(), 200 if is_well else 503)


class Probes:
    """The liveness file, and the server on `address`. Raises SettingsError if either can't be had."""

    def __init__(
        self, *, liveness_file: Path | None = None, address: tuple[str, int] | None = None
    ) -> None:
        self._file = liveness_file
        self._is_touched = False
        self._board: Board | None = None
        self.server: Server | None = None
        if address is not None:
            self._board = Board()
            pages = {"/live": self._board.live, "/ready": self._board.ready}
            self.server = Server("spark_probes", "--health-port", address, pages)
        self._touch(at_start=True)

    def renew(self, *, is_ready: bool, text: str) -> None:
        """Give a sign of life."""
        self._touch()
        if self._board is not None:
            self._board.write(is_ready=is_ready, text=text)

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
