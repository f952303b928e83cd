"""When a worker process has done enough, and another is to take its place."""

import math
import resource
import sys


class Quota:
    """About `max_events` events, or more than `max_rss` MiB of memory; None for no bound."""

    def __init__(self, max_events: int | None, max_rss: int | None) -> None:
        self._events_left = max_events or math.inf
        self._max_rss = max_rss

    def is_used_up(self, handled: int) -> bool:
        """Count `handled` events more; return whether the process has done enough."""
        self._events_left -= handled
        return self._events_left <= 0 or self._is_bloated()

    def _is_bloated(self) -> bool:
        if self._max_rss is None:
            return False
        unit = 1024 * 1024 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > self._max_rss * unit
