"""Computes the delay before the next attempt. Pure."""

import datetime as dt
import random
from collections.abc import Callable, Sequence

MAX_DELAY = dt.timedelta(days=100 * 365)
"""The longest delay of an event: later times would exceed those that PostgreSQL can store."""

Seconds = float | dt.timedelta
Backoff = Seconds | Sequence[Seconds] | Callable[[int], Seconds]
"""The first delay, which doubles with each attempt; or a list of delays, the last of which repeats; or a
function of the attempt."""


def delay(
    attempt: int, backoff: Backoff = 1.0, *, longest: float = 3600.0, jitter: float | None = None
) -> float:
    """Return the seconds to wait after the failed `attempt` (1-based).

    Doubling delays grow up to `longest`. `jitter` (0 to 1, random by default) takes away up to half, so
    that events that failed together are not retried together. Delays of a list or a function are used
    unchanged.
    """
    if callable(backoff):
        return max(0.0, seconds(backoff(attempt)))
    if isinstance(backoff, Sequence):
        return seconds(backoff[min(attempt, len(backoff)) - 1])
    if jitter is None:
        jitter = random.random()  # noqa: S311, no secret
    full = min(longest, seconds(backoff) * 2.0 ** min(attempt - 1, 32))
    return full * (1 - jitter / 2)


def seconds(value: Seconds) -> float:
    """Return `value` in seconds. Raises TypeError for text and the like."""
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number of seconds.")
    return float(value)
