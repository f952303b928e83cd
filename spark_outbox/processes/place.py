"""The supervisor's records: each place, and the child that runs there."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import NamedTuple

from spark_outbox.processes.slot import NEVER, Slot

RESTART_PAUSES = (0.1, 30.0)
"""The first and the longest pause before a dead process is restarted, in seconds."""

HEALTHY = 60.0
"""A process that lives this many seconds is restarted after the first pause."""

GRACE = 5.0
"""Seconds beyond a handler's timeout after which its process is killed: the alarm comes first."""

STUCK = 10.0
"""Seconds beyond the end of its sleep after which a process is killed: also a busy machine gives it some
time within these."""

InHand = list[tuple[int, int]]
"""The current calls: ids of events, and the numbers of their handlers."""


class Fault(NamedTuple):
    """Why a child is to be killed."""

    what: str
    due: float = NEVER
    """The deadline that it has exceeded."""


@dataclass(slots=True)
class Child:
    """A worker process, from its fork to its end."""

    slot: Slot
    wake: tuple[int, int] = field(default_factory=os.pipe)
    """A pipe by which the supervisor tells it that the watch is its own."""
    pid: int = 0
    started: float = field(default_factory=time.monotonic)
    killed_at: float = NEVER
    """When the supervisor has killed it."""
    overdue: float = NEVER
    """The deadline that it was killed for."""

    @property
    def killed(self) -> bool:
        return self.killed_at < NEVER

    def send(self, number: signal.Signals) -> None:
        send(self.pid, number)

    def kill(self, *, overdue: float = NEVER) -> None:
        self.killed_at = min(self.killed_at, time.monotonic())
        self.overdue = min(self.overdue, overdue)
        self.send(signal.SIGKILL)

    def give_watch(self) -> None:
        """Let it look out for events."""
        self.slot.give_watch(True)
        os.write(self.wake[1], b"!")

    def take_watch(self) -> None:
        """Let it look out no more, also if it has just begun to."""
        self.slot.give_watch(False)
        if self.slot.is_idle():
            os.write(self.wake[1], b"!")

    def close(self) -> None:
        for end in self.wake:
            os.close(end)

    def fault(self, now: float, answer_timeout: float) -> Fault | None:
        """Return why it is to be killed, unless it is well, or was killed already."""
        if self.killed:
            return None
        if now >= (due := self.slot.due()) + GRACE:
            return Fault("does not end in time", due)
        if now - self.slot.waits_since() > answer_timeout:
            return Fault("has had no answer from the database in time")
        if now >= self.slot.back_by() + STUCK:
            return Fault("does nothing, though it should")
        return None

    def was_killed(self, code: int) -> bool:
        """Return whether the supervisor has caused this exit code."""
        return self.killed and code == -signal.SIGKILL

    def was_late(self, code: int) -> bool:
        """Return whether it was killed for a call's deadline, while that call was still running."""
        return self.was_killed(code) and self.slot.due() == self.overdue != NEVER


@dataclass(slots=True)
class Booking:
    """A process that books the crash of a child. No other child takes its place before it has ended."""

    pid: int
    in_hand: InHand


@dataclass(slots=True)
class Place:
    """A place for one child at a time."""

    number: int
    child: Child | None = None
    booking: Booking | None = None
    start_at: float = 0.0
    """When the next child starts; NEVER if the work of this place is done."""
    _crashes: int = 0
    _was_ready: bool = False

    @property
    def is_vacant(self) -> bool:
        return self.child is None and self.booking is None

    def has_been_ready(self) -> bool:
        """Return whether any child of this place has ever been ready."""
        return self._was_ready or (self.child is not None and self.child.slot.has_been_ready())

    def leave(self) -> None:
        """Note that its child has ended."""
        self._was_ready = self.has_been_ready()
        if self.child is not None:
            self.child.close()
        self.child = None

    def restart_later(self, started: float) -> None:
        """After a crash, start the next child after a pause, which grows with each crash."""
        now = time.monotonic()
        self._crashes = self._crashes + 1 if now - started < HEALTHY else 1
        first, longest = RESTART_PAUSES
        self.start_at = now + min(longest, first * 2 ** min(self._crashes - 1, 16))


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def exit_code(pid: int) -> int | None:
    """Return the exit code of a process, negative for a signal; None while it runs."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def reap_orphans(ours: Callable[[], Container[int]]) -> None:
    """As the first process of a container, which gets all orphans for its own: let those go that have
    ended. One of `ours()` is left to `exit_code`, and others with it until then."""
    if os.getpid() != 1:
        return
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in ours():
                return
            os.waitpid(ended.si_pid, 0)
