"""Prune events that have ended, as SPARK_OUTBOX["RETENTION"] says, in chunks that take milliseconds.

Each worker looks now and then whether there is something to prune. One is at it at a time, in the whole
database: others leave it alone until their next look. `spark_prune` does the same by hand.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from spark_outbox import conf
from spark_outbox.errors import describe
from spark_outbox.store import pruning
from spark_outbox.store.pruning import Holder, Pruned
from spark_outbox.store.reading import LOWEST_ID
from spark_outbox.worker.context import Context
from spark_outbox.worker.refusals import Refused, refusals
from spark_outbox.worker.tempo import POLL

logger = logging.getLogger(__name__)

FIRST_LOOK = (30.0, 90.0)
"""Seconds after its start within which a worker looks for the first time: not all of them at once."""

LOOK_INTERVAL = 600.0
"""Seconds between two looks of a worker."""

KEYS_INTERVAL = 86_400.0
"""Seconds between two passes of a worker over all keys, with KEYS_RETENTION."""

BUSY = 3
"""A worker with events to handle prunes for a quarter of the time; else for half of it."""

PATIENCE = 300.0
"""Seconds for which somebody may hold a snapshot. While one is older, to prune would bloat the table:
vacuum could not remove the old versions of its rows."""

MANY_XIDS = 1_000_000
"""The same for what has no age, in transactions: replication slots and standbys."""

HOLDER_INTERVAL = 10.0
"""Seconds between two looks for such a snapshot."""

KEYS_PIECE = 20
"""To look whether a key is old takes so much less time than to prune an event."""


NOTHING = Pruned(0, 0)


class Portion(NamedTuple):
    """Events to prune: those of a state and a group that ended so many seconds ago."""

    state: str
    group: str
    seconds: float


def due(retention: conf.Retention, *, using: str) -> list[Portion]:
    """Return what there is to prune."""
    return [
        Portion(ended.state, ended.group, seconds)
        for ended in pruning.oldest(retention.prunes, using=using)
        if (seconds := retention.seconds(ended.state, ended.group)) is not None and ended.age > seconds
    ]


def held_up(*, using: str) -> Holder | None:
    """Return who holds a snapshot for so long that pruning has to wait."""
    return pruning.oldest_snapshot(seconds=PATIENCE, xids=MANY_XIDS, using=using)


class Chunks:
    """Prunes chunk by chunk, each as large as `seconds` allow: smaller while the server is busy.

    The iterators yield what each chunk has done; or who holds it up, whenever they are asked while
    somebody does. They end if another process is at it, unless this one `insists`.
    """

    SMALLEST, LARGEST = 50, 10_000

    def __init__(
        self,
        *,
        seconds: float,
        using: str,
        clock: Callable[[], float] = time.monotonic,
        insists: bool = False,
    ) -> None:
        self._seconds = seconds
        self._using = using
        self._clock = clock
        self._insists = insists
        self._size = self.SMALLEST
        self._looks_at = clock()

    def prune(self, portion: Portion) -> Iterator[Pruned | Holder]:
        """Prune events of a state and group."""
        state, group, seconds = portion
        self._size, goes_on = self.SMALLEST, True
        while goes_on:
            yield from self._holders()
            most, start = self._size, self._clock()
            self._size = self.SMALLEST  # if this fails
            pruned = pruning.prune(state, group, seconds=seconds, most=most, using=self._using)
            if pruned is None and not self._insists:
                return
            done = pruned or NOTHING
            self._fit(most, done.total, start)
            yield done
            goes_on = pruned is None or pruned.total == most

    def forget_keys(self, seconds: float, *, after: int = LOWEST_ID) -> Iterator[Pruned | Holder]:
        """Delete the keys of pruned events that were emitted so many seconds ago."""
        reached: int | None = after
        self._size = self.SMALLEST
        while reached is not None:
            yield from self._holders()
            most, start = self._size, self._clock()
            self._size = self.SMALLEST
            found = pruning.forget_keys(
                reached, seconds=seconds, most=most * KEYS_PIECE, using=self._using
            )
            if found is None and not self._insists:
                return
            deleted, reached = found or (0, reached)
            self._fit(most, most, start)
            yield Pruned(0, deleted)

    def _holders(self) -> Iterator[Holder]:
        while self._clock() >= self._looks_at:
            if holder := held_up(using=self._using):
                yield holder
            else:
                self._looks_at = self._clock() + HOLDER_INTERVAL

    def _fit(self, size: int, done: int, start: float) -> None:
        """Fit the next chunk to the time that one has taken since `start`. A chunk that found less to do
        than it was allowed says nothing about larger ones."""
        share = (self._clock() - start) / self._seconds
        fitting = int(size * min(2.0, 1 / max(share, 0.01)))
        self._size = max(self.SMALLEST, min(self.LARGEST, fitting, 2 * done))


class Retention:
    """One worker's part in it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._chunks = Chunks(seconds=POLL, using=context.using, clock=context.clock)
        self._left: list[Iterator[Pruned | Holder]] | None = None
        """What is left of the pass that is under way."""
        self._count = 0
        self._next_at = context.clock() + random.uniform(*FIRST_LOOK)  # noqa: S311, no secret
        self._keys_at = self._next_at

    @property
    def due_in(self) -> float:
        """Seconds until the next `turn`."""
        return max(0.0, self._next_at - self._context.clock())

    def turn(self, *, is_busy: bool) -> None:
        """If it is time, look whether there is something to prune, or prune a chunk."""
        start = self._context.clock()
        if start < self._next_at:
            return
        self._next_at = start + LOOK_INTERVAL  # also after an outage
        left, self._left = self._left, None
        try:
            with refusals(using=self._context.using):
                if left is None:
                    left = self._begin()
                done = next(left[0], None) if left else None
        except Refused as refused:
            details: dict[str, object] = {"error": describe(refused.error)}
            logger.warning("Events can't be pruned (%(error)s).", details, extra=details)
            done = None
        if isinstance(done, Pruned):
            self._count += done.total
        elif left:
            left.pop(0)
        if isinstance(done, Holder) or not left:
            self._end(done)
            return
        self._left = left
        took = self._context.clock() - start
        self._next_at = start + took * (1 + (BUSY if is_busy else 1))

    def _begin(self) -> list[Iterator[Pruned | Holder]]:
        """Return what there is to do, one thing after the other: a refusal ends only one of them."""
        settings, now = self._context.settings, self._context.clock()
        left = [
            self._chunks.prune(portion) for portion in due(settings.RETENTION, using=self._context.using)
        ]
        if settings.KEYS_RETENTION is not None and now >= self._keys_at:
            left.append(self._chunks.forget_keys(settings.KEYS_RETENTION))
            self._keys_at = now + KEYS_INTERVAL
        return left

    def _end(self, done: Pruned | Holder | None) -> None:
        if isinstance(done, Holder):
            details: dict[str, object] = {"holder": done.who, "seconds": done.seconds}
            logger.warning(
                "Nothing is pruned: %(holder)s holds a snapshot, so that vacuum could not clean up.",
                details,
                extra=details,
            )
        if self._count:
            details = {"events": self._count}
            logger.info("Pruned %(events)s events.", details, extra=details)
        self._count = 0
