"""Looks for events without an ordering key: ready, due, and those of a worker's groups."""

import math

from spark_outbox.store import claiming
from spark_outbox.store.claiming import EARLIEST, Due
from spark_outbox.store.connection import run_query
from spark_outbox.store.reading import HIGHEST_ID, LOWEST_ID
from spark_outbox.store.scanning import PIECE
from spark_outbox.worker.context import Context
from spark_outbox.worker.looks import DUE, READY, Ask, Found, Handled, Look, RoundsLook, without

SWEEP_INTERVAL = 1.0
"""Seconds between two claims from the lowest id, at the most if they are cheap."""


class ReadyEvents(Look):
    """Ready events without order, of all groups, lowest id first.

    The index keeps entries of handled rows, below the first ready one, for as long as any snapshot is
    open. The *floor* skips them. A lower id can be committed later, or be freed by a worker that died.
    So now and then, and before it sleeps, the worker *sweeps* from the lowest id.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.floor = LOWEST_ID
        """The lowest id that can still be ready, as far as this worker knows."""
        self._sweep_at = -math.inf
        self._sweeps_often_at = -math.inf  # when another would take a tenth of the time
        self._waiting: int | None = None  # the lowest id that waits for room, below the floor
        self._was_full = False

    def begins(self) -> bool:
        return not self._was_full and claiming.can_begin(using=self._context.using)

    def claim(self, ask: Ask) -> dict[str, Found]:
        is_sweep = ask.now >= self._sweep_at
        floor = LOWEST_ID if is_sweep else self.floor
        limit = ask.limit + len(ask.without)  # these may come first, and take others' places
        claim = claiming.begin_with_ready if self.begins() else claiming.claim_ready
        rows = claim(floor, limit, first=ask.first, using=self._context.using)
        if is_sweep:
            now = self._context.clock()
            self._sweeps_often_at = now + 10 * (now - ask.now)
            self._sweep_at = max(now + SWEEP_INTERVAL, self._sweeps_often_at)
        self._was_full = len(rows) == limit
        rows = without(ask.without, rows)
        return {READY: Found(rows, ready=len(rows), is_full=self._was_full)}

    def learn(self, handled: Handled) -> None:
        if handled.events:
            self.floor = min(handled.events[-1].id + 1, HIGHEST_ID)
        for event in handled.events if handled.passed else ():
            if event.id in handled.passed:
                self._waiting = event.id if self._waiting is None else min(self._waiting, event.id)
                break

    def restart(self) -> None:
        super().restart()
        self._sweep_at = -math.inf

    def rest(self) -> None:
        if self._waiting is None:
            self._sweep_at = -math.inf

    def poll(self) -> None:
        if self._waiting is None:
            self._sweep_at = self._sweeps_often_at

    def make_room(self) -> None:
        if self._waiting is not None:
            self.floor = min(self.floor, self._waiting)
            self._waiting = None


class DueEvents(Look):
    """Delayed and failed events without order, of all groups, whose time has come: earliest first."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._after = EARLIEST  # the last one that waits for room

    def claim(self, ask: Ask) -> dict[str, Found]:
        self.look_at(ask.now + self._context.settings.COMMIT_INTERVAL)
        limit = due_share(ask.limit) + len(ask.without)
        rows = claiming.claim_due(limit, after=self._after, using=self._context.using)
        is_full = len(rows) == limit
        if not is_full:
            self._after = EARLIEST
        return {DUE: Found(without(ask.without, rows), is_full=is_full)}

    def learn(self, handled: Handled) -> None:
        for event in handled.events:
            if event.id in handled.passed:
                self._after = Due(str(event.available_at), event.id)

    def make_room(self) -> None:
        self._after = EARLIEST


class GroupEvents(RoundsLook):
    """Ready and due events without order, of the worker's groups."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, ordered=False)

    def claim(self, ask: Ask) -> dict[str, Found]:
        using = self._context.using
        if ask.first:
            run_query(ask.first, using=using)
        wanted = self._rounds.take(ask.limit)
        rows = claiming.claim_ids(wanted, using=using) if wanted else []
        if len(rows) < len(wanted):
            self._sort_out(wanted, {row.id for row in rows})
        self._rounds.drop(each for each in wanted if each in ask.without)
        rows = without(ask.without, rows)
        ready = [row for row in rows if row.available_at is None]
        due = [row for row in rows if row.available_at is not None]
        return {READY: Found(ready, ready=len(ready)), DUE: Found(due)}

    def _sort_out(self, wanted: list[int], locked: set[int]) -> None:
        """Hold those `wanted` that another transaction has locked; drop what is not ready any more."""
        known = [each for each in self._rounds.first(PIECE) if each not in locked]
        ready = claiming.still_ready(known, using=self._context.using)
        self._rounds.drop(each for each in known if each not in ready)
        self._rounds.hold(each for each in wanted if each in ready)

    def learn(self, handled: Handled) -> None:
        self._rounds.expect_more()
        self._rounds.drop(event.id for event in handled.events if event.id not in handled.passed)
        self._rounds.hold(event.id for event in handled.events if event.id in handled.passed)


def due_share(limit: int) -> int:
    """Return how many of a batch may be due events: most may wait a little longer."""
    return max(1, limit // 4)
