"""Which rows a worker locks next, and how many: the floor, the sweep, and what is due."""

import math
from collections.abc import Callable, Iterable

from spark_outbox import conf, store
from spark_outbox.events import Event, StoredRow
from spark_outbox.outcomes import Batch, Outcomes
from spark_outbox.references import References

SWEEP_INTERVAL = 1.0
"""Seconds between two claims from the lowest id, at the most if they are cheap."""

FIRST_SIZE = 16


class Claims:
    """One worker's view of the queue; learns from each batch.

    Entries of handled rows stay in the index, below the first ready one, for as long as any
    snapshot is open; the *floor* skips them. A lower id can be committed later, or be freed by a
    worker that died: so now and then, and before it sleeps, the worker *sweeps* from the lowest id.
    """

    def __init__(
        self,
        *,
        using: str,
        groups: str | None,
        batch_size: int,
        commit_interval: float,
        clock: Callable[[], float],
    ) -> None:
        self.using = using
        self.groups = groups
        self.batch_size = batch_size
        self.size = min(FIRST_SIZE, batch_size)  # what the last commit intervals managed
        self.floor = (
            store.LOWEST_ID
        )  # the lowest id that can still be ready, as far as this worker knows
        self._commit_interval = commit_interval
        self._clock = clock
        self._one_by_one = 0
        self._sweep_at = -math.inf
        self._due_at = -math.inf  # when a busy worker looks for due events again
        self._looked_for_due = False
        self._order_at = -math.inf  # when a busy worker that found no ordered events looks again
        self._looked_for_ordered = False
        self._after_key = ""  # the ordering key after which to look next
        self._failed_head = conf.current().FAILED_HEAD
        self._passed_over: set[int] = set()
        self.held = False  # heads of ordering keys that another transaction holds were seen

    @property
    def careful(self) -> bool:
        """Events are handled one by one, after a commit that failed through one of them."""
        return self._one_by_one > 0

    def next(self, references: References, *, sweep: bool, first: str = "") -> Batch:
        """Lock events that can be handled now; with `sweep`, wherever they are in the queue.

        `first` is a query to begin with.
        """
        started = self._clock()
        limit = (1 if self.careful else self.size) + len(self._passed_over)
        sweeping = sweep or started >= self._sweep_at
        ready = self._claim_ready(started, limit, first, sweeping=sweeping)
        # Not twice in a row: a backlog of due events must leave slow handlers time for ready ones.
        everywhere = sweep or not ready
        self._looked_for_due = everywhere or (started >= self._due_at and not self._looked_for_due)
        due = self._claim_due(started, limit) if self._looked_for_due else []
        # Nor this: a hot ordering key must leave others their time.
        self._looked_for_ordered = everywhere or (
            started >= self._order_at and not self._looked_for_ordered
        )
        ordered = self._claim_ordered(limit, all_keys=sweep) if self._looked_for_ordered else []
        if self._looked_for_ordered:
            self._order_at = started + (0 if ordered or self.held else self._commit_interval)
        if self._passed_over:
            due, ordered, ready = map(self._but_passed_over, (due, ordered, ready))
        rows = (due + ordered + ready)[: 1 if self.careful else None]
        events = Event.from_rows(rows, references)
        retried = [event.id for event in events if event.attempt > 1]
        earlier = store.deliveries(retried, using=self.using) if retried else {}
        batch = Batch(events, elsewhere=len(due) + len(ordered), earlier=earlier)
        return batch.with_killers_alone() if earlier else batch

    def learn(self, batch: Batch, outcomes: Outcomes) -> None:
        """After the commit: move the floor, and fit the size to what was managed."""
        if self.careful:
            self._one_by_one -= 1
        elif outcomes.cut:
            self.size = max(1, min(outcomes.count, self.batch_size))
        else:
            self.size = min(self.size * 2, self.batch_size)
        handled_ready = batch.events[batch.elsewhere : outcomes.reached]
        if handled_ready:
            self.floor = handled_ready[-1].id + 1

    def doubt(self, batch: Batch) -> None:
        """After a commit that failed: claim the same events again, and only one at a time."""
        self._one_by_one = max(1, len(batch.events))

    def look_closely(self) -> None:
        """After the unclean end of a worker: one by one, as many as that can have claimed."""
        self._one_by_one = max(self._one_by_one, self.batch_size)

    def pass_over(self, event_ids: Iterable[int]) -> None:
        """Claim these no more: PostgreSQL refuses to change their rows, to whatever end."""
        self._passed_over.update(event_ids)

    def start_over(self) -> None:
        """Trust nothing but the table: after the connection was lost."""
        self.floor = store.LOWEST_ID
        self._sweep_at = self._due_at = -math.inf

    def expect(self, due_in: float) -> None:
        """Look for due events in `due_in` seconds: that is when the next one's time comes."""
        self._due_at = self._clock() + min(due_in, SWEEP_INTERVAL)

    def hurry(self) -> None:
        """After a notification: what has just come first, and what has been waiting after it."""
        soon = self._clock() + self._commit_interval
        self._due_at = max(self._due_at, soon)
        self._order_at = max(self._order_at, soon)

    def _but_passed_over(self, rows: list[StoredRow]) -> list[StoredRow]:
        """Return `rows` without what is passed over, and without what must wait for it."""
        blocked = {row[5] for row in rows if row[0] in self._passed_over} - {None}
        return [row for row in rows if row[0] not in self._passed_over and row[5] not in blocked]

    def _claim_ready(self, started: float, limit: int, first: str, *, sweeping: bool) -> list[StoredRow]:
        floor = store.LOWEST_ID if sweeping else self.floor
        rows = store.claim_ready(floor, limit, groups=self.groups, first=first, using=self.using)
        if sweeping:
            now = self._clock()
            self._sweep_at = now + max(SWEEP_INTERVAL, 10 * (now - started))
        return rows

    def _claim_ordered(self, limit: int, *, all_keys: bool) -> list[StoredRow]:
        """Go on where the last look ended; with `all_keys`, look until something is found."""
        if all_keys:
            self._after_key = ""
        while True:
            ordered = store.claim_ordered(
                self._after_key,
                limit,
                failed=self._failed_head,
                groups=self.groups,
                using=self.using,
            )
            self.held = ordered.held
            self._after_key = ordered.after
            if ordered.rows or not (all_keys and ordered.after):
                return ordered.rows

    def _claim_due(self, started: float, limit: int) -> list[StoredRow]:
        self._due_at = started + self._commit_interval
        return store.claim_due(max(1, limit // 4), groups=self.groups, using=self.using)
