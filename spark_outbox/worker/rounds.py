"""Finds events among many that this worker can't handle: reads what is new, and everything in rounds.

An index may hold any number of events of other groups, or that wait for others of their ordering key.
So each look reads a bounded *piece* of it. The *front* is where the last look at new events ended. A
*round* is a look at everything, piece by piece. It finds events behind the front that others have made
possible. Rounds take a small share of the time.

Ids are not committed in their order. So a look at new events begins at the *safe* id, which no open
transaction can have gone below, rather than at the front. Nothing here locks a row.
"""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, NamedTuple

from spark_outbox.store.reading import LOWEST_ID
from spark_outbox.store.scanning import Piece, Position

ROUND_INTERVAL = 1.0
"""Seconds between the beginnings of two rounds, at the least."""

ROUND_SHARE = 20
"""A round takes at most one part in so many of the time, unless it is of a single piece."""

HELD_INTERVAL = 0.25
"""Seconds between two looks at candidates that another transaction holds: its worker may have died."""

MAX_HELD = 1000
"""How many held candidates are remembered. A round finds the others again."""

START = Position()

Read = Callable[[Position], Piece]


class Candidates:
    """Ids of events or ordering keys that may have something to do, first found first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._found: dict[Any, None] = {}
        self._held: dict[Any, None] = {}  # another transaction holds them, or there is no room for them
        self._recall_at = -math.inf

    def __len__(self) -> int:
        return len(self._found)

    @property
    def held(self) -> bool:
        return bool(self._held)

    def first(self, count: int) -> list[Any]:
        return list(islice(self._found, count))

    def add(self, candidates: Iterable[Any]) -> None:
        for each in candidates:
            self._found.setdefault(each)

    def put_last(self, candidates: Iterable[Any]) -> None:
        for each in candidates:
            self._found.pop(each, None)
            self._found[each] = None

    def drop(self, candidates: Iterable[Any]) -> None:
        for each in candidates:
            self._found.pop(each, None)
            self._held.pop(each, None)

    def hold(self, candidates: Iterable[Any]) -> bool:
        """Set these aside; return whether all of them could be remembered."""
        fits = True
        for each in candidates:
            self._found.pop(each, None)
            if len(self._held) < MAX_HELD:
                self._held[each] = None
            else:
                fits = False
        return fits

    def recall(self) -> None:
        """Put what was held behind the others."""
        self._recall_at = self._clock() + HELD_INTERVAL
        self._found |= self._held
        self._held = {}

    def recall_in_time(self, now: float) -> None:
        if now >= self._recall_at:
            self.recall()


class Round(NamedTuple):
    """How far a look at everything has come."""

    position: Position = START
    cost: float = 0.0
    """Seconds that its pieces took."""
    safe: int | None = None
    """An id that is safe once it is complete."""


class Front:
    """How far new events have been read. Begins where the first round ends."""

    def __init__(self, piece: Piece) -> None:
        self._end = piece.end
        self._safe: int | None = LOWEST_ID  # None if too much lies between it and the front
        # An id that becomes safe once no transaction is open that is older than this one.
        self._mark: tuple[int, int] | None = (piece.end.id, piece.next)
        self._has_more = False
        self._is_read = True

    @property
    def has_more(self) -> bool:
        """The last look at new events did not come to their end."""
        return self._has_more

    @property
    def is_read(self) -> bool:
        """All that is new has been found."""
        return self._is_read

    def expect_more(self) -> None:
        self._is_read = False

    def look(self, read: Read) -> Piece:
        """Read a piece of what is new."""
        safe = self._safe
        piece = read(self._end if safe is None else Position(safe, self._end.due))
        if safe is not None and piece.is_full and piece.end.id < self._end.id:
            self._safe = None  # the next round finds what is committed late
            piece = read(self._end)
        self.advance(piece, None if self._safe is None else self.safe_by(piece))
        return piece

    def safe_by(self, piece: Piece) -> int | None:
        """Return the id before which nothing can come that `piece`, or what follows, does not show."""
        if self._mark is None or piece.oldest < self._mark[1]:
            return None
        return self._mark[0]

    def advance(self, piece: Piece, safe: int | None) -> None:
        """Note that everything up to the end of `piece` has been read."""
        self._end = piece.end._replace(id=max(piece.end.id, self._end.id))
        self._has_more = piece.is_full
        self._is_read = not piece.is_full
        if safe is not None:
            self._safe, self._mark = safe, None
        if self._mark is None:
            self._mark = (self._end.id, piece.next)


class Rounds:
    """The candidates of one index, which `read` reads a piece of."""

    def __init__(self, read: Read, clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._candidates = Candidates(clock)
        self._front: Front | None = None  # until the first round is complete
        self._round: Round | None = Round()
        self._round_at = -math.inf  # when the next may begin
        self._is_short = True  # the last round was a single piece
        self._is_wanted = False

    @property
    def goes_on(self) -> bool:
        """There is more to look at, now."""
        has_more = self._front is not None and self._front.has_more
        return bool(self._candidates) or self._round is not None or has_more

    @property
    def held(self) -> bool:
        """Some candidates can't be handled now."""
        return self._candidates.held

    @property
    def round_in(self) -> float:
        """Seconds until a round may begin that was not to begin when the worker fell asleep."""
        return max(0.0, self._round_at - self._clock()) if self._is_wanted else math.inf

    def rest(self) -> None:
        """Before sleeping: begin a round; or, if that is too soon, some time later."""
        self.expect_more()
        self._candidates.recall()
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
        self._candidates.recall_in_time(now)
        if self._round is None and now >= self._round_at:
            self._begin_round()
        if len(self._candidates) < count:
            self._look()
        return self._candidates.first(count)

    def first(self, count: int) -> list[Any]:
        """Return up to `count` candidates, without another look."""
        return self._candidates.first(count)

    def drop(self, candidates: Iterable[Any]) -> None:
        """There is nothing to do for them, or not any more."""
        self._candidates.drop(candidates)

    def put_last(self, candidates: Iterable[Any]) -> None:
        """There may be more to do for them, after the others."""
        self._candidates.put_last(candidates)

    def hold(self, candidates: Iterable[Any]) -> None:
        """They can't be handled now: look again in a moment, or when told to `recall` them."""
        if not self._candidates.hold(candidates):
            self._is_wanted = True

    def recall(self) -> None:
        """Look again at what was held."""
        self._candidates.recall()

    def expect_more(self) -> None:
        """Something was handled: by now there may be new events."""
        if self._front is not None:
            self._front.expect_more()

    def _begin_round(self) -> None:
        self._round = Round()
        self._is_wanted = False

    def _look(self) -> None:
        if self._round is not None:
            self._go_round(self._round)
        if self._front is not None and not (self._candidates and self._front.is_read):
            self._candidates.add(self._front.look(self._read).candidates)

    def _go_round(self, current: Round) -> None:
        started = self._clock()
        piece = self._read(current.position)
        now = self._clock()
        self._candidates.add(piece.candidates)
        cost = current.cost + now - started
        is_first, safe = current.position == START, current.safe
        if is_first and self._front is not None:
            safe = self._front.safe_by(piece)
        if piece.is_full:
            self._round = Round(piece.end, cost, safe)
            return
        self._round = None
        self._round_at = now + max(ROUND_INTERVAL, ROUND_SHARE * cost)
        self._is_short = is_first
        if self._front is None:
            self._front = Front(piece)
        else:
            self._front.advance(piece, safe)
