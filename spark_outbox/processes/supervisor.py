"""Prefork: run workers in child processes, restart what dies, and remember what it died of.

A child notes the handler and the event that it has in hand in memory that it shares with the
supervisor. If it dies there, say of a segmentation fault, its transaction is rolled back, and the
attempt would be forgotten with it. So the supervisor has `on_crash` book it, in a process of its own:
no connection that is opened for it can be inherited by another child.

The alarm that ends a handler past its timeout rings only between two steps of Python. So its deadline
is in the shared memory, too. A child that goes on for GRACE seconds beyond it is killed, and the
attempt is booked as one that ran out of time. Nothing else that the supervisor kills is a crash.

A child that has no handler in hand, and is not at rest, waits for the database. If that goes on for too
long, behind a pooler that hangs, say, where TCP has nothing to complain of, the child is killed: it may
be deaf to anything less.

It installs no signal handlers: `stop` and `kill` are for those of its caller, who has one for SIGCHLD,
too, if only to be woken. Python calls handlers between two steps of its own, so a signal that comes just
before a system call would be heeded after it: hence the wakeup file descriptor, written to at once.
"""

import atexit
import contextlib
import logging
import mmap
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from spark_outbox.errors import HandlerTimeout, WorkerDied

logger = logging.getLogger(__name__)

RESTART_PAUSES = (0.1, 30.0)
"""The first and the longest pause before a process that died is started again, in seconds."""

HEALTHY = 60.0
"""Seconds after which a process that dies is started again with the first pause."""

GRACE = 5.0
"""Seconds beyond a handler's timeout after which its process is killed: the alarm comes first."""

BOOKING_PATIENCE = 30.0
"""The most seconds that the booking of a crash may take."""

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What stops the supervisor. A terminal sends the last two to the children as well."""

SIGNALS = (*STOPS, signal.SIGCHLD)
"""Blocked around the fork: a child must not run the handlers of its parent."""

READY = b"r"
"""What a child that is ready writes to the supervisor's pipe: the number of no signal."""

LATE = "The handler ran longer than its timeout, in code that does not heed it: its process was killed."
DIED = "The worker process died of {cause} while it ran this handler."

NEVER = float("inf")

_SIZE = 16 * mmap.PAGESIZE
_ROOM = (_SIZE // 8 - 5) // 2  # pairs of words, beside their count and the four at the end
_ASKED, _DUE, _READY, _SESSION = -1, -2, -3, -4


@dataclass(slots=True)
class Slot:
    """The place of one child process, shared with it."""

    number: int
    pid: int = 0
    booker: int = 0
    """The process that books the crash of the last child. Until it has ended, no other is started."""
    started: float = 0.0
    crashes: int = 0
    start_at: float = 0.0
    killed: bool = False
    """The supervisor has killed the child."""
    overdue: float = NEVER
    """The deadline for whose sake it has."""
    _words: "memoryview[int]" = field(init=False)
    """Shared: how many calls are in hand, and their events and handlers; at _READY, whether a child of
    this place has ever been ready; at _SESSION, the child's session."""
    _times: "memoryview[float]" = field(init=False)
    """The same memory. At _ASKED, when the child began to wait for the database; at _DUE, when what it
    does has to end."""

    def __post_init__(self) -> None:
        memory = mmap.mmap(-1, _SIZE)
        self._words, self._times = memoryview(memory).cast("q"), memoryview(memory).cast("d")
        self._times[_DUE] = NEVER

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
        self._times[_ASKED] = time.monotonic()
        self._words[0] = 0

    def rest(self) -> None:
        """Note, in the child, that nobody has to answer; until `put_down`."""
        self._times[_ASKED] = NEVER

    def end_by(self, deadline: float) -> None:
        """Note, in the child, when what it does has to end, on the monotonic clock; NEVER lifts it."""
        self._times[_DUE] = deadline

    def be_ready(self) -> None:
        """Note, in the child, that it is ready."""
        self._words[_READY] = 1

    def identify(self, session: int) -> None:
        """Note, in the child, its session."""
        self._words[_SESSION] = session

    def session(self) -> int:
        """Return the child's session; 0 if it had none."""
        return int(self._words[_SESSION])

    def in_hand(self) -> list[tuple[int, int]]:
        words = self._words[1 : 2 * self._words[0] + 1].tolist()
        return list(zip(words[::2], words[1::2], strict=True))

    def waits_since(self) -> float:
        """Return when the child asked the database for what it waits for; infinity if it does not."""
        return NEVER if self._words[0] else float(self._times[_ASKED])

    def due(self) -> float:
        """Return when what the child does has to end."""
        return float(self._times[_DUE])

    def has_been_ready(self) -> bool:
        return bool(self._words[_READY])

    def start_over(self) -> None:
        """Forget the last child, before another is started."""
        self.put_down()
        self.end_by(NEVER)
        self.identify(0)
        self.started = time.monotonic()
        self.killed, self.overdue = False, NEVER


class Supervisor:
    """Keeps `processes` children running `work`, whose return value is their exit code.

    `work` gets its slot and what to call when it is ready. It starts with SIGNALS blocked, and
    unblocks them when it has handlers of its own; on SIGTERM it is to finish.

    A child that exits with 0 is done: it is started again at once, or not at all if `finite`. One
    that exits with EX_CONFIG would do so again: then all are stopped, and `run` returns that code. Any
    other end is a crash, but for those by the supervisor's own hand. `on_crash` gets the events and
    handlers that the child had in hand, if any, what they failed with, and the child's session; the
    error is None for a child that was killed since it did not stop in time. It runs in a process of its
    own, where signals to stop are ignored, and has BOOKING_PATIENCE, or the `answer_timeout`.
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
        on_crash: Callable[[list[tuple[int, int]], BaseException | None, int], None],
    ) -> None:
        self._work = work
        self._slots = [Slot(number) for number in range(processes)]
        self._shutdown_timeout = shutdown_timeout
        self._answer_timeout = answer_timeout
        self._finite = finite
        self._on_ready = on_ready
        self._on_crash = on_crash
        self._stopping = False
        self._deadline = NEVER
        self._exit_code = 0
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
        self._kill(*self._slots)

    def in_hand(self) -> list[tuple[int, int]]:
        """Return what the children are at: events and handlers."""
        return [pair for slot in self._slots if slot.pid for pair in slot.in_hand()]

    # The loop

    def run(self) -> int:
        """Run until stopped, or all are done; return the exit code. In the main thread only."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        while True:
            now = time.monotonic()
            for slot in self._vacant():
                if slot.start_at <= now:
                    self._start(slot)
            if not any(slot.pid or slot.booker for slot in self._slots) and (
                self._stopping or all(slot.start_at == NEVER for slot in self._slots)
            ):
                return self._exit_code
            self._wait(now)
            self._reap()
            self._kill_late()

    def _wait(self, now: float) -> None:
        # A call that begins from now on is due after now, and so is late after GRACE at the earliest.
        looks = [now + GRACE, now + self._answer_timeout / 4, self._deadline]
        looks += [slot.due() + GRACE for slot in self._slots if slot.pid and not slot.killed]
        looks += [slot.start_at for slot in self._vacant()]
        if select.select([self._wake_read], [], [], max(0.0, min(looks) - now))[0]:
            told = os.read(self._wake_read, 4096)
            if READY in told and all(slot.has_been_ready() for slot in self._slots):
                self._on_ready()

    def _vacant(self) -> list[Slot]:
        """Return the places that are to be filled, each at its time."""
        return [] if self._stopping else [s for s in self._slots if not (s.pid or s.booker)]

    def _start(self, slot: Slot) -> None:
        slot.start_over()
        with _signals_blocked():
            if not self._stopping:  # a signal may have come a moment ago
                slot.pid = os.fork()
                if not slot.pid:
                    self._be_child(slot)

    def _be_child(self, slot: Slot) -> NoReturn:
        code = 1
        try:
            self._leave_parent()
            threading.Thread(target=_follow, args=(self._life_read,), daemon=True).start()
            code = self._work(slot, lambda: self._tell_ready(slot))
        finally:
            slot.rest()
            slot.end_by(time.monotonic() + self._shutdown_timeout)
            _exit(code)

    def _book(self, slot: Slot, in_hand: list[tuple[int, int]], error: BaseException | None) -> None:
        """Start a process that books a crash."""
        with _signals_blocked():
            try:
                slot.booker = os.fork()
            except OSError as refused:
                logger.error("A crash could not be counted: %(error)s.", {"error": refused.strerror})
                return
            if slot.booker:
                return
            code = 1
            try:
                self._leave_parent()
                for number in STOPS:
                    signal.signal(number, signal.SIG_IGN)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends us, whatever we wait for
                signal.setitimer(signal.ITIMER_REAL, min(BOOKING_PATIENCE, self._answer_timeout))
                self._on_crash(in_hand, error, slot.session())
                code = 0
            finally:
                _exit(code)

    def _leave_parent(self) -> None:
        """Give up, in a new process, what is the supervisor's alone."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self._life_write)

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.pid:
                pid, status = os.waitpid(slot.pid, os.WNOHANG)
                if pid:
                    slot.pid = 0
                    self._ended(slot, os.waitstatus_to_exitcode(status))
            elif slot.booker:
                pid, status = os.waitpid(slot.booker, os.WNOHANG)
                if pid:
                    slot.booker = 0
                    if os.waitstatus_to_exitcode(status) == -signal.SIGALRM:
                        (event_id, _), *_ = slot.in_hand()
                        logger.error(
                            "A crash on event %(event_id)s could not be counted: The database does not "
                            "answer.",
                            {"event_id": event_id},
                            extra={"event_id": event_id},
                        )

    def _ended(self, slot: Slot, code: int) -> None:
        """Decide when a child's place is filled again, and whether its end is a failed attempt."""
        now = time.monotonic()
        in_hand = slot.in_hand()
        if code == 0 and not in_hand:  # else a handler has ended it
            slot.start_at = NEVER if self._finite else now
            return
        by_us = slot.killed and code == -signal.SIGKILL
        late = by_us and slot.due() == slot.overdue != NEVER  # else it had come to an end after all
        if code == os.EX_CONFIG or (self._finite and not in_hand and (late or code > 0)):
            self._exit_code = self._exit_code or (code if code == os.EX_CONFIG else 1)
            self.stop()
            return
        slot.crashes = slot.crashes + 1 if now - slot.started < HEALTHY else 1
        first, longest = RESTART_PAUSES
        slot.start_at = now + min(longest, first * 2 ** min(slot.crashes - 1, 16))
        if by_us:
            if in_hand:
                self._book(slot, in_hand, HandlerTimeout(LATE) if late else None)
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        logger.error("A worker process died of %(cause)s.", {"cause": cause}, extra={"cause": cause})
        if in_hand:
            self._book(slot, in_hand, WorkerDied(DIED.format(cause=cause)))

    def _kill_late(self) -> None:
        """Kill what should have ended by now, and what the database has not answered. Comes just after
        `_reap`: one that is dead already has not been killed by us."""
        now = time.monotonic()
        for slot in self._slots:
            if not slot.pid or slot.killed:
                continue
            if now >= (due := slot.due()) + GRACE:
                slot.overdue = due
                what = "heed its handler's timeout" if slot.in_hand() else "end in time"
                logger.warning("A worker process does not %(what)s, and is killed.", {"what": what})
                self._kill(slot)
            elif now - slot.waits_since() > self._answer_timeout:
                logger.warning("The database has not answered a worker in time, which is killed.")
                self._kill(slot)
        if now >= self._deadline:
            self._deadline = NEVER
            logger.warning("A worker did not stop in time, and is killed.")
            self._kill(*(slot for slot in self._slots if not slot.booker))

    def _kill(self, *slots: Slot) -> None:
        for slot in slots:
            if pid := slot.pid or slot.booker:
                slot.killed = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for slot in self._slots:
            if slot.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(slot.pid, number)

    def _tell_ready(self, slot: Slot) -> None:
        slot.be_ready()
        os.write(self._wake_write, READY)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _exit(code: int) -> NoReturn:
    """End a child as Python ends: wait for threads, run the functions given to atexit, flush.

    This includes functions that were given to atexit before the fork. Exporters of metrics, traces and
    errors register theirs as the settings are loaded, and each child has to send what it has collected.
    Not `sys.exit`: the frames below ours belong to the parent, and so do their `finally` blocks.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # the terminal is gone, or it is closed
                stream.flush()
    finally:
        os._exit(code)


def _follow(life: int) -> None:
    """In a child: stop when the supervisor has ended, however it did."""
    os.read(life, 1)
    os.kill(os.getpid(), signal.SIGTERM)
