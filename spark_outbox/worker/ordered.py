"""Looks for events that have an ordering key, and wakes who can go on with one."""

from collections.abc import Iterable

from spark_outbox.events.event import Event, StoredRow
from spark_outbox.store import ordering, waking
from spark_outbox.store.ordering import KEYS_AT_ONCE
from spark_outbox.worker.context import Context
from spark_outbox.worker.looks import ORDERED, Ask, Found, Handled, RoundsLook


class HandOver:
    """Wakes workers of other groups that can go on with an ordering key that this worker has held.

    They slept while the head was this worker's.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._ours: set[str] = set()  # keys claimed, and not looked at since

    def add(self, keys: Iterable[str]) -> None:
        self._ours.update(keys)

    def before_commit(self, events: Iterable[Event]) -> None:
        """Wake others for what comes after these events."""
        context = self._context
        if context.groups is None:
            return
        keys = dict.fromkeys(event.ordering_key for event in events if event.ordering_key is not None)
        if keys:
            ordering.hand_over(
                list(keys),
                failed=context.settings.FAILED_HEAD,
                groups=context.groups,
                using=context.using,
            )

    def after_look(self, keys: list[str], *, claimed: set[str], others: list[str]) -> None:
        """Wake others for heads that are theirs, and were emitted as we handled the one before."""
        if not self._ours.isdisjoint(others):
            self.wake()
        self._ours.difference_update(keys)
        if self._context.groups is not None:
            self._ours |= claimed

    def wake(self) -> None:
        waking.wake_others(using=self._context.using)


class OrderedEvents(RoundsLook):
    """Heads of ordering keys, and the events that follow them without a gap."""

    def __init__(self, context: Context, hand_over: HandOver) -> None:
        super().__init__(context, ordered=True)
        self._hand_over = hand_over
        self._whole: set[str] = set()  # keys of which the last claim has all that there is

    def claim(self, ask: Ask) -> dict[str, Found]:
        context = self._context
        keys = self._rounds.take(KEYS_AT_ONCE)
        rows = self._claim(keys, ask) if keys else []
        is_over = not rows and not self._rounds.held
        self.look_at(ask.now + (context.settings.COMMIT_INTERVAL if is_over else 0))
        return {ORDERED: Found(rows)}

    def _claim(self, keys: list[str], ask: Ask) -> list[StoredRow]:
        context = self._context
        ordered = ordering.claim_ordered(
            keys,
            ask.limit,
            failed=context.settings.FAILED_HEAD,
            groups=context.groups,
            using=context.using,
        )
        rows = ordered.rows
        if ask.without:  # with what must wait for it
            blocked = {row.ordering_key for row in rows if row.id in ask.without}
            rows = [row for row in rows if row.ordering_key not in blocked]
        claimed = {str(row.ordering_key) for row in rows}
        self._rounds.hold(ordered.held)
        self._rounds.drop(set(keys).difference(claimed, ordered.held, ordered.left))
        self._hand_over.after_look(keys, claimed=claimed, others=ordered.others)
        self._whole = ordered.whole if context.groups is None else set()
        return rows

    def learn(self, handled: Handled) -> None:
        keys = dict.fromkeys(str(event.ordering_key) for event in handled.events)
        passed = {event.ordering_key for event in handled.events if event.id in handled.passed}
        over = self._whole.difference(passed, handled.unfinished)
        self._rounds.expect_more()
        self._rounds.put_last(key for key in keys if key not in over and key not in passed)
        self._rounds.hold(key for key in keys if key in passed)
        self._rounds.drop(key for key in keys if key in over)

    def revisit(self, keys: list[str]) -> None:
        """Look at keys of which an event has just ended."""
        self._rounds.put_last(keys)
