"""Guards a worker's calls: notes the current ones, and interrupts a call that takes too long.

A worker calls `take_in_hand` and `start` before a handler, `stop` and `put_down` after it. Its guard is
a Guard in the main thread of a process, and elsewhere an Unguarded.
"""

import signal
import time
from typing import Protocol

from spark_outbox.errors import HandlerTimeout
from spark_outbox.processes.slot import NEVER

AGAIN = 1.0
"""Seconds between repeated alarms, for a handler that catches the first."""


class Notes(Protocol):
    """Holds notes of the current calls, and of the wait for the database."""

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        """Note the current calls, as pairs of an event's id and its handler's number."""

    def keep(self, *called: tuple[int, int]) -> None:
        """Note the async calls that are under way, for people."""

    def under_way(self) -> list[tuple[int, int]]:
        """Return the current calls, and async ones that go on."""

    def put_down(self) -> None:
        """Note that there is no current call, and start the answer timeout of the database."""

    def rest(self, seconds: float = NEVER) -> None:
        """Pause the answer timeout until `put_down()`, which comes within `seconds`."""

    def lose_database(self) -> None:
        """Note that the worker has no database until it is ready again."""

    def tally(self, handled: int, failed: int) -> None:
        """Note that so many events were settled, and so many of them failed for good."""

    def identify(self, session: int) -> None:
        """Note the session that is stored in this worker's running deliveries."""

    def in_hand(self) -> list[tuple[int, int]]:
        """Return the current calls."""


class SharedNotes(Notes, Protocol):
    """Notes that a supervisor reads, such as a Slot."""

    def end_by(self, deadline: float) -> None:
        """Note the deadline of the current call, on the monotonic clock; NEVER means none."""


class CallGuard(Notes, Protocol):
    """The methods of a guard that a worker uses."""

    @property
    def is_watched(self) -> bool:
        """Whether a supervisor reads the notes, and kills a worker that gets no answer."""

    @property
    def interrupts(self) -> bool:
        """Whether a call that exceeds its timeout is interrupted even if it runs no query."""

    def start(self, seconds: float) -> None:
        """Raise HandlerTimeout after `seconds`, and repeatedly from then on, until `stop`."""

    def stop(self) -> None: ...


class OwnNotes:
    """Notes in the process's own memory: no supervisor reads them."""

    def __init__(self) -> None:
        self._called: tuple[tuple[int, int], ...] = ()

    def take_in_hand(self, *called: tuple[int, int]) -> None:
        self._called = called

    def put_down(self) -> None:
        self._called = ()

    def keep(self, *called: tuple[int, int]) -> None:
        pass

    def under_way(self) -> list[tuple[int, int]]:
        return list(self._called)

    def rest(self, seconds: float = NEVER) -> None:
        pass

    def lose_database(self) -> None:
        pass

    def tally(self, handled: int, failed: int) -> None:
        pass

    def identify(self, session: int) -> None:
        pass

    def in_hand(self) -> list[tuple[int, int]]:
        return list(self._called)

    def end_by(self, deadline: float) -> None:
        pass


class _Noting:
    """Has the methods of its notes as its own. Some run for each event: a call in between would cost."""

    def __init__(self, notes: SharedNotes | None = None) -> None:
        self.is_watched = notes is not None
        notes = OwnNotes() if notes is None else notes
        self.take_in_hand = notes.take_in_hand
        self.put_down = notes.put_down
        self.keep = notes.keep
        self.under_way = notes.under_way
        self.rest = notes.rest
        self.lose_database = notes.lose_database
        self.tally = notes.tally
        self.identify = notes.identify
        self.in_hand = notes.in_hand
        self._end_by = notes.end_by


class Unguarded(_Noting):
    """Interrupts no call: for threads, where no alarm rings, and for `drain()`."""

    interrupts = False

    def start(self, seconds: float) -> None:
        pass

    def stop(self) -> None:
        pass


class Guard(_Noting):
    """Interrupts calls by SIGALRM: only in a process's main thread, and between two steps of Python.

    It notes the deadline, too. So a supervisor can kill a process that takes no such step.
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
        self._armed = False  # first: an alarm may wait for Python's next step
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._end_by(NEVER)

    def _ring(self, *_: object) -> None:
        if self._armed:
            raise HandlerTimeout
