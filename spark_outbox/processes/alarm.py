"""End a handler that runs too long: by SIGALRM, so only in a process's main thread, and only between two
steps of Python. Of code that does not come to such, the supervisor takes care: it sees the deadline."""

import signal
import time

from spark_outbox.errors import HandlerTimeout
from spark_outbox.processes.supervisor import NEVER, Slot

AGAIN = 1.0
"""Seconds between further alarms, for a handler that catches the first."""


class Alarm:
    """Raises HandlerTimeout in the main thread, a number of seconds after `start`, until `stop`.

    It notes the deadline in `slot`, if there is a supervisor to read it.
    """

    def __init__(self, slot: Slot | None = None) -> None:
        self._armed = False
        self._slot = slot
        signal.signal(signal.SIGALRM, self._ring)

    def start(self, seconds: float) -> None:
        self._armed = True
        if self._slot is not None:
            self._slot.end_by(time.monotonic() + seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)

    def stop(self) -> None:
        self._armed = False  # first: one may have rung that Python has not told us of yet
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._slot is not None:
            self._slot.end_by(NEVER)

    def _ring(self, *_: object) -> None:
        if self._armed:
            raise HandlerTimeout
