"""End a handler that runs too long: by SIGALRM, so only in a process's main thread."""

import signal

from spark_outbox.outcomes import timed_out

AGAIN = 1.0
"""Seconds between further alarms, for a handler that catches the first."""


class Alarm:
    """Raises HandlerTimeout in the main thread, a number of seconds after `start`, until `stop`."""

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGALRM, self._ring)

    def start(self, seconds: float) -> None:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)

    def stop(self) -> None:
        self._armed = False  # first: one may have rung that Python has not told us of yet
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, *_: object) -> None:
        if self._armed:
            raise timed_out()
