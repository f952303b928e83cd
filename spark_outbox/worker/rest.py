"""When a worker that has nothing to do looks again, and why. Reads no clock and asks no database."""

import math
from typing import NamedTuple

from spark_outbox.store.resting import Outlook
from spark_outbox.worker.rounds import HELD_INTERVAL
from spark_outbox.worker.running import TAKE_OVER_INTERVAL

DEFERENCE = 0.5
"""After leaving retries to a newer release, wait this long before claiming due events, so that its
workers come first."""


class NextLook(NamedTuple):
    seconds: float
    reason: str


def next_look(
    outlook: Outlook,
    *,
    poll_interval: float,
    pause: float,
    held: bool,
    round_in: float,
    defers: bool,
    retention_in: float,
    pauses_in: float,
) -> NextLook:
    """Return the first reason to look again, and the seconds until then.

    `pause` is how long a sleep is safe, see wake.py; `round_in`, when a round may begin, see rounds.py;
    `retention_in`, when there may be something to prune, see retention.py; `pauses_in`, when to see what
    is paused, see pauses.py.
    """
    reasons = {
        "poll": poll_interval,
        "emit under way": pause,
        "due": outlook.due_in + (DEFERENCE if defers else 0),
        "held": HELD_INTERVAL if held else math.inf,
        "running": TAKE_OVER_INTERVAL if outlook.running else math.inf,
        "round": round_in,
        "retention": retention_in,
        "pauses": pauses_in,
    }
    reason = min(reasons, key=reasons.__getitem__)
    return NextLook(reasons[reason], reason)
