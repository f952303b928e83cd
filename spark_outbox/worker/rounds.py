"""Where a worker looks for events among many that it can't handle: at what is new, and in rounds at all.

An index may hold any number of events of other groups, or that wait for others of their ordering key.
So each look reads a bounded *piece* of it. The *front* is where the last look at new events ended. A
*round* is a look at everything, piece by piece: it finds what has become possible behind the front
without our doing. Rounds cost a small share of the time.

Ids are not committed in their order. So a look at new events begins at the *safe* id, which no open
transaction can have gone below, rather than at the front.
"""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from spark_outbox import store
from spark_outbox.store import LOWEST_ID, Piece, Position

ROUND_INTERVAL = 1.0
"""Seconds between the beginnings of two rounds, at the least."""

ROUND_SHARE = 20
"""A round takes at most one part in so many of the time, unless it is of a single piece."""

HELD_INTERVAL = 0.25
"""Seconds between two looks at candidates that another transaction holds: its worker may have died."""

MAX_HELD = 1000

START = Position()


class Rounds:
    """Candidates: ids of events, or the ordering keys of `ordered` ones. Locks nothing."""

    def __init__(
        self, *, ordered: bool, groups: str | None, using: str, clock: Callable[[], float]
    ) -> None:
        self._ordered = ordered
        self._groups = groups
        self._using = using
        self._clock = clock
        self.start_over()

    def start_over(self) -> None:
        """Trust nothing but the table."""
        self._queue: dict[Any, None] = {}  # found, and not looked at closely since
        self._held: dict[Any, None] = {}  # another transaction holds them, or we can't handle them yet
        self._recall_at = -math.inf
        self._front: Position | None = None  # None until the first round is complete
        self._safe: int | None = LOWEST_ID  # None if too much lies between it and the front
        self._mark: tuple[int, int] | None = None  # an id, and the transaction that comes after it
        self._is_read = False  # all that is new is in the queue, or has been
        self._has_more = False  # the last look at new events did not come to their end
        self._round: Position | None = START  # how far the current round has come
        self._safe_after_round: int | None = None
        self._cost = 0.0
        self._is_short = True  # the last round was a single piece
        self._round_at = -math.inf  # when the next may begin
        self._is_wanted = False

    @property
    def goes_on(self) -> bool:
        """There is more to look at, now."""
        return bool(self._queue or self._round is not None or self._has_more)

    @property
    def held(self) -> bool:
        return bool(self._held)

    @property
    def round_in(self) -> float:
        """Seconds until a round may begin that was not to begin when the worker fell asleep."""
        return max(0.0, self._round_at - self._clock()) if self._is_wanted else math.inf

    def rest(self) -> None:
        """Before sleeping: begin a round; or, if that is too soon, some time later."""
        self._is_read = False
        self.recall()
        self._is_wanted = True
        if self._round is None and (self._is_short or self._clock() >= self._round_at):
            self._begin_round()

    def restart(self) -> None:
        """Begin a round now, whatever it costs."""
        self.rest()
        self._begin_round()

    def take(self, count: int) -> list[Any]:
        """Return up to `count` candidates; if there are fewer, after another look.

        They stay candidates, and come first, until the methods below say what became of them.
        """
        now = self._clock()
        if now >= self._recall_at:
            self.recall()
        if self._round is None and now >= self._round_at:
            self._begin_round()
        if len(self._queue) < count:
            self._look()
        return list(islice(self._queue, count))

    def first(self, count: int) -> list[Any]:
        """Return up to `count` candidates, without another look."""
        return list(islice(self._queue, count))

    def drop(self, candidates: Iterable[Any]) -> None:
        """There is nothing to do for them, or not any more."""
        for each in candidates:
            self._queue.pop(each, None)
            self._held.pop(each, None)

    def put_last(self, candidates: Iterable[Any]) -> None:
        """There may be more to do for them, after the others."""
        for each in candidates:
            self._queue.pop(each, None)
            self._queue[each] = None

    def hold(self, candidates: Iterable[Any]) -> None:
        """They can't be handled now: look again in a moment, or when told to `recall` them."""
        for each in candidates:
            self._queue.pop(each, None)
            if len(self._held) < MAX_HELD:
                self._held[each] = None
            else:
                self._is_wanted = True  # a round finds it again

    def recall(self) -> None:
        """Look again at what was held."""
        self._recall_at = self._clock() + HELD_INTERVAL
        self._queue |= self._held
        self._held = {}

    def expect_more(self) -> None:
        """Something was handled: by now there may be new events."""
        self._is_read = False

    def _begin_round(self) -> None:
        self._round = START
        self._cost = 0.0
        self._is_wanted = False

    def _look(self) -> None:
        if self._round is not None:
            self._go_round(self._round)
        if self._front is not None and not (self._is_read and self._queue):
            self._look_at_new(self._front)

    def _go_round(self, after: Position) -> None:
        started = self._clock()
        piece = self._read(after)
        now = self._clock()
        self._cost += now - started
        if after == START:
            self._safe_after_round = self._safe_by(piece)
        self._is_short = after == START and not piece.is_full
        if piece.is_full:
            self._add(piece)
            self._round = piece.end
            return
        self._round = None
        self._round_at = now + max(ROUND_INTERVAL, ROUND_SHARE * self._cost)
        self._advance(piece, self._safe_after_round)

    def _look_at_new(self, front: Position) -> None:
        safe = self._safe
        piece = self._read(front if safe is None else Position(safe, front.due))
        if safe is not None and piece.is_full and piece.end.id < front.id:
            self._safe = None  # the next round finds what is committed late
            piece = self._read(front)
        self._advance(piece, self._safe and self._safe_by(piece))

    def _read(self, after: Position) -> Piece:
        return store.read_piece(after, ordered=self._ordered, groups=self._groups, using=self._using)

    def _add(self, piece: Piece) -> None:
        for each in piece.candidates:
            self._queue.setdefault(each)

    def _safe_by(self, piece: Piece) -> int | None:
        """Return the id before which nothing can come that `piece`, or what follows, does not show."""
        if self._mark is None or piece.oldest < self._mark[1]:
            return None
        return self._mark[0]

    def _advance(self, piece: Piece, safe: int | None) -> None:
        """Note that everything up to the end of `piece` has been looked at."""
        front = (
            piece.end
            if self._front is None
            else piece.end._replace(id=max(piece.end.id, self._front.id))
        )
        self._front = front
        self._has_more = piece.is_full
        self._is_read = not piece.is_full
        self._add(piece)
        if safe is not None:
            self._safe, self._mark = safe, None
        if self._mark is None:
            self._mark = (front.id, piece.next)
