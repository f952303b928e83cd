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
from spark_outbox.processes.crash import book, booked
from spark_outbox.processes.fork import READY, be_process, name_process, signals_blocked
from spark_outbox.processes.keeper import Keeper
from spark_outbox.processes.place import GRACE, Child, InHand, Place, exit_code, reap_orphans, send
from spark_outbox.processes.reload import Reload, inherit
from spark_outbox.processes.signs import Signs
from spark_outbox.processes.slot import NEVER, Slot
from spark_outbox.processes.watch import WORK, OwnWatch, SharedWatch, Watch

logger = logging.getLogger(__name__)

READY_PATIENCE = 30.0
"""Seconds after which the service counts as started although some process has no database yet: it waits
for that, and a host need not wait with it."""

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
    is ready and all others are, or have been; and after READY_PATIENCE in any case. `signs` tells how it
    goes; `reload` loads new code.
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
        signs: Signs | None = None,
        reload: Reload | None = None,
    ) -> None:
        self._work = work
        self._places = [Place(number) for number in range(processes)]
        self._keeper = Keeper()
        self._former, self._pipes = inherit()
        self._signs = signs or Signs()
        self._reload = reload or Reload()
        self._shutdown_timeout = shutdown_timeout
        self._answer_timeout = answer_timeout
        self._finite = finite
        self._on_ready = on_ready
        self._on_crash = on_crash
        self._stopping = False
        self._deadline = NEVER
        self._judge_at = 0.0  # not before that
        self._ready_by = time.monotonic() + READY_PATIENCE
        self._exit_code = 0

    # For signal handlers

    def stop(self) -> None:
        """Let the children finish their current calls; kill those that take too long."""
        self._stopping = True
        self._deadline = time.monotonic() + self._shutdown_timeout
        self._reload.stop()
        self._former.send(signal.SIGTERM)
        for child in self._children():
            child.send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the children at once. Events that they have not committed are handled again."""
        self._stopping = True
        self._reload.stop()
        self._former.send(signal.SIGKILL)
        for child in self._children():
            child.kill()
        for place in self._places:
            if place.booking is not None:
                send(place.booking.pid, signal.SIGKILL)

    def calls(self) -> str:
        """Return in words what all children have in hand."""
        return ", ".join(filter(None, map(self._signs.calls, self._children())))

    # The loop

    def run(self) -> int:
        """Run until stopped, or all are done; return the exit code. In the main thread only."""
        self._pipes.receive_signals()
        try:
            while not self._is_done():
                now = time.monotonic()
                for place in self._vacant():
                    if place.start_at <= now:
                        self._start(place)
                self._signs.look(self._places, self._pipes, state=self._state())
                self._wait(now)
                self._reap()
                reap_orphans(self._pids)
                self._turn_over()
                self._keeper.pass_on(self._children())
                self._kill_late()
        finally:
            self._signs.stop()
        return self._exit_code

    def _is_done(self) -> bool:
        is_empty = all(place.is_vacant for place in self._places) and not self._former
        return is_empty and (self._stopping or all(place.start_at == NEVER for place in self._places))

    def _state(self) -> str:
        if self._stopping:
            return "stopping"
        return "loading new code" if self._former or self._reload.pid else ""

    def _wait(self, now: float) -> None:
        # A call that starts later has a later deadline: it can't be late before now + GRACE.
        looks = [self._signs.look_at, now + GRACE, self._deadline, self._keeper.pass_on_at]
        looks += [child.slot.due() + GRACE for child in self._children() if not child.killed]
        looks += [place.start_at for place in self._vacant()]
        until = max(now, min(looks))
        received = self._pipes.wait(until - now)
        now = time.monotonic()
        if now > until + GRACE:  # we were stopped, maybe with all of them: let them catch up
            self._judge_at = now + GRACE
        if (READY in received and self._is_ready()) or now > self._ready_by:
            self._ready_by = NEVER
            self._on_ready()
        if WORK in received:
            self._keeper.works()

    def _is_ready(self) -> bool:
        """Return whether all processes have been ready, and no reload is under way."""
        return not self._state() and all(place.has_been_ready() for place in self._places)

    def _children(self) -> Iterator[Child]:
        return (place.child for place in self._places if place.child is not None)

    def _pids(self) -> set[int]:
        """Return all processes that are ours to reap."""
        bookings = (place.booking.pid for place in self._places if place.booking is not None)
        children = (child.pid for child in self._children())
        return {*children, *bookings, *self._former.pids, *self._signs.pids, self._reload.pid}

    def _vacant(self) -> list[Place]:
        """Return the places that wait for their next child, and may have it."""
        if self._stopping:
            return []
        room = self._former.room(len(self._places))
        return [place for place in self._places[:room] if place.is_vacant]

    def _turn_over(self) -> None:
        """Stop a former child for each new one that is ready; or load new code, if somebody asks."""
        self._former.reap()
        if self._stopping:
            return
        if self._former:
            self._ready_by = time.monotonic() + READY_PATIENCE
            started = self._places[: self._former.room(len(self._places))]
            if all(place.has_been_ready() for place in started):
                self._former.stop_one(self._shutdown_timeout)
        elif all(place.booking is None for place in self._places):
            pids = [child.pid for child in self._children()]
            self._reload.step(pids, self._pipes, self._leave)
            if self._ready_by < NEVER and self._is_ready():
                self._ready_by = NEVER
                self._on_ready()

    def _leave(self) -> bool:
        """Prepare for another program; return False if there is to be none."""
        self._signs.stop()
        return not self._stopping

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
            name_process(f"spark_worker:{slot.number + 1}")
            self._signs.leave()
            is_alone = len(self._places) == 1
            watch = OwnWatch() if is_alone else SharedWatch(slot, wake, self._pipes.tell)
            return self._work(slot, watch, partial(self._tell_ready, slot))
        finally:
            slot.rest()
            slot.end_by(time.monotonic() + self._shutdown_timeout)

    def _tell_ready(self, slot: Slot) -> None:
        slot.be_ready()
        self._pipes.tell(READY)

    def _reap(self) -> None:
        for place in self._places:
            if (child := place.child) is not None:
                if (code := exit_code(child.pid)) is not None:
                    self._signs.ended(child)
                    place.leave()
                    self._keeper.ended(child)
                    self._ended(place, child, code)
            elif (booking := place.booking) and (code := exit_code(booking.pid)) is not None:
                place.booking = None
                self._keeper.has_booked()
                booked(booking, code)

    def _ended(self, place: Place, child: Child, code: int) -> None:
        """Decide when a child's place is filled again, and whether its end is a failed attempt."""
        in_hand = child.slot.in_hand()
        if code == 0 and not in_hand:  # with a current call, its handler has ended it
            place.start_at = NEVER if self._finite else 0.0
            return
        late = child.was_late(code)
        is_wrong = code == os.EX_CONFIG and not self._former and self._ready_by < NEVER
        if is_wrong or (self._finite and not in_hand and (late or code > 0)):
            self._exit_code = self._exit_code or (code if is_wrong else 1)
            self.stop()
            return
        place.restart_later(child.started)
        if child.was_killed(code):
            if in_hand:
                self._book(place, child, HandlerTimeout(LATE) if late else None)
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        details = {"pid": child.pid, "cause": cause}
        logger.error("The worker process %(pid)s died of %(cause)s.", details, extra=details)
        if in_hand:
            self._book(place, child, WorkerDied(DIED.format(cause=cause)))

    def _kill_late(self) -> None:
        """Kill children past their deadline, and those that the database does not answer.

        Call `_reap` just before, so that a child that died by itself does not count as killed.
        """
        now = time.monotonic()
        for child in self._children():
            if now >= self._judge_at and (fault := child.fault(now, self._answer_timeout)):
                self._signs.log_kill(child, fault.what)
                child.kill(overdue=fault.due)
        if now >= self._deadline:
            self._deadline = NEVER
            self._former.send(signal.SIGKILL)
            for child in self._children():
                self._signs.log_kill(child, "did not stop in time")
                child.kill()

    def _book(self, place: Place, child: Child, error: BaseException | None) -> None:
        """Start a process that books a crash."""
        self._keeper.is_booking()
        place.booking = book(
            child.slot,
            lambda in_hand, session: self._on_crash(in_hand, error, session),
            self._answer_timeout,
            self._pipes,
        )
