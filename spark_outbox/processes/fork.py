"""Starts and ends child processes, and holds the pipes between them and the supervisor."""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that stop the supervisor; without a terminal, the last has it load new code. A terminal
sends the last two to the children as well."""

SIGNALS = (*STOPS, signal.SIGCHLD)
"""Blocked around the fork: a child must not run the handlers of its parent."""

READY = b"r"
"""The byte that a ready child writes to the supervisor's pipe. No signal has this number."""


class Pipes:
    """Two pipes. One wakes the supervisor, by a byte for each signal and for each child that is ready.

    The other one closes when the supervisor ends, which stops the children.
    """

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        self.descriptors = tuple(inherited or (*os.pipe(), *os.pipe()))
        self._wake_read, self._wake_write, self._life_read, self._life_write = self.descriptors
        for end in self.descriptors:
            os.set_inheritable(end, False)
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)

    def receive_signals(self) -> None:
        """Make each signal write a byte as soon as it arrives."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def wait(self, seconds: float) -> bytes:
        """Wait for bytes, up to `seconds`; return them, or none."""
        if select.select([self._wake_read], [], [], max(0.0, seconds))[0]:
            return os.read(self._wake_read, 4096)
        return b""

    # In a child

    def leave_parent(self) -> None:
        """In a new process, close and reset what belongs to the supervisor alone."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._life_write)

    def follow_parent(self, on_end: Callable[[], None] | None = None) -> None:
        """Stop this process when the supervisor has ended, for whatever reason; before that, call
        `on_end`, in a thread."""
        threading.Thread(target=self._follow, args=(on_end,), daemon=True).start()

    def _follow(self, on_end: Callable[[], None] | None) -> None:
        os.read(self._life_read, 1)
        if on_end is not None:
            on_end()
        os.kill(os.getpid(), signal.SIGTERM)

    def tell(self, byte: bytes) -> None:
        """Wake the supervisor with a byte."""
        with contextlib.suppress(BlockingIOError):  # it has enough of them to wake up
            os.write(self._wake_write, byte)


def name_process(name: str) -> None:
    """Have `top` and `ps -o comm` show this process by a name of up to 15 characters, where they can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def default_signals() -> None:
    """In a process that a handler has forked: have signals do what they do to any Python program."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def be_process(work: Callable[[], int]) -> NoReturn:
    """In a new process, run `work`, and exit with the code that it returns, or with 1 if it raises.

    Does not use `sys.exit`: the calling frames, with their `finally` blocks, belong to the parent.
    """
    code = 1
    try:
        code = work()
    finally:
        _exit(code)


def _exit(code: int) -> NoReturn:
    """Wait for threads, run the functions given to atexit, flush, and exit.

    This includes functions that were given to atexit before the fork. Exporters of metrics, traces and
    errors register theirs as the settings are loaded, and each child has to send what it has collected.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or it is closed
                stream.flush()
    finally:
        os._exit(code)
