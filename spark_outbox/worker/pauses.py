"""What is paused by hand, and putting back what has waited for a pause that has ended.

An event that meets a pause is put aside with the mark of that pause: see 0001_pauses.sql.
`spark_resume` makes the first of those due. The others are put back here: also what a worker puts aside
after that, as it had read the pauses before, and what workers have left that are gone.
"""

import logging
import math
from collections.abc import Callable, Mapping

from spark_outbox.errors import describe
from spark_outbox.store import pausing
from spark_outbox.worker.refusals import Refused, refusals

logger = logging.getLogger(__name__)

READ_INTERVAL = 0.8
"""Seconds for which a worker relies on what it has read. A batch that has begun does not read again."""

PUT_BACK_INTERVAL = 60.0
"""Seconds between two looks for what others have left."""

PUT_BACK_CHUNK = 1000

Paused = Mapping[tuple[str, str], str]
"""The mark of each pause, by its kind, `handler` or `group`, and by the name."""


class Pauses:
    """The pauses of one database. Threads may share them."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._paused: Paused = {}
        self._heeded: Paused = {}  # since the last look; events may have been put aside for these
        self._read_at = self._put_back_at = -math.inf  # when to do it again

    @property
    def due_in(self) -> float:
        """Seconds until a sleeping worker has to `look`, and to put back what is due."""
        at = min(self._put_back_at, self._read_at if self._heeded else math.inf)
        return max(0.0, at - self._clock())

    def look(self, *, using: str) -> Paused:
        """Return what is paused, as it was within the last READ_INTERVAL.

        Call it outside of a batch's transaction. If the query fails, the next call repeats it. Threads
        that come here together each read: none waits for another's connection, and none relies on what
        nobody has read yet.
        """
        now = self._clock()
        if now < self._read_at:
            return self._paused
        paused = pausing.paused(using=using)
        if not self._heeded.items() <= paused.items():
            self._put_back_at = now
        self._heeded = self._paused = paused
        self._read_at = now + READ_INTERVAL
        return paused

    def were_heeded(self, paused: Paused) -> None:
        """After the commit of a batch that knew of these pauses: if one has ended meanwhile, look for
        what that has put aside."""
        if paused:
            self._heeded = {**self._heeded, **paused}

    def put_back_if_due(self, *, using: str) -> None:
        """Put back a chunk of what waits no more, if a pause has ended or it is time."""
        now, count = self._clock(), 0
        if now < self._put_back_at:
            return
        try:
            with refusals(using=using):
                for handler, mark in pausing.ended(using=using):
                    if (left := PUT_BACK_CHUNK - count) > 0:
                        count += pausing.put_back(handler, mark, limit=left, using=using)
        except Refused as refused:
            details: dict[str, object] = {"error": describe(refused.error)}
            logger.warning(
                "Events whose pause has ended can't be put back (%(error)s).", details, extra=details
            )
        if count:
            details = {"events": count}
            logger.info("Put back %(events)s events whose pause has ended.", details, extra=details)
        if count < PUT_BACK_CHUNK:
            self._put_back_at = now + PUT_BACK_INTERVAL
