"""How a child process begins and ends, and how it and the supervisor hear of each other."""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What stops the supervisor. A terminal sends the last two to the children as well."""

SIGNALS = (*STOPS, signal.SIGCHLD)
"""Blocked around the fork: a child must not run the handlers of its parent."""

READY = b"r"
"""What a child that is ready writes to the supervisor's pipe: the number of no signal."""


class Pipes:
    """One pipe wakes the supervisor: a byte per signal, and one per child that is ready.

    At the end of the other, the children know that the supervisor is gone.
    """

    def __init__(self) -> None:
        self._wake_read, self._wake_write = os.pipe()
        self._life_read, self._life_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)

    def receive_signals(self) -> None:
        """Have each signal write a byte, from the moment that it comes."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def wait(self, seconds: float) -> bytes:
        """Wait for bytes; return them, or none after so many seconds."""
        if select.select([self._wake_read], [], [], max(0.0, seconds))[0]:
            return os.read(self._wake_read, 4096)
        return b""

    # In a child

    def leave_parent(self) -> None:
        """Give up, in a new process, what is the supervisor's alone."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._life_write)

    def follow_parent(self) -> None:
        """Stop when the supervisor has ended, however it did."""
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        os.read(self._life_read, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def tell_ready(self) -> None:
        os.write(self._wake_write, READY)


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
    """In a new process: do the work, and end as Python ends. Its exit code is 1 if it raises.

    Not by `sys.exit`: the frames below ours belong to the parent, and so do their `finally` blocks.
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
