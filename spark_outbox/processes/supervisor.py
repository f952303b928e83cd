"""Prefork: runs workers in child processes, restarts those that die, and books their crashes.

A child notes its current event and handler in memory that it shares with the supervisor, see slot.py.
If it dies during that call, say of a segmentation fault, its transaction is rolled back, and the attempt
with it. So the supervisor calls `on_crash` to book the attempt. `on_crash` runs in a process of its own,
so that no child can inherit a connection that it opens.

The alarm that interrupts a handler rings only between two steps of Python. So the deadline of a call is
in the shared memory, too. A child that exceeds it by GRACE seconds is killed, and the attempt is booked
as a timeout. A child that the supervisor kills for another reason has not crashed.

A child that has no current call, and is not at rest, waits for the database. If that takes too long, the
child is killed. The cause may be a pooler that hangs: TCP reports no error then, and the child may react
to nothing less.

The supervisor installs no signal handlers. Its caller does, and calls `stop` and `kill` from them. It
also needs a handler for SIGCHLD, if only to wake the supervisor. Python runs handlers between two steps
of its own, so a signal just before a system call would be handled only after it. The wakeup file
descriptor prevents that: a signal writes to it at once.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

from spark_outbox.errors import HandlerTimeout, WorkerDied
from spark_outbox.processes.fork import READY, SIGNALS, STOPS, Pipes, be_process, signals_blocked
from spark_outbox.processes.place import Booking, Child, InHand, Place, exit_code, send
from spark_outbox.processes.slot import NEVER, Slot
from spark_outbox.processes.watch import HANGS, PASS_ON, WORK, OwnWatch, SharedWatch, Watch

logger = logging.getLogger(__name__)

GRACE = 5.0
"""Seconds beyond a handler's timeout after which its process is killed: the alarm comes first."""

BOOKING_PATIENCE = 30.0
"""The most seconds that the booking of a crash may take."""

HEAD_START = 0.5
"""The most seconds for which nobody watches after its holder has died: another would call again what it
died of, before that is booked."""

LATE = "The handler ran longer than its timeout, in code that no alarm stops: its process was killed."
DIED = "The worker process died of {cause} while it ran this handler."


class Supervisor:
    """Keeps `processes` children running `work`, whose return value is their exit code.

    `work` gets its slot, its part in the watch, see watch.py, and a function to call when it is ready.
    It starts with SIGNALS blocked, and must unblock them when it has handlers of its own. On SIGTERM it
    must finish.

    A child that exits with 0 is done: it is restarted at once, or not at all if `finite`. With EX_CONFIG
    a restart can't help: all children are stopped, and `run` returns that code. Any other end is a
    crash, unless the supervisor has killed the child. `on_crash` gets the child's current events, their
    handlers, the error, and the child's session. The error is None for a child that was killed because
    it did not stop in time. `on_crash` runs in a process of its own, which ignores signals to stop. It
    may take BOOKING_PATIENCE, or `answer_timeout` if that is shorter. `on_ready` is called when a child
    is ready and all others are, or have been.
    """

    def __init__(
        self,
        work: Callable[[Slot, Watch, Callable[[], None]], int],
        *,
        processes: int,
        shutdown_timeout: float,
        answer_timeout: float,
        finite: bool,
        on_ready: Callable[[], None],
        on_crash: Callable[[InHand, BaseException | None, int], None],
    ) -> None:
        self._work = work
        self._places = [Place(number) for number in range(processes)]
        self._pipes = Pipes()
        self._shutdown_timeout = shutdown_timeout
        self._answer_timeout = answer_timeout
        self._finite = finite
        self._on_ready = on_ready
        self._on_crash = on_crash
        self._stopping = False
        self._deadline = NEVER
        self._exit_code = 0
        self._watch: Child | None = None  # the child that has it
        self._pass_on_at = NEVER

    # For signal handlers

    def stop(self) -> None:
        """Let the children finish their current calls; kill those that take too long."""
        self._stopping = True
        self._deadline = time.monotonic() + self._shutdown_timeout
        for child in self._children():
            child.send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the children at once. Events that they have not committed are handled again."""
        self._stopping = True
        for child in self._children():
            child.kill()
        for place in self._places:
            if place.booking is not None:
                send(place.booking.pid, signal.SIGKILL)

    def in_hand(self) -> InHand:
        """Return the current calls of all children."""
        return [pair for child in self._children() for pair in child.slot.in_hand()]

    # The loop

    def run(self) -> int:
        """Run until stopped, or all are done; return the exit code. In the main thread only."""
        self._pipes.receive_signals()
        while True:
            now = time.monotonic()
            for place in self._vacant():
                if place.start_at <= now:
                    self._start(place)
            if all(place.is_vacant for place in self._places) and (
                self._stopping or all(place.start_at == NEVER for place in self._places)
            ):
                return self._exit_code
            self._wait(now)
            self._reap()
            self._pass_on()
            self._kill_late()

    def _wait(self, now: float) -> None:
        # A call that starts later has a later deadline: it can't be late before now + GRACE.
        looks = [now + GRACE, now + self._answer_timeout / 4, self._deadline, self._pass_on_at]
        looks += [child.slot.due() + GRACE for child in self._children() if not child.killed]
        looks += [place.start_at for place in self._vacant()]
        received = self._pipes.wait(min(looks) - now)
        if READY in received and all(place.has_been_ready() for place in self._places):
            self._on_ready()
        if WORK in received and self._watch is not None:
            self._pass_on_at = time.monotonic() + PASS_ON

    def _children(self) -> Iterator[Child]:
        return (place.child for place in self._places if place.child is not None)

    def _vacant(self) -> list[Place]:
        """Return the places that wait for their next child; none while stopping."""
        return [] if self._stopping else [place for place in self._places if place.is_vacant]

    # Children

    def _start(self, place: Place) -> None:
        child = Child(Slot(place.number))
        with signals_blocked():
            if not self._stopping:  # a signal may have come a moment ago
                child.pid = os.fork()
                if not child.pid:
                    be_process(partial(self._be_child, child.slot, child.wake[0]))
                place.child = child

    def _be_child(self, slot: Slot, wake: int) -> int:
        try:
            self._pipes.leave_parent()
            self._pipes.follow_parent()
            is_alone = len(self._places) == 1
            watch = OwnWatch() if is_alone else SharedWatch(slot, wake, self._pipes.tell)
            return self._work(slot, watch, partial(self._tell_ready, slot))
        finally:
            slot.rest()
            slot.end_by(time.monotonic() + self._shutdown_timeout)

    def _tell_ready(self, slot: Slot) -> None:
        slot.be_ready()
        self._pipes.tell(READY)

    def _pass_on(self) -> None:
        """Give the watch to a child that is idle, unless its holder is, or has just begun to work."""
        now, holder = time.monotonic(), self._watch
        watches = (
            holder is not None and holder.slot.is_idle() and now - holder.slot.waits_since() < HANGS
        )
        if not watches and now < self._pass_on_at < NEVER:
            return
        self._pass_on_at = NEVER
        if watches:
            return
        others = (child for child in self._children() if child is not holder)
        idle = next((child for child in others if child.slot.is_idle()), None)
        if idle is not None:
            self._watch = idle
            idle.give_watch()
            if not idle.slot.is_idle():  # it has begun to work this moment, and need not have said so
                self._pass_on_at = now + PASS_ON
            if holder is not None:
                holder.take_watch()

    def _reap(self) -> None:
        for place in self._places:
            if (child := place.child) is not None:
                if (code := exit_code(child.pid)) is not None:
                    place.leave()
                    if child is self._watch:
                        self._watch, self._pass_on_at = None, NEVER
                    self._ended(place, child, code)
            elif (booking := place.booking) and (code := exit_code(booking.pid)) is not None:
                place.booking, self._pass_on_at = None, time.monotonic()
                _booked(booking, code)

    def _ended(self, place: Place, child: Child, code: int) -> None:
        """Decide when a child's place is filled again, and whether its end is a failed attempt."""
        in_hand = child.slot.in_hand()
        if code == 0 and not in_hand:  # with a current call, its handler has ended it
            place.start_at = NEVER if self._finite else 0.0
            return
        late = child.was_late(code)
        if code == os.EX_CONFIG or (self._finite and not in_hand and (late or code > 0)):
            self._exit_code = self._exit_code or (code if code == os.EX_CONFIG else 1)
            self.stop()
            return
        place.restart_later(child.started)
        if child.was_killed(code):
            if in_hand:
                self._book(place, child, HandlerTimeout(LATE) if late else None)
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        logger.error("A worker process died of %(cause)s.", {"cause": cause}, extra={"cause": cause})
        if in_hand:
            self._book(place, child, WorkerDied(DIED.format(cause=cause)))

    def _kill_late(self) -> None:
        """Kill children past their deadline, and those that the database does not answer.

        Call `_reap` just before, so that a child that died by itself does not count as killed.
        """
        now = time.monotonic()
        for child in self._children():
            if child.killed:
                continue
            if now >= (due := child.slot.due()) + GRACE:
                what = "end its call in time" if child.slot.in_hand() else "end in time"
                logger.warning("A worker process does not %(what)s, and is killed.", {"what": what})
                child.kill(overdue=due)
            elif now - child.slot.waits_since() > self._answer_timeout:
                logger.warning("A worker process that the database has not answered in time is killed.")
                child.kill()
        if now >= self._deadline:
            self._deadline = NEVER
            logger.warning("A worker did not stop in time, and is killed.")
            for child in self._children():
                child.kill()

    # Crashes

    def _book(self, place: Place, child: Child, error: BaseException | None) -> None:
        """Start a process that books a crash."""
        if self._watch is None:
            self._pass_on_at = time.monotonic() + HEAD_START
        with signals_blocked():
            try:
                pid = os.fork()
            except OSError as refused:
                logger.error("A crash could not be counted: %(error)s.", {"error": refused.strerror})
                return
            if not pid:
                be_process(partial(self._be_booker, child.slot, error))
            place.booking = Booking(pid, child.slot.in_hand())

    def _be_booker(self, slot: Slot, error: BaseException | None) -> int:
        self._pipes.leave_parent()
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends this process in any state
        signal.setitimer(signal.ITIMER_REAL, min(BOOKING_PATIENCE, self._answer_timeout))
        self._on_crash(slot.in_hand(), error, slot.session())
        return 0


def _booked(booking: Booking, code: int) -> None:
    """Log if the process that booked a crash ran out of time."""
    if code == -signal.SIGALRM:
        context = {"event_id": booking.in_hand[0][0]}
        logger.error(
            "A crash on event %(event_id)s could not be counted: The database does not answer.",
            context,
            extra=context,
        )
