"""Guards a worker's calls: notes for others what is being called, and ends a call that takes too long.

A worker calls `take_in_hand` and `start` before a handler, `stop` and `put_down` after it. Its guard is
a Guard in the main thread of a process, and elsewhere an Unguarded.
"""

import signal
import time
from typing import Protocol

from spark_outbox.errors import HandlerTimeout
from spark_outbox.processes.slot import NEVER

AGAIN = 1.0
"""Seconds between further alarms, for a handler that catches the first."""


class Notes(Protocol):
    """Where it is noted what is being called."""

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        """Note pairs of an event's id and its handler's number, instead of what was noted before."""

    def put_down(self) -> None:
        """Note that nothing is called, and that from now on the database has to answer."""

    def rest(self) -> None:
        """Note that the database need not answer, until `put_down`."""

    def identify(self, session: int) -> None:
        """Note the session that running deliveries of this worker bear."""

    def in_hand(self) -> list[tuple[int, int]]:
        """Return what was taken in hand and not put down."""


class SharedNotes(Notes, Protocol):
    """Notes that a supervisor reads, such as a Slot."""

    def end_by(self, deadline: float) -> None:
        """Note when the call has to end, on the monotonic clock; NEVER lifts it."""


class CallGuard(Notes, Protocol):
    """What a worker needs of its guard."""

    @property
    def is_watched(self) -> bool:
        """Whether a supervisor reads the notes, and ends a worker that the database does not answer."""

    @property
    def interrupts(self) -> bool:
        """Whether a call ends that outlasts its timeout, also if it makes no query."""

    def start(self, seconds: float) -> None:
        """Raise HandlerTimeout in so many seconds, and again after that, until `stop`."""

    def stop(self) -> None: ...


class OwnNotes:
    """Notes in the process's own memory: no supervisor reads them."""

    def __init__(self) -> None:
        self._called: tuple[tuple[int, int], ...] = ()

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        self._called = called

    def put_down(self) -> None:
        self._called = ()

    def rest(self) -> None:
        pass

    def identify(self, session: int) -> None:
        pass

    def in_hand(self) -> list[tuple[int, int]]:
        return list(self._called)

    def end_by(self, deadline: float) -> None:
        pass


class _Noting:
    """A guard's methods are those of its notes: each event calls some, so there is no call between."""

    def __init__(self, notes: SharedNotes | None = None) -> None:
        self.is_watched = notes is not None
        notes = OwnNotes() if notes is None else notes
        self.take_in_hand = notes.take_in_hand
        self.put_down = notes.put_down
        self.rest = notes.rest
        self.identify = notes.identify
        self.in_hand = notes.in_hand
        self._end_by = notes.end_by


class Unguarded(_Noting):
    """Ends no call: for threads, where no alarm rings, and for whoever drains by hand."""

    interrupts = False

    def start(self, seconds: float) -> None:
        pass

    def stop(self) -> None:
        pass


class Guard(_Noting):
    """Ends calls by SIGALRM: in a process's main thread alone, and only between two steps of Python.

    Notes the deadline, too. So a supervisor can end code that takes no such step.
    """

    interrupts = True

    def __init__(self, notes: SharedNotes | None = None) -> None:
        super().__init__(notes)
        self._armed = False
        signal.signal(signal.SIGALRM, self._ring)

    def start(self, seconds: float) -> None:
        self._armed = True
        self._end_by(time.monotonic() + seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)

    def stop(self) -> None:
        self._armed = False  # first: one may have rung that Python has not told us of yet
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._end_by(NEVER)

    def _ring(self, *_: object) -> None:
        if self._armed:
            raise HandlerTimeout
