"""Which rows a worker locks next, and how many: of ready, due and ordered events, each in their turn."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

from spark_outbox.events.event import Event
from spark_outbox.events.references import References
from spark_outbox.store import settling
from spark_outbox.store.settling import Stored
from spark_outbox.worker.batch import Batch, known_deliveries
from spark_outbox.worker.context import Context
from spark_outbox.worker.looks import DUE, ORDERED, READY, Ask, Found, Handled, Look, kind_of
from spark_outbox.worker.ordered import HandOver, OrderedEvents
from spark_outbox.worker.unordered import SWEEP_INTERVAL, DueEvents, GroupEvents, ReadyEvents

FIRST_SIZE = 16


class Turns:
    """A batch begins with the kind of events whose turn is the longest ago.

    It may end after the first event, if that takes long: so none of them starves.
    """

    def __init__(self) -> None:
        self._order = [READY, DUE, ORDERED]

    def merge(self, found: Mapping[str, Found]) -> Found:
        """Return what all kinds have found, in the order of their turns."""
        parts = [found[kind] for kind in self._order if kind in found]
        if len(parts) == 1:
            return parts[0]
        return Found(
            [row for part in parts for row in part.rows],
            ready=sum(part.ready for part in parts),
            is_full=any(part.is_full for part in parts),
        )

    def had_theirs(self, kinds: Container[str]) -> None:
        self._order.sort(key=kinds.__contains__)


class BatchSize:
    """As many events as a worker manages in a commit interval; or one, after something went wrong."""

    def __init__(self, most: int) -> None:
        self.fitting = min(FIRST_SIZE, most)
        """As many as the last commit intervals managed."""
        self._most = most
        self._alone = 0  # how many batches are to have a single event

    @property
    def careful(self) -> bool:
        return self._alone > 0

    @property
    def limit(self) -> int:
        return 1 if self.careful else self.fitting

    def doubt(self, count: int) -> None:
        """Let the next `count` events be claimed one by one."""
        self._alone = max(1, count)

    def look_closely(self) -> None:
        """Let as many events be claimed one by one as any batch can have."""
        self._alone = max(self._alone, self._most)

    def learn(self, batch: Batch) -> None:
        """Fit the size to what a batch managed."""
        if self.careful:
            self._alone -= 1
        elif batch.cut:
            self.fitting = max(1, min(batch.count, self._most))
        elif batch.passed and batch.count:
            self.fitting = min(max(FIRST_SIZE, batch.count), self._most)
        else:
            self.fitting = min(self.fitting * 2, self._most)


class Claims:
    """One worker's view of the outbox; learns from each batch.

    Without `groups` all ready and due events can be claimed. With `groups`, and for ordered events, the
    worker looks for those that it can handle: see rounds.py.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self.size = BatchSize(context.settings.BATCH_SIZE)
        self._turns = Turns()
        self._hand_over = HandOver(self._context)
        self._passed_over = context.experience.passed_over
        self.defers = False
        """The last due events were left to workers of a newer release, which have their handlers."""
        self._hurries = False
        self._waits_for_room = False
        self._left_some = False  # the last batch may have, and nothing of it could be handled
        self._was_whole = False  # the last batch had all that its look was for, and is handled
        self.start_over()

    def start_over(self) -> None:
        """Trust nothing but the table: after the connection was lost."""
        context = self._context
        self._ordered = OrderedEvents(context, self._hand_over)
        self.looks: dict[str, Look] = (
            {READY: ReadyEvents(context), DUE: DueEvents(context), ORDERED: self._ordered}
            if context.groups is None
            else {READY: GroupEvents(context), ORDERED: self._ordered}  # the first claims due ones
        )

    # Where it stands

    @property
    def careful(self) -> bool:
        """Events are handled one by one, after a commit that failed through one of them."""
        return self.size.careful

    @property
    def goes_on(self) -> bool:
        """The last look was not at everything: there may be something to do."""
        return self._left_some or any(look.goes_on for look in self.looks.values())

    @property
    def expects_more(self) -> bool:
        """The next claim is likely to find events."""
        return self.goes_on or not self._was_whole

    @property
    def held(self) -> bool:
        """Events were seen that another transaction holds, or that wait for room."""
        return any(look.held for look in self.looks.values())

    @property
    def round_in(self) -> float:
        """Seconds after which a sleeping worker has to look at everything."""
        return min(look.round_in for look in self.looks.values())

    def can_follow(self) -> bool:
        """Return whether the next claim begins the transaction of its batch, so that statements can go
        ahead of it in its round trip."""
        return self.looks[READY].begins()

    # A batch

    def next(self, references: References, *, sweep: bool, first: str = "") -> Batch:
        """Lock events that can be handled now; with `sweep`, wherever they are in the outbox.

        `first` is a query to begin with.
        """
        self._left_some = False
        if sweep:
            for look in self.looks.values():
                look.restart()
        found = self._look(first)
        while sweep and not found.rows and self.goes_on:
            found = self._look()
        self._left_some = found.is_full
        self._was_whole = not found.rows or not (found.is_full or self.careful)
        events = Event.from_rows(found.rows[: 1 if self.careful else None], references)
        retried = [event for event in events if event.attempt > 1]
        stored = self._stored(retried) if retried else {}
        is_mixed = found.ready < len(found.rows)
        elsewhere = sum(kind_of(event) != READY for event in events) if is_mixed else 0
        batch = Batch(events, elsewhere=elsewhere, stored=stored)
        return batch.with_killers_alone() if stored else batch

    def _stored(self, events: Sequence[Event]) -> dict[int, dict[str, Stored]]:
        """Return the deliveries of events that were tried before."""
        found = settling.deliveries([event.id for event in events], using=self._context.using)
        handlers_for = self._context.registry.handlers_for
        return {
            event.id: known_deliveries(found[event.id], handlers_for(event.group))
            for event in events
            if event.id in found
        }

    def _look(self, first: str = "") -> Found:
        """Lock events, up to the size of a batch of each kind that has its turn."""
        ask = Ask(self.size.limit, self._context.clock(), first, self._passed_over)
        found: dict[str, Found] = {}
        is_busy, self._hurries = self._hurries, False
        for kind, look in self.looks.items():
            if kind == READY or not is_busy or look.has_turn(ask.now):
                found |= look.claim(ask)
                is_busy = is_busy or found[READY].ready > 0
        return self._turns.merge(found)

    def learn(self, batch: Batch) -> None:
        """After the commit: fit the size, and note for each kind of events what became of them."""
        self.size.learn(batch)
        self._was_whole = self._was_whole and batch.reached == len(batch.events)
        self._left_some = self._left_some and not batch.count
        if batch.elsewhere:
            self.defers = batch.leaves_to_others
        self._waits_for_room = self._waits_for_room or bool(batch.passed)
        reached = batch.events[: batch.reached]
        if not reached:
            return
        if not batch.elsewhere:
            self._turns.had_theirs({READY})
            self.looks[READY].learn(Handled(reached, batch.passed, set()))
            return
        kinds: set[str] = set()
        shares: dict[str, list[Event]] = {kind: [] for kind in self.looks}
        for event in reached:
            kind = kind_of(event)
            kinds.add(kind)
            shares[kind if kind in shares else READY].append(event)
        self._turns.had_theirs(kinds)
        unfinished = {event.ordering_key for event in batch.events[batch.reached :]}
        for kind, events in shares.items():
            look = self.looks[kind]
            look.learn(Handled(events, batch.passed, unfinished | batch.blocked))

    def pass_by(self, batch: Batch) -> None:
        """Nothing of a batch can be handled until there is room: look at what comes after it."""
        ids = {event.id for event in batch.events}
        self.learn(replace(batch, reached=len(ids), passed=ids))

    def make_room(self) -> None:
        """There is room again for what had to wait for it."""
        if self._waits_for_room:
            self._waits_for_room = False
            for look in self.looks.values():
                look.make_room()

    # When something went wrong

    def doubt(self, batch: Batch) -> None:
        """After a commit that failed: claim the same events again, and only one at a time."""
        self.size.doubt(len(batch.events))

    def look_closely(self) -> None:
        """After the unclean end of a worker: one by one, as many as that can have claimed."""
        self.size.look_closely()

    def pass_over(self, event_ids: Iterable[int]) -> None:
        """Claim these no more: PostgreSQL refuses to change their rows, to whatever end."""
        self._passed_over.update(event_ids)

    # When to look

    def expect(self, due_in: float) -> None:
        """Look for due events in `due_in` seconds: that is when the next one's time comes."""
        if DUE in self.looks:
            self.looks[DUE].look_at(self._context.clock() + min(due_in, SWEEP_INTERVAL))

    def hurry(self) -> None:
        """After a notification: what has just come first, and what has been waiting after it.

        The next look is for ready events alone: if another worker was quicker, that is all.
        """
        self._hurries = True
        soon = self._context.clock() + self._context.settings.COMMIT_INTERVAL
        for look in self.looks.values():
            look.wait_until(soon)

    def rest(self) -> None:
        """Before sleeping: look at everything, until `goes_on` says that this is done.

        A look that would take too long begins in `round_in` seconds.
        """
        for look in self.looks.values():
            look.rest()

    def poll(self) -> None:
        """Before looking again in a moment: a lower id may have been committed than those that were
        handled."""
        for look in self.looks.values():
            look.poll()

    # Ordering keys, and who goes on with them

    def revisit(self, keys: list[str]) -> None:
        """Look at ordering keys of which an event has just ended."""
        self._ordered.revisit(keys)
        self._hand_over.add(keys)

    def hand_over(self, batch: Batch) -> None:
        """Before the commit: wake workers of other groups that can go on with our ordering keys."""
        if batch.elsewhere:
            self._hand_over.before_commit(batch.events[: batch.reached])

    def leave(self) -> None:
        """Before stopping: wake workers that sleep if there is more to do of our ordering keys."""
        if self._ordered.goes_on:
            self._hand_over.wake()
