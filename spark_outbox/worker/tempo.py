"""Whether a worker that has nothing to do polls for a while before it sleeps.

While a worker sleeps, each emit notifies, which costs the emitter. So if events come fast, it does not
sleep in between, but looks again every few milliseconds.
"""

import math
from collections.abc import Callable

FAST = 200.0
"""Events a second, from which on they come fast."""

MEMORY = 0.05
"""Seconds after which an event counts for about a third."""

POLL = 0.005
"""Seconds between two looks."""

_FEW = FAST * MEMORY


class Tempo:
    """How fast events come, as one worker sees it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent = 0.0  # how many events have come lately, those of long ago counting less
        self._noted_at = -math.inf

    def note(self, count: int) -> None:
        """Note that so many events were handled."""
        now = self._clock()
        elapsed = max(now - self._noted_at, 0 if count else POLL)
        faded = self._recent * math.exp(-elapsed / MEMORY)
        self._recent = min(faded + count, 2 * _FEW)  # after many at once it is soon quiet again
        self._noted_at = now

    @property
    def is_fast(self) -> bool:
        """As of the last note."""
        return self._recent >= _FEW
