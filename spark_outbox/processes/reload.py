"""Loads new code without a gap: the supervisor becomes a new program, and keeps its children until new
ones are ready.

A supervisor forks its children after all code was loaded. So it first has another process try whether
the new code can be loaded. Then it replaces itself, by exec, which keeps its number, its children and
the pipes between them. The new program starts one child after the other, and stops one of the former
ones for each that is ready.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from spark_outbox.processes import systemd
from spark_outbox.processes.fork import Pipes, signals_blocked
from spark_outbox.processes.place import exit_code, send
from spark_outbox.processes.slot import NEVER

logger = logging.getLogger(__name__)

VARIABLE = "SPARK_OUTBOX_FORMER"
"""The environment variable by which the new program gets the former children and the pipes."""


CHECK_PATIENCE = 60.0
"""The most seconds that trying the new code may take."""


class Former:
    """The children of the program before this one that still run. Their slots are lost with it."""

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self.pids = list(pids)
        self._stopping = 0
        self._kill_at = NEVER

    def __len__(self) -> int:
        return len(self.pids)

    def room(self, places: int) -> int:
        """Return how many places may have a child of the new program: one more child than places."""
        return max(1, places + 1 - len(self)) if self else places

    def stop_one(self, timeout: float) -> None:
        """Let one of them finish its current call; kill it if that takes longer."""
        if self._stopping not in self.pids:
            self._stopping = self.pids[0]
            self._kill_at = time.monotonic() + timeout
            send(self._stopping, signal.SIGTERM)
        elif time.monotonic() >= self._kill_at:
            self._kill_at = NEVER
            send(self._stopping, signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        for pid in self.pids:
            send(pid, number)

    def reap(self) -> None:
        for pid in list(self.pids):
            if (code := exit_code(pid)) is not None:
                self.pids.remove(pid)
                if code:
                    details = {"pid": pid, "code": code}
                    logger.warning(
                        "The former worker process %(pid)s has ended with %(code)s.",
                        details,
                        extra=details,
                    )


class Reload:
    """A reload, from the signal to the new program. `check` is the command that tries the new code."""

    def __init__(self, check: Sequence[str] = ()) -> None:
        self._check = check
        self._wanted = False
        self._kill_at = NEVER
        self.pid = 0  # of the process that tries the new code

    def ask(self) -> None:
        """Signal handlers may call it."""
        self._wanted = bool(self._check)

    def step(self, pids: Sequence[int], pipes: Pipes, prepare: Callable[[], bool]) -> None:
        """Begin a reload that was asked for, or end it: then this function does not return, and the
        processes `pids` have a new parent program; unless `prepare` returns False, with SIGNALS blocked.
        """
        if self.pid and (code := exit_code(self.pid)) is not None:
            self.pid = 0
            if code == 0:
                try:
                    with signals_blocked():
                        if prepare():
                            _become_new(pids, pipes)
                except OSError as error:
                    self._give_up(str(error.strerror))
            else:
                self._give_up(f"it ended with {code}")
        elif self.pid and time.monotonic() >= self._kill_at:
            self._kill_at = NEVER
            send(self.pid, signal.SIGKILL)
        elif self._wanted and not self.pid:
            self._wanted = False
            logger.info("Loading new code.")
            systemd.reloading()
            try:
                self.pid = os.posix_spawn(sys.executable, [*self._check], os.environ, setsigmask=())
                self._kill_at = time.monotonic() + CHECK_PATIENCE
            except OSError as error:
                self._give_up(str(error.strerror))

    def stop(self) -> None:
        """There is to be no new program any more. Signal handlers may call it."""
        self._wanted = False
        if self.pid:
            send(self.pid, signal.SIGKILL)

    def _give_up(self, why: str) -> None:
        details = {"why": why}
        logger.error(
            "The new code can't be loaded (%(why)s): the worker goes on with the old code.",
            details,
            extra=details,
        )
        systemd.notify("READY=1")


def _become_new(pids: Sequence[int], pipes: Pipes) -> None:
    """Become the new program, which unblocks the signals as soon as it has handlers. Raises OSError."""
    for descriptor in pipes.descriptors:
        os.set_inheritable(descriptor, True)
    os.environ[VARIABLE] = " ".join(map(str, [*pipes.descriptors, *pids]))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606, no shell
    finally:  # it could not
        del os.environ[VARIABLE]


def inherit() -> tuple[Former, Pipes]:
    """Return what the program before this one has left; nothing and new pipes if there was none."""
    left = [int(number) for number in os.environ.pop(VARIABLE, "").split()]
    if not left:
        return Former(), Pipes()
    return Former(left[4:]), Pipes(left[:4])
