"""Prefork: run workers in child processes, restart what dies, and remember what it died of.

A child notes the handler and the event that it has in hand in memory that it shares with the
supervisor. If it dies there, say of a segmentation fault, its transaction is rolled back, and the
attempt would be forgotten with it: so the supervisor tells `on_crash`, which books it.

A child that has no handler in hand, and is not at rest, waits for the database. If that goes on for too
long, behind a pooler that hangs, say, where TCP has nothing to complain of, the child is killed: it may
be deaf to anything less.

It installs no signal handlers: `stop` and `kill` are for those of its caller, who has one for SIGCHLD,
too, if only to be woken. Python calls handlers between two steps of its own, so a signal that comes just
before a system call would be heeded after it: hence the wakeup file descriptor, written to at once.
"""

import contextlib
import logging
import mmap
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

logger = logging.getLogger(__name__)

RESTART_PAUSES = (0.1, 30.0)
"""The first and the longest pause before a process that died is started again, in seconds."""

HEALTHY = 60.0
"""Seconds after which a process that dies is started again with the first pause."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
"""Blocked around the fork: a child must not run the handlers of its parent."""

READY = b"r"
"""What a child that is ready writes to the supervisor's pipe: the number of no signal."""

_SIZE = 16 * mmap.PAGESIZE
_ROOM = (_SIZE // 8 - 2) // 2  # pairs of words, beside their count and a time


@dataclass(slots=True)
class Slot:
    """The place of one child process, shared with it."""

    number: int
    pid: int = 0
    started: float = 0.0
    crashes: int = 0
    start_at: float = 0.0
    _words: "memoryview[int]" = field(init=False)
    """Shared: how many calls are in hand, and their events and handlers."""
    _times: "memoryview[float]" = field(init=False)
    """The same memory. The last one is when the child began to wait for the database."""

    def __post_init__(self) -> None:
        memory = mmap.mmap(-1, _SIZE)
        self._words, self._times = memoryview(memory).cast("q"), memoryview(memory).cast("d")

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        """Note, in the child, what is about to be called: ids of events, and the places of their
        handlers in the registry."""
        words = self._words
        if len(called) == 1:
            words[1], words[2] = called[0]
            words[0] = 1
            return
        self.put_down()
        for number, pair in enumerate(called[:_ROOM]):
            words[2 * number + 1], words[2 * number + 2] = pair
        words[0] = len(called[:_ROOM])

    def put_down(self) -> None:
        """Note, in the child, that it has nothing in hand, and that the database has to answer now."""
        self._times[-1] = time.monotonic()
        self._words[0] = 0

    def rest(self) -> None:
        """Note, in the child, that nobody has to answer; until `put_down`."""
        self._times[-1] = float("inf")

    def in_hand(self) -> list[tuple[int, int]]:
        words = self._words[1 : 2 * self._words[0] + 1].tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def waits_since(self) -> float:
        """Return when the child asked the database for what it waits for; infinity if it does not."""
        return float("inf") if self._words[0] else float(self._times[-1])


class Supervisor:
    """Keeps `processes` children running `work`, whose return value is their exit code.

    `work` gets its slot and what to call when it is ready. It starts with SIGNALS blocked, and
    unblocks them when it has handlers of its own; on SIGTERM it is to finish.

    A child that exits with 0 is done: it is started again at once, or not at all if `finite`. One
    that exits with EX_CONFIG would do so again: then all are stopped. Any other end is a crash, and
    `on_crash` gets the events and handlers that the child had in hand, if any, and the cause. `on_kill`
    gets those of a child that did not stop in time, and was killed for it.
    `on_ready` is called when a child is ready and all have been.
    """

    def __init__(
        self,
        work: Callable[[Slot, Callable[[], None]], int],
        *,
        processes: int,
        shutdown_timeout: float,
        answer_timeout: float,
        finite: bool,
        on_ready: Callable[[], None],
        on_crash: Callable[[list[tuple[int, int]], str], None],
        on_kill: Callable[[list[tuple[int, int]]], None] = lambda _: None,
    ) -> None:
        self._work = work
        self._slots = [Slot(number) for number in range(processes)]
        self._shutdown_timeout = shutdown_timeout
        self._answer_timeout = answer_timeout
        self._finite = finite
        self._on_ready = on_ready
        self._on_crash = on_crash
        self._on_kill = on_kill
        self._stopping = False
        self._deadline = float("inf")
        self._exit_code = 0
        self._ready = 0
        self._wake_read, self._wake_write = os.pipe()  # a byte per signal, and one per child's `ready`
        self._life_read, self._life_write = os.pipe()  # at its end, the children know we are gone
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)

    # For signal handlers

    def stop(self) -> None:
        """Have the children finish the handler in hand; kill those that take too long."""
        self._stopping = True
        self._deadline = time.monotonic() + self._shutdown_timeout
        self._signal_all(signal.SIGTERM)

    def kill(self) -> None:
        """End the children at once. What they had not committed is handled again."""
        self._stopping = True
        self._signal_all(signal.SIGKILL)

    # The loop

    def run(self) -> int:
        """Run until stopped, or all are done; return the exit code. In the main thread only."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        while True:
            now = time.monotonic()
            for slot in self._vacant():
                if slot.start_at <= now:
                    self._start(slot)
            if not any(slot.pid for slot in self._slots) and (
                self._stopping or all(slot.start_at == float("inf") for slot in self._slots)
            ):
                return self._exit_code
            if now >= self._deadline:
                self._deadline = float("inf")
                logger.warning("A worker did not stop in time, and is killed.")
                self._signal_all(signal.SIGKILL)
            self._wait(now)
            self._reap()
            self._kill_unanswered()

    def _wait(self, now: float) -> None:
        starts = (slot.start_at for slot in self._vacant())
        seconds = max(0.0, min(self._deadline, *starts, now + self._answer_timeout / 4) - now)
        if select.select([self._wake_read], [], [], seconds)[0]:
            told = os.read(self._wake_read, 4096)
            self._ready += told.count(READY)
            if READY in told and self._ready >= len(self._slots):
                self._on_ready()

    def _vacant(self) -> list[Slot]:
        """Return the places that are to be filled, each at its time."""
        return [] if self._stopping else [slot for slot in self._slots if not slot.pid]

    def _start(self, slot: Slot) -> None:
        slot.put_down()
        slot.started = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not self._stopping:  # a signal may have come a moment ago
            slot.pid = os.fork()
            if not slot.pid:
                self._be_child(slot)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _be_child(self, slot: Slot) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            os.close(self._life_write)
            threading.Thread(target=_follow, args=(self._life_read,), daemon=True).start()
            code = self._work(slot, self._tell_ready)
        finally:
            os._exit(code)  # not the parent's atexit handlers

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.pid:
                pid, status = os.waitpid(slot.pid, os.WNOHANG)
                if pid:
                    slot.pid = 0
                    self._ended(slot, os.waitstatus_to_exitcode(status))

    def _ended(self, slot: Slot, code: int) -> None:
        """Decide when a child's place is filled again."""
        now = time.monotonic()
        if code == 0:
            slot.start_at = float("inf") if self._finite else now
            return
        if code == os.EX_CONFIG or (self._finite and code > 0):
            self._exit_code = 1
            self.stop()
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        in_hand = slot.in_hand()
        if self._stopping and code == -signal.SIGKILL:  # we did that
            if in_hand:
                self._on_kill(in_hand)
            return
        slot.crashes = slot.crashes + 1 if now - slot.started < HEALTHY else 1
        first, longest = RESTART_PAUSES
        slot.start_at = now + min(longest, first * 2 ** min(slot.crashes - 1, 16))
        logger.error("A worker process died of %(cause)s.", {"cause": cause}, extra={"cause": cause})
        if in_hand:
            self._on_crash(in_hand, cause)

    def _kill_unanswered(self) -> None:
        for slot in self._slots:
            if slot.pid and time.monotonic() - slot.waits_since() > self._answer_timeout:
                slot.rest()
                logger.warning("The database has not answered a worker in time, which is killed.")
                os.kill(slot.pid, signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for slot in self._slots:
            if slot.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.pid, number)

    def _tell_ready(self) -> None:
        os.write(self._wake_write, READY)


def _follow(life: int) -> None:
    """In a child: stop when the supervisor has ended, however it did."""
    os.read(life, 1)
    os.kill(os.getpid(), signal.SIGTERM)
