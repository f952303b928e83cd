"""How long to wait before the next attempt. Pure."""

import random

BASE = 1.0
CAP = 3600.0


def delay(attempt: int, *, jitter: float | None = None) -> float:
    """Return the seconds to wait after the failed `attempt` (1-based): 1, 2, 4 … 3600.

    `jitter` (0 to 1, random by default) takes away up to half of it, so that what failed together
    does not come back together.
    """
    if jitter is None:
        jitter = random.random()  # noqa: S311, no secret
    full: float = min(CAP, BASE * 2.0 ** min(attempt - 1, 32))
    return full * (1 - jitter / 2)
