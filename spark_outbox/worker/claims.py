"""Which rows a worker locks next, and how many: of ready, due and ordered events, each in their turn."""

import math
from collections.abc import Callable, Iterable

from spark_outbox import conf, store
from spark_outbox.events.event import Event, StoredRow
from spark_outbox.events.references import References
from spark_outbox.store import EARLIEST, KEYS_AT_ONCE, PIECE, Due
from spark_outbox.worker.outcome import Batch, Outcomes
from spark_outbox.worker.rounds import Rounds

SWEEP_INTERVAL = 1.0
"""Seconds between two claims from the lowest id, at the most if they are cheap."""

FIRST_SIZE = 16

READY, DUE, ORDERED = "ready", "due", "ordered"


def kind_of(event: Event) -> str:
    if event.ordering_key is not None:
        return ORDERED
    return READY if event.available_at is None else DUE


class Turns:
    """A batch begins with the kind of events whose turn is the longest ago.

    It may end after the first event, if that takes long: so none of them starves.
    """

    def __init__(self) -> None:
        self.order = [READY, DUE, ORDERED]

    def had_theirs(self, kinds: set[str]) -> None:
        self.order.sort(key=kinds.__contains__)


class Claims:
    """One worker's view of the queue; learns from each batch.

    Entries of handled rows stay in the index, below the first ready one, for as long as any
    snapshot is open; the *floor* skips them. A lower id can be committed later, or be freed by a
    worker that died: so now and then, and before it sleeps, the worker *sweeps* from the lowest id.

    Ordered events, and with `groups` the others too, are looked for as rounds.py says.
    """

    def __init__(
        self,
        *,
        using: str,
        groups: str | None,
        batch_size: int,
        commit_interval: float,
        clock: Callable[[], float],
        passed_over: set[int],
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
        self._order_at = -math.inf  # when a busy worker that found no ordered events looks again
        self._failed_head = conf.current().FAILED_HEAD
        self._passed_over = passed_over
        self._turns = Turns()
        self._keys = Rounds(ordered=True, groups=groups, using=using, clock=clock)
        self._whole: set[str] = set()  # keys of which the last claim has all that there is
        self._ours: set[str] = set()  # keys that we have claimed, and not looked at since
        self._rounds = [self._keys]
        self._ids: Rounds | None = None  # without groups all that is ready or due can be claimed
        if groups is not None:
            self._ids = Rounds(ordered=False, groups=groups, using=using, clock=clock)
            self._rounds.append(self._ids)
        self._waits_for_room = False  # something does: the two below say what, or the rounds
        self._passed: int | None = None  # the lowest ready id that waits for room, below the floor
        self._after_due = EARLIEST  # the last due event that waits for room
        self._is_full = False  # the last claim may have left some behind
        self._passes_on = False  # and nothing of it could be handled

    @property
    def careful(self) -> bool:
        """Events are handled one by one, after a commit that failed through one of them."""
        return self._one_by_one > 0

    @property
    def goes_on(self) -> bool:
        """The last look was not at everything: there may be something to do."""
        return self._passes_on or any(each.goes_on for each in self._rounds)

    @property
    def held(self) -> bool:
        """Events were seen that another transaction holds, or that wait for room."""
        return any(each.held for each in self._rounds)

    @property
    def round_in(self) -> float:
        """Seconds after which a sleeping worker has to look at everything."""
        return min(each.round_in for each in self._rounds)

    def next(self, references: References, *, sweep: bool, first: str = "") -> Batch:
        """Lock events that can be handled now; with `sweep`, wherever they are in the queue.

        `first` is a query to begin with.
        """
        self._passes_on = False
        if sweep:
            for each in self._rounds:
                each.restart()
        found = self._look(first, sweep=sweep)
        while sweep and not any(found.values()) and self.goes_on:
            found = self._look("", sweep=False)
        rows = [row for kind in self._turns.order for row in found[kind]]
        events = Event.from_rows(rows[: 1 if self.careful else None], references)
        retried = [event.id for event in events if event.attempt > 1]
        earlier = store.deliveries(retried, using=self.using) if retried else {}
        is_mixed = bool(found[DUE] or found[ORDERED])
        elsewhere = sum(kind_of(event) != READY for event in events) if is_mixed else 0
        batch = Batch(events, elsewhere=elsewhere, earlier=earlier)
        return batch.with_killers_alone() if earlier else batch

    def learn(self, batch: Batch, outcomes: Outcomes) -> None:
        """After the commit: move the floor, and fit the size to what was managed."""
        if self.careful:
            self._one_by_one -= 1
        elif outcomes.cut:
            self.size = max(1, min(outcomes.count, self.batch_size))
        elif outcomes.passed and outcomes.count:
            self.size = min(max(FIRST_SIZE, outcomes.count), self.batch_size)
        else:
            self.size = min(self.size * 2, self.batch_size)
        self._passes_on = self._is_full and not outcomes.count
        self._waits_for_room = self._waits_for_room or bool(outcomes.passed)
        reached = batch.events[: outcomes.reached]
        if not reached:
            return
        if self._ids is None and not (batch.elsewhere or outcomes.passed):
            self.floor = reached[-1].id + 1
            self._turns.had_theirs({READY})
            return
        by_kind: dict[str, list[Event]] = {READY: [], DUE: [], ORDERED: []}
        for event in reached:
            by_kind[kind_of(event)].append(event)
        self._turns.had_theirs({kind for kind, events in by_kind.items() if events})
        self._learn_ordered(by_kind[ORDERED], batch, outcomes)
        if self._ids is None:
            self._learn_unordered(by_kind[READY], by_kind[DUE], outcomes)
        else:
            self._learn_ids([*by_kind[READY], *by_kind[DUE]], self._ids, outcomes)

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
        self._passed, self._after_due = None, EARLIEST
        for each in self._rounds:
            each.start_over()

    def expect(self, due_in: float) -> None:
        """Look for due events in `due_in` seconds: that is when the next one's time comes."""
        self._due_at = self._clock() + min(due_in, SWEEP_INTERVAL)

    def hurry(self) -> None:
        """After a notification: what has just come first, and what has been waiting after it."""
        soon = self._clock() + self._commit_interval
        self._due_at = max(self._due_at, soon)
        self._order_at = max(self._order_at, soon)

    def rest(self) -> None:
        """Before sleeping: look at everything, until `goes_on` says that this is done.

        What would take too long is begun in `round_in` seconds.
        """
        if self._passed is None:
            self._sweep_at = -math.inf
        for each in self._rounds:
            each.rest()

    def make_room(self) -> None:
        """There is room again for what had to wait for it."""
        if not self._waits_for_room:
            return
        self._waits_for_room = False
        if self._passed is not None:
            self.floor = min(self.floor, self._passed)
        self._passed, self._after_due = None, EARLIEST
        for each in self._rounds:
            each.recall()

    def pass_by(self, batch: Batch) -> None:
        """Nothing of a batch can be handled until there is room: look at what comes after it."""
        ids = {event.id for event in batch.events}
        self.learn(batch, Outcomes(reached=len(ids), passed=ids))

    def revisit(self, keys: list[str]) -> None:
        """Look at ordering keys of which an event has just ended."""
        self._keys.put_last(keys)
        self._ours.update(keys)

    def hand_over(self, batch: Batch, outcomes: Outcomes) -> None:
        """Before the commit: wake workers of other groups that can go on with our ordering keys."""
        if self.groups is None or not batch.elsewhere:
            return
        events = batch.events[: outcomes.reached]
        keys = dict.fromkeys(e.ordering_key for e in events if e.ordering_key is not None)
        if keys:
            store.hand_over(list(keys), failed=self._failed_head, groups=self.groups, using=self.using)

    def leave(self) -> None:
        """Before stopping: wake workers that sleep if there is more to do of our ordering keys."""
        if self._keys.goes_on:
            store.wake_others(using=self.using)

    # To look

    def _look(self, first: str, *, sweep: bool) -> dict[str, list[StoredRow]]:
        """Lock what is found, up to the size of a batch of each kind."""
        started = self._clock()
        limit = 1 if self.careful else self.size
        over = len(self._passed_over)  # these may come first, and take others' places
        if self._ids is not None:
            found = self._claim_ids(self._ids, limit, first)
        else:
            sweeping = sweep or started >= self._sweep_at
            found = {READY: self._claim_ready(started, limit + over, first, sweeping=sweeping), DUE: []}
            share = due_share(limit) + over
            if sweep or not found[READY] or started >= self._due_at:
                found[DUE] = self._claim_due(started, share)
            self._is_full = len(found[READY]) == limit + over or len(found[DUE]) == share
        found[ORDERED] = []
        if sweep or not found[READY] or started >= self._order_at:
            found[ORDERED] = self._claim_ordered(limit)
            more = found[ORDERED] or self._keys.held
            self._order_at = started + (0 if more else self._commit_interval)
        if self._passed_over:
            for kind in (READY, DUE):
                found[kind] = [row for row in found[kind] if row[0] not in self._passed_over]
        return found

    def _claim_ready(self, started: float, limit: int, first: str, *, sweeping: bool) -> list[StoredRow]:
        floor = store.LOWEST_ID if sweeping else self.floor
        rows = store.claim_ready(floor, limit, first=first, using=self.using)
        if sweeping:
            now = self._clock()
            self._sweep_at = now + max(SWEEP_INTERVAL, 10 * (now - started))
        return rows

    def _claim_due(self, started: float, limit: int) -> list[StoredRow]:
        self._due_at = started + self._commit_interval
        rows = store.claim_due(limit, after=self._after_due, using=self.using)
        if len(rows) < limit:
            self._after_due = EARLIEST
        return rows

    def _claim_ids(self, ids: Rounds, limit: int, first: str) -> dict[str, list[StoredRow]]:
        if first:
            store.run_query(first, using=self.using)
        wanted = ids.take(limit)
        rows = store.claim_ids(wanted, using=self.using) if wanted else []
        if len(rows) < len(wanted):
            locked = {row.id for row in rows}
            known = [each for each in ids.first(PIECE) if each not in locked]
            ready = store.still_ready(known, using=self.using)
            ids.drop(each for each in known if each not in ready)
            ids.hold(each for each in wanted if each in ready)
        ids.drop(self._passed_over.intersection(wanted))
        found: dict[str, list[StoredRow]] = {READY: [], DUE: []}
        for row in rows:
            found[READY if row.available_at is None else DUE].append(row)
        self._is_full = False
        return found

    def _claim_ordered(self, limit: int) -> list[StoredRow]:
        keys = self._keys.take(KEYS_AT_ONCE)
        if not keys:
            return []
        ordered = store.claim_ordered(
            keys, limit, failed=self._failed_head, groups=self.groups, using=self.using
        )
        if not self._ours.isdisjoint(ordered.others):
            store.wake_others(using=self.using)  # it was emitted as we handled the one before
        rows = ordered.rows
        if self._passed_over:  # with what must wait for it
            blocked = {row.ordering_key for row in rows if row.id in self._passed_over}
            rows = [row for row in rows if row.ordering_key not in blocked]
        claimed = {str(row.ordering_key) for row in rows}
        self._keys.hold(ordered.held)
        self._keys.drop(set(keys).difference(claimed, ordered.held, ordered.left))
        self._ours = self._ours.difference(keys) | (claimed if self.groups is not None else set())
        self._whole = ordered.whole if self.groups is None else set()
        return rows

    # To learn

    def _learn_ordered(self, reached: list[Event], batch: Batch, outcomes: Outcomes) -> None:
        keys = dict.fromkeys(str(event.ordering_key) for event in reached)
        passed = {event.ordering_key for event in reached if event.id in outcomes.passed}
        unfinished = {event.ordering_key for event in batch.events[outcomes.reached :]}
        over = self._whole.difference(passed, unfinished, outcomes.blocked)
        self._keys.expect_more()
        self._keys.put_last(key for key in keys if key not in over and key not in passed)
        self._keys.hold(key for key in keys if key in passed)
        self._keys.drop(key for key in keys if key in over)

    def _learn_unordered(self, ready: list[Event], due: list[Event], outcomes: Outcomes) -> None:
        if ready:
            self.floor = ready[-1].id + 1
        for event in ready:
            if event.id in outcomes.passed:
                self._passed = event.id if self._passed is None else min(self._passed, event.id)
                break
        for event in due:
            if event.id in outcomes.passed:
                self._after_due = Due(str(event.available_at), event.id)

    def _learn_ids(self, reached: list[Event], ids: Rounds, outcomes: Outcomes) -> None:
        ids.expect_more()
        ids.drop(event.id for event in reached if event.id not in outcomes.passed)
        ids.hold(event.id for event in reached if event.id in outcomes.passed)


def due_share(limit: int) -> int:
    """Return how many of a batch may be due events: most may wait a little longer."""
    return max(1, limit // 4)
