"""The circuit breakers: leave alone for a while a handler that fails on everything. Pure.

A handler that fails on some events is no reason to keep the others waiting. So only the first attempt at
an event says something about the handler; a retry that fails says that its event still fails.

Each handler has two circuits: `new`, for events that it is to be called with for the first time, and
`rest`, for those that have waited for a circuit, and for retries. Both are closed at first.

- A first attempt that fails counts for `rest`, and for `new` as well if the event was new. After
  `threshold` different events in a row a circuit opens.
- Any call that succeeds closes both, and the counts begin again.
- While `rest` is open, events wait, and burn no attempt. One at a time is called as the probe.
- New events go on while `new` is closed. If it is open, too, one may be the probe after half a second,
  and after each that fails in twice the time. They come first: all of those that wait may be bad.
- An event that waits and was never called may be the probe at the end of a pause: of 5 s at first, and
  twice as long after each that fails. Both pauses grow up to 5 minutes.
- One retry a pause is called as well, since there may be nothing else to show that the handler works
  again. If it fails, no pause grows.
- An event that a person has made ready is called at once, but only one a second: a long queue of them
  must not burn an attempt of each. If it fails, no pause grows.
- `Retry`, `Discard` and hopeless payloads are neither failures of the handler nor successes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

NEW_PAUSE = 0.5
FIRST_PAUSE = 5.0
LONGEST_PAUSE = 300.0
BY_HAND_PAUSE = 1.0


Turn = Literal["new", "untried", "retry"]
"""Where an event stands with a handler: to be called for the first time; kept waiting by a circuit, and
never called; or failed at least once."""


@dataclass(eq=False, slots=True)
class _Slot:
    """A place through which one event at a time passes an open circuit."""

    until: float = 0.0
    """When the next one may pass."""


@dataclass(eq=False, slots=True)
class _Circuit(_Slot):
    first_pause: float = FIRST_PAUSE
    pause: float = 0.0
    """0 while the circuit is closed."""
    failed: set[int] = field(default_factory=set)
    """Events whose first attempt failed since the handler last succeeded."""

    def count(self, event_id: int, threshold: int, now: float) -> float:
        """Count a failure; return the pause if this opens the circuit, or 0."""
        if self.pause:  # it was called before the circuit opened
            return 0.0
        self.failed.add(event_id)
        return self.lengthen(now) if len(self.failed) >= threshold else 0.0

    def lengthen(self, now: float) -> float:
        """Open the circuit, or keep it open for twice as long; return the pause."""
        self.failed.clear()
        self.pause = min(LONGEST_PAUSE, self.pause * 2 or self.first_pause)
        self.until = now + self.pause
        return self.pause


@dataclass(slots=True)
class _Handler:
    new: _Circuit = field(default_factory=lambda: _Circuit(first_pause=NEW_PAUSE))
    rest: _Circuit = field(default_factory=_Circuit)
    retries: _Slot = field(default_factory=_Slot)
    by_hand: _Slot = field(default_factory=_Slot)
    probes: dict[int, _Circuit] = field(default_factory=dict)
    """By event, the circuit whose pause grows if it fails."""

    def let_pass(self, event_id: int, turn: Turn, *, by_hand: bool, now: float) -> float:
        """Return the seconds for which an event has to wait; 0 if it takes a slot."""
        slots: dict[_Slot, float] = {self.by_hand: BY_HAND_PAUSE} if by_hand else {}
        if turn == "new":
            slots[self.new] = self.new.pause
        if turn == "retry":
            slots[self.retries] = self.rest.pause
        else:
            slots[self.rest] = FIRST_PAUSE
        wait = 0.0
        for slot, pause in slots.items():
            wait = slot.until - now
            if wait <= 0:
                slot.until = now + pause
                if isinstance(slot, _Circuit):
                    self.probes[event_id] = slot
                return 0.0
        return wait


class Breakers:
    """One worker's, for all of its handlers, by name. Threads may share them.

    `threshold` is the number of events in a row after which a circuit opens; None for never.
    """

    def __init__(self, threshold: int | None, clock: Callable[[], float]) -> None:
        self._threshold = threshold
        self._clock = clock
        self._lock = Lock()
        self._handlers: dict[str, _Handler] = {}
        self.any = False
        """Whether something has failed lately. If not, neither `remaining` nor `succeeded` need be
        called."""

    def remaining(self, name: str, event_id: int, turn: Turn, *, by_hand: bool = False) -> float:
        """Return the seconds for which the handler is not to be called with this event; 0 if it may be.

        The event that may pass an open circuit is the probe. Others may not until it has ended.
        """
        with self._lock:
            handler = self._handlers.get(name)
            if handler is None or not handler.rest.pause:
                return 0.0
            if turn == "new" and not handler.new.pause:
                return 0.0
            return handler.let_pass(event_id, turn, by_hand=by_hand, now=self._clock())

    def succeeded(self, name: str) -> bool:
        """Close the handler's circuits; return whether one was open."""
        with self._lock:
            handler = self._handlers.pop(name, None)
            self.any = bool(self._handlers)
            return handler is not None and handler.rest.pause > 0

    def failed(self, name: str, event_id: int, turn: Turn) -> float:
        """Count a failure; return the seconds for which events wait, if this opens their circuit or
        keeps it open; or 0."""
        if self._threshold is None or turn == "retry":
            return 0.0
        with self._lock:
            handler = self._handlers.setdefault(name, _Handler())
            self.any = True
            now = self._clock()
            probed = handler.probes.pop(event_id, None)
            if probed is not None:
                pause = probed.lengthen(now)
                return pause if probed is handler.rest else 0.0
            if turn == "new":
                handler.new.count(event_id, self._threshold, now)
            pause = handler.rest.count(event_id, self._threshold, now)
            if pause:
                handler.retries.until = handler.rest.until
            return pause
