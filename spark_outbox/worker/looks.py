"""One interface for each kind of events that a worker looks for: unordered.py and ordered.py have them.

A look locks events that can be handled now, and learns from what became of them. It decides nothing
about other kinds: claims.py says whose turn it is, and how many events a batch may have.
"""

import math
from collections.abc import Sequence, Set
from functools import partial
from typing import NamedTuple

from spark_outbox.events.event import Event, StoredRow
from spark_outbox.store import scanning
from spark_outbox.worker.context import Context
from spark_outbox.worker.rounds import Rounds

READY, DUE, ORDERED = "ready", "due", "ordered"


def kind_of(event: Event) -> str:
    if event.ordering_key is not None:
        return ORDERED
    return READY if event.available_at is None else DUE


class Ask(NamedTuple):
    """The terms of a claim."""

    limit: int
    now: float
    first: str
    """A query to run before the claim."""
    without: Set[int]
    """Ids of events that must not be claimed."""


class Found(NamedTuple):
    """Rows of one kind that a look has locked."""

    rows: list[StoredRow]
    ready: int = 0
    """How many are ready, rather than due or ordered."""
    is_full: bool = False
    """There may be more: the limit was reached."""


class Handled(NamedTuple):
    """The events of one look that a batch has handled."""

    events: Sequence[Event]
    passed: Set[int]
    """Ids of those that were left as they are, since there was no room for their calls."""
    unfinished: Set[str | None]
    """Ordering keys of which the batch has left events behind."""


class Look:
    """Looks for one kind of events. An object lasts as long as the connection."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._next_at = -math.inf

    def begins(self) -> bool:
        """Return whether the next claim, as the first of a batch, begins the transaction: then what runs
        before it is outside of that."""
        return False

    def claim(self, ask: Ask) -> dict[str, Found]:
        """Lock events that can be handled now; return them by their kinds."""
        raise NotImplementedError

    def learn(self, handled: Handled) -> None:
        """After the commit: note what became of events that `claim` has returned."""
        raise NotImplementedError

    def has_turn(self, now: float) -> bool:
        """Return whether a busy worker looks for these events again."""
        return now >= self._next_at

    def look_at(self, moment: float) -> None:
        """Give a busy worker's next turn a time."""
        self._next_at = moment

    def wait_until(self, moment: float) -> None:
        """Have no turn before `moment`."""
        self._next_at = max(self._next_at, moment)

    def restart(self) -> None:
        """Look at everything now, whatever it costs."""
        self._next_at = -math.inf

    def rest(self) -> None:
        """Before sleeping: look at everything, as far as that is cheap."""

    def poll(self) -> None:
        """Before looking again in a moment: look at everything, if that takes no more than a tenth of
        the time."""

    def make_room(self) -> None:
        """Look again at events that had to wait for room."""

    @property
    def goes_on(self) -> bool:
        """The last claim was not a look at everything."""
        return False

    @property
    def held(self) -> bool:
        """Events were seen that another transaction holds, or that wait for room."""
        return False

    @property
    def round_in(self) -> float:
        """Seconds after which a sleeping worker has to look at everything."""
        return math.inf


class RoundsLook(Look):
    """Looks for events among many that this worker can't handle, see rounds.py."""

    def __init__(self, context: Context, *, ordered: bool) -> None:
        super().__init__(context)
        read = partial(scanning.read_piece, ordered=ordered, groups=context.groups, using=context.using)
        self._rounds = Rounds(read, context.clock)

    def restart(self) -> None:
        super().restart()
        self._rounds.restart()

    def rest(self) -> None:
        self._rounds.rest()

    def make_room(self) -> None:
        self._rounds.recall()

    @property
    def goes_on(self) -> bool:
        return self._rounds.goes_on

    @property
    def held(self) -> bool:
        return self._rounds.held

    @property
    def round_in(self) -> float:
        return self._rounds.round_in


def without(ids: Set[int], rows: list[StoredRow]) -> list[StoredRow]:
    """Return the rows of other events than these."""
    return [row for row in rows if row[0] not in ids] if ids else rows
